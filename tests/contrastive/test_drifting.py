"""The field of a one-step generator against plain loops, its invariances, and what it is the gradient of."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from largest_tensor import LargestTensor
from loops import field_by_loops, points
from sklearn.manifold._t_sne import _kl_divergence

from hf_dpssl.contrastive import drift_field, drift_loss, drifting
from hf_dpssl.contrastive.matching import q_similarities
from hf_dpssl.models.choices import FIELD_KERNELS
from hf_dpssl.models.gather import gather_with_gradient, is_distributed

OPTIONS = [{"kernel": kernel, "symmetric": symmetric} for kernel in FIELD_KERNELS for symmetric in (True, False)]


def sets(dtype=torch.float64) -> tuple[torch.Tensor, ...]:
    """Two sets: generated (2, 5, 3), real (2, 4, 3) elsewhere, negatives (2, 3, 3), weights (2, 7) with a zero."""
    generated, real, negatives = (points(2 * rows, seed=rows).view(2, rows, 3) for rows in (5, 4, 3))
    weights = points(14, 1, seed=9).abs().view(2, 7)
    weights[1, 2] = 0
    return generated.to(dtype), (real + 0.5).to(dtype), negatives.to(dtype), weights.to(dtype)


@pytest.mark.parametrize("tile", [drifting._TILE, 24])
def test_the_field_is_that_of_plain_loops_whole_and_in_tiles(tile, monkeypatch):
    monkeypatch.setattr(drifting, "_TILE", tile)
    generated, real, negatives, weights = sets()
    for options in OPTIONS:
        options = {"scales": (0.2, 0.7), "dof": 2.0} | options
        found = drift_field(generated, real, negatives=negatives, weights=weights, **options).field
        for part, *rest in zip(found, generated, real, negatives, weights, strict=True):
            expected = field_by_loops(*(tensor.tolist() for tensor in rest), **options)
            torch.testing.assert_close(part, torch.tensor(expected, dtype=torch.float64), rtol=1e-11, atol=1e-11)


def test_the_field_follows_permutations_translations_rotations_and_scalings_and_single_precision_is_enough():
    generated, real, negatives, weights = sets()
    rotation = torch.linalg.qr(points(3, 3, seed=1)).Q
    order = torch.tensor([3, 1, 4, 0, 2])
    for options in OPTIONS:
        drift = drift_field(generated, real, negatives=negatives, weights=weights, **options)
        moved = [7 * part @ rotation + 100 for part in (generated[:, order], real.flip(1), negatives)]
        order_of_weights = [3, 2, 1, 0, 4, 5, 6]
        turned = drift_field(moved[0], moved[1], negatives=moved[2], weights=weights[:, order_of_weights], **options)
        torch.testing.assert_close(turned.field, drift.field[:, order] @ rotation, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(turned.unit, 7 * drift.unit)
        torch.testing.assert_close(turned.squares, drift.squares, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(drift.field.square().mean((1, 2)) > 1, torch.tensor([True, True]))
        narrow = [part.float() for part in (generated, real, negatives, weights)]
        single = drift_field(*narrow[:2], negatives=narrow[2], weights=narrow[3], **options)
        assert single.field.dtype == torch.float32
        torch.testing.assert_close(single.field.double(), drift.field, rtol=1e-4, atol=1e-4)


def test_a_weight_is_how_often_a_sample_counts():
    generated, real, negatives, _ = sets()
    for options in OPTIONS:
        weights = torch.tensor([[1.0, 3, 0, 1, 2, 1, 1]] * 2).double()
        repeated = [real[:, [0, 1, 1, 1, 3]], negatives[:, [0, 0, 1, 2]]]
        weighted = drift_field(generated, real, negatives=negatives, weights=weights, **options)
        expected = drift_field(generated, repeated[0], negatives=repeated[1], **options)
        torch.testing.assert_close(weighted.field, expected.field)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_field_is_exactly_zero_where_what_attracts_and_what_repels_are_the_same(dtype):
    generated, real, _, _ = sets(dtype)
    for options in OPTIONS:
        drift = drift_field(generated[:, :1], real, negatives=real.flip(1), **options)
        assert not drift.field.any() and not drift.squares.any()


def test_the_field_vanishes_in_the_mean_when_both_sets_are_of_one_distribution():
    """Unbiased: over 4,000 draws its mean lies within four standard errors of 0, and outside for another one."""
    draws = points(4000 * 9, 2, seed=3).view(4000, 9, 2)
    fixed = torch.tensor([0.4, -0.2]).double().expand(4000, 1, 2)
    for shift, zero in ((0.0, True), (0.3, False)):
        options = {"kernel": "gaussian", "scales": [0.5], "symmetric": False}
        drift = drift_field(fixed, draws[:, :4] + shift, negatives=draws[:, 4:8], **options)
        raw = drift.field[:, 0] * drift.squares.sqrt()
        z = raw.mean(0) / (raw.std(0) / len(raw) ** 0.5)
        assert bool((z.abs() < 4).all()) == zero


def raw_field(x: torch.Tensor, real: torch.Tensor, negatives: torch.Tensor, kernel: str, scale: float, **options):
    """V (D,) at one point x, of a kernel with a bandwidth that does not depend on x."""
    mean = torch.cdist(x[None], torch.cat([real, negatives])).mean()
    scale = scale / float(mean if kernel == "exponential" else mean**2)
    drift = drift_field(x[None], real, negatives=negatives, kernel=kernel, scales=[scale], dof=1.0, **options)
    return drift.field[0] * drift.squares.sqrt() * drift.unit


def test_of_the_kernels_only_the_gaussian_per_anchor_makes_the_field_a_gradient():
    """Curl: the antisymmetric part of the Jacobian, by central differences, relative to the whole."""
    real, negatives, x = points(5, seed=1), points(4, seed=2), points(1, seed=3)[0]
    step = 1e-5
    curls = {}
    for options in OPTIONS:
        columns = []
        for direction in torch.eye(3, dtype=torch.float64):
            ends = [raw_field(x + sign * step * direction, real, negatives, scale=1.5, **options) for sign in (1, -1)]
            columns.append((ends[0] - ends[1]) / (2 * step))
        jacobian = torch.stack(columns, 1)
        curls[options["kernel"], options["symmetric"]] = float((jacobian - jacobian.T).norm() / jacobian.norm())
    assert curls.pop(("gaussian", False)) < 1e-7
    assert min(curls.values()) > 1e-2, curls


def test_the_gaussian_field_per_anchor_ascends_the_share_of_real_neighbours_as_sne_does():
    """V = bandwidth / 2 * gradient of Q(real | x), Q the similarities of SNE over real samples and negatives."""
    real, negatives, x = points(5, seed=1), points(4, seed=2), points(1, seed=3)
    x.requires_grad_()
    targets = torch.cat([real, negatives])
    log_q = q_similarities(x, targets, kernel="gaussian", normalization="anchor", temperature=1.5)
    (gradient,) = torch.autograd.grad(log_q[0, :5].exp().sum(), x)
    found = raw_field(x.detach()[0], real, negatives, "gaussian", 1.5, symmetric=False)
    torch.testing.assert_close(found, 1.5 / 2 * gradient[0])


def test_the_field_has_the_coefficients_of_sne_and_t_snes_gradient_those_times_the_kernel():
    """V = Q(real) sum_j (p_j - q_j) t_j, with q of the neighbours and p of the real ones among them; t-SNE's gradient,
    as scikit-learn computes it, has another factor k_j = 1 / (1 + d_j^2) of each target, and -4 / Q(real) of all.

    In nine dimensions a field has the coefficients of ten points alone, so that they can be found.
    """
    real, negatives, x = points(5, 9, seed=1), points(4, 9, seed=2), points(1, 9, seed=3)[0]
    targets = torch.cat([real, negatives])
    equations = torch.cat([targets.T, torch.ones(1, 9, dtype=torch.float64)])  # their sum is 0
    for kernel in ("student_t", "gaussian"):
        field = raw_field(x, real, negatives, kernel, 1.0, symmetric=False)
        found = torch.linalg.lstsq(equations, torch.cat([field, field.new_zeros(1)])[:, None]).solution[:, 0]
        squared = (targets - x).square().sum(1)
        k = 1 / (1 + squared) if kernel == "student_t" else (-squared).exp()
        q, of_real = k / k.sum(), k[:5].sum() / k.sum()
        p = torch.cat([q[:5] / of_real, q.new_zeros(4)])
        torch.testing.assert_close(found, of_real * (p - q))
        if kernel == "gaussian":
            continue
        together = torch.cat([x[None], targets])
        pairs = np.triu_indices(10, 1)
        similarity_of_pairs = 1 / (1 + torch.cdist(together, together).square().numpy()[pairs])
        share = float(k.sum()) / (2 * similarity_of_pairs.sum())  # of Q over ordered pairs that x has
        joint = np.full(45, 0.01)  # of pairs without x, which move x by nothing
        joint[:9] = share * p.numpy()
        _, gradient = _kl_divergence(together.numpy().ravel(), joint, 1, 10, 9)
        expected = -4 * share / of_real * ((found * k)[:, None] * (targets - x)).sum(0)
        torch.testing.assert_close(torch.from_numpy(gradient[:9]), expected)


def test_memory_of_field_and_loss_grows_with_the_samples_and_not_with_their_pairs(monkeypatch):
    monkeypatch.setattr(drifting, "_TILE", 4096)
    for count in (300, 600):
        generated, real, negatives = torch.randn(3, 2, count, 4)
        generated.requires_grad_()
        for options in OPTIONS:
            with LargestTensor() as largest:
                drift_loss(generated, real, negatives=negatives, **options).loss.backward()
            assert 0 < largest.elements <= 24 * count, "all targets of both sets; pairs are 6 count squared"


def test_the_loss_is_flat_and_its_gradient_is_the_field_through_the_feature_spaces():
    generated, real, negatives, weights = sets()
    generated.requires_grad_()
    linear = points(3, 3, seed=5)
    options = {"negatives": negatives, "weights": weights}
    loss, square = drift_loss(generated, real, spaces=[lambda s: s, lambda s: (s @ linear)[:, :, None]], **options)
    (gradient,) = torch.autograd.grad(loss, generated)
    expected = torch.zeros_like(gradient)
    value = 0
    for matrix in (torch.eye(3).double(), linear):
        drift = drift_field(generated @ matrix, real @ matrix, negatives=negatives @ matrix, weights=weights)
        expected -= 2 * drift.field / drift.unit[:, None, None] @ matrix.T / drift.field.numel() / 2
        value += drift.field.square().mean() / 2
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(loss.detach(), value)
    assert 0 < float(square) < 1


def loss_of_halves(generated: torch.Tensor, real: torch.Tensor) -> dict[str, torch.Tensor]:
    """Loss and gradient of samples of one set, of which each process holds half, as DDP averages it."""
    mine = (generated.chunk(2, 1)[dist.get_rank()] if is_distributed() else generated).clone().requires_grad_()
    gathered = gather_with_gradient(mine.transpose(0, 1)).transpose(0, 1)
    loss = drift_loss(gathered, real, kernel="student_t", scales=[0.1, 1.0]).loss
    loss.backward()
    return {"loss": loss.detach(), "gradient": mine.grad / (2 if is_distributed() else 1)}


def test_two_processes_that_share_a_set_have_the_loss_and_gradient_of_one(run_in_two):
    generated, real = points(12, seed=4).view(2, 6, 3), points(8, seed=5).view(2, 4, 3)
    expected = loss_of_halves(generated, real)
    both = run_in_two(loss_of_halves, generated, real)
    torch.testing.assert_close(torch.cat([part["gradient"] for part in both], 1), expected["gradient"])
    assert all(torch.equal(part["loss"], expected["loss"]) for part in both)


def test_far_sets_do_not_underflow_and_half_precision_is_computed_in_single():
    near, far = points(4, seed=1).float(), points(4, seed=2).float() + 300
    drift = drift_field(near, far, kernel="gaussian", scales=[0.005], symmetric=False)
    assert drift.field.isfinite().all() and abs(float(drift.field.square().mean()) - 1) < 1e-5
    assert (drift.field.mean(0) > 0).all()
    assert drift_field(near.bfloat16(), far.bfloat16()).field.dtype == torch.float32


def test_bad_input_is_named():
    x, y = points(4), points(3, seed=1)
    cases = [
        (lambda: drift_field(x, y, kernel="cosine"), "kernel must be one of"),
        (lambda: drift_field(x, y, scales=()), "at least one number"),
        (lambda: drift_field(x, y, scales=[0.1, 0.0]), "scale must be a positive"),
        (lambda: drift_field(x, y, kernel="student_t", dof=0.0), "dof must be positive"),
        (lambda: drift_field(x, y[:, :2]), r"got \(4, 3\), \(3, 2\)"),
        (lambda: drift_field(x[None], y), r"got \(1, 4, 3\), \(3, 3\)"),
        (lambda: drift_field(x, y[:0]), "at least 1"),
        (lambda: drift_field(x[:1], y), "nothing that repels it"),
        (lambda: drift_field(x[:1], y, negatives=x, weights=torch.tensor([1.0] * 3 + [0.0] * 4)), "nothing repels it"),
        (lambda: drift_field(x, y, weights=torch.ones(4)), r"must be \(3,\), got \(4,\)"),
        (lambda: drift_field(x, y, weights=-torch.ones(3)), "not negative"),
        (lambda: drift_field(x, y, weights=torch.zeros(3)), "no real sample of positive weight"),
        (lambda: drift_field(x * math.nan, y), "must be finite, but 12 values of generated"),
        (lambda: drift_field(x * 0, y * 0), "coincide"),
        (lambda: drift_loss(x[None], y[None], spaces=lambda s: s[:1]), "gave 1 features of 4"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
