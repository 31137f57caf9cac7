"""Bayesian linear model: evidence of labels given features, and probability of new labels, in closed form.

    y = x w + e,    w ~ N(0, I / alpha),    e ~ N(0, 1 / beta),    one model per column of y

After rotation to the eigenvectors of X'X, of eigenvalues l_i, everything is a sum over dimensions (MacKay 1992; Bishop
2006, section 3.5). With t = alpha / beta the best beta has a closed form, so that the evidence is maximised over t
alone: a grid over all orders of magnitude, which finds the largest of several maxima, then golden section.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

_GRID = 97  # values of t, two an order of magnitude or more
_REFINEMENTS = 48  # of golden section: the bracket shrinks to 1e-10 of itself
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


def spectrum_of(count: int, gram: np.ndarray, products: np.ndarray, squares: np.ndarray) -> tuple[Spectrum, np.ndarray]:
    """The spectrum, and the eigenvectors (d, d) as columns, from n, X'X (d, d), X'y (d, C) and y'y (C,), in float64."""
    eigenvalues, vectors = np.linalg.eigh(gram)
    floor = max(float(eigenvalues[-1]), 0.0) * len(eigenvalues) * np.finfo(np.float64).eps
    kept = eigenvalues > floor
    eigenvalues = np.where(kept, eigenvalues, 0.0)
    fitted = np.where(kept[:, None], (vectors.T @ products) ** 2 / np.where(kept, eigenvalues, 1.0)[:, None], 0.0)
    return Spectrum(count, eigenvalues, fitted, np.maximum(squares - fitted.sum(0), 0.0)), vectors


def log_evidence(spectrum: Spectrum, alpha: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """(C,) log p(y | X, alpha, beta) in nats, of all n labels together; alpha and beta (C,), larger than 0."""
    ratio = alpha / beta
    volume = np.log1p(spectrum.eigenvalues[:, None] / ratio).sum(0)
    return 0.5 * (spectrum.count * np.log(beta / (2 * np.pi)) - volume - beta * _misfit(spectrum, ratio))


def maximise_evidence(spectrum: Spectrum) -> tuple[np.ndarray, np.ndarray]:
    """(alpha, beta), (C,) each, of largest evidence.

    A column of labels that does not vary, of which no noise could be estimated, is refused, as are features that are
    all 0; the noise is at least 1e-8 of the mean square of the labels. Features that say nothing end with an alpha of
    1e8 times the largest eigenvalue, in units of beta: weights of 0.

    Raises:
        ValueError: labels that are all 0, or features that are all 0.
    """
    squares = spectrum.residual + spectrum.fitted.sum(0)
    if not (squares > 0).all():
        raise ValueError(f"column {int((squares <= 0).argmax())} of the labels is 0 everywhere: leave that class out.")
    if not spectrum.eigenvalues.max() > 0:
        raise ValueError("the features are the same for all samples: nothing can be told from them.")
    floored = spectrum._replace(residual=np.maximum(spectrum.residual, _LEAST_NOISE * squares))
    positive = spectrum.eigenvalues[spectrum.eigenvalues > 0]
    grid = np.linspace(math.log(positive.min() * 1e-8), math.log(positive.max() * 1e8), _GRID)
    values = np.stack([_profile(floored, np.full(len(squares), point)) for point in grid])
    best = values.argmax(0)
    low = grid[np.maximum(best - 1, 0)]
    high = grid[np.minimum(best + 1, _GRID - 1)]
    for _ in range(_REFINEMENTS):
        first = high - _GOLDEN * (high - low)
        second = low + _GOLDEN * (high - low)
        left = _profile(floored, first) > _profile(floored, second)
        low, high = np.where(left, low, first), np.where(left, second, high)
    ratio = np.exp((low + high) / 2)
    beta = spectrum.count / _misfit(floored, ratio)
    return ratio * beta, beta


def log_predictive(train: Spectrum, both: Spectrum, alpha: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """(C,) log p(y' | X', y, X, alpha, beta) in nats, of all labels y' together.

    It is log p(y', y) - log p(y): `both` is the spectrum of old and new samples in one, with the same offsets.
    """
    return log_evidence(both, alpha, beta) - log_evidence(train, alpha, beta)


def _misfit(spectrum: Spectrum, ratio: np.ndarray) -> np.ndarray:
    return spectrum.residual + (spectrum.fitted * (ratio / (ratio + spectrum.eigenvalues[:, None]))).sum(0)


def _profile(spectrum: Spectrum, log_ratio: np.ndarray) -> np.ndarray:
    """(C,) evidence at t = exp(log_ratio) and the beta that is best there, up to a constant."""
    ratio = np.exp(log_ratio)
    volume = np.log1p(spectrum.eigenvalues[:, None] / ratio).sum(0)
    return -0.5 * (spectrum.count * np.log(_misfit(spectrum, ratio)) + volume)
