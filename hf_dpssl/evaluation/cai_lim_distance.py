"""Cai-Lim distance: Wasserstein between clouds of different dimension, up to isometric affine maps.

With d_z <= d_x and phi(x) = V x + b, V with orthonormal rows:

    D-(x, z) = inf_phi W2(phi(x), z)                     project x into the space of z
    D+(x, z) = inf_phi inf { W2(x, a) : phi(a) = z }     embed z into the space of x

They are equal (the main theorem of Cai and Lim). The trap in D+: `a` is ANY cloud with the projection z, not z laid
flat into R^d_x; a flat copy adds all the variance that x has across it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

_MAX_POINTS = 1000
_INNER = 10  # steps of V for each exact transport
_TRIAL, _FINALISTS = 10, 2  # iterations from every start; starts that go on
Match = Callable[[Tensor, Tensor], tuple[Tensor, float]]


def cai_lim(
    x: Tensor,
    z: Tensor,
    *,
    restarts: int = 8,
    max_iterations: int = 100,
    tolerance: float = 1e-6,
    num_directions: int = 64,
    seed: int = 0,
) -> dict[str, float]:
    """Cai-Lim distance of two clouds of equally many points, for W2 by exact transport, and its sliced relative.

    Alternates exact transport with steps of V and b, from the pairing i = i, from the principal axes and from random
    V. No step increases the value, but the problem is not convex: values are the least of all starts and UPPER
    bounds of the infimum over these samples. For d_z = d_x the step of V is Procrustes in closed form; for d_z < d_x
    that has none, and its majorisation is solved in closed form instead.

    With N not well above d_x the distance is near 0 whatever the clouds, as every pairing has its projection: give
    principal components of x then.

    Args:
        x: (N, ...) points of the larger space, flattened.
        z: (N, ...) points of the smaller space, d_z <= d_x; both clouds have uniform weights. N is 2 to 1,000: choose
            a subset of more. Scaling both by c multiplies all values by c.
        restarts: random V besides the two fixed starts.
        max_iterations, tolerance: of the alternation; it ends when the value falls by less, relatively.
        num_directions: of the sliced version, rounded up to whole orthonormal bases of R^d_z.
        seed: of random V and directions.

    Returns:
        cai_lim_projection: D-, from above.
        cai_lim_embedding: D+, from above: exact transport in R^d_x between x and a cloud that projects on z.
        cai_lim_sliced: ANOTHER quantity, with W2 replaced by sliced W2 (root of the mean square over directions);
            at most D- / sqrt(d_z) at the same V.

    Raises:
        ValueError: unequal numbers of points, too few or too many, d_z > d_x, or numbers that are not finite.

    Example:
        100 samples of normal distributions on R^10 and R^2:

        >>> generator = torch.Generator().manual_seed(0)
        >>> x, z = torch.randn(100, 10, generator=generator), torch.randn(100, 2, generator=generator)
        >>> found = cai_lim(x, z)
        >>> abs(found["cai_lim_projection"] - found["cai_lim_embedding"]) < 1e-6
        True
        >>> 0.1 < found["cai_lim_projection"] < 0.4  # near 0: a projection of N(0, I) is N(0, I)
        True

    Source: Cai and Lim 2022 (definitions and equality); Kiers 1990 (the majorisation).
    """
    x, z = _checked(x, z)
    x, z = x - x.mean(0), z - z.mean(0)  # the best b sends mean to mean, for every coupling
    generator = torch.Generator().manual_seed(seed)
    starts = [_step_of_pairing(x, z), _principal_axes(x, z)]
    starts += [_random_projection(x.shape[1], z.shape[1], generator) for _ in range(restarts)]
    directions = _directions(num_directions, z.shape[1], generator)

    def slices(projected: Tensor, targets: Tensor) -> tuple[Tensor, float]:
        return _slice(projected, targets, directions)

    def descend(v: Tensor, match: Match, iterations: int, tolerance: float = tolerance) -> tuple[float, Tensor]:
        return _minimise(x, z, v, match, max_iterations=iterations, tolerance=tolerance)

    # The sliced cost is smoother: its minima are better starts of the exact one than random V. A few iterations tell
    # the starts apart; the best ones go on to the end.
    sliced = [descend(v, slices, max_iterations, 1e-3) for v in starts]
    tried = [descend(v, _transport, _TRIAL) for v in [*starts[:2], *(v for _, v in sliced)]]
    finalists = sorted(tried, key=lambda found: found[0])[:_FINALISTS]
    smooth = [min(sliced, key=lambda found: found[0])[1], finalists[0][1]]
    projection, best = min((descend(v, _transport, max_iterations) for _, v in finalists), key=lambda found: found[0])
    return {
        "cai_lim_projection": projection,
        "cai_lim_embedding": _embedding(x, z, best),
        "cai_lim_sliced": min(descend(v, slices, max_iterations)[0] for v in smooth),
    }


def _checked(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    if len(x) != len(z) or not 2 <= len(x) <= _MAX_POINTS:
        raise ValueError(
            f"both clouds must have the same number of points, 2 to {_MAX_POINTS:,}, got {len(x)} and {len(z)}: "
            "transport is exact; choose subsets of equal size."
        )
    x, z = (points.detach().cpu().flatten(1).double() for points in (x, z))
    if z.shape[1] > x.shape[1]:
        raise ValueError(f"z has more dimensions ({z.shape[1]}) than x ({x.shape[1]}): swap them.")
    for name, points in (("x", x), ("z", z)):
        if not bool(points.isfinite().all()):
            raise ValueError(f"{name} holds NaN or infinite numbers.")
    if len(x) <= x.shape[1]:
        warnings.warn(
            f"{len(x)} points in {x.shape[1]} dimensions can be projected on nearly any cloud: the Cai-Lim distance "
            "then says nothing. Take more points, or fewer principal components of x.",
            stacklevel=3,
        )
    return x, z


def _minimise(
    x: Tensor, z: Tensor, v: Tensor, match: Match, *, max_iterations: int, tolerance: float
) -> tuple[float, Tensor]:
    """(root of the least mean cost, V) from this V; `match` gives targets of the projected points and the cost."""
    # Without variance of x across V's choice (equal dimensions) the first step is exact Procrustes.
    largest = 0.0 if len(v) == x.shape[1] else float(torch.linalg.matrix_norm(x, 2)) ** 2 / len(x)
    targets, cost = match(x @ v.T, z)
    for _ in range(max_iterations):
        step = v
        for _ in range(_INNER if largest else 1):
            step = _step(x, targets, step, largest)
        new_targets, new_cost = match(x @ step.T, z)
        if new_cost > cost:  # rounding
            break
        fallen, v, targets = cost - new_cost, step, new_targets
        cost = new_cost
        if fallen <= tolerance * cost or cost <= 1e-24:
            break
    return max(cost, 0.0) ** 0.5, v


def _step(x: Tensor, targets: Tensor, v: Tensor, largest: float) -> Tensor:
    """V (m, n) that lowers the mean of |V x_i - t_i|^2: its majorisation at v by the largest variance of x."""
    pull = targets.T @ x / len(x)
    if largest:
        pull = pull + largest * v - (x @ v.T).T @ x / len(x)
    return _polar(pull)


def _polar(matrix: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


def _step_of_pairing(x: Tensor, z: Tensor) -> Tensor:
    return _polar(z.T @ x)


def _principal_axes(x: Tensor, z: Tensor) -> Tensor:
    """The principal axes of x, turned to those of z."""
    few = len(x) < z.shape[1]
    axes_x, axes_z = (torch.linalg.svd(points.T, full_matrices=few).U[:, : z.shape[1]] for points in (x, z))
    # Of the two directions of an axis take the one in which the cloud's tail is longer.
    signs = [(points @ axes).pow(3).sum(0).sign() + 0.5 for points, axes in ((x, axes_x), (z, axes_z))]
    return (axes_z * (signs[0] * signs[1]).sign()) @ axes_x.T


def _random_projection(size: int, rows: int, generator: torch.Generator) -> Tensor:
    return _polar(torch.randn(rows, size, generator=generator, dtype=torch.float64))


def _transport(projected: Tensor, z: Tensor) -> tuple[Tensor, float]:
    """The z that each point goes to under exact transport, and the mean squared distance."""
    cost = torch.cdist(projected, z, compute_mode="donot_use_mm_for_euclid_dist").square()
    columns = torch.from_numpy(linear_sum_assignment(cost.numpy())[1])
    return z[columns], float(cost[torch.arange(len(cost)), columns].mean())


def _directions(number: int, size: int, generator: torch.Generator) -> Tensor:
    """(L, size) unit vectors, whole orthonormal bases: they weigh all axes alike."""
    bases = math.ceil(number / size) if size > 1 else 1
    return torch.cat([_random_projection(size, size, generator) for _ in range(bases)])


def _slice(projected: Tensor, z: Tensor, directions: Tensor) -> tuple[Tensor, float]:
    """Targets whose mean squared distance has the gradient of d_z times sliced W2^2 in V, and sliced W2^2 itself."""
    lines, goals = projected @ directions.T, (z @ directions.T).sort(0).values  # (N, L)
    matched = torch.empty_like(goals).scatter_(0, lines.argsort(0), goals)
    return matched @ directions * (z.shape[1] / len(directions)), float((lines - matched).square().mean())


def _embedding(x: Tensor, z: Tensor, v: Tensor) -> float:
    """W2 in the space of x between x and a cloud that V projects on z, and that equals x across V."""
    projected = x @ v.T
    columns = _transport(projected, z)[0]
    embedded = x + (columns - projected) @ v
    return _transport(x, embedded)[1] ** 0.5
