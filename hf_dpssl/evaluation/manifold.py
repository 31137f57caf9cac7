"""Fidelity and diversity of generated features as two numbers each, from balls around samples.

A ball has the radius of the distance to the k-th nearest neighbour within its own set. Precision and recall:
Kynkaanniemi et al., "Improved precision and recall metric for assessing generative models", NeurIPS 2019, equation 2.
Density and coverage: Naeem et al., "Reliable fidelity and diversity metrics for generative models", ICML 2020,
equations 4 and 5. Outliers widen the balls of precision and recall; density and coverage mind them less.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .feature_checks import check_clouds, widened

_CHUNK = 1024


def manifold_overlap(real: Tensor, generated: Tensor, *, k: int = 5) -> dict[str, float]:
    """Precision, recall, density and coverage, with Euclidean distances, in chunks of rows, where the features lie.

    Args:
        real, generated: features (N, D) and (M, D).
        k: neighbours that set the radii, below N and M. Kynkaanniemi use 3, Naeem 5.

    Returns:
        {"precision": share of generated features inside some real ball,
         "recall": share of real features inside some generated ball,
         "density": mean number of real balls around a generated feature, divided by k (may exceed 1),
         "coverage": share of real balls that hold a generated feature}.
        All but density in [0, 1]. Coverage of fresh real features by M = N others is 1 - ((N - 1) ... (N - k)) /
        ((2N - 1) ... (2N - k)), about 1 - 2^-k (Naeem et al., equation 8).

    Raises:
        ValueError: shapes that do not fit, k outside [1, min(N, M) - 1], or values that are not finite.
    """
    check_clouds(real, generated)
    if not 1 <= k < min(len(real), len(generated)):
        raise ValueError(f"k must lie in [1, {min(len(real), len(generated)) - 1}] (features - 1), got {k}.")
    real, generated = widened(real), widened(generated)
    # Distances hardly change by a shift, but their rounding does.
    centre = real.mean(0)
    real, generated = real - centre, generated - centre
    real_radii, generated_radii = radii(real, k), radii(generated, k)
    inside = real.new_zeros(len(generated), dtype=torch.int64)  # real balls around each generated feature
    recalled, covered = [], []
    for first in range(0, len(real), _CHUNK):
        part = slice(first, first + _CHUNK)
        distances = torch.cdist(real[part], generated)
        balls = distances <= real_radii[part, None]
        inside += balls.sum(0)
        covered.append(balls.any(1))
        recalled.append((distances <= generated_radii).any(1))
    return {
        "precision": float((inside > 0).double().mean()),
        "recall": float(torch.cat(recalled).double().mean()),
        "density": float(inside.double().mean()) / k,
        "coverage": float(torch.cat(covered).double().mean()),
    }


def radii(features: Tensor, k: int) -> Tensor:
    """(N,) distance of each feature (N, D) to its k-th nearest other one."""
    parts = []
    for first in range(0, len(features), _CHUNK):
        distances = torch.cdist(features[first : first + _CHUNK], features)
        distances.diagonal(first).fill_(torch.inf)  # itself; an equal other feature is at distance 0
        parts.append(distances.kthvalue(k, dim=1).values)
    return torch.cat(parts)
