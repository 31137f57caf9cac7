"""A large symmetric matrix to a narrow band by products of matrices, and the trace of a band matrix's square root.

LAPACK's eigenvalues go through a tridiagonal matrix, and half of that work is products with single vectors, which
wait for memory. A band of some 64 diagonals needs products of matrices only (Dongarra, Hammarling and Sorensen 1989;
Bischof, Lang and Sun 2000), and where the trace of the root is all that is wanted the band is narrow enough.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.linalg import lapack
from torch import Tensor

_BLOCK = 512  # columns whose lower part is updated at once
_STEP = 0.7  # of the trapezoidal rule: error exp(-2 pi^2 / step), 6e-13 of each root


def reduce_to_band(matrix: Tensor, width: int = 64) -> np.ndarray:
    """Lower band of Q^T A Q with the eigenvalues of A, by blocked Householder reflections.

    Args:
        matrix: symmetric (D, D) float64 on the CPU, D > width, of which the lower triangle is read. It is
            overwritten. A row stride that is no power of two is faster.
        width: diagonals below the main one.

    Returns:
        (width + 1, D), entry [i, j] is that of row j + i, column j: LAPACK's lower band, Fortran order.
    """
    size = len(matrix)
    for a, b in _blocks(0, size):  # only these are kept whole
        block = matrix[a:b, a:b]
        block.copy_(block.tril() + block.tril(-1).T)
    band = np.zeros((size, width + 1))
    for first in range(0, size - width, width):
        panel = matrix[first + width :, first : first + width]
        reflectors, scales = torch.geqrf(panel)
        count = min(panel.shape)
        triangle = torch.zeros(width, width, dtype=matrix.dtype)
        triangle[:count] = reflectors[:count].triu()
        _write(band, first, torch.cat([matrix[first : first + width, first : first + width], triangle]))
        reflectors = reflectors[:, :count].tril(-1)
        reflectors.diagonal().fill_(1)
        _apply_both_sides_(matrix, first + width, reflectors, scales)
    done = first + width
    _write(band, done, matrix[done:, done:])
    return band.T


def _write(band: np.ndarray, first: int, columns: Tensor) -> None:
    """The diagonals of (rows, columns), which begins on the main diagonal, into band[first:]."""
    columns, width = columns.numpy(), band.shape[1]
    for column in range(columns.shape[1]):
        part = columns[column : column + width, column]
        band[first + column, : len(part)] = part


def _apply_both_sides_(matrix: Tensor, first: int, reflectors: Tensor, scales: Tensor) -> None:
    """A <- H^T A H with H = I - V T V^T for the part from row and column `first` on, of which the lower half is kept.

    In the symmetric form A - V W^T - W V^T, W = Y - V (T^T V^T Y) / 2, Y = A V T (Dongarra et al. 1989, section 4);
    T^-1 is the upper half of V^T V with 1 / scales on the diagonal (Schreiber and Van Loan 1989; Puglisi 1992).
    """
    inverse = (reflectors.T @ reflectors).triu(1)
    inverse.diagonal().copy_(torch.where(scales == 0, torch.inf, 1 / scales))
    flat = scales == 0  # a column that was zero already is not reflected
    inverse[flat], inverse[:, flat] = 0.0, 0.0
    inverse.diagonal()[flat] = 1.0
    turned = torch.linalg.solve_triangular(inverse, reflectors, upper=True, left=False)  # V T
    turned[:, flat] = 0.0
    size = len(matrix)
    blocks = _blocks(first, size)
    product = torch.zeros_like(turned)
    for a, b in blocks:
        product[a - first :].addmm_(matrix[a:, a:b], turned[a - first : b - first])
        if b < size:
            product[a - first : b - first].addmm_(matrix[b:, a:b].T, turned[b - first :])
    product.addmm_(reflectors, turned.T @ product, alpha=-0.5)
    left, right = torch.cat([reflectors, product], 1), torch.cat([product, reflectors], 1)
    for a, b in blocks:
        matrix[a:, a:b].addmm_(left[a - first :], right[a - first : b - first].T, alpha=-1)


def _blocks(first: int, size: int) -> list[tuple[int, int]]:
    """Ranges of columns from `first` on, which end at the same columns whatever `first`."""
    edges = [first, *range((first // _BLOCK + 1) * _BLOCK, size, _BLOCK), size]
    return list(zip(edges, edges[1:], strict=False))


def trace_of_root_of_band(band: np.ndarray, rounding: float) -> float | None:
    """tr A^(1/2) of a positive definite band matrix in LAPACK's lower form.

    2 pi x^(1/2) is the integral of s^(-1/2) log(1 + x / s) over s > 0, so that log determinants of A + s I give the
    trace: a banded Cholesky each. With s = exp(t) the trapezoidal rule converges geometrically; both ends, where
    log det(I + A / s) is log det A - D t or tr A / s - |A|^2 / (2 s^2), are geometric series.

    Args:
        band: (width + 1, D).
        rounding: eigenvalues below it are not to be trusted.

    Returns:
        The trace, None where the smallest eigenvalue is not above `rounding`.
    """
    size = band.shape[1]
    factor = _cholesky(band, 0.0)
    if factor is None or _smallest_eigenvalue(factor) <= rounding:
        return None
    log_determinant = _log_determinant(factor)
    trace = float(band[0].sum())
    square = float((band[0] ** 2).sum() + 2 * (band[1:] ** 2).sum())
    # The upper end: beyond exp(9) times the largest eigenvalue the series' third term is nothing.
    upper = math.ceil((0.5 * math.log(square) + 9) / _STEP)
    total = sum(
        sign * moment * math.exp(-power * upper * _STEP) / (1 - math.exp(-power * _STEP))
        for sign, moment, power in ((1, trace, 0.5), (-1, square / 2, 1.5))
    )
    place, ratio = upper, math.exp(-0.5 * _STEP)
    while True:
        place -= 1
        t = place * _STEP
        value = _log_determinant(_cholesky(band, math.exp(t))) - size * t
        total += math.exp(t / 2) * value
        if math.exp(t / 2) * (value - (log_determinant - size * t)) < 1e-13 * total:
            break
    # The lower end: sum over i >= 0 of exp((t - i h) / 2) (log det A - D (t - i h)), t the next place.
    t = (place - 1) * _STEP
    series = (log_determinant - size * t) / (1 - ratio) + size * _STEP * ratio / (1 - ratio) ** 2
    return _STEP / (2 * math.pi) * (total + math.exp(t / 2) * series)


def _cholesky(band: np.ndarray, shift: float) -> np.ndarray | None:
    """Band of the lower triangular factor of A + shift I; None unless it is positive definite."""
    shifted = np.array(band, order="F")
    shifted[0] += shift
    factor, failed = lapack.dpbtrf(shifted, lower=1, overwrite_ab=1)
    return None if failed else factor


def _log_determinant(factor: np.ndarray) -> float:
    return 2 * float(np.log(factor[0]).sum())


def _smallest_eigenvalue(factor: np.ndarray) -> float:
    """Of the matrix with this factor, by a few steps of inverse iteration: of the right size, never below it."""
    vector = np.zeros(factor.shape[1])
    vector[np.argmin(factor[0])] = 1.0
    length = 1.0
    for _ in range(5):
        vector, _ = lapack.dpbtrs(factor, vector / length, lower=1)
        length = float(np.linalg.norm(vector))
    return 1 / length
