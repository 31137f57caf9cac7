"""Which of many features tell the classes: a Bayesian linear model with a spike and a slab, by variational EM.

    y_c = x w_c + e,  e ~ N(0, 1 / beta);   w_jc | z_j ~ N(0, 1 / slab) where z_j = 1, N(0, 1 / spike) where it is 0;
    z_j ~ Bernoulli(share)

One z_j for all classes: a feature is kept or not. ZooD (Dong et al. 2022, section 3.3) selects so from the features of
several encoders side by side. q(w) q(z) is fitted by turns, and with it spike, slab, share and beta: each turn has a
closed form that raises the bound of log p(y | x), so that it never falls.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .baselines import checked_samples
from .evidence import log_evidence, maximise_evidence, spectrum_of

_SPIKE = 100.0  # precision of the spike at the start, in that of the slab
_LEAST_NOISE = 1e-8  # variance, of that of the labels
_LARGEST = 1e8  # precision of spike or slab, in that of the data of a standardised feature
_STRONG = 5.0  # nats by which the evidence with all features exceeds that without: strong (Kass and Raftery 1995)
_DIGITS = 5  # to which two standardised columns agree that count as one


class Selection(NamedTuple):
    """What variational EM has found of D features.

    Attributes:
        kept: (D,) bool, relevance above one half. Where no feature stands out and yet all together tell the classes (as
            where each tells a little), all that vary and repeat no other.
        relevance: (D,) float64, q(z_j = 1); 0 of columns that do not vary or repeat an earlier one.
        bounds: (T,) of log p(y | x) in nats, one after each round of turns, never falling.
    """

    kept: Tensor
    relevance: Tensor
    bounds: list[float]


def select_features(features: Tensor, labels: Tensor, *, rounds: int = 200, tolerance: float = 1e-5) -> Selection:
    """Fit the model at the top of this file to standardised features and centred 0/1 labels.

    A column that does not vary says nothing and is left out; one that repeats an earlier one, up to scale, offset and
    sign, is left out too. Of two starts, all features alike and each as if it were the only one, the one with the
    larger bound counts. A round costs one inverse of side min(N, D).

    Args:
        features: (N, D), finite. labels: (N,) class ids, of two classes or more.
        rounds: at most.
        tolerance: rise of the bound, per sample, at which it ends.

    Raises:
        ValueError: other shapes or values, or no column that varies.
    """
    if rounds < 1 or not tolerance > 0:
        raise ValueError(f"rounds must be at least 1 and tolerance larger than 0, got {rounds} and {tolerance}.")
    rows, one_hot = checked_samples(features, labels)
    columns, rows = _usable(rows)
    targets = one_hot - one_hot.mean(0)
    found = []
    for start in (np.full(len(columns), 0.5), _alone(rows, targets)):
        model = _SpikeAndSlab(rows, targets, start)
        bounds = [model.turn()]
        while len(bounds) < rounds and (len(bounds) < 2 or bounds[-1] - bounds[-2] > tolerance * len(rows)):
            bounds.append(model.turn())
        found.append((model, bounds))
    model, bounds = max(found, key=lambda pair: pair[1][-1])
    relevance = torch.zeros(features.shape[1], dtype=torch.float64)
    relevance[columns] = torch.from_numpy(model.relevance)
    kept = relevance > 0.5
    if not kept.any() and model.told > _STRONG:
        kept[columns] = True
    return Selection(kept, relevance, bounds)


def _alone(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(D,) where to start: how probable it is that each feature, as if it were the only one, explains a tenth of y."""
    count = len(x)
    shares = (x.T @ y) ** 2 / (count * (y**2).sum(0))  # squared correlations (D, C)
    odds = 0.5 * (count * shares / (1 + 10 / count) - np.log1p(count / 10)).sum(1)
    return 1 / (1 + np.exp(-odds.clip(-700, 700)))


def _usable(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the columns that vary and repeat no earlier one, and these columns standardised."""
    centred = rows - rows.mean(0)
    deviations = np.sqrt((centred**2).mean(0))
    varying = deviations > 1e-10 * np.abs(rows).max(0)
    columns = varying.nonzero()[0]
    if not len(columns):
        raise ValueError("the features are the same for all samples: nothing can be told from them.")
    standard = centred[:, columns] / deviations[columns]
    seen = set()
    kept = []
    for place, column in enumerate(standard.T):
        largest = column[np.abs(column).argmax()]
        key = (np.round(column / np.sign(largest), _DIGITS) + 0.0).astype(np.float32).tobytes()  # -0 is 0
        if key not in seen:
            seen.add(key)
            kept.append(place)
    return columns[kept], standard[:, kept]


class _SpikeAndSlab:
    """State of the turns: x (N, D) standardised, y (N, C) centred; precisions, share and relevance (D,) as above."""

    def __init__(self, x: np.ndarray, y: np.ndarray, relevance: np.ndarray):
        self.x = x
        self.y = y
        self.products = x.T @ y
        self.squares = float((y**2).sum())
        self.gram = x.T @ x if len(x) >= x.shape[1] else None
        alpha, beta, self.told = _ridge(x, y)
        self.beta = beta
        self.slab = alpha
        self.spike = alpha * _SPIKE
        self.share = float(np.clip(relevance.mean(), 0.5 / x.shape[1], 0.5))
        self.relevance = relevance

    def turn(self) -> float:
        """q(w), q(z), then the parameters; the bound with q(w) and q(z) as they then are."""
        count, classes = self.y.shape
        dimension = self.x.shape[1]
        prior = self.relevance * self.slab + (1 - self.relevance) * self.spike
        mean, variances, log_volume = self._weights(prior)
        squares = (mean**2).sum(1) + classes * variances
        misfit = float(((self.y - self.x @ mean) ** 2).sum())
        trace = classes * (dimension - float((prior * variances).sum())) / self.beta  # C tr(X S X')

        logit = np.log(self.share / (1 - self.share)) + 0.5 * classes * np.log(self.slab / self.spike)
        logit = logit - 0.5 * (self.slab - self.spike) * squares
        self.relevance = 1 / (1 + np.exp(-logit.clip(-700, 700)))

        kept, others = self.relevance, 1 - self.relevance
        most = _LARGEST * count * self.beta
        self.slab = _ratio(classes * kept.sum(), (kept * squares).sum(), self.slab, most)
        self.spike = _ratio(classes * others.sum(), (others * squares).sum(), self.spike, most)
        self.share = float(np.clip(kept.mean(), 1e-6, 1 - 1e-6))
        noise = max((misfit + trace) / (count * classes), _LEAST_NOISE * self.squares / (count * classes))
        self.beta = 1 / noise

        fit = 0.5 * count * classes * np.log(self.beta / (2 * np.pi)) - 0.5 * self.beta * (misfit + trace)
        weights = 0.5 * classes * (kept * np.log(self.slab) + others * np.log(self.spike)).sum()
        weights -= 0.5 * ((kept * self.slab + others * self.spike) * squares).sum()
        entropy = 0.5 * classes * (log_volume + dimension)  # the terms of 2 pi cancel
        choices = kept.sum() * np.log(self.share) + others.sum() * np.log(1 - self.share)
        choices -= sum(float((part[part > 0] * np.log(part[part > 0])).sum()) for part in (kept, others))
        return float(fit + weights + entropy + choices)

    def _weights(self, prior: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        """Mean (D, C), variances (D,) and log determinant of the covariance S = (beta X'X + diag(prior))^-1 of q(w)."""
        if self.gram is not None:
            scale = 1 / np.sqrt(prior)
            inner = self.beta * self.gram * scale * scale[:, None] + np.eye(len(prior))
            inverse, log_volume = _inverse(inner)
            mean = self.beta * scale[:, None] * (inverse @ (scale[:, None] * self.products))
            return mean, scale**2 * np.diagonal(inverse), -log_volume - float(np.log(prior).sum())
        wide = self.x / prior  # (N, D); Woodbury's identity, of side N
        inverse, log_volume = _inverse(np.eye(len(self.x)) + self.beta * (wide @ self.x.T))
        through = inverse @ wide
        mean = self.beta * wide.T @ (inverse @ self.y)
        variances = 1 / prior - self.beta * (wide * through).sum(0)
        return mean, variances, -log_volume - float(np.log(prior).sum())


def _inverse(matrix: np.ndarray) -> tuple[np.ndarray, float]:
    """Inverse and log determinant of a positive definite matrix."""
    factor = torch.linalg.cholesky(torch.from_numpy(matrix))
    return torch.cholesky_inverse(factor).numpy(), 2 * float(factor.diagonal().log().sum())


def _ratio(numerator: float, denominator: float, now: float, most: float) -> float:
    """A precision in closed form; where nothing says what it is, it stays."""
    return min(numerator / denominator, most) if numerator > 0 and denominator > 0 else now


def _ridge(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Precisions of weights and noise to start from: those of largest evidence without spike and slab, means over
    classes; and by how much that exceeds the evidence of weights that are all 0, in nats, of all classes."""
    rows = np.linalg.qr(x.T, mode="r").T if x.shape[1] > len(x) else x
    squares = (y**2).sum(0)
    spectrum, _ = spectrum_of(len(x), rows.T @ rows, rows.T @ y, squares)
    alpha, beta = maximise_evidence(spectrum)
    nothing = 0.5 * len(x) * (np.log(len(x) / (2 * np.pi * squares)) - 1)
    told = float((log_evidence(spectrum, alpha, beta) - nothing).sum())
    return float(np.exp(np.log(alpha).mean())), float(np.exp(np.log(beta).mean())), told
