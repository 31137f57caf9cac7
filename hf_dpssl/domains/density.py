"""Gaussian density of features in closed form, with a covariance that is shrunk so that it can be inverted."""

from __future__ import annotations

import numpy as np


def shrinkage(eigenvalues: np.ndarray, count: int, dimension: int) -> float:
    """Share of the scaled identity in the covariance, in [0, 1]: OAS (Chen et al. 2010), as scikit-learn's `oas`.

    Args:
        eigenvalues: (r,) of the covariance of `count` samples (divided by their number); the others are 0.
        count: n.
        dimension: D, r or more.
    """
    mean = eigenvalues.sum() / dimension
    mean_square = (eigenvalues**2).sum() / dimension**2
    spread = (count + 1) * (mean_square - mean**2 / dimension)
    return float(min(1.0, (mean_square + mean**2) / spread)) if spread > 0 else 1.0


def held_out_density(eigenvalues: np.ndarray, count: int, moments: np.ndarray, dimension: int) -> tuple[float, float]:
    """How probable new features are under the Gaussian of old ones, per sample and dimension, in nats.

    The Gaussian has the old mean, and the old covariance S shrunk to (1 - s) S + s (tr S / D) I, s as `shrinkage` says.
    Features count in units in which the old ones have mean variance 1, so that no scale enters.

    Args:
        eigenvalues: (r,) of S, old samples only; 0 in the other D - r directions, in which the new ones lie on the old
            mean as well.
        count: old samples.
        moments: (r,) mean square of the new samples along the eigenvectors of S, about the old mean.
        dimension: D.

    Returns:
        density: mean log density of the new samples. stability: that minus the mean log density of the old ones: 0
        where the new samples are spread as the old ones are, negative where they lie elsewhere.
    """
    share = shrinkage(eigenvalues, count, dimension)
    scale = eigenvalues.sum() / dimension
    variances = (1 - share) * eigenvalues / scale + share
    others = dimension - len(eigenvalues)
    volume = np.log(variances).sum() + others * np.log(share) if others else np.log(variances).sum()
    old = (eigenvalues / scale / variances).sum()
    new = (moments / scale / variances).sum()
    density = -0.5 * (np.log(2 * np.pi) + (volume + new) / dimension)
    return float(density), float(0.5 * (old - new) / dimension)
