"""Trace of the square root of a product of two covariances, in real float64 arithmetic.

tr (S_1 S_2)^(1/2) is the sum of the roots of the eigenvalues of the symmetric F^T S_2 F, for any factor S_1 = F F^T:
the lower triangular one of Cholesky, or with pivoting a thin one (D, rank) where S_1 has no full rank.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import lapack

_EPSILON = float(np.finfo(np.float64).eps)


def trace_of_root_of_product(sigma_1: np.ndarray, sigma_2: np.ndarray) -> float:
    """tr (S_1 S_2)^(1/2) of two (D, D) symmetric positive semi-definite float64 matrices.

    Raises:
        ValueError: a matrix with a negative eigenvalue beyond rounding.
    """
    factor, other = _cholesky(sigma_1), sigma_2
    if factor is None:
        factor, other = _cholesky(sigma_2), sigma_1
    if factor is not None:
        product, _ = lapack.dsygst(np.asfortranarray(other), factor, itype=2, lower=1)
    else:
        thin, other = sorted(((_thin_factor(sigma_1), sigma_2), (_thin_factor(sigma_2), sigma_1)), key=_rank)[0]
        if not thin.shape[1]:
            return 0.0
        product = thin.T @ (other @ thin)
    return _sum_of_roots(np.linalg.eigvalsh(product))


def _rank(pair: tuple[np.ndarray, np.ndarray]) -> int:
    return pair[0].shape[1]


def _cholesky(sigma: np.ndarray) -> np.ndarray | None:
    """Lower triangular factor, None unless the matrix has full rank beyond rounding."""
    factor, failed = lapack.dpotrf(sigma.T, lower=1, clean=1)
    if failed:
        return None
    pivots = np.diagonal(factor) ** 2
    return factor if pivots.min() > len(sigma) * _EPSILON * pivots.max() else None


def _thin_factor(sigma: np.ndarray) -> np.ndarray:
    """(D, rank) with F F^T = sigma up to rounding, by Cholesky with complete pivoting (Higham 2002, section 10.3)."""
    factor, order, rank, _ = lapack.dpstrf(sigma.T, lower=1)
    # What pivoting leaves over must be rounding only: a negative eigenvalue would hide in it.
    factor = np.tril(factor)[:, :rank]
    left_over = np.diagonal(sigma)[order - 1] - (factor**2).sum(1)
    largest = float(np.diagonal(sigma).max(initial=0))
    if len(left_over) and left_over.min() < -1e-8 * largest:
        raise ValueError(f"a covariance has a negative eigenvalue: {left_over.min():.3g} where 0 is the least.")
    thin = np.empty_like(factor)
    thin[order - 1] = factor
    return thin


def _sum_of_roots(eigenvalues: np.ndarray) -> float:
    largest = float(eigenvalues.max())
    if eigenvalues.min() < -1e-8 * max(largest, 0):
        raise ValueError(f"a covariance has a negative eigenvalue: their product has {eigenvalues.min():.3g}.")
    # Below this an eigenvalue is rounding, and its root would be far from small.
    kept = eigenvalues[eigenvalues > len(eigenvalues) * _EPSILON * largest]
    return float(np.sqrt(kept).sum())
