"""Gromov-Wasserstein: how far distances change between two spaces of different dimension."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_MAX_POINTS = 500  # of the default; time grows with the cube


def gromov_wasserstein(
    x: Tensor,
    z: Tensor,
    *,
    scaled: bool = True,
    random_starts: int = 8,
    max_points: int = _MAX_POINTS,
    max_iterations: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """Gromov-Wasserstein distance between points x and their images z = f(x), from above and from below.

    GW = ( min_pi sum_{i j k l} (d_x(i, k) - d_z(j, l))^2 pi_ij pi_kl )^(1/2), Euclidean distances, uniform weights

    One convention: the SQUARE ROOT of the cost, as in the formula. POT's `gromov_wasserstein2` returns its square;
    Memoli's distance is half of it. The problem is not convex, and the solver ends in a stationary point (only its
    inner linear programmes are exact): the value is the least of all starts and an UPPER bound. Started from the
    true pairing i = j, from the product coupling and from random ones; as Euclidean distances make the cost concave
    in pi, some permutation is best, and those found are improved by swapping two points as long as that helps.

    Args:
        x, z: (N, ...) the same points in two spaces, flattened; N >= 2, more than `max_points` are thinned out at
            random.
        scaled: divide the distances of each space by their mean over pairs i != j first, so that scales play no
            part. False: distances as they are; then GW(c x, c z) = c GW(x, z).
        random_starts: couplings between a random permutation and the product coupling; 8 or more are advised.
        max_points: time grows with the cube: about 3 s for 200 points, 15 s for 500 on one core.
        max_iterations: of the conditional gradient, from each start.
        seed: of the random starts and the choice of points.

    Returns:
        gromov_wasserstein: UPPER bound of GW, at most pairing_distortion; 0 for isometric sets.
        gromov_wasserstein_lower: LOWER bound: transport between the two distributions of distances.
        pairing_distortion: the same cost of the true pairing, root of the mean of (d_x(i, k) - d_z(i, k))^2 over all
            N^2 pairs: how far f itself changes distances, which GW forgives when other points fit better.
        gromov_wasserstein_points: points compared.

    Raises:
        ImportError: without POT (`pip install 'hf_dpssl[eval]'`).
        ValueError: unequal numbers, fewer than two points, numbers that are not finite, or, when scaled, a space whose
            points are all the same.

    Example:
        100 samples of normal distributions on R^10 and R^2:

        >>> generator = torch.Generator().manual_seed(0)
        >>> x, z = torch.randn(100, 10, generator=generator), torch.randn(100, 2, generator=generator)
        >>> found = gromov_wasserstein(x, z)
        >>> found["gromov_wasserstein_lower"] <= found["gromov_wasserstein"] < 0.7 * found["pairing_distortion"]
        True

    Source: Memoli 2011 (definition; the second of its lower bounds); Peyre, Cuturi and Solomon 2016 (the
    solver); Vayer et al. 2019 (its step length); Maron and Lipman 2018 (concavity).
    """
    try:
        from ot.gromov import gromov_wasserstein as solve
    except ImportError as error:
        raise ImportError("Gromov-Wasserstein needs POT: pip install 'hf_dpssl[eval]', or pip install POT.") from error
    generator = torch.Generator().manual_seed(seed)
    x, z = _matched(x, z, max_points, generator)
    first, second = (_distances(points, scaled) for points in (x, z))
    count = len(first)
    weights = np.full(count, 1 / count)
    pairing = float(np.sqrt(np.mean((first - second) ** 2)))
    costs = [pairing**2, _cost(first, second, _swapped(first, second, np.eye(count) / count))]
    for start in _starts(count, random_starts, generator):
        options = dict(loss_fun="square_loss", symmetric=True, max_iter=max_iterations)
        plan = solve(first, second, weights, weights, G0=start, **options)
        costs.append(_cost(first, second, _swapped(first, second, plan)))
    quantiles = np.sort(first, axis=None) - np.sort(second, axis=None)
    return {
        "gromov_wasserstein": max(0.0, min(costs)) ** 0.5,
        "gromov_wasserstein_lower": float(np.sqrt(np.mean(quantiles**2))),
        "pairing_distortion": pairing,
        "gromov_wasserstein_points": count,
    }


def _matched(x: Tensor, z: Tensor, limit: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    if len(x) != len(z) or len(x) < 2:
        raise ValueError(f"x and z must be the same two or more points, got {len(x)} and {len(z)}.")
    x, z = (points.detach().cpu().flatten(1).double() for points in (x, z))
    for name, points in (("x", x), ("z", z)):
        if not bool(points.isfinite().all()):
            raise ValueError(f"{name} holds NaN or infinite numbers.")
    if len(x) > limit:
        rows = torch.randperm(len(x), generator=generator)[:limit]
        x, z = x[rows], z[rows]
    return x, z


def _distances(points: Tensor, scaled: bool) -> np.ndarray:
    """(N, N), symmetric to the last bit and 0 on the diagonal; scaled to a mean of 1 over pairs."""
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    if scaled:
        mean = distances.sum() / (len(points) * (len(points) - 1))
        if not bool(mean > 0):
            raise ValueError("all points of one space are the same: their distances have no scale.")
        distances = distances / mean
    return distances.numpy()


def _starts(count: int, random_starts: int, generator: torch.Generator):
    """Couplings with uniform marginals: the true pairing, the product, and mixtures of it with permutations."""
    product = np.full((count, count), count**-2)
    yield np.eye(count) / count
    yield product
    for place in range(random_starts):
        permutation = np.zeros((count, count))
        permutation[np.arange(count), torch.randperm(count, generator=generator).numpy()] = 1 / count
        share = (place + 1) / random_starts  # from nearly the product to a permutation itself
        yield share * permutation + (1 - share) * product


def _permutation(plan: np.ndarray) -> np.ndarray | None:
    """The (N,) places of a coupling that is a permutation, else None."""
    rows, places = np.arange(len(plan)), plan.argmax(1)
    whole = len(np.unique(places)) == len(plan) and plan[rows, places].sum() > 1 - 1e-9
    return places if whole else None


def _swapped(first: np.ndarray, second: np.ndarray, plan: np.ndarray) -> np.ndarray:
    """The best of all swaps of two points, again and again; a plan that is no permutation stays as it is."""
    places = _permutation(plan)
    if places is None:
        return plan
    while True:
        moved = second[np.ix_(places, places)]
        products = first @ moved
        own = np.diag(products)
        gains = products + products.T - own[:, None] - own[None] + 2 * first * moved
        i, k = divmod(int(gains.argmax()), len(places))
        if gains[i, k] <= 1e-9 * products.max():
            break
        places[i], places[k] = places[k], places[i]
    swapped = np.zeros_like(plan)
    swapped[np.arange(len(places)), places] = 1 / len(places)
    return swapped


def _cost(first: np.ndarray, second: np.ndarray, plan: np.ndarray) -> float:
    """sum (d_x(i, k) - d_z(j, l))^2 pi_ij pi_kl, without the cancellation of its expanded form for a permutation."""
    places = _permutation(plan)
    if places is not None:
        return float(np.mean((first - second[np.ix_(places, places)]) ** 2))
    rows, columns = plan.sum(1), plan.sum(0)
    squares = rows @ first**2 @ rows + columns @ second**2 @ columns
    return float(squares - 2 * np.sum((first @ plan @ second) * plan))
