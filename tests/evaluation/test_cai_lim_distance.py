"""The Cai-Lim distance against closed forms of normal distributions, permutations, and its two definitions."""

import doctest
import importlib
import itertools
import math

import pytest
import torch

from hf_dpssl.evaluation import cai_lim, gaussian_cai_lim

module = importlib.import_module("hf_dpssl.evaluation.cai_lim_distance")  # the package's attribute is the function

KEYS = ("cai_lim_projection", "cai_lim_embedding", "cai_lim_sliced")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def white(n: int, d: int, seed: int = 0) -> torch.Tensor:
    """Normal samples with mean 0 and covariance I exactly."""
    points = random(n, d, seed=seed)
    return torch.linalg.qr(points - points.mean(0)).Q * n**0.5


def quantiles(n: int, sd: float) -> torch.Tensor:
    """N(0, sd^2) on the line: the middles of n equal shares."""
    return sd * torch.special.ndtri((torch.arange(n).double() + 0.5) / n)[:, None]


@pytest.mark.parametrize("sd, expected", [(0.2, 0.3), (0.5, 0.0), (1.3, 0.0), (2.0, 0.0), (3.5, 1.5)])
def test_normal_on_a_line_against_normal_in_space(sd, expected):
    scales = torch.tensor([0.5, 1.0, 2.0]).double()
    turn = torch.linalg.qr(random(3, 3)).Q
    covariance = turn @ torch.diag(scales**2) @ turn.T
    assert gaussian_cai_lim(covariance, torch.tensor([[sd**2]])) == pytest.approx(expected, abs=1e-6)
    found = cai_lim(white(300, 3) * scales @ turn.T + 5, quantiles(300, sd) - 7, restarts=4)
    # Only the shape of 300 samples is left: about 0.1 of their deviation.
    assert found["cai_lim_projection"] == pytest.approx(expected, abs=0.12 * max(sd, 0.5))
    assert found["cai_lim_sliced"] == pytest.approx(found["cai_lim_projection"], rel=1e-3, abs=2e-3)  # one direction


def test_normal_in_the_plane_against_normal_in_space():
    # Deviations (3, 0.2) of z against 2, 1, 0.5 of x: 3 is 1 from [1, 2], 0.2 is 0.3 from [0.5, 1].
    covariance_x, covariance_z = torch.diag(torch.tensor([4.0, 1.0, 0.25])), torch.diag(torch.tensor([9.0, 0.04]))
    expected = math.hypot(1.0, 0.3)
    assert gaussian_cai_lim(covariance_x, covariance_z) == pytest.approx(expected)
    x, z = white(300, 3) @ covariance_x.double().sqrt(), white(300, 2, seed=1) @ covariance_z.double().sqrt()
    found = cai_lim(x, z, restarts=4)
    assert found["cai_lim_projection"] == pytest.approx(expected, rel=0.15)


def test_closed_form_is_the_least_over_projections_of_the_bures_distance():
    covariance_x = torch.cov(random(4, 20)).double()
    covariance_z = torch.diag(torch.tensor([5.0, 0.01])).double()
    exact = gaussian_cai_lim(covariance_x, covariance_z)

    def bures(v: torch.Tensor) -> float:
        projected = v @ covariance_x @ v.T
        root = torch.linalg.eigvals(projected @ covariance_z).real.clamp_min(0).sqrt().sum()
        return float((projected.trace() + covariance_z.trace() - 2 * root).clamp_min(0).sqrt())

    samples = [bures(torch.linalg.qr(random(4, 2, seed=seed)).Q.T) for seed in range(4000)]
    assert exact <= min(samples) + 1e-9 and min(samples) == pytest.approx(exact, rel=0.1)


def test_equal_dimensions_are_wasserstein_up_to_orthogonal_maps():
    # All permutations, each with its best orthogonal map from an SVD (Procrustes).
    x, z = random(5, 2), random(5, 2, seed=1)
    a, b = x - x.mean(0), z - z.mean(0)
    best = min(
        float(a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(b[list(order)].T @ a).sum()) / 5
        for order in itertools.permutations(range(5))
    )
    found = cai_lim(x, z, restarts=30)
    for key in ("cai_lim_projection", "cai_lim_embedding"):
        assert found[key] == pytest.approx(best**0.5, rel=1e-6)


def test_turned_moved_and_shuffled_clouds_have_distance_0():
    x = random(60, 4).exp() * torch.tensor([1, 2, 3, 4])
    turned = x[torch.randperm(60)] @ torch.linalg.qr(random(4, 4, seed=1)).Q + 3
    assert all(cai_lim(x, turned)[key] == pytest.approx(0, abs=1e-5) for key in KEYS)
    projected = x @ torch.linalg.qr(random(4, 2, seed=2)).Q - 1
    found = cai_lim(x, projected, restarts=2)
    assert found["cai_lim_projection"] < 0.02 * projected.std()  # from the pairing, if not to the end


def test_both_definitions_agree_on_100_samples_of_r_10_and_r_2():
    x, z = random(100, 10), random(100, 2, seed=1)
    found = cai_lim(x, z)
    assert found["cai_lim_embedding"] == pytest.approx(found["cai_lim_projection"], rel=1e-9)
    # The trap: z laid flat into R^10 is another cloud, farther by all the variance across the plane.
    flat = torch.cat([z, torch.zeros(100, 8)], 1)
    assert cai_lim(x, flat)["cai_lim_projection"] > 2 * found["cai_lim_projection"]


def test_embedding_projects_on_z_and_no_random_projection_is_nearer():
    x, z = random(50, 6), random(50, 2, seed=1)
    found = cai_lim(x, z)
    x, z = x - x.mean(0), z - z.mean(0)
    others = []
    for seed in range(200):
        v = torch.linalg.qr(random(6, 2, seed=seed)).Q.T
        others.append(module._transport(x @ v.T, z)[1] ** 0.5)
        assert module._embedding(x, z, v) == pytest.approx(others[-1], rel=1e-9)  # D+ = D- at any V
    assert found["cai_lim_projection"] < min(others)


def test_no_step_raises_the_value():
    x, z = random(80, 7), random(80, 3, seed=1)
    x, z = x - x.mean(0), z - z.mean(0)
    v = torch.linalg.qr(random(7, 3)).Q.T
    values = [module._minimise(x, z, v, module._transport, max_iterations=n, tolerance=0)[0] for n in range(6)]
    assert values == sorted(values, reverse=True) and values[-1] < values[0]


@pytest.mark.parametrize("size", [2, 3])
def test_targets_of_slices_have_the_gradient_of_sliced_wasserstein(size):
    directions = module._directions(40, size, torch.Generator().manual_seed(0))
    torch.testing.assert_close(directions.T @ directions / len(directions), torch.eye(size).double() / size)
    y, z = random(30, size).requires_grad_(), random(30, size, seed=1)
    lines, goals = (y @ directions.T).sort(0).values, (z @ directions.T).sort(0).values
    value = (lines - goals).square().mean()
    (gradient,) = torch.autograd.grad(value, y)
    targets, found = module._slice(y.detach(), z, directions)
    assert found == pytest.approx(float(value.detach()))
    torch.testing.assert_close(2 * (y.detach() - targets) / 30 / size, gradient)


def test_scaling_law_and_seed():
    x, z = random(40, 5), random(40, 2, seed=1)
    plain = cai_lim(x, z, seed=2)
    assert cai_lim(x, z, seed=2) == plain
    scaled = cai_lim(10 * x, 10 * z, seed=2)
    assert all(scaled[key] == pytest.approx(10 * plain[key], rel=1e-3) for key in KEYS)


def test_example_of_the_docstring():
    assert doctest.testmod(module, extraglobs={"torch": torch}).failed == 0


def test_bad_input_is_refused_and_too_few_points_are_warned_about():
    with pytest.raises(ValueError, match="same number of points"):
        cai_lim(random(5, 3), random(6, 2))
    with pytest.raises(ValueError, match="more dimensions"):
        cai_lim(random(5, 2), random(5, 3))
    with pytest.raises(ValueError, match="same number of points"):
        cai_lim(random(1001, 2), random(1001, 2))
    with pytest.raises(ValueError, match="NaN or infinite"):
        cai_lim(random(5, 2) / 0, random(5, 2))
    with pytest.raises(ValueError, match="not be larger"):
        gaussian_cai_lim(torch.eye(2), torch.eye(3))
    with pytest.warns(UserWarning, match="projected on nearly any cloud"):
        cai_lim(random(10, 20), random(10, 2), restarts=0)
