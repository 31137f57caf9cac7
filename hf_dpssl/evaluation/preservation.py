"""Whether neighbours stay neighbours between two spaces: trustworthiness and continuity, by scikit-learn."""

from __future__ import annotations

import sklearn.manifold
from torch import Tensor


def trustworthiness(x: Tensor, z: Tensor, *, k: int = 12) -> dict[str, float]:
    """Whether neighbours in z are neighbours in x: low when z shows neighbourhoods that x does not have.

    1 - 2 / (N k (2N - 3k - 1)) sum_i sum_{j in the k nearest of i in z} max(0, rank of j around i in x - k)

    Args:
        x: (N, ...) points of the original space, flattened; Euclidean distances. Memory grows with N^2: 1 GB at 8,000.
        z: (N, ...) the same points in the other space (latents, embeddings).
        k: neighbours, < N / 2.

    Returns:
        {"trustworthiness": in [0, 1], 1 is best; about 0.5 for unrelated points}.

    Raises:
        ValueError: unequal numbers of points, k out of range, numbers that are not finite.

    Source: Venna and Kaski 2001.
    """
    return {"trustworthiness": _kept(x, z, k)}


def continuity(x: Tensor, z: Tensor, *, k: int = 12) -> dict[str, float]:
    """Whether neighbours in x are neighbours in z: low when z tears neighbourhoods apart.

    Trustworthiness with the spaces exchanged; arguments and errors as there.

    Returns:
        {"continuity": in [0, 1], 1 is best}.

    Source: Venna and Kaski 2001.
    """
    return {"continuity": _kept(z, x, k)}


def _kept(x: Tensor, z: Tensor, k: int) -> float:
    count = len(x)
    if len(z) != count:
        raise ValueError(f"both spaces must hold the same points, got {count} and {len(z)}.")
    if not 1 <= k < count / 2:
        raise ValueError(f"k must be at least 1 and below half the {count} points, got {k}.")
    arrays = []
    for points in (x, z):
        points = points.detach().cpu().flatten(1).double()
        if not bool(points.isfinite().all()):
            raise ValueError("points hold NaN or infinite numbers.")
        arrays.append((points - points.mean(0)).numpy())  # so that products lose less
    return float(sklearn.manifold.trustworthiness(*arrays, n_neighbors=k))
