"""Gromov-Wasserstein against all permutations, isometries, scaling and POT's own cost."""

import doctest
import itertools

import numpy as np
import pytest
import torch

pytest.importorskip("ot")
import ot  # noqa: E402

from hf_dpssl.evaluation import gromov_wasserstein  # noqa: E402
from hf_dpssl.evaluation.gromov import _cost  # noqa: E402

KEYS = ("gromov_wasserstein", "gromov_wasserstein_lower", "pairing_distortion")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def brute_force(x: torch.Tensor, z: torch.Tensor) -> float:
    """Least cost over all permutations, by loops over points."""
    first, second, n = torch.cdist(x, x).numpy(), torch.cdist(z, z).numpy(), len(x)
    costs = []
    for permutation in itertools.permutations(range(n)):
        moved = second[np.ix_(permutation, permutation)]
        costs.append(sum((first[i, k] - moved[i, k]) ** 2 for i in range(n) for k in range(n)) / n**2)
    return min(costs) ** 0.5


def test_equals_the_best_of_all_permutations():
    # Euclidean distances are conditionally negative: the cost is concave in the coupling, a permutation is best.
    for n, seed in ((2, 0), (4, 1), (5, 2), (6, 0), (6, 1)):
        x, z = random(n, 3, seed=seed).double(), random(n, 2, seed=seed + 10).double()
        found = gromov_wasserstein(x, z, scaled=False, random_starts=30)
        exact = brute_force(x, z)
        assert found["gromov_wasserstein"] == pytest.approx(exact, abs=1e-6)
        assert found["gromov_wasserstein_lower"] <= exact + 1e-9
        assert found["pairing_distortion"] >= exact - 1e-9


@pytest.mark.parametrize("scaled", [True, False])
def test_isometric_sets_have_distance_0_however_they_are_ordered(scaled):
    x = random(40, 5).double()
    rotated = x @ torch.linalg.qr(random(5, 5, seed=1).double()).Q + 2
    found = gromov_wasserstein(x, rotated, scaled=scaled)
    assert all(found[key] == pytest.approx(0, abs=1e-6) for key in KEYS)
    padded = torch.cat([rotated, torch.zeros(40, 3)], 1)
    assert gromov_wasserstein(x, padded, scaled=scaled)["gromov_wasserstein"] == pytest.approx(0, abs=1e-6)
    mixed = rotated[torch.randperm(40, generator=torch.Generator().manual_seed(0))]
    shuffled = gromov_wasserstein(x, mixed, scaled=scaled)
    assert shuffled["gromov_wasserstein_lower"] == pytest.approx(0, abs=1e-6)
    assert shuffled["gromov_wasserstein"] < 0.1 * shuffled["pairing_distortion"]  # found without the pairing


def test_scaling_law():
    factor = 30.0
    x, z = random(30, 4), random(30, 2, seed=1)
    plain, both = gromov_wasserstein(x, z, scaled=False), gromov_wasserstein(factor * x, factor * z, scaled=False)
    for key in KEYS:
        assert both[key] == pytest.approx(factor * plain[key], rel=1e-4)
    assert gromov_wasserstein(x, factor * z) == pytest.approx(gromov_wasserstein(x, z), rel=1e-4)


def test_is_symmetric():
    x, z = random(6, 4).double(), random(6, 2, seed=1).double()
    options = dict(random_starts=30)
    assert gromov_wasserstein(x, z, **options) == pytest.approx(gromov_wasserstein(z, x, **options), abs=1e-6)


def test_convention_is_the_root_of_pots_cost_and_twice_memolis():
    # Two points at distance 1 against two at distance 3: half of all pairs change by 2.
    x, z = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [3.0]])
    found = gromov_wasserstein(x, z, scaled=False)["gromov_wasserstein"]
    assert found == pytest.approx((0.5 * 2**2) ** 0.5)
    distances = [np.array([[0.0, d], [d, 0.0]]) for d in (1, 3)]
    peer = ot.gromov.gromov_wasserstein2(*distances, G0=np.eye(2) / 2)
    assert found == pytest.approx(float(peer) ** 0.5)


def test_cost_of_a_coupling_equals_the_fourfold_sum():
    first, second = (torch.cdist(p, p).numpy() for p in (random(5, 3).double(), random(5, 2, seed=1).double()))
    permutation = np.eye(5)[[2, 0, 1, 4, 3]] / 5
    for plan in (permutation, (permutation + np.full((5, 5), 1 / 25)) / 2):
        total = sum(
            (first[i, k] - second[j, m]) ** 2 * plan[i, j] * plan[k, m]
            for i, j, k, m in itertools.product(range(5), repeat=4)
        )
        assert _cost(first, second, plan) == pytest.approx(total)


def test_a_seed_decides_and_large_sets_are_thinned_out():
    x, z = random(80, 4), random(80, 2, seed=1)
    assert gromov_wasserstein(x, z, seed=3) == gromov_wasserstein(x, z, seed=3)
    few = gromov_wasserstein(x, z, max_points=20)
    assert few["gromov_wasserstein_points"] == 20 and few["gromov_wasserstein"] > few["gromov_wasserstein_lower"] > 0


def test_example_of_the_docstring():
    from hf_dpssl.evaluation import gromov as module

    assert doctest.testmod(module, extraglobs={"torch": torch}).failed == 0


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="same two or more points"):
        gromov_wasserstein(random(5, 2), random(6, 2))
    with pytest.raises(ValueError, match="NaN or infinite"):
        gromov_wasserstein(random(5, 2) / 0, random(5, 2))
    with pytest.raises(ValueError, match="no scale"):
        gromov_wasserstein(torch.ones(5, 2), random(5, 2))
