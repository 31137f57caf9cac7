"""Losses against loops written from the formulas, against scikit-learn's t-SNE, and in known limits."""

import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.manifold._t_sne import _kl_divergence

from hf_dpssl.contrastive.losses import info_nce, moco, t_simclr

SIZES = [(2, 1), (3, 4), (6, 2)]
LOSSES = {
    "info_nce": lambda a, b, **kw: info_nce(a, b, temperature=0.5, **kw),
    "joint": lambda a, b, **kw: t_simclr(a, b, temperature=2.0, dof=3.0, **kw),
    "anchor": lambda a, b, **kw: t_simclr(a, b, temperature=2.0, dof=3.0, normalization="anchor", **kw),
}
MOCO = {
    "cosine": lambda q, k, queue: moco(q, k, queue, kernel="cosine", temperature=0.2),
    "student_t": lambda q, k, queue: moco(q, k, queue, kernel="student_t", temperature=5.0, dof=10.0),
}


def views(pairs: int, columns: int, seed: int = 0, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first = scale * torch.randn(pairs, columns, generator=generator, dtype=torch.float64)
    return first, first + 0.3 * scale * torch.randn(pairs, columns, generator=generator, dtype=torch.float64)


def pair_weights(pairs: int) -> torch.Tensor:
    return torch.arange(1, pairs + 1, dtype=torch.float64)


# Oracles: plain loops over lists of floats, from the formulas in methods.md and the docstrings.


def exp_cosine(a, b, temperature):
    return math.exp(sum(p * q for p, q in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b) / temperature)


def student_t(a, b, temperature, dof):
    squared = sum((p - q) ** 2 for p, q in zip(a, b, strict=True))
    return (1 + squared / (temperature * dof)) ** (-(dof + 1) / 2)


def gaussian(a, b, temperature):
    return math.exp(-sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) / temperature)


def loop_anchor(view_1, view_2, kernel, weights=None):
    n, z = len(view_1), view_1.tolist() + view_2.tolist()
    weights = [1.0] * n if weights is None else weights.tolist()
    total = 0.0
    for i in range(2 * n):
        denominator = sum(kernel(z[i], z[k]) for k in range(2 * n) if k != i)
        total -= weights[i % n] * math.log(kernel(z[i], z[(i + n) % (2 * n)]) / denominator)
    return total / 2 / sum(weights)


def loop_joint(view_1, view_2, kernel, weights=None):
    n, z = len(view_1), view_1.tolist() + view_2.tolist()
    weights = [1.0] * n if weights is None else weights.tolist()
    denominator = sum(kernel(z[j], z[k]) for j in range(2 * n) for k in range(2 * n) if j != k)
    return sum(-w * math.log(kernel(z[i], z[i + n]) / denominator) for i, w in enumerate(weights)) / sum(weights)


def loop_moco(queries, keys, queue, kernel):
    total = 0.0
    for query, key in zip(queries.tolist(), keys.tolist(), strict=True):
        positive = kernel(query, key)
        total -= math.log(positive / (positive + sum(kernel(query, other) for other in queue.tolist())))
    return total / len(queries)


def close(value: torch.Tensor, expected: float, tolerance: float = 1e-10) -> bool:
    return math.isclose(float(value), expected, rel_tol=tolerance, abs_tol=tolerance)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
@pytest.mark.parametrize(("pairs", "columns"), SIZES)
def test_info_nce_equals_loop_form_oracle(pairs, columns, temperature, weighted):
    a, b = views(pairs, columns)
    weights = pair_weights(pairs) if weighted else None
    expected = loop_anchor(a, b, lambda x, y: exp_cosine(x, y, temperature), weights)
    assert close(info_nce(a, b, temperature=temperature, weights=weights), expected)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("temperature", "dof"), [(0.5, 1.0), (1.0, 0.5), (8.0, 5.0), (2.0, 100.0)])
@pytest.mark.parametrize(("pairs", "columns"), SIZES)
@pytest.mark.parametrize(("normalization", "oracle"), [("joint", loop_joint), ("anchor", loop_anchor)])
def test_t_simclr_equals_loop_form_oracle(normalization, oracle, pairs, columns, temperature, dof, weighted):
    a, b = views(pairs, columns)
    weights = pair_weights(pairs) if weighted else None
    expected = oracle(a, b, lambda x, y: student_t(x, y, temperature, dof), weights)
    value = t_simclr(a, b, temperature=temperature, dof=dof, normalization=normalization, weights=weights)
    assert close(value, expected)


@pytest.mark.parametrize("queue_size", [1, 5])
@pytest.mark.parametrize(("pairs", "columns"), [(1, 1), *SIZES])
@pytest.mark.parametrize("temperature", [0.2, 5.0])
def test_moco_equals_loop_form_oracle(pairs, columns, queue_size, temperature):
    query, key = views(pairs, columns)
    queue = views(queue_size, columns, seed=1)[0]
    expected = loop_moco(query, key, queue, lambda x, y: exp_cosine(x, y, temperature))
    assert close(moco(query, key, queue, kernel="cosine", temperature=temperature), expected)
    expected = loop_moco(query, key, queue, lambda x, y: student_t(x, y, temperature, 10.0))
    assert close(moco(query, key, queue, kernel="student_t", temperature=temperature, dof=10.0), expected)


def test_moco_with_cosine_equals_cross_entropy_of_the_positive():
    query, key = views(4, 8)
    queue = F.normalize(views(9, 8, seed=1)[0], dim=1)
    q, k = F.normalize(query, dim=1), F.normalize(key, dim=1)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], dim=1) / 0.2
    expected = F.cross_entropy(logits, torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(moco(query, key, queue), expected)


@pytest.mark.parametrize("dof", [1.0, 3.0, 7.0])
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


@pytest.mark.parametrize("pairs", [2, 5, 64])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_value_at_collapse_is_the_log_of_the_number_of_candidates(pairs, value):
    z = torch.full((pairs, 4), value, dtype=torch.float64)
    assert close(LOSSES["info_nce"](z, z), math.log(2 * pairs - 1))
    assert close(LOSSES["anchor"](z, z), math.log(2 * pairs - 1))
    assert close(LOSSES["joint"](z, z), math.log(2 * pairs * (2 * pairs - 1)))
    for loss in MOCO.values():
        assert close(loss(z, z, z[:2]), math.log(3))


@pytest.mark.parametrize(("normalization", "oracle"), [("joint", loop_joint), ("anchor", loop_anchor)])
def test_t_simclr_tends_to_the_gaussian_kernel_of_twice_the_temperature(normalization, oracle):
    a, b = views(4, 3)
    limit = oracle(a, b, lambda x, y: gaussian(x, y, 2 * 1.3))
    options = {"temperature": 1.3, "normalization": normalization}
    errors = [abs(float(t_simclr(a, b, dof=dof, **options)) - limit) for dof in (1e2, 1e4, 1e6)]
    assert errors[2] < 1e-5
    assert abs(float(t_simclr(a, b, dof=math.inf, **options)) - limit) < 1e-12
    assert errors[0] > 50 * errors[1] > 2500 * errors[2], "the error should fall like 1/dof"


def test_t_simclr_of_one_degree_of_freedom_uses_the_cauchy_kernel():
    a, b = views(4, 3)
    expected = loop_joint(a, b, lambda x, y: 1 / (1 + sum((p - q) ** 2 for p, q in zip(x, y, strict=True)) / 2.5))
    assert close(t_simclr(a, b, temperature=2.5, dof=1), expected)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_does_not_depend_on_the_order_of_pairs_or_views(name):
    a, b = views(7, 3)
    weights, order = pair_weights(7), torch.randperm(7, generator=torch.Generator().manual_seed(0))
    value = LOSSES[name](a, b, weights=weights)
    torch.testing.assert_close(LOSSES[name](a[order], b[order], weights=weights[order]), value)
    torch.testing.assert_close(LOSSES[name](b, a, weights=weights), value)
    assert not torch.isclose(LOSSES[name](a, b[order], weights=weights), value), "broken pairs should show"


@pytest.mark.parametrize("name", LOSSES)
def test_only_the_ratio_of_weights_matters(name):
    a, b = views(5, 3)
    plain = LOSSES[name](a, b)
    torch.testing.assert_close(LOSSES[name](a, b, weights=torch.full((5,), 7)), plain)
    weighted = LOSSES[name](a, b, weights=pair_weights(5))
    torch.testing.assert_close(LOSSES[name](a, b, weights=100 * pair_weights(5)), weighted)
    assert not torch.isclose(weighted, plain)


@pytest.mark.parametrize("name", MOCO)
def test_moco_does_not_depend_on_the_order_of_the_queue(name):
    (query, key), queue = views(3, 4), views(6, 4, seed=1)[0]
    torch.testing.assert_close(MOCO[name](query, key, queue.flip(0)), MOCO[name](query, key, queue))


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_of_loss_equals_finite_differences(name):
    a, b = (z.requires_grad_() for z in views(4, 3))
    assert torch.autograd.gradcheck(lambda x, y: LOSSES[name](x, y, weights=pair_weights(4)), (a, b))


@pytest.mark.parametrize("name", MOCO)
def test_gradient_of_moco_equals_finite_differences(name):
    query, key = (z.requires_grad_() for z in views(3, 4))
    queue = views(5, 4, seed=1)[0]
    assert torch.autograd.gradcheck(lambda q, k: MOCO[name](q, k, queue), (query, key))


@pytest.mark.parametrize("name", MOCO)
def test_queue_may_be_overwritten_before_the_backward_pass(name):
    (query, key), queue = views(3, 4), views(6, 4, seed=1)[0]
    expected = torch.autograd.grad(MOCO[name](query.requires_grad_(), key, queue), query)[0]
    loss = MOCO[name](query, key, queue)
    queue.fill_(7.0)
    torch.testing.assert_close(torch.autograd.grad(loss, query)[0], expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_half_precision_embeddings_lose_nothing_but_their_own_rounding(dtype, scale):
    a, b = (z.to(dtype) for z in views(32, 64, scale=scale))
    queue = views(20, 64, seed=1, scale=scale)[0].to(dtype)
    for loss in LOSSES.values():
        value = loss(a, b)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), loss(a.double(), b.double()), rtol=1e-5, atol=1e-5)
    for loss in MOCO.values():
        value = loss(a, b, queue)
        torch.testing.assert_close(value.double(), loss(a.double(), b.double(), queue.double()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_does_not_lower_the_precision_of_a_loss(name):
    a, b = (z.float() for z in views(8, 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = LOSSES[name](a, b)
    torch.testing.assert_close(value, LOSSES[name](a, b), rtol=0, atol=0)


def extreme_points() -> dict[str, torch.Tensor]:
    far = torch.zeros(4, 3)
    far[0, 0], far[1, 1], far[2, 2] = 1e4, -1e4, 1e4
    return {"coincident": torch.ones(4, 3), "at the origin": torch.zeros(4, 3), "distance 1e4": far}


@pytest.mark.parametrize("kind", extreme_points())
def test_extreme_points_give_finite_loss_and_gradient(kind):
    for loss in LOSSES.values():
        a, b = extreme_points()[kind].requires_grad_(), extreme_points()[kind].flip(0).requires_grad_()
        value = loss(a, b)
        value.backward()
        assert value.isfinite() and a.grad.isfinite().all() and b.grad.isfinite().all()
    for loss in MOCO.values():
        a, b = extreme_points()[kind].requires_grad_(), extreme_points()[kind].flip(0)
        value = loss(a, b, b)
        value.backward()
        assert value.isfinite() and a.grad.isfinite().all()
