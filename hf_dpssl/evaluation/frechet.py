"""Frechet distance between two clouds of features, each taken as a Gaussian (FID when the features are Inception's),
and how far one of N features can be trusted: its interval, and the value for infinitely many.

    d^2 = |mu_1 - mu_2|^2 + tr S_1 + tr S_2 - 2 tr (S_1 S_2)^(1/2)

Heusel et al., "GANs trained by a two time-scale update rule ...", NeurIPS 2017, equation 6; Dowson and Landau 1982.
Everything is float64 and real: with S_1 = F F^T the last trace is that of (F^T S_2 F)^(1/2), a symmetric matrix, and
with S_2 = G G^T it is the sum of the singular values of F^T G.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.linalg import lapack
from torch import Tensor

from .feature_checks import check_clouds, widened
from .feature_statistics import FeatureStatistics

_EPSILON = float(np.finfo(np.float64).eps)


def frechet_distance(mu_1, sigma_1, mu_2, sigma_2) -> float:
    """Squared Frechet distance of two Gaussians, as FID is reported; 0 for equal ones, up to rounding.

    Args:
        mu_1, mu_2: (D,) means; tensors or arrays.
        sigma_1, sigma_2: (D, D) covariances, symmetric and positive semi-definite, of full rank or not.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, or a matrix that is no covariance.
    """
    mu_1, mu_2 = (_double(mu) for mu in (mu_1, mu_2))
    sigma_1, sigma_2 = (_double(sigma) for sigma in (sigma_1, sigma_2))
    _check(mu_1, sigma_1, mu_2, sigma_2)
    traces = float(np.trace(sigma_1) + np.trace(sigma_2))
    difference = mu_1 - mu_2
    return float(difference @ difference) + traces - 2 * _trace_of_root(sigma_1, sigma_2)


def frechet_distance_of_features(features_1: Tensor, features_2: Tensor) -> float:
    """`frechet_distance` of the means and covariances (divided by N - 1) of two clouds (N_1, D) and (N_2, D).

    With fewer features than half the dimensions no D x D matrix is made: with centred rows X_1 and X_2 the trace of
    the root is the nuclear norm of X_1 X_2^T / sqrt((N_1 - 1) (N_2 - 1)), exact for rank-deficient covariances.

    Raises:
        ValueError: shapes that do not fit, fewer than two features, or values that are not finite.
    """
    check_clouds(features_1, features_2)
    if 2 * max(len(features_1), len(features_2)) > features_1.shape[1]:
        first, second = (FeatureStatistics().update(features) for features in (features_1, features_2))
        return frechet_distance(*first.moments, *second.moments)
    (mean_1, rows_1), (mean_2, rows_2) = (_centred_rows(features) for features in (features_1, features_2))
    nuclear = float(torch.linalg.svdvals(rows_1 @ rows_2.T).sum())
    return float((mean_1 - mean_2).square().sum() + rows_1.square().sum() + rows_2.square().sum()) - 2 * nuclear


def frechet_interval(
    real: Tensor,
    generated: Tensor,
    *,
    resamples: int = 100,
    level: float = 0.95,
    resample_real: bool = True,
    generator: torch.Generator | None = None,
) -> dict[str, float]:
    """Bootstrap interval of the Frechet distance of features (N, D) and (M, D).

    Features are drawn with replacement. A resample has fewer different features, so that its distance is larger on
    average by about the bias of N features; the interval is therefore the spread of the resamples around their own
    mean, put around the distance of all features. It covers the sampling of these features, and neither that bias
    (`frechet_extrapolation`) nor another training run.

    Args:
        real, generated: the features. With fewer of them than half of D a resample costs a small SVD, otherwise
            one `frechet_distance`.
        resamples: how many, at least 2.
        level: share of the resamples inside, in (0, 1).
        resample_real: False keeps the real features as they are, the interval then is for this reference set.
        generator: of the draws; default: seeded with 0.

    Returns:
        {"fid", "fid_low", "fid_high", "fid_std": standard deviation of the resamples}.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, or options outside their range.
    """
    check_clouds(real, generated)
    if resamples < 2 or not 0 < level < 1:
        raise ValueError(f"resamples must be at least 2 and level in (0, 1), got {resamples} and {level}.")
    generator = generator or torch.Generator().manual_seed(0)
    real, generated = real.detach().cpu(), generated.detach().cpu()
    values = []
    for _ in range(resamples):
        drawn = generated[torch.randint(len(generated), (len(generated),), generator=generator)]
        beside = real[torch.randint(len(real), (len(real),), generator=generator)] if resample_real else real
        values.append(frechet_distance_of_features(beside, drawn))
    values = torch.tensor(values, dtype=torch.float64)
    value = frechet_distance_of_features(real, generated)
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = (value + torch.quantile(values - values.mean(), tails)).tolist()
    return {"fid": value, "fid_low": low, "fid_high": high, "fid_std": float(values.std())}


def frechet_extrapolation(
    real: Tensor,
    generated: Tensor,
    *,
    points: int = 15,
    smallest: float | None = None,
    vary_real: bool = True,
    generator: torch.Generator | None = None,
) -> dict[str, float]:
    """The Frechet distance of infinitely many features, from a line in 1 / N through those of several N.

    Chong and Forsyth, "Effectively unbiased FID and inception score and where to find them", CVPR 2020, section 4:
    the bias of N features is linear in 1 / N to first order, with a slope that depends on the generator, so that even
    distances at equal N do not compare. They keep the reference fixed; with `vary_real` it shrinks in proportion, and
    its own bias goes too.

    Args:
        real, generated: features (N, D) and (M, D).
        points: sizes, evenly spaced from `smallest` to all features, each a random subset; at least 3.
        smallest: share of the features in the smallest subset, in (0, 1); default: a tenth, but at least 2 D features.
        vary_real: whether the real features are cut in the same proportion.
        generator: of the subsets; default: seeded with 0.

    Returns:
        {"fid_infinity": the line at 1 / N = 0; "fid": of all features; "fid_slope": fid is about fid_infinity +
        fid_slope / M}.

    Raises:
        ValueError: fewer than 4 D features (the line holds for more features than dimensions only), or options
            outside their range.
    """
    check_clouds(real, generated)
    least, dimension = min(len(real), len(generated)), real.shape[1]
    if least < 4 * dimension:
        raise ValueError(
            f"extrapolation needs at least 4 x {dimension} = {4 * dimension} features of either kind, got {least}: "
            "use more images, an extractor of fewer dimensions, or kernel_distance, which has no bias."
        )
    smallest = max(0.1, 2 * dimension / least) if smallest is None else smallest
    if points < 3 or not 0 < smallest < 1 or smallest * least < 2:
        raise ValueError(f"points must be at least 3 and smallest in (0, 1), got {points} and {smallest}.")
    generator = generator or torch.Generator().manual_seed(0)
    real, generated = real.detach().cpu(), generated.detach().cpu()
    inverse, values = [], []
    for share in torch.linspace(smallest, 1, points).tolist():
        part = _subset(generated, share, generator)
        inverse.append(1 / len(part))
        values.append(frechet_distance_of_features(_subset(real, share if vary_real else 1.0, generator), part))
    design = torch.stack([torch.ones(points), torch.tensor(inverse)], 1).double()
    intercept, slope = torch.linalg.lstsq(design, torch.tensor(values, dtype=torch.float64)[:, None]).solution[:, 0]
    return {"fid_infinity": float(intercept), "fid": values[-1], "fid_slope": float(slope)}


def _trace_of_root(sigma_1: np.ndarray, sigma_2: np.ndarray) -> float:
    """tr (S_1 S_2)^(1/2) of two (D, D) symmetric positive semi-definite float64 matrices.

    Raises:
        ValueError: a matrix with a negative eigenvalue beyond rounding.
    """
    factor = _triangular_factor(sigma_1)
    if factor is None or _triangular_factor(sigma_2) is None:
        # The root of an eigenvalue that is rounding is far from small; singular values have no root to be taken.
        first, second = _thin_factor(sigma_1), _thin_factor(sigma_2)
        return float(np.linalg.svd(first.T @ second, compute_uv=False).sum())
    # LAPACK's upper triangle, by columns, is the lower one by rows, which is all that eigvalsh reads.
    product, _ = lapack.dsygst(sigma_2.T, factor, itype=2, lower=0)
    return float(np.sqrt(np.linalg.eigvalsh(product.T).clip(0)).sum())


def _triangular_factor(sigma: np.ndarray) -> np.ndarray | None:
    """Upper triangular F^T with F F^T = sigma, None unless the matrix has full rank beyond rounding."""
    factor, failed = lapack.dpotrf(sigma.T, lower=0, clean=0)
    if failed:
        return None
    pivots = np.diagonal(factor) ** 2
    return factor if pivots.min() > len(sigma) * _EPSILON * pivots.max() else None


def _thin_factor(sigma: np.ndarray) -> np.ndarray:
    """(D, rank) with F F^T = sigma up to rounding, by Cholesky with complete pivoting (Higham 2002, section 10.3)."""
    factor, order, rank, _ = lapack.dpstrf(sigma.T, lower=1)
    factor, order = np.tril(factor)[:, :rank], order - 1
    # All that the factor leaves over must be rounding: a negative eigenvalue would hide in it.
    left_over = np.diagonal(sigma)[order] - (factor**2).sum(1)
    largest = float(np.diagonal(sigma).max(initial=0))
    if left_over.min(initial=0) < -1e-8 * largest:
        raise ValueError(f"a covariance has a negative eigenvalue, at most {left_over.min():.3g}.")
    thin = np.empty_like(factor)
    thin[order] = factor
    return thin


def _centred_rows(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and rows X (N, D) with X^T X the covariance, in float64."""
    features = widened(features)
    mean = features.mean(0)
    return mean, (features - mean) / math.sqrt(len(features) - 1)


def _double(values) -> np.ndarray:
    if torch.is_tensor(values):
        values = values.detach().cpu().numpy()
    return np.asarray(values, dtype=np.float64)


def _check(mu_1, sigma_1, mu_2, sigma_2) -> None:
    size = mu_1.shape[0] if mu_1.ndim == 1 else 0
    if not size or mu_2.shape != (size,) or any(sigma.shape != (size, size) for sigma in (sigma_1, sigma_2)):
        shapes = ", ".join(str(value.shape) for value in (mu_1, sigma_1, mu_2, sigma_2))
        raise ValueError(f"means must be (D,) and covariances (D, D) with one D >= 1, got {shapes}.")
    for name, mu, sigma in (("1", mu_1, sigma_1), ("2", mu_2, sigma_2)):
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise ValueError(f"mu_{name} and sigma_{name} must be finite: NaN or infinity was given.")
        variances = np.diagonal(sigma)
        if variances.min() < -_EPSILON * size * max(variances.max(), 0):
            raise ValueError(f"sigma_{name} is no covariance: its smallest variance is {variances.min():.3g}.")
        # A strided part shows a matrix that is not symmetric, without another pass over all of a large one.
        part = sigma[:: max(1, size // 256)]
        if np.abs(part - sigma[:, :: max(1, size // 256)].T).max() > 1e-6 * variances.max():
            raise ValueError(f"sigma_{name} is no covariance: it is not symmetric.")


def _subset(features: Tensor, share: float, generator: torch.Generator) -> Tensor:
    number = round(share * len(features))
    return (
        features if number == len(features) else features[torch.randperm(len(features), generator=generator)[:number]]
    )
