"""Gaussian density of features in closed form, with a covariance that is shrunk so that it can be inverted."""

from __future__ import annotations

import numpy as np
from scipy.linalg import lapack


def shrinkage(mean: float, mean_square: float, count: int, dimension: int) -> float:
    """Share of the scaled identity in the covariance, in [0, 1]: OAS (Chen et al. 2010), as scikit-learn's `oas`.

    Args:
        mean, mean_square: tr S / D and tr S^2 / D^2 of the covariance S of `count` samples (divided by their number).
        count: n.
        dimension: D.
    """
    spread = (count + 1) * (mean_square - mean**2 / dimension)
    return float(min(1.0, (mean_square + mean**2) / spread)) if spread > 0 else 1.0


def held_out_density(
    old: np.ndarray, old_count: int, new: np.ndarray, new_count: int, dimension: int | None = None
) -> tuple[float, float]:
    """How probable new features are under the Gaussian of old ones, per sample and dimension, in nats.

    The Gaussian has the old mean, and the old covariance S shrunk to (1 - s) S + s (tr S / D) I, s as `shrinkage` says.
    Features count in units in which the old ones have mean variance 1, so that no scale enters.

    Args:
        old: (d, d) sum of x x' of the old samples about their mean: S times their number.
        old_count: of these samples.
        new: (d, d) sum of x x' of the new samples, about the old mean.
        new_count: of these.
        dimension: D, where old and new samples lie in d of D dimensions; None: d.

    Returns:
        density: mean log density of the new samples. stability: that minus the mean log density of the old ones: 0
        where the new samples are spread as the old ones are, negative where they lie elsewhere.

    Raises:
        ValueError: old features that are all equal.
    """
    inside = len(old)
    dimension = dimension or inside
    scale = float(np.trace(old)) / old_count / dimension
    if not scale > 0:
        raise ValueError("the features are the same for all samples: nothing can be told from them.")
    share = shrinkage(scale, float(np.vdot(old, old)) / old_count**2 / dimension**2, old_count, dimension)
    shrunk = ((1 - share) / (scale * old_count)) * old
    shrunk[np.diag_indices(inside)] += share
    factor, _ = lapack.dpotrf(shrunk.T, lower=1, overwrite_a=1)
    volume = 2 * float(np.log(np.diagonal(factor)).sum()) + (dimension - inside) * np.log(share if share else 1)
    inverse, _ = lapack.dpotri(factor, lower=1, overwrite_c=1)  # its lower half
    squared_old, squared_new = (
        _trace(inverse, moments) / (scale * count) for moments, count in ((old, old_count), (new, new_count))
    )
    density = -0.5 * (np.log(2 * np.pi) + (volume + squared_new) / dimension)
    return float(density), float(0.5 * (squared_old - squared_new) / dimension)


def _trace(lower: np.ndarray, matrix: np.ndarray) -> float:
    """tr(A B) of symmetric matrices, of A the lower half with zeros above it."""
    return 2 * float(np.vdot(lower.T, matrix)) - float(np.diagonal(lower) @ np.diagonal(matrix))
