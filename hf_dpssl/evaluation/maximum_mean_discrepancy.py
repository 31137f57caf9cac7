"""Kernel distance between two clouds of features (KID when the features are Inception's).

The squared maximum mean discrepancy under the polynomial kernel (x.y / D + 1)^3, unbiased, so that it may be slightly
negative for equal distributions. Binkowski et al., "Demystifying MMD GANs", ICLR 2018, section 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .feature_checks import check_clouds, widened

_CHUNK = 1024


def polynomial_mmd(features_1: Tensor, features_2: Tensor, *, degree: int = 3) -> float:
    """Unbiased squared MMD of all of (N_1, D) and (N_2, D) under (x.y / D + 1)^degree; float64, in chunks.

    Raises:
        ValueError: shapes that do not fit, fewer than two features, or values that are not finite.
    """
    check_clouds(features_1, features_2)
    first, second = widened(features_1), widened(features_2)
    within = sum(_kernel_sum(x, x, degree, without_diagonal=True) / (len(x) * (len(x) - 1)) for x in (first, second))
    return within - 2 * _kernel_sum(first, second, degree) / (len(first) * len(second))


def kernel_distance(
    real: Tensor,
    generated: Tensor,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    generator: torch.Generator | None = None,
) -> dict[str, float]:
    """Mean and spread of `polynomial_mmd` over random subsets, each without replacement.

    Args:
        real, generated: features (N, D) and (M, D).
        subsets: how many are drawn.
        subset_size: features of each; lowered to min(N, M) where these are fewer, which moves `kid_std` only.
        generator: of the subsets; default: seeded with 0.

    Returns:
        {"kid": mean, "kid_std": standard deviation over subsets (divided by their number), as torch-fidelity's}.

    Raises:
        ValueError: as `polynomial_mmd`, or no subsets.
    """
    check_clouds(real, generated)
    if subsets < 1 or subset_size < 2:
        raise ValueError(f"subsets must be at least 1 and subset_size at least 2, got {subsets} and {subset_size}.")
    size = min(subset_size, len(real), len(generated))
    generator = generator or torch.Generator().manual_seed(0)
    real, generated = widened(real), widened(generated)
    values = []
    # Where a subset is all there is, one value is enough.
    for _ in range(1 if size == len(real) == len(generated) else subsets):
        drawn = (cloud[torch.randperm(len(cloud), generator=generator)[:size]] for cloud in (real, generated))
        values.append(polynomial_mmd(*drawn))
    values = torch.tensor(values, dtype=torch.float64)
    return {"kid": float(values.mean()), "kid_std": float(values.std(correction=0))}


def _kernel_sum(x: Tensor, y: Tensor, degree: int, without_diagonal: bool = False) -> float:
    total = 0.0
    for first in range(0, len(x), _CHUNK):
        values = (x[first : first + _CHUNK] @ y.T).div_(x.shape[1]).add_(1).pow_(degree)
        total += float(values.sum())
        if without_diagonal:
            total -= float(values.diagonal(first).sum())
    return total
