"""Trace of the square root of a product of two covariances, in real float64 arithmetic.

tr (S_1 S_2)^(1/2) is the sum of the roots of the eigenvalues of the symmetric F^T S_2 F, for any factor S_1 = F F^T:
the triangular one of Cholesky, or with pivoting a thin one (D, rank) where S_1 has no full rank.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.linalg import eigvals_banded, lapack

from .band_matrix import reduce_to_band, trace_of_root_of_band

_EPSILON = float(np.finfo(np.float64).eps)
_LARGE, _WIDTH = 768, 48  # from this size on the way through a band of this width is faster


def trace_of_root_of_product(sigma_1: np.ndarray, sigma_2: np.ndarray) -> float:
    """tr (S_1 S_2)^(1/2) of two (D, D) symmetric positive semi-definite float64 matrices.

    Raises:
        ValueError: a matrix with a negative eigenvalue beyond rounding.
    """
    # Eigenvalues of the product below this are rounding, and the root of rounding is far from small.
    rounding = 16 * _EPSILON * _norm(sigma_1) * _norm(sigma_2)
    factor = _cholesky(sigma_1)
    if factor is not None:
        # LAPACK's upper triangle, by columns, is the lower one by rows.
        product, _ = lapack.dsygst(sigma_2.T, factor, itype=2, lower=0)
        trace, eigenvalues = _trace_or_eigenvalues(product.T, rounding)
        if trace is not None:
            return trace
        # Some eigenvalues drown in rounding: because they are small, or because sigma_2 has no full rank?
        if _thin_factor(sigma_2).shape[1] == len(sigma_2):
            return float(np.sqrt(eigenvalues.clip(0)).sum())
    factors = _thin_factor(sigma_1), _thin_factor(sigma_2)
    thin, other = (factors[0], sigma_2) if factors[0].shape[1] <= factors[1].shape[1] else (factors[1], sigma_1)
    if thin.shape[1] == 0:
        return 0.0
    trace, eigenvalues = _trace_or_eigenvalues(thin.T @ (other @ thin), rounding)
    return float(np.sqrt(eigenvalues[eigenvalues > rounding]).sum()) if trace is None else trace


def _trace_or_eigenvalues(product: np.ndarray, rounding: float) -> tuple[float | None, np.ndarray | None]:
    """The sum of the roots of the eigenvalues, or these themselves, ascending, where some are not above `rounding`.

    Only the lower triangle of the product is read.
    """
    size = len(product)
    if size < _LARGE:
        eigenvalues = np.linalg.eigvalsh(product)
        trace = float(np.sqrt(eigenvalues).sum()) if eigenvalues[0] > rounding else None
        return trace, eigenvalues
    # Rows a power of two apart would share the same places of a cache.
    matrix = torch.empty(size, size + 8, dtype=torch.float64)[:, :size]
    matrix.copy_(torch.from_numpy(product))
    band = reduce_to_band(matrix, _WIDTH)
    trace = trace_of_root_of_band(band, rounding)
    return trace, eigvals_banded(band, lower=True, check_finite=False) if trace is None else None


def _norm(sigma: np.ndarray) -> float:
    """The largest eigenvalue, by a few steps of the power method: of the right size is enough."""
    vector = sigma[np.argmax(np.diagonal(sigma))]
    for _ in range(5):
        length = float(np.linalg.norm(vector))
        if length == 0:
            return 0.0
        vector = sigma @ (vector / length)
    return float(np.linalg.norm(vector))


def _cholesky(sigma: np.ndarray) -> np.ndarray | None:
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
