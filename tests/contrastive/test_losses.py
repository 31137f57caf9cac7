"""Losses against loops written from their papers' formulas, against scikit-learn's t-SNE, and in known limits."""

import math
from functools import partial

import loops
import pytest
import torch
import torch.nn.functional as F
from cases import for_each
from loops import close, points, similarity, views
from sklearn.manifold._t_sne import _joint_probabilities, _kl_divergence

from hf_dpssl.contrastive.kernels import log_similarities
from hf_dpssl.contrastive.losses import alignment, clip, info_nce, moco, sne, sup_con, t_simclr, t_sne, uniformity

SIZES = [(2, 1), (3, 4), (6, 2)]
PAIR_LOSSES = {
    "info_nce": lambda a, b, **kw: info_nce(a, b, temperature=0.5, **kw),
    "joint": lambda a, b, **kw: t_simclr(a, b, temperature=2.0, dof=3.0, **kw),
    "anchor": lambda a, b, **kw: t_simclr(a, b, temperature=2.0, dof=3.0, normalization="anchor", **kw),
}
MOCO = {
    "cosine": lambda q, k, queue: moco(q, k, queue, kernel="cosine", temperature=0.2),
    "student_t": lambda q, k, queue: moco(q, k, queue, kernel="student_t", temperature=5.0, dof=10.0),
}
# Kernels of clip and sup_con, and the loop's.
KERNELS = {
    "cosine": (similarity("cosine", 0.7), {"kernel": "cosine"}),
    "student_t": (similarity("student_t", 0.7, 3.0), {"kernel": "student_t", "dof": 3.0}),
    "gaussian": (similarity("gaussian", 2 * 0.7), {"kernel": "student_t", "dof": math.inf}),
}


def pair_weights(pairs: int) -> torch.Tensor:
    return torch.arange(1, pairs + 1, dtype=torch.float64)


# Values.


def test_info_nce_equals_the_loop():
    for pairs, columns in SIZES:
        a, b = views(pairs, columns)
        for weights in (None, pair_weights(pairs)):
            for temperature in (0.1, 0.5, 2.0):
                expected = loops.info_nce_per_anchor(a, b, similarity("cosine", temperature), weights)
                assert close(info_nce(a, b, temperature=temperature, weights=weights), expected)


@pytest.mark.parametrize(
    ("normalization", "oracle"), [("joint", loops.info_nce_joint), ("anchor", loops.info_nce_per_anchor)]
)
def test_t_simclr_equals_the_loop_and_tends_to_the_gaussian_kernel(normalization, oracle):
    for pairs, columns in SIZES:
        a, b = views(pairs, columns)
        for weights in (None, pair_weights(pairs)):
            for temperature, dof in [(0.5, 1.0), (1.0, 0.5), (8.0, 5.0), (2.0, 100.0)]:
                options = {"temperature": temperature, "dof": dof, "normalization": normalization}
                expected = oracle(a, b, similarity("student_t", temperature, dof), weights)
                assert close(t_simclr(a, b, **options, weights=weights), expected)
    limit = oracle(a, b, similarity("gaussian", 2 * 1.3))
    options = {"temperature": 1.3, "normalization": normalization}
    errors = [abs(float(t_simclr(a, b, dof=dof, **options)) - limit) for dof in (1e2, 1e4, 1e6)]
    assert abs(float(t_simclr(a, b, dof=math.inf, **options)) - limit) < 1e-12
    assert errors[2] < 1e-5
    assert errors[0] > 50 * errors[1] > 2500 * errors[2], "the error should fall like 1/dof"


def test_moco_equals_the_loop():
    for pairs, columns in [(1, 1), *SIZES]:
        query, key = views(pairs, columns)
        for queue_size in (1, 5):
            queue = points(queue_size, columns, seed=1)
            for temperature in (0.2, 5.0):
                expected = loops.moco(query, key, queue, similarity("cosine", temperature))
                assert close(moco(query, key, queue, kernel="cosine", temperature=temperature), expected)
                expected = loops.moco(query, key, queue, similarity("student_t", temperature, 10.0))
                found = moco(query, key, queue, kernel="student_t", temperature=temperature, dof=10.0)
                assert close(found, expected)


def test_moco_with_cosine_equals_cross_entropy_of_the_positive():
    query, key = views(4, 8)
    queue = F.normalize(points(9, 8, seed=1), dim=1)
    q, k = F.normalize(query, dim=1), F.normalize(key, dim=1)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], dim=1) / 0.2
    torch.testing.assert_close(moco(query, key, queue), F.cross_entropy(logits, torch.zeros(4, dtype=torch.int64)))


@for_each("name", KERNELS)
def test_clip_and_sup_con_equal_the_loops_and_sup_con_skips_lonely_anchors(name):
    kernel, options = KERNELS[name]
    image, text = views(6)
    assert close(clip(image, text, temperature=0.7, **options), loops.clip(image, text, kernel))
    x, labels = points(8), torch.tensor([0, 1, 0, 2, 1, 1, 0, 3])
    assert close(sup_con(x, labels, temperature=0.7, **options), loops.sup_con(x, labels, kernel))


def test_sup_con_of_one_positive_each_is_the_contrastive_loss():
    a, b = views(5)
    z, labels = torch.cat([a, b]), torch.arange(5).repeat(2)
    torch.testing.assert_close(sup_con(z, labels, temperature=0.5), info_nce(a, b, temperature=0.5))
    expected = t_simclr(a, b, temperature=0.5, dof=2.0, normalization="anchor")
    torch.testing.assert_close(sup_con(z, labels, temperature=0.5, kernel="student_t", dof=2.0), expected)


@for_each("dof", [1.0, 3.0, 7.0])
def test_joint_t_simclr_is_t_sne_with_pairs_as_neighbours(dof):
    pairs = 5
    a, b = views(pairs, 2)
    z = torch.cat([a, b]).requires_grad_()
    # P of SimCLR as SNE: 1/(2N) for each ordered positive pair; condensed, as scipy's pdist orders pairs.
    rows, columns = torch.triu_indices(2 * pairs, 2 * pairs, offset=1)
    neighbours = ((columns - rows) == pairs).double().numpy() / (2 * pairs)
    kl, gradient = _kl_divergence(z.detach().numpy().ravel(), neighbours, dof, 2 * pairs, 2)
    loss = t_simclr(*z.chunk(2), temperature=1.0, dof=dof)
    loss.backward()
    assert close(loss.detach() - math.log(2 * pairs), kl, 1e-9)  # cross-entropy minus the entropy of P
    if dof == 1:  # the only one for which scikit-learn's gradient is that of its objective
        torch.testing.assert_close(z.grad.flatten(), torch.from_numpy(gradient), rtol=1e-7, atol=1e-9)


def test_sne_equals_the_loop():
    y, p = points(6, 2), torch.rand(6, 6, dtype=torch.float64).fill_diagonal_(0)
    p[0, 1] = 0
    p = p / p.sum(1, keepdim=True)
    kernel = loops.matrix(y, y, similarity("gaussian", 1.5)).fill_diagonal_(0)
    q = kernel / kernel.sum(1, keepdim=True)
    expected = sum(loops.divergence(a, b, "kl", 0.5) for a, b in zip(p.tolist(), q.tolist(), strict=True)) / 6
    assert close(sne(p, y, temperature=1.5), expected)


@for_each("dof", [1.0, 2.0, 7.0])
def test_t_sne_equals_scikit_learns_objective_and_gradient(dof):
    x, y = points(20, 6), points(20, 2, seed=3).requires_grad_()
    condensed = _joint_probabilities(torch.cdist(x, x).pow(2).numpy().astype("float32"), 5.0, 0)
    rows, columns = torch.triu_indices(20, 20, offset=1)
    p = torch.zeros(20, 20, dtype=torch.float64)
    p[rows, columns] = torch.from_numpy(condensed).double()
    p = p + p.T
    kl, gradient = _kl_divergence(y.detach().numpy().ravel(), condensed, dof, 20, 2)
    loss = t_sne(p, y, dof=dof)
    loss.backward()
    assert close(loss.detach(), kl, 1e-6)
    if dof == 1:  # the only one for which scikit-learn's gradient is that of its objective
        torch.testing.assert_close(y.grad.flatten(), torch.from_numpy(gradient), rtol=1e-5, atol=1e-9)


def test_neighbour_embedding_of_its_own_similarities_is_zero():
    y = points(9, 2)
    kernel = torch.exp(-torch.cdist(y, y).pow(2)).fill_diagonal_(0)
    assert close(sne(kernel / kernel.sum(1, keepdim=True), y), 0.0, 1e-12)
    kernel = (1 / (1 + torch.cdist(y, y).pow(2))).fill_diagonal_(0)
    assert close(t_sne(kernel / kernel.sum(), y), 0.0, 1e-12)


def test_alignment_and_uniformity_equal_the_loops_and_their_bounds():
    a, b = views(7)
    unit_a, unit_b = ([[v / math.hypot(*row) for v in row] for row in part.tolist()] for part in (a, b))
    for alpha in (1.0, 2.0):
        expected = sum(math.dist(p, q) ** alpha for p, q in zip(unit_a, unit_b, strict=True)) / 7
        assert close(alignment(a, b, alpha=alpha), expected)
        assert close(alignment(a, -a, alpha=alpha), 2**alpha) and close(alignment(a, 3 * a), 0.0)
    values = [math.exp(-2 * math.dist(unit_a[i], unit_a[j]) ** 2) for i in range(7) for j in range(i)]
    assert close(uniformity(a), math.log(sum(values) / len(values)))
    assert close(uniformity(a[:1].expand(7, 3)), 0.0, 1e-9)
    assert close(uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64), t=3.0), -12.0)


def test_value_at_collapse_is_the_log_of_the_number_of_candidates():
    for pairs in (2, 5, 64):
        for value in (0.0, 1.0, -3.0):
            z = torch.full((pairs, 4), value, dtype=torch.float64)
            assert close(PAIR_LOSSES["info_nce"](z, z), math.log(2 * pairs - 1))
            assert close(PAIR_LOSSES["anchor"](z, z), math.log(2 * pairs - 1))
            assert close(PAIR_LOSSES["joint"](z, z), math.log(2 * pairs * (2 * pairs - 1)))
            assert close(clip(z, z, temperature=0.7), math.log(pairs))
            for loss in MOCO.values():
                assert close(loss(z, z, z[:2]), math.log(3))


# Invariances and gradients.


@for_each("name", PAIR_LOSSES)
def test_only_the_pairing_and_the_ratio_of_weights_matter(name):
    loss = PAIR_LOSSES[name]
    a, b = views(7)
    weights, order = pair_weights(7), torch.randperm(7, generator=torch.Generator().manual_seed(0))
    value = loss(a, b, weights=weights)
    torch.testing.assert_close(loss(a[order], b[order], weights=weights[order]), value)
    torch.testing.assert_close(loss(b, a, weights=weights), value)
    torch.testing.assert_close(loss(a, b, weights=100 * weights), value)
    torch.testing.assert_close(loss(a, b, weights=torch.full((7,), 7)), loss(a, b))
    for other in (loss(a, b[order], weights=weights), loss(a, b, weights=weights[order]), loss(a, b)):
        assert not torch.isclose(other, value), "broken pairs and other weights should show"


def test_queue_may_come_in_any_order_and_be_overwritten_before_the_backward_pass():
    for loss in MOCO.values():
        (query, key), queue = views(3, 4), points(6, 4, seed=1)
        value = loss(query.requires_grad_(), key, queue)
        (expected,) = torch.autograd.grad(value, query)
        torch.testing.assert_close(loss(query, key, queue.flip(0)), value)
        again = loss(query, key, queue)
        queue.fill_(7.0)
        assert torch.equal(torch.autograd.grad(again, query)[0], expected)


def test_gradients_equal_finite_differences():
    a, b = (z.requires_grad_() for z in views(4))
    for loss in PAIR_LOSSES.values():
        assert torch.autograd.gradcheck(lambda x, y, loss=loss: loss(x, y, weights=pair_weights(4)), (a, b))
    queue = points(5, seed=1)
    for loss in MOCO.values():
        assert torch.autograd.gradcheck(lambda q, k, loss=loss: loss(q, k, queue), (a, b))
    p = torch.rand(4, 4, dtype=torch.float64).fill_diagonal_(0)
    assert torch.autograd.gradcheck(lambda z: sne(p / p.sum(1, keepdim=True), z), (a,))
    assert torch.autograd.gradcheck(lambda z: t_sne(p / p.sum(), z), (a,))


# Precision.


def test_half_precision_embeddings_lose_nothing_but_their_own_rounding():
    for dtype in (torch.bfloat16, torch.float16):
        for scale in (1.0, 30.0):
            a, b = (z.to(dtype) for z in views(32, 64, scale=scale))
            queue = points(20, 64, seed=1, scale=scale).to(dtype)
            calls = [(loss, (a, b)) for loss in PAIR_LOSSES.values()]
            calls += [(loss, (a, b, queue)) for loss in MOCO.values()]
            for loss, embeddings in calls:
                value = loss(*embeddings)
                assert value.dtype == torch.float32
                exact = loss(*(z.double() for z in embeddings))
                torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)


def test_gradient_of_half_precision_embeddings_is_rounded_once():
    a, b = (z.bfloat16().requires_grad_() for z in views(64, 8))
    losses = [*PAIR_LOSSES.values(), lambda a, b: moco(a, b, b.detach(), temperature=0.2)]
    for loss in [
        *losses,
        lambda a, b: clip(a, b, temperature=0.5),
        lambda a, b: sup_con(a, b.argmax(1), temperature=0.5),
    ]:
        (found,) = torch.autograd.grad(loss(a, b), a)
        exact_a, exact_b = (z.detach().double().requires_grad_() for z in (a, b))
        (exact,) = torch.autograd.grad(loss(exact_a, exact_b), exact_a)
        # Half a unit in the last of 8 bits; pull and push that were rounded apart would leave several.
        torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-6)


def test_autocast_does_not_lower_the_precision_of_a_loss():
    a, b = (z.float() for z in views(8, 16))
    for loss in PAIR_LOSSES.values():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(a, b)
        assert torch.equal(value, loss(a, b))


def test_extreme_points_give_finite_loss_and_gradient():
    for z in (torch.ones(4, 3), torch.zeros(4, 3), loops.far_points(4)):
        for loss in [
            *PAIR_LOSSES.values(),
            *(lambda a, b, loss=loss: loss(a, b, b.detach()) for loss in MOCO.values()),
        ]:
            a, b = z.clone().requires_grad_(), z.flip(0).requires_grad_()
            value = loss(a, b)
            value.backward()
            assert value.isfinite() and a.grad.isfinite().all() and b.grad.isfinite().all()


def test_moco_keeps_the_relative_precision_of_a_small_loss():
    """With a near key and far negatives the loss is 1e-12 and less beside log-similarities of 20."""
    query = 1 + 0.1 * points(6, 8)
    key = query + 0.01 * points(6, 8, seed=1)
    queue = -query
    for kernel, temperature in (("cosine", 0.05), ("student_t", 0.1)):
        options = {"kernel": kernel, "temperature": temperature, "dof": 20.0}
        log_positive = log_similarities(query, key, **options).diagonal()
        expected = (log_similarities(query, queue, **options) - log_positive[:, None]).exp().sum(1).log1p().mean()
        assert 0 < expected < 1e-6
        found = moco(query.float(), key.float(), queue.float(), **options)
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=0)


def test_one_pair_has_a_constant_loss_without_gradient_in_every_loss_of_pairs():
    a, b = views(1, 5)
    joint = partial(t_simclr, temperature=1.0, dof=5.0)
    for loss, expected in [
        (partial(info_nce, temperature=0.1), 0.0),
        (partial(clip, temperature=0.1, kernel="student_t"), 0.0),
        (partial(joint, normalization="anchor"), 0.0),
        (joint, math.log(2)),  # 2N (2N - 1) pairs
    ]:
        leaf = a.clone().requires_grad_()
        with pytest.warns(UserWarning, match="one pair has no negatives"):
            value = loss(leaf, b)
        assert value.item() == pytest.approx(expected, abs=1e-12)
        assert torch.autograd.grad(value, leaf)[0].abs().max() < 1e-12


# What is refused.


def refused(message: str, function, *arguments, **options) -> None:
    with pytest.raises(ValueError, match=message):
        function(*arguments, **options)


def test_views_weights_and_embeddings_that_do_not_fit_are_refused():
    a, b = views(4)
    for loss in PAIR_LOSSES.values():
        for first, second in [(a, b[:3]), (a, b[:, :2]), (a[0], b[0]), (a[None], b[None])]:
            refused(r"\(N, D\)", loss, first, second)
        refused("at least one pair, got none", loss, a[:0], b[:0])
        refused(r"weights must have shape \(4,\)", loss, a, b, weights=torch.ones(3))
        for weights in ([1, 1, 1, -1], [0, 0, 0, 0], [1, 1, 1, math.nan]):
            refused("non-negative with a positive sum", loss, a, b, weights=torch.tensor(weights))
    for value in (math.nan, math.inf):
        bad = a.clone()
        bad[1, 2] = value
        for loss in PAIR_LOSSES.values():
            refused("finite", loss, bad, b)
        for loss in MOCO.values():
            refused("finite", loss, bad, b, b)


def test_options_out_of_range_are_refused_with_the_allowed_ones():
    a, b = views(4)
    for value in (0, -1, math.inf, math.nan):
        refused("temperature", info_nce, a, b, temperature=value)
        refused("temperature", moco, a, b, a, kernel="cosine", temperature=value)
        for name in ("temperature", "dof") if value != math.inf else ("temperature",):  # infinite dof are Gaussian
            options = {"temperature": 1.0, "dof": 1.0} | {name: value}
            refused(name, t_simclr, a, b, **options)
            refused(name, moco, a, b, a, kernel="student_t", **options)
    refused("'joint', 'anchor'.*'row'", t_simclr, a, b, temperature=1.0, dof=1.0, normalization="row")
    refused("'cosine', 'student_t'.*'gaussian'", moco, a, b, a, kernel="gaussian")
    refused("'cosine', 'student_t'.*'gaussian'", clip, a, b, temperature=1.0, kernel="gaussian")
    refused("alpha", alignment, a, b, alpha=0)
    refused("t must be", uniformity, a, t=-1.0)


def test_queues_labels_and_similarities_that_do_not_fit_are_refused():
    a, b = views(4)
    refused("must not ask for a gradient", moco, a, b, a.clone().requires_grad_())
    refused("at least one negative", moco, a, b, a[:0])
    for query, key, queue in [(a, b[:3], a), (a, b, a[:, :2]), (a[0], b[0], a), (a, b, a[0])]:
        refused(r"query and key must be \(B, D\)", moco, query, key, queue)
    refused("no class twice", sup_con, a, torch.arange(4), temperature=1.0)
    refused(r"labels \(N,\)", sup_con, a, torch.arange(3), temperature=1.0)
    refused("sum to 1 in every row", sne, torch.ones(4, 4).fill_diagonal_(0), a)
    refused("sum to 1 over all pairs", t_sne, torch.ones(4, 4).fill_diagonal_(0), a)
    refused("diagonal of 0", t_sne, torch.full((4, 4), 1 / 16), a)
    refused("N >= 2", uniformity, a[:1])
