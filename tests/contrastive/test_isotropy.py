"""SIGReg and LeJEPA against numerical integrals, a closed form, and lightly; what they do not depend on."""

import math

import pytest
import torch
from loops import close, points, views
from scipy.integrate import quad

from hf_dpssl.contrastive.isotropy import lejepa, random_directions, sigreg

DIRECTIONS = random_directions(5, 3, step=0)


def epps_pulley(values: list[float], largest: float) -> float:
    """N times the integral of the squared distance of characteristic functions, weighted by that of the normal."""

    def integrand(t: float) -> float:
        cosine = math.fsum(math.cos(t * value) for value in values) / len(values) - math.exp(-t * t / 2)
        sine = math.fsum(math.sin(t * value) for value in values) / len(values)
        return (cosine**2 + sine**2) * math.exp(-t * t / 2)

    return len(values) * quad(integrand, -largest, largest, epsabs=1e-12, limit=200)[0]


def whole_line(values: list[float]) -> float:
    """The integral over all frequencies, term by term."""
    count = len(values)
    pairs = math.fsum(math.exp(-((a - b) ** 2) / 2) for a in values for b in values)
    single = math.fsum(math.exp(-(a**2) / 4) for a in values)
    return math.sqrt(2 * math.pi) * pairs / count - 2 * math.sqrt(math.pi) * single + count * math.sqrt(2 * math.pi / 3)


def test_sigreg_is_the_mean_over_directions_of_epps_and_pulleys_integral():
    for rows, scale, shift in [(1, 1.0, 0.0), (6, 1.0, 0.0), (20, 0.1, 0.5), (20, 2.0, -1.0)]:
        z = shift + points(rows, 3, scale=scale)
        sliced = [(z @ a).tolist() for a in DIRECTIONS]
        expected = sum(epps_pulley(values, 3.0) for values in sliced) / len(sliced)
        assert close(sigreg(z, DIRECTIONS), expected, 2e-3 * max(1.0, expected))
        for values in sliced:  # the oracle's own oracle
            assert epps_pulley(values, math.inf) == pytest.approx(whole_line(values), abs=1e-7)


def test_sigreg_tells_normal_embeddings_from_others_of_the_same_mean_and_variance():
    generator = torch.Generator().manual_seed(0)
    directions = random_directions(64, 2, step=0)
    found = []
    for _ in range(20):
        normal = torch.randn(500, 2, generator=generator, dtype=torch.float64)
        found.append(float(sigreg(normal, directions)))
    whole = math.sqrt(2 * math.pi) - math.sqrt(2 * math.pi / 3)  # expected, over all frequencies
    assert sum(found) / 20 == pytest.approx(whole, rel=0.15)
    circle = math.sqrt(2) * torch.nn.functional.normalize(normal, dim=1)
    scaled, moved, collapsed = 2 * normal, normal + 1, torch.zeros_like(normal)
    assert all(sigreg(z, directions) > 5 * max(found) for z in (circle, scaled, moved, collapsed))


def test_order_rotation_with_the_directions_and_a_mirrored_direction_change_nothing():
    a, b = views(12)
    rotation = torch.linalg.qr(points(3, 3, seed=5)).Q
    value = lejepa(a, b, DIRECTIONS, weight=0.3)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    for other in (
        lejepa(a[order], b[order], DIRECTIONS, weight=0.3),
        lejepa(b, a, DIRECTIONS, weight=0.3),
        lejepa(a @ rotation, b @ rotation, DIRECTIONS @ rotation, weight=0.3),
        lejepa(a, b, -DIRECTIONS, weight=0.3),
    ):
        assert close(other, value, 1e-12)
    assert not close(lejepa(a, b[order], DIRECTIONS, weight=0.3), value, 1e-3)  # the pairs do matter
    first = lejepa(a, b, DIRECTIONS, weight=1e-9)
    assert close(first, (a - b).square().mean() / 4, 1e-6)


def test_lejepa_equals_lightlys_parts():
    module = pytest.importorskip("lightly.loss.lejepa_loss")
    a, b = (z.float().requires_grad_() for z in views(32, 16))
    theirs = module.SIGReg(num_vectors=40)
    torch.manual_seed(3)
    directions = theirs._generate_unit_vectors(a.device, a.dtype, 16).T
    both = torch.stack([a, b])
    expected = 0.9 * module.lejepa_invariance_loss(all_proj=both, global_proj=both)
    for view in (a, b):
        torch.manual_seed(3)
        expected = expected + 0.1 * theirs(view) / 2
    found = lejepa(a, b, directions, weight=0.1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for mine, other in zip(torch.autograd.grad(found, (a, b)), torch.autograd.grad(expected, (a, b)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-7)


def test_gradients_equal_finite_differences_and_half_precision_loses_nothing_but_its_own_rounding():
    a, b = (z.requires_grad_() for z in views(4))
    assert torch.autograd.gradcheck(lambda x, y: lejepa(x, y, DIRECTIONS, weight=0.4), (a, b))
    halves = [z.detach().bfloat16() for z in (a, b)]
    value = lejepa(*halves, DIRECTIONS, weight=0.4)
    assert value.dtype == torch.float32
    assert close(value.double(), lejepa(*(z.double() for z in halves), DIRECTIONS, weight=0.4), 1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lejepa(*(z.detach().float() for z in (a, b)), DIRECTIONS, weight=0.4).double(),
                           lejepa(*(z.detach().float() for z in (a, b)), DIRECTIONS, weight=0.4).double())  # fmt: skip


def test_directions_of_a_step_are_unit_vectors_uniform_on_the_sphere():
    first = random_directions(4000, 3, step=7)
    assert torch.equal(first, random_directions(4000, 3, step=7))
    assert not torch.allclose(first, random_directions(4000, 3, step=8))
    assert not torch.equal(random_directions(4, 3), random_directions(4, 3))
    torch.testing.assert_close(first.norm(dim=1), torch.ones(4000, dtype=torch.float64))
    assert first.mean(0).abs().max() < 0.05
    torch.testing.assert_close(first.T @ first / 4000, torch.eye(3, dtype=torch.float64) / 3, atol=0.02, rtol=0)


def test_what_does_not_fit_is_refused():
    a, b = views(4)
    for message, given, weight in [
        (r"\(N, D\)", (a, b[:3], DIRECTIONS), 0.1),
        (r"\(N, D\) and directions \(M, D\)", (a[:, :2], b[:, :2], DIRECTIONS), 0.1),
        ("needs embeddings and directions, got 0 and 5", (a[:0], b[:0], DIRECTIONS), 0.1),
        ("got 4 and 0", (a, b, DIRECTIONS[:0]), 0.1),
        ("finite", (a * math.nan, b, DIRECTIONS), 0.1),
        (r"in \(0, 1\), got 1", (a, b, DIRECTIONS), 1),
        (r"in \(0, 1\), got nan", (a, b, DIRECTIONS), math.nan),
    ]:
        with pytest.raises(ValueError, match=message):
            lejepa(*given, weight=weight)
    with pytest.raises(ValueError, match="got 0 of 3"):
        random_directions(0, 3)
