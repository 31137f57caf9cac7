"""The Bayesian linear model without eigenvectors: X'X is brought to a tridiagonal matrix once.

With X'X = Q T Q' (Householder), (X'X + t I)^-1 and its determinant cost O(d) operations at any t, where eigenvectors,
as evidence.py has them, cost more than all the rest. One reduction also serves offsets of the same samples:

    (X - 1 a')'(X - 1 a') = X'X + n a a'  for centred X

differs by rank one (Sherman and Morrison 1950), so that all samples are reduced once however many domains are left out.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.linalg import eigvalsh_tridiagonal, lapack


class Tridiagonal(NamedTuple):
    """n samples with d features that have full rank, and C columns of labels, as `evidence.Spectrum`.

    Attributes:
        count: n.
        diagonal, off: (d,) and (d - 1,) of T.
        products: (d, C) Q'X'y.
        squares: (C,) y'y.
        reflections: LAPACK's, of Q, and their factors.
        ends: smallest and largest eigenvalue.
        lift: (C,) added to every misfit, so that the noise has a floor.
    """

    count: int
    diagonal: np.ndarray
    off: np.ndarray
    products: np.ndarray
    squares: np.ndarray
    reflections: tuple[np.ndarray, np.ndarray]
    ends: tuple[float, float]
    lift: np.ndarray | float = 0.0

    def turned(self, columns: np.ndarray) -> np.ndarray:
        """(d, k) Q' columns."""
        return _turned(*self.reflections, columns)

    def volume_and_misfit(self, ratio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(C,) log |X'X + t I| - d log t, and least squared error plus penalty, at t = ratio (C,)."""
        volumes = np.empty(len(ratio))
        explained = np.empty(len(ratio))
        for value in np.unique(ratio):  # a grid has one for all columns
            chosen = ratio == value
            volumes[chosen], solved = self._solved(float(value), self.products[:, chosen])
            explained[chosen] = (self.products[:, chosen] * solved).sum(0)
        return volumes, self.squares - explained + self.lift

    def floored(self, least: np.ndarray) -> Tridiagonal:
        """With misfits of at least `least` (C,)."""
        _, explained = self._solved(0.0, self.products)
        residual = self.squares - (self.products * explained).sum(0)
        return self._replace(lift=np.maximum(0.0, least - np.maximum(residual, 0.0)))

    def moved_evidence(self, offset: np.ndarray, shares: np.ndarray, alpha: np.ndarray, beta: np.ndarray) -> np.ndarray:
        """(C,) log evidence of these samples when `offset` (d,) is added to each x, and `shares` (C,) to each y.

        The samples must be centred, x and y.
        """
        u = self.turned(offset[:, None])[:, 0]
        products = self.products + self.count * np.outer(u, shares)
        squares = self.squares + self.count * shares**2
        found = np.empty(len(alpha))
        for column, ratio in enumerate(alpha / beta):
            volume, solved = self._solved(float(ratio), np.stack([products[:, column], u], 1))
            more = 1 + self.count * float(u @ solved[:, 1])
            explained = products[:, column] @ solved[:, 0] - self.count * float(u @ solved[:, 0]) ** 2 / more
            misfit = squares[column] - explained
            found[column] = self.count * np.log(beta[column] / (2 * np.pi)) - volume - np.log(more)
            found[column] -= beta[column] * misfit
        return 0.5 * found

    def _solved(self, ratio: float, columns: np.ndarray) -> tuple[float, np.ndarray]:
        """log |T + t I| - d log t (at 0 without the latter), and (T + t I)^-1 columns."""
        diagonal, off, failed = lapack.dpttrf(self.diagonal + ratio, self.off)
        if failed:
            raise ArithmeticError("the features do not have full rank.")
        solved, _ = lapack.dpttrs(diagonal, off, np.asfortranarray(columns))
        volume = float(np.log(diagonal).sum())
        return volume - (len(diagonal) * np.log(ratio) if ratio > 0 else 0.0), solved


def tridiagonal_of(count: int, gram: np.ndarray, products: np.ndarray, squares: np.ndarray) -> Tridiagonal | None:
    """From n, X'X (d, d), X'y (d, C) and y'y (C,), float64; None where d < 2 or the features do not have full rank."""
    size = len(gram)
    if size < 2:
        return None
    work, _ = lapack.dsytrd_lwork(size, lower=1)
    reflections, diagonal, off, factors, _ = lapack.dsytrd(gram.T, lower=1, lwork=int(work))
    low, high = (
        float(eigvalsh_tridiagonal(diagonal, off, select="i", select_range=(place, place))[0])
        for place in (0, size - 1)
    )
    if not low > high * size * np.finfo(np.float64).eps:
        return None
    kept = (reflections[1:, :-1], factors)
    turned = _turned(*kept, products)
    return Tridiagonal(count, diagonal, off, turned, squares, kept, (low, high))


def _turned(reflections: np.ndarray, factors: np.ndarray, columns: np.ndarray) -> np.ndarray:
    below = np.asfortranarray(columns[1:])
    work = max(1, 64 * below.shape[1])
    found, _, _ = lapack.dormqr("L", "T", reflections, factors, below, work)
    return np.concatenate([columns[:1], found])
