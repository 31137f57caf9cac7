"""Q and divergences: values against loops, limits, invariances, gradients, and what is refused."""

import itertools
import math

import pytest
import torch

from hf_dpssl import matching
from hf_dpssl.contrastive.matching import DIVERGENCES, KERNELS, NORMALIZATIONS, match, q_similarities

ALPHAS = (-0.7, 0.3, 0.5, 1.6, 3.0)
CASES = [(name, 0.5) for name in DIVERGENCES if name != "alpha"] + [("alpha", alpha) for alpha in ALPHAS]
Q_OPTIONS = {"temperature": 0.7, "dof": 3.0}


def points(rows: int, columns: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense_p(rows: int, normalization: str) -> torch.Tensor:
    return matching.normalize_similarities(points(rows, rows, seed=5).exp(), normalization=normalization)


def log_q_of(z: torch.Tensor, normalization: str, kernel: str = "student_t") -> torch.Tensor:
    return q_similarities(z, kernel=kernel, normalization=normalization, **Q_OPTIONS)


def loop_divergence(p: list[float], q: list[float], name: str, alpha: float) -> float:
    """Straight from the definitions, over the pairs where both are defined (q > 0)."""
    total = 0.0
    for a, b in zip(p, q, strict=True):
        if b == 0:
            continue
        m = (a + b) / 2
        if name == "kl":
            total += a * math.log(a / b) if a else 0
        elif name == "reverse_kl":
            total += b * math.log(b / a)
        elif name == "jensen_shannon":
            total += ((a * math.log(a / m) if a else 0) + b * math.log(b / m)) / 2
        elif name == "chi_square":
            total += (a - b) ** 2 / b
        else:
            total += (a**alpha * b ** (1 - alpha) if a else 0) / (alpha * (alpha - 1))
    return total - 1 / (alpha * (alpha - 1)) if name == "alpha" else total


@pytest.mark.parametrize(
    ("name", "alpha", "zeros"),
    [(*case, False) for case in CASES] + [(*case, True) for case in CASES if case[0] != "reverse_kl" and case[1] > 0],
)
def test_divergence_equals_its_definition(name, alpha, zeros):
    for normalization in NORMALIZATIONS:
        p = dense_p(5, normalization)
        if zeros:
            p = matching.normalize_similarities(p.where(p > p.median(), 0), normalization=normalization)
        log_q = log_q_of(points(5), normalization)
        if normalization == "joint":
            expected = loop_divergence(p.flatten().tolist(), log_q.exp().flatten().tolist(), name, alpha)
        else:
            rows = zip(p.tolist(), log_q.exp().tolist(), strict=True)
            expected = sum(loop_divergence(a, b, name, alpha) for a, b in rows) / 5
        assert math.isclose(match(p, log_q, name, alpha=alpha), expected, rel_tol=1e-11, abs_tol=1e-13)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_q_equals_the_loop_and_leaves_out_self_and_masked_pairs(kernel, normalization):
    z, mask = points(5), torch.ones(5, 5, dtype=torch.bool)
    mask[0, 3] = mask[4, 1] = False
    q = torch.zeros(5, 5, dtype=torch.float64)
    for i, j in itertools.permutations(range(5), 2):
        if mask[i, j]:
            squared = math.dist(z[i], z[j]) ** 2
            log_k = {
                "cosine": float(z[i] @ z[j] / z[i].norm() / z[j].norm()) / 0.7,
                "gaussian": -squared / 0.7,
                "student_t": -(3 + 1) / 2 * math.log(1 + squared / (0.7 * 3)),
            }[kernel]
            q[i, j] = math.exp(log_k)
    q = q / (q.sum(1, keepdim=True) if normalization == "anchor" else q.sum())
    log_q = q_similarities(z, kernel=kernel, normalization=normalization, mask=mask, **Q_OPTIONS)
    torch.testing.assert_close(log_q.exp(), q, rtol=1e-12, atol=1e-15)
    assert ((log_q == -math.inf) == (q == 0)).all()


@pytest.mark.parametrize(("name", "alpha"), CASES)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_divergence_is_zero_at_p_and_positive_elsewhere(name, alpha, normalization):
    log_q = log_q_of(points(6), normalization)
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


@pytest.mark.parametrize("alpha", [-1.0, 0.2, 0.5, 3.0])
def test_alpha_divergence_of_order_1_minus_alpha_exchanges_p_and_q(alpha):
    log_p, log_q = log_q_of(points(6, seed=1), "anchor"), log_q_of(points(6), "anchor")
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


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_gradient_of_match_equals_finite_differences(name, normalization):
    z, matrix = points(5).requires_grad_(), points(5, 5, seed=5).requires_grad_()

    def cell(z, matrix):
        p = matrix.exp().masked_fill(torch.eye(5, dtype=torch.bool), 0)
        p = p / (p.sum() if normalization == "joint" else p.sum(1, keepdim=True))
        return match(p, log_q_of(z, normalization), name, alpha=1.7)

    assert torch.autograd.gradcheck(cell, (z, matrix))
    one_hot = matching.pair_similarities(3, normalization=normalization)
    smoothing = 0.1 if name == "reverse_kl" else 0.0
    assert torch.autograd.gradcheck(
        lambda z: match(one_hot, log_q_of(z, normalization), name, alpha=1.7, smoothing=smoothing),
        (points(6).requires_grad_(),),
    )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_match_does_not_depend_on_the_order_of_points(kernel, normalization):
    p, z, order = dense_p(7, normalization), points(7), torch.randperm(7, generator=torch.Generator().manual_seed(3))
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


def far_points() -> torch.Tensor:
    far = torch.zeros(6, 3)
    far[0, 0], far[1, 1], far[4, 2] = 1e4, -1e4, 1e4
    return far


@pytest.mark.parametrize("z", [torch.ones(6, 3), torch.zeros(6, 3), far_points()], ids=["ones", "origin", "far"])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_extreme_points_give_finite_divergence_and_gradient(z, normalization):
    p = matching.pair_similarities(3, normalization=normalization)
    for kernel in KERNELS:
        for name in DIVERGENCES:
            leaf = z.clone().requires_grad_()
            log_q = q_similarities(leaf, kernel=kernel, normalization=normalization, temperature=0.5, dof=1e3)
            value = match(p, log_q, name, smoothing=0.1)
            if name == "chi_square" and bool((log_q > -math.inf).any() and log_q[p > 0].min() < -88):
                assert value == math.inf  # 1/q is beyond float32, as documented
                continue
            value.backward()
            assert value.isfinite() and leaf.grad.isfinite().all(), (kernel, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_embeddings_are_matched_in_float32(dtype):
    z, p = points(8, 16).to(dtype), matching.pair_similarities(4, normalization="joint")
    for kernel in KERNELS:
        options = {"kernel": kernel, "normalization": "joint"} | Q_OPTIONS
        value, exact = match(p, q_similarities(z, **options)), match(p, q_similarities(z.double(), **options))
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)
