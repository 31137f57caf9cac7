"""Whether neighbours stay neighbours between two spaces: trustworthiness and continuity."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def trustworthiness(x: Tensor, z: Tensor, *, k: int = 12, chunk: int = 256) -> dict[str, float]:
    """Whether neighbours in z are neighbours in x: low when z shows neighbourhoods that x does not have.

    1 - 2 / (N k (2N - 3k - 1)) sum_i sum_{j in the k nearest of i in z} max(0, rank of j around i in x - k)

    Args:
        x: (N, ...) points of the original space, flattened; Euclidean distances.
        z: (N, ...) the same points in the other space (latents, embeddings).
        k: neighbours, < N / 2.
        chunk: rows whose distances to all others are held at once.

    Returns:
        {"trustworthiness": in [0, 1], 1 is best; about 0.5 for unrelated points}.

    Raises:
        ValueError: unequal numbers of points, k out of range, numbers that are not finite.

    Source: Venna and Kaski 2001.
    """
    return {"trustworthiness": _kept(x, z, k, chunk)}


@torch.no_grad()
def continuity(x: Tensor, z: Tensor, *, k: int = 12, chunk: int = 256) -> dict[str, float]:
    """Whether neighbours in x are neighbours in z: low when z tears neighbourhoods apart.

    Trustworthiness with the spaces swapped; arguments and errors as there.

    Returns:
        {"continuity": in [0, 1], 1 is best}.

    Source: Venna and Kaski 2001.
    """
    return {"continuity": _kept(z, x, k, chunk)}


def _kept(x: Tensor, z: Tensor, k: int, chunk: int) -> float:
    count = len(x)
    if len(z) != count:
        raise ValueError(f"both spaces must hold the same points, got {count} and {len(z)}.")
    if not 1 <= k < count / 2:
        raise ValueError(f"k must be at least 1 and below half the {count} points, got {k}.")
    x, z = (_centred(points) for points in (x, z))
    penalty = 0
    for first in range(0, count, chunk):
        rows = torch.arange(first, min(first + chunk, count), device=x.device)
        nearest = _others(z, rows).topk(k, largest=False).indices  # (B, k)
        order = _others(x, rows).argsort(dim=1, stable=True)  # (B, N), the point itself last
        ranks = torch.empty_like(order).scatter_(1, order, torch.arange(1, count + 1, device=x.device).expand_as(order))
        penalty += int((ranks.gather(1, nearest.to(x.device)) - k).clamp_min(0).sum())
    return 1 - penalty * 2 / (count * k * (2 * count - 3 * k - 1))


def _centred(points: Tensor) -> Tensor:
    points = points.flatten(1).double()
    if not bool(points.isfinite().all()):
        raise ValueError("points hold NaN or infinite numbers.")
    return points - points.mean(0)  # so that products lose less in cdist


def _others(points: Tensor, rows: Tensor) -> Tensor:
    """Distances of these rows to all points, infinite to themselves: (B, N)."""
    distances = torch.cdist(points[rows], points)
    distances[torch.arange(len(rows), device=rows.device), rows] = torch.inf
    return distances
