"""Bayesian linear model: evidence of labels given features, and probability of new labels, in closed form.

    y = x w + e,    w ~ N(0, I / alpha),    e ~ N(0, 1 / beta),    one model per column of y

After rotation to the eigenvectors of X'X, of eigenvalues l_i, everything is a sum over dimensions (MacKay 1992; Bishop
2006, section 3.5). With t = alpha / beta the best beta has a closed form, so that the evidence is maximised over t
alone: a grid over all orders of magnitude, which finds the largest of several maxima, then golden section.

tridiagonal.py has the same model without eigenvectors, which is faster where the features have full rank.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from .tridiagonal import Tridiagonal

_GRID = 97  # values of t, two an order of magnitude or more
_REFINEMENTS = 36  # of golden section: the bracket shrinks to 3e-8 of itself
_LEAST_NOISE = 1e-8  # variance of the noise, of that of the labels: else labels that are linear have infinite evidence
_GOLDEN = (math.sqrt(5) - 1) / 2


class Spectrum(NamedTuple):
    """What the evidence of C columns of labels needs to know of n samples with d features.

    Attributes:
        count: n.
        eigenvalues: (d,) of X'X, at least 0.
        fitted: (d, C) share of y'y along each eigenvector: (v'X'y)^2 / l, 0 where l is 0.
        residual: (C,) y'y that no linear function of the features explains.
    """

    count: int
    eigenvalues: np.ndarray
    fitted: np.ndarray
    residual: np.ndarray

    @property
    def squares(self) -> np.ndarray:
        """(C,) y'y."""
        return self.residual + self.fitted.sum(0)

    @property
    def ends(self) -> tuple[float, float]:
        """Smallest and largest eigenvalue above 0; both 0 where there is none."""
        positive = self.eigenvalues[self.eigenvalues > 0]
        return (float(positive.min()), float(positive.max())) if len(positive) else (0.0, 0.0)

    def volume_and_misfit(self, ratio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(C,) log |X'X / t + I|, and least squared error plus penalty, at t = ratio (C,)."""
        volume = np.log1p(self.eigenvalues[:, None] / ratio).sum(0)
        shrunk = self.fitted * (ratio / (ratio + self.eigenvalues[:, None]))
        return volume, self.residual + shrunk.sum(0)

    def floored(self, least: np.ndarray) -> Spectrum:
        """With misfits of at least `least` (C,)."""
        return self._replace(residual=np.maximum(self.residual, least))


def spectrum_of(count: int, gram: np.ndarray, products: np.ndarray, squares: np.ndarray) -> tuple[Spectrum, np.ndarray]:
    """The spectrum, and the eigenvectors (d, d) as columns, from n, X'X (d, d), X'y (d, C) and y'y (C,), in float64."""
    eigenvalues, vectors = np.linalg.eigh(gram)
    floor = max(float(eigenvalues[-1]), 0.0) * len(eigenvalues) * np.finfo(np.float64).eps
    kept = eigenvalues > floor
    eigenvalues = np.where(kept, eigenvalues, 0.0)
    fitted = np.where(kept[:, None], (vectors.T @ products) ** 2 / np.where(kept, eigenvalues, 1.0)[:, None], 0.0)
    return Spectrum(count, eigenvalues, fitted, np.maximum(squares - fitted.sum(0), 0.0)), vectors


def log_evidence(spectrum: Spectrum | Tridiagonal, alpha: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """(C,) log p(y | X, alpha, beta) in nats, of all n labels together; alpha and beta (C,), larger than 0."""
    volume, misfit = spectrum.volume_and_misfit(alpha / beta)
    return 0.5 * (spectrum.count * np.log(beta / (2 * np.pi)) - volume - beta * misfit)


def maximise_evidence(spectrum: Spectrum | Tridiagonal) -> tuple[np.ndarray, np.ndarray]:
    """(alpha, beta), (C,) each, of largest evidence.

    A column of labels that does not vary, of which no noise could be estimated, is refused, as are features that are
    all 0; the noise is at least 1e-8 of the mean square of the labels. Features that say nothing end with an alpha of
    1e8 times the largest eigenvalue, in units of beta: weights of 0.

    Raises:
        ValueError: labels that are all 0, or features that are all 0.
    """
    squares = spectrum.squares
    if not (squares > 0).all():
        raise ValueError(f"column {int((squares <= 0).argmax())} of the labels is 0 everywhere: leave that class out.")
    smallest, largest = spectrum.ends
    if not largest > 0:
        raise ValueError("the features are the same for all samples: nothing can be told from them.")
    floored = spectrum.floored(_LEAST_NOISE * squares)
    grid = np.linspace(math.log(smallest * 1e-8), math.log(largest * 1e8), _GRID)
    values = np.stack([_profile(floored, np.full(len(squares), point)) for point in grid])
    best = values.argmax(0)
    low = grid[np.maximum(best - 1, 0)]
    high = grid[np.minimum(best + 1, _GRID - 1)]
    first = high - _GOLDEN * (high - low)
    second = low + _GOLDEN * (high - low)
    at_first = _profile(floored, first)
    at_second = _profile(floored, second)
    for _ in range(_REFINEMENTS):
        left = at_first > at_second
        low, high = np.where(left, low, first), np.where(left, second, high)
        new = np.where(left, high - _GOLDEN * (high - low), low + _GOLDEN * (high - low))
        at_new = _profile(floored, new)
        first, second = np.where(left, new, second), np.where(left, first, new)
        at_first, at_second = np.where(left, at_new, at_second), np.where(left, at_first, at_new)
    ratio = np.exp((low + high) / 2)
    beta = spectrum.count / floored.volume_and_misfit(ratio)[1]
    return ratio * beta, beta


def log_predictive(train: Spectrum, both: Spectrum, alpha: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """(C,) log p(y' | X', y, X, alpha, beta) in nats, of all labels y' together.

    It is log p(y', y) - log p(y): `both` is the spectrum of old and new samples in one, with the same offsets.
    """
    return log_evidence(both, alpha, beta) - log_evidence(train, alpha, beta)


def _profile(spectrum: Spectrum | Tridiagonal, log_ratio: np.ndarray) -> np.ndarray:
    """(C,) evidence at t = exp(log_ratio) and the beta that is best there, up to a constant."""
    volume, misfit = spectrum.volume_and_misfit(np.exp(log_ratio))
    return -0.5 * (spectrum.count * np.log(misfit) + volume)
