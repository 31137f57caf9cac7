"""The Cai-Lim distance against closed forms of normal distributions, permutations, and its two definitions."""

import doctest
import importlib
import itertools
import math

import pytest
import torch

from hf_dpssl.evaluation import cai_lim

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


def of_normal_distributions(deviations_x: list[float], deviations_z: list[float]) -> float:
    """W2 between N(0, A) and N(0, B) up to projections, of eigenvalues' roots, descending (Cai and Lim 2022).

    V A V^T can have any eigenvalues that interlace those of A (Fan and Pall 1957): each deviation of z moves into
    its interval.
    """
    n, m = len(deviations_x), len(deviations_z)
    moves = [
        max(deviations_x[n - m + i] - z, z - deviations_x[i], 0.0) for i, z in enumerate(sorted(deviations_z)[::-1])
    ]
    return math.hypot(*moves)


def test_samples_of_normal_distributions_have_the_closed_form():
    # Only the shape of 200 samples is left: about 0.1 of their deviation.
    scales = torch.tensor([2.0, 1.0, 0.5]).double()
    turn = torch.linalg.qr(random(3, 3)).Q
    for sd, expected in ((0.2, 0.3), (1.3, 0.0), (3.5, 1.5)):
        assert of_normal_distributions(scales.tolist(), [sd]) == pytest.approx(expected)
        found = cai_lim(white(200, 3) * scales @ turn.T + 5, quantiles(200, sd) - 7, restarts=2)
        assert found["cai_lim_projection"] == pytest.approx(expected, abs=0.12 * max(sd, 0.5))
        assert found["cai_lim_sliced"] == pytest.approx(
            found["cai_lim_projection"], rel=1e-3, abs=2e-3
        )  # one direction
    # Deviations (3, 0.2) of z against 2, 1, 0.5 of x: 3 is 1 from [1, 2], 0.2 is 0.3 from [0.5, 1].
    expected = of_normal_distributions([2.0, 1.0, 0.5], [3.0, 0.2])
    assert expected == pytest.approx(math.hypot(1.0, 0.3))
    found = cai_lim(white(200, 3) * scales, white(200, 2, seed=1) * torch.tensor([3.0, 0.2]), restarts=2)
    assert found["cai_lim_projection"] == pytest.approx(expected, rel=0.15)


def test_equal_dimensions_are_wasserstein_up_to_orthogonal_maps():
    # All permutations, each with its best orthogonal map from an SVD (Procrustes).
    x, z = random(5, 2), random(5, 2, seed=1)
    a, b = x - x.mean(0), z - z.mean(0)
    best = min(
        float(a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(b[list(order)].T @ a).sum()) / 5
        for order in itertools.permutations(range(5))
    )
    found = cai_lim(x, z, restarts=20)
    for key in ("cai_lim_projection", "cai_lim_embedding"):
        assert found[key] == pytest.approx(best**0.5, rel=1e-6)


def test_turned_moved_and_shuffled_clouds_have_distance_0():
    x = random(60, 4).exp() * torch.tensor([1, 2, 3, 4])
    turned = x[torch.randperm(60)] @ torch.linalg.qr(random(4, 4, seed=1)).Q + 3
    found = cai_lim(x, turned, restarts=2)
    assert all(found[key] == pytest.approx(0, abs=1e-5) for key in KEYS)
    projected = x @ torch.linalg.qr(random(4, 2, seed=2)).Q - 1
    found = cai_lim(x, projected, restarts=2)
    assert found["cai_lim_projection"] < 0.02 * projected.std()  # from the pairing, if not to the end


@pytest.mark.extended
def test_both_definitions_agree_and_a_flat_copy_is_another_cloud():
    x, z = random(100, 10), random(100, 2, seed=1)
    found = cai_lim(x, z, restarts=2)
    assert found["cai_lim_embedding"] == pytest.approx(found["cai_lim_projection"], rel=1e-9)
    # The trap: z laid flat into R^10 is farther by all the variance across the plane.
    flat = torch.cat([z, torch.zeros(100, 8)], 1)
    assert cai_lim(x, flat, restarts=0)["cai_lim_projection"] > 2 * found["cai_lim_projection"]


def test_embedding_projects_on_z_and_no_random_projection_is_nearer():
    x, z = random(50, 6), random(50, 2, seed=1)
    found = cai_lim(x, z)
    x, z = x - x.mean(0), z - z.mean(0)
    others = []
    for seed in range(50):
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


def test_targets_of_slices_have_the_gradient_of_sliced_wasserstein():
    size = 3
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
    plain = cai_lim(x, z, restarts=2, seed=2)
    assert cai_lim(x, z, restarts=2, seed=2) == plain
    scaled = cai_lim(10 * x, 10 * z, restarts=2, seed=2)
    assert all(scaled[key] == pytest.approx(10 * plain[key], rel=1e-3) for key in KEYS)


@pytest.mark.extended
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
    with pytest.warns(UserWarning, match="projected on nearly any cloud"):
        cai_lim(random(10, 20), random(10, 2), restarts=0)
