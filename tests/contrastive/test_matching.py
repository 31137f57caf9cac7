"""Q and divergences against loops, limits and invariances; every named loss is a cell of P x Q x divergence, and all
cells train."""

import itertools
import math

import loops
import pytest
import torch
from cases import for_each
from loops import points

from hf_dpssl import matching
from hf_dpssl.contrastive.losses import clip, info_nce, moco, sne, sup_con, t_simclr, t_sne
from hf_dpssl.contrastive.matching import DIVERGENCES, KERNELS, NORMALIZATIONS, cross_entropy, match, q_similarities

ALPHAS = (-0.7, 0.3, 0.5, 1.6, 3.0)
CASES = [(name, 0.5) for name in DIVERGENCES if name != "alpha"] + [("alpha", alpha) for alpha in ALPHAS]
Q_OPTIONS = {"temperature": 0.7, "dof": 3.0}


def dense_p(rows: int, normalization: str) -> torch.Tensor:
    return matching.normalize_similarities(points(rows, rows, seed=5).exp(), normalization=normalization)


def log_q_of(z: torch.Tensor, normalization: str, kernel: str = "student_t") -> torch.Tensor:
    return q_similarities(z, kernel=kernel, normalization=normalization, **Q_OPTIONS)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_divergence_equals_its_definition(normalization):
    log_q = log_q_of(points(5), normalization)
    for zeros in (False, True):
        p = dense_p(5, normalization)
        if zeros:
            p = matching.normalize_similarities(p.where(p > p.median(), 0), normalization=normalization)
        for name, alpha in CASES:
            if zeros and (name == "reverse_kl" or alpha < 0):
                continue  # infinite
            if normalization == "joint":
                expected = loops.divergence(p.flatten().tolist(), log_q.exp().flatten().tolist(), name, alpha)
            else:
                rows = zip(p.tolist(), log_q.exp().tolist(), strict=True)
                expected = sum(loops.divergence(a, b, name, alpha) for a, b in rows) / 5
            assert loops.close(match(p, log_q, name, alpha=alpha), expected, 1e-11), (name, alpha, zeros)


@for_each("kernel", KERNELS)
def test_q_equals_the_loop_and_leaves_out_self_and_masked_pairs(kernel):
    z, mask = points(5), torch.ones(5, 5, dtype=torch.bool)
    mask[0, 3] = False
    mask[4, 1] = False
    similarity = loops.similarity(kernel, 0.7, 3.0)
    k = torch.zeros(5, 5, dtype=torch.float64)
    for i, j in itertools.permutations(range(5), 2):
        if mask[i, j]:
            k[i, j] = similarity(z[i].tolist(), z[j].tolist())
    for normalization in NORMALIZATIONS:
        q = k / (k.sum(1, keepdim=True) if normalization == "anchor" else k.sum())
        log_q = q_similarities(z, kernel=kernel, normalization=normalization, mask=mask, **Q_OPTIONS)
        torch.testing.assert_close(log_q.exp(), q, rtol=1e-12, atol=1e-15)
        assert ((log_q == -math.inf) == (q == 0)).all()


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_divergence_is_zero_at_p_and_positive_elsewhere(normalization):
    log_q = log_q_of(points(6), normalization)
    for name, alpha in CASES:
        assert abs(match(log_q.exp(), log_q, name, alpha=alpha)) < 1e-14
        for seed in range(1, 6):
            assert match(log_q_of(points(6, seed=seed), normalization).exp(), log_q, name, alpha=alpha) > 1e-3


def test_alpha_divergence_tends_to_its_limits():
    p, log_q = dense_p(6, "joint"), log_q_of(points(6), "joint")
    for limit, name in [(1, "kl"), (0, "reverse_kl")]:
        expected = match(p, log_q, name)
        assert match(p, log_q, "alpha", alpha=limit) == expected
        for step in (1e-3, -1e-3, 1e-6, -1e-6, 1e-12, -1e-12):
            value = match(p, log_q, "alpha", alpha=limit + step)
            assert abs(value - expected) < 2 * abs(step) * expected + 1e-14
    torch.testing.assert_close(2 * match(p, log_q, "alpha", alpha=2.0), match(p, log_q, "chi_square"))
    hellinger = (p.sqrt() - log_q.exp().sqrt()).square().sum()
    torch.testing.assert_close(match(p, log_q, "alpha", alpha=0.5), 2 * hellinger)


def test_alpha_divergence_of_order_1_minus_alpha_exchanges_p_and_q():
    log_p, log_q = log_q_of(points(6, seed=1), "anchor"), log_q_of(points(6), "anchor")
    for alpha in (-1.0, 0.2, 0.5, 3.0):
        exchanged = match(log_q.exp(), log_p, "alpha", alpha=1 - alpha)
        torch.testing.assert_close(match(log_p.exp(), log_q, "alpha", alpha=alpha), exchanged)


def test_jensen_shannon_is_symmetric_and_at_most_log_2():
    log_p, log_q = log_q_of(points(6, seed=1), "joint"), log_q_of(points(6), "joint")
    torch.testing.assert_close(match(log_p.exp(), log_q, "jensen_shannon"), match(log_q.exp(), log_p, "jensen_shannon"))
    z = torch.tensor([[0.0], [100.0], [1e4], [1e4 + 1]], dtype=torch.float64)
    log_q = q_similarities(z, kernel="gaussian", normalization="joint", temperature=1.0)
    p = torch.zeros(4, 4, dtype=torch.float64)
    p[0, 3] = 1.0  # Q has all its mass on the pair (2, 3)
    assert math.isclose(match(p, log_q, "jensen_shannon"), math.log(2), rel_tol=1e-12)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_gradient_of_match_equals_finite_differences(normalization):
    def dense(z, matrix, name):
        p = matrix.exp().masked_fill(torch.eye(4, dtype=torch.bool), 0)
        p = p / (p.sum() if normalization == "joint" else p.sum(1, keepdim=True))
        return match(p, log_q_of(z, normalization), name, alpha=1.7)

    def sparse(z, name):
        smoothing = 0.1 if name == "reverse_kl" else 0.0
        return match(one_hot, log_q_of(z, normalization), name, alpha=1.7, smoothing=smoothing)

    z, matrix = points(4).requires_grad_(), points(4, 4, seed=5).requires_grad_()
    one_hot = matching.pair_similarities(2, normalization=normalization)
    for name in DIVERGENCES:
        assert torch.autograd.gradcheck(lambda z, matrix, name=name: dense(z, matrix, name), (z, matrix)), name
        assert torch.autograd.gradcheck(lambda z, name=name: sparse(z, name), (z,)), name


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_match_does_not_depend_on_the_order_of_points(normalization):
    p, z, order = dense_p(7, normalization), points(7), torch.randperm(7, generator=torch.Generator().manual_seed(3))
    for kernel in KERNELS:
        log_q, permuted = log_q_of(z, normalization, kernel), log_q_of(z[order], normalization, kernel)
        torch.testing.assert_close(permuted, log_q[order][:, order])
        for name, alpha in CASES:
            value = match(p, log_q, name, alpha=alpha)
            torch.testing.assert_close(match(p[order][:, order], permuted, name, alpha=alpha), value)
            assert not torch.isclose(match(p, permuted, name, alpha=alpha), value), "a broken pairing should show"


def test_rows_of_p_weigh_anchors_and_empty_rows_drop_out():
    p, log_q = dense_p(4, "anchor"), log_q_of(points(4), "anchor")
    weights = torch.tensor([2.0, 0.0, 1.0, 5.0], dtype=torch.float64)
    for name, alpha in CASES:
        rows = torch.stack([match(p[i : i + 1], log_q[i : i + 1], name, alpha=alpha) for i in range(4)])
        value = match(weights[:, None] * p, log_q, name, alpha=alpha)
        torch.testing.assert_close(value, (weights * rows).sum() / 8)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_infinite_divergence_is_refused_until_p_is_smoothed(normalization):
    p, log_q = matching.pair_similarities(3, normalization=normalization), log_q_of(points(6), normalization)
    for name, alpha in [("reverse_kl", 1.0), ("alpha", 0.0), ("alpha", -1.0)]:
        with pytest.raises(ValueError, match=f"{name}.* is infinite where P is 0.*smoothing"):
            match(p, log_q, name, alpha=alpha)
        assert match(p, log_q, name, alpha=alpha, smoothing=0.1).isfinite()
    neighbours = 5 if normalization == "anchor" else 30
    uniform = (~torch.eye(6, dtype=torch.bool)) / neighbours
    expected = match(0.9 * p + 0.1 * uniform, log_q, "reverse_kl")
    torch.testing.assert_close(match(p, log_q, "reverse_kl", smoothing=0.1), expected)


def test_wrong_input_is_refused_with_the_reason():
    z, p = points(6), matching.pair_similarities(3, normalization="anchor")
    log_q, options = log_q_of(z, "anchor"), {"kernel": "cosine", "normalization": "anchor", "temperature": 1.0}
    for call, message in [
        (lambda: match(p, log_q, "l2"), "'kl', 'reverse_kl'.*'l2'"),
        (lambda: match(p, log_q, "alpha", alpha=math.inf), "alpha must be finite"),
        (lambda: match(p, log_q, smoothing=1.0), r"smoothing must lie in \[0, 1\)"),
        (lambda: match(p[:5], log_q), r"equal shape, got \(5, 6\), \(6, 6\)"),
        (lambda: match(-p, log_q), "non-negative"),
        (lambda: match(0 * p, log_q), "positive sum"),
        (lambda: match(p, log_q_of(z, "joint")), "normalised jointly, so P must sum to 1, got 6"),
        (lambda: match(torch.ones(6, 6) / 6, log_q), "mass where log Q is -inf"),
        (lambda: match(p, log_q + 1), "not normalised"),
        (lambda: match(p, log_q_of(z * math.nan, "anchor")), "not finite"),
        (lambda: q_similarities(z, **options | {"kernel": "l1"}), "'cosine', 'gaussian', 'student_t'.*'l1'"),
        (lambda: q_similarities(z, **options | {"normalization": "row"}), "'joint', 'anchor'.*'row'"),
        (lambda: q_similarities(z, z[:, :2], **options), r"got \(6, 3\), \(6, 2\)"),
        (lambda: q_similarities(z, mask=torch.ones(6, 6), **options), "mask must be bool"),
        (lambda: q_similarities(z, mask=torch.eye(6) > 0, **options), "row 0 of Q has no pair left"),
        (lambda: q_similarities(z[:1], **options), "row 0 of Q has no pair left"),
        (lambda: q_similarities(z, **options | {"temperature": 0}), "temperature"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_extreme_points_give_finite_divergence_and_gradient(normalization):
    p = matching.pair_similarities(3, normalization=normalization)
    clouds = (torch.ones(6, 3), torch.zeros(6, 3), loops.far_points())
    for z, kernel, name in itertools.product(clouds, KERNELS, DIVERGENCES):
        leaf = z.clone().requires_grad_()
        log_q = q_similarities(leaf, kernel=kernel, normalization=normalization, temperature=0.5, dof=1e3)
        value = match(p, log_q, name, smoothing=0.1)
        if name == "chi_square" and bool((log_q > -math.inf).any() and log_q[p > 0].min() < -88):
            assert value == math.inf  # 1/q is beyond float32, as documented
            continue
        value.backward()
        assert value.isfinite() and leaf.grad.isfinite().all(), (kernel, name)


def test_half_precision_embeddings_are_matched_in_float32():
    p = matching.pair_similarities(4, normalization="joint")
    for dtype, kernel in itertools.product((torch.bfloat16, torch.float16), KERNELS):
        z = points(8, 16).to(dtype)
        options = {"kernel": kernel, "normalization": "joint"} | Q_OPTIONS
        value, exact = match(p, q_similarities(z, **options)), match(p, q_similarities(z.double(), **options))
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)


# Named losses are cells of P x Q x divergence.


def equal(cell, loss, *embeddings: torch.Tensor) -> None:
    """The cell and the named loss agree in value and gradient to 1e-9."""
    results = []
    for function in (cell, loss):
        leaves = [z.clone().requires_grad_() for z in embeddings]
        value = function(*leaves)
        results.append((value.detach(), *torch.autograd.grad(value, leaves)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def pair_cell(kernel: str, normalization: str, weights=None, function=match, **options):
    def cell(a, b):
        p = matching.pair_similarities(len(a), normalization=normalization, weights=weights)
        z = torch.cat([a, b])
        return function(p, q_similarities(z, kernel=kernel, normalization=normalization, **options))

    return cell


def test_pair_losses_are_their_cells():
    a, b = points(5), points(5, seed=1)
    student = {"temperature": 2.0, "dof": 3.0}
    for weights in (None, torch.tensor([1.0, 0.0, 2.0, 7.0, 0.5])):
        cell = pair_cell("cosine", "anchor", weights, temperature=0.3)
        equal(cell, lambda a, b, weights=weights: info_nce(a, b, temperature=0.3, weights=weights), a, b)
        for normalization, function in [("anchor", match), ("joint", cross_entropy)]:
            cell = pair_cell("student_t", normalization, weights, function, **student)
            loss = {"normalization": normalization, "weights": weights} | student
            equal(cell, lambda a, b, loss=loss: t_simclr(a, b, **loss), a, b)


def test_info_nce_weighed_by_overlap_of_crops_is_the_cell_of_iou_similarities():
    corners = torch.rand(2, 5, 2, generator=torch.Generator().manual_seed(0))
    boxes_1, boxes_2 = torch.cat([corners / 2, corners / 2 + 0.4], dim=2)
    weights = matching.iou_weights(boxes_1, boxes_2, temperature=0.5)

    def cell(a, b):
        p = matching.iou_similarities(boxes_1, boxes_2, temperature=0.5, normalization="anchor")
        return match(p, q_similarities(torch.cat([a, b]), kernel="cosine", normalization="anchor", temperature=0.3))

    equal(cell, lambda a, b: info_nce(a, b, temperature=0.3, weights=weights), points(5), points(5, seed=1))


@pytest.mark.parametrize("kernel", ["cosine", "student_t"])
def test_moco_clip_and_sup_con_are_their_cells(kernel):
    options, queue = {"kernel": kernel, "temperature": 0.7, "dof": 3.0}, points(6, seed=2)

    def moco_cell(query, key):
        mask = torch.cat([torch.eye(3), torch.ones(3, 6)], dim=1).bool()  # no other query's key
        log_q = q_similarities(query, torch.cat([key, queue]), normalization="anchor", mask=mask, **options)
        return match(torch.eye(3, 9), log_q)

    def clip_cell(image, text):
        forth = match(torch.eye(5), q_similarities(image, text, normalization="anchor", **options))
        back = match(torch.eye(5), q_similarities(text, image, normalization="anchor", **options))
        return (forth + back) / 2

    equal(moco_cell, lambda query, key: moco(query, key, queue, **options), points(3), points(3, seed=1))
    equal(clip_cell, lambda image, text: clip(image, text, **options), points(5), points(5, seed=1))
    for labels in ([0, 1, 0, 2, 1, 0], [3, 3, 3, 3, 3, 3], [0, 0, 1, 2, 3, 4]):
        p = matching.label_similarities(torch.tensor(labels), normalization="anchor")

        def sup_con_cell(z, p=p):
            return cross_entropy(p, q_similarities(z, normalization="anchor", **options))

        equal(sup_con_cell, lambda z, labels=labels: sup_con(z, torch.tensor(labels), **options), points(6))


def test_sne_and_t_sne_are_their_cells():
    p = matching.gaussian_similarities(points(9), 4.0, normalization="anchor")
    for temperature in (1.0, 0.3):
        options = {"kernel": "gaussian", "normalization": "anchor", "temperature": temperature}
        equal(
            lambda z, options=options: match(p, q_similarities(z, **options)),
            lambda z, temperature=temperature: sne(p, z, temperature=temperature),
            points(9, 2, seed=1),
        )
    joint = matching.gaussian_similarities(points(9), 4.0, normalization="joint")
    for dof in (1.0, 3.0, math.inf):
        options = {"kernel": "student_t", "normalization": "joint", "temperature": 1.0, "dof": dof}
        equal(
            lambda z, options=options: match(joint, q_similarities(z, **options)),
            lambda z, dof=dof: t_sne(joint, z, dof=dof),
            points(9, 2, seed=1),
        )


# All cells train.

RING = torch.stack([torch.arange(5).mul(2 * math.pi / 5).cos(), torch.arange(5).mul(2 * math.pi / 5).sin()], dim=1)
SIZE = 60


def mixture(size: int, std: float = 0.1) -> torch.Tensor:
    return RING[torch.arange(size) % 5] + std * torch.randn(size, 2, generator=torch.Generator().manual_seed(0))


def boxes(size: int, seed: int) -> torch.Tensor:
    corner = torch.rand(size, 2, generator=torch.Generator().manual_seed(seed)) / 2
    return torch.cat([corner, corner + 0.4], dim=1)


X = mixture(SIZE)
BUILDERS = {
    "gaussian": lambda n: matching.gaussian_similarities(X, 10.0, normalization=n),
    "pairs": lambda n: matching.pair_similarities(SIZE // 2, normalization=n),
    "iou": lambda n: matching.iou_similarities(
        boxes(SIZE // 2, 0), boxes(SIZE // 2, 1), temperature=0.5, normalization=n
    ),
    "mixup": lambda n: matching.mixup_similarities(X, ratio=0.3, components=RING, component_std=0.1, normalization=n),
    "noise": lambda n: matching.noise_similarities(X, noise_std=0.1, data=X, normalization=n),
    "labels": lambda n: matching.label_similarities(torch.arange(SIZE) % 5, normalization=n),
    "matrix": lambda n: matching.normalize_similarities(1 / (1 + torch.cdist(X, X)), normalization=n),
}


@pytest.mark.extended
@for_each("name", BUILDERS)
def test_every_cell_of_this_p_trains_on_the_mixture(name):
    for normalization, kernel, divergence in itertools.product(NORMALIZATIONS, KERNELS, DIVERGENCES):
        p = BUILDERS[name](normalization)
        smoothing = 0.05 if divergence == "reverse_kl" else 0.0
        z = torch.nn.Parameter(0.3 * torch.randn(SIZE, 2, generator=torch.Generator().manual_seed(1)))
        optimizer = torch.optim.Adam([z], lr=0.02)
        values = []
        for _ in range(6):
            log_q = q_similarities(z, kernel=kernel, normalization=normalization, temperature=0.5, dof=3.0)
            loss = match(p, log_q, divergence, smoothing=smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(loss.item())
        cell = f"{name}, {kernel}, {normalization}, {divergence}: {values}"
        assert all(math.isfinite(v) and v >= -1e-6 for v in values) and z.isfinite().all(), cell
        assert values[-1] < values[0], cell
