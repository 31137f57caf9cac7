"""Which encoder to take for data of several domains: the score of ZooD (Dong et al. 2022), domain by domain left out.

    labels     log p(y' | X', y, X): the labels of the domain that was left out, by a Bayesian linear model of the other
               domains (evidence.py), one model per class on 0/1 labels: mean over classes and samples
    density    log p(X' | X): its features, by a Gaussian of those of the others (density.py): per sample and dimension
    stability  density, minus the same of the features that the Gaussian was fitted to
    score      labels + stability

ZooD's own sum has the density in place of the stability. A density rises without limit as features collapse to few
directions, and so prefers encoders that say nothing; measured from the old features' own density it is 0 for features
that are spread alike in all domains, whatever their spectrum, and can only be lost by moving.

All parts are in nats. Features are centred by the mean of the domains that are not left out, labels by their class
frequencies there; one common scale of the features makes no difference to any part, nor does a rotation.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..domains.domain_checks import check_domains
from .density import held_out_density
from .domain_statistics import DomainStatistics
from .evidence import log_evidence, log_predictive, maximise_evidence, spectrum_of
from .tridiagonal import Tridiagonal, tridiagonal_of

_SUMS = ("counts", "sums", "moments", "class_counts", "class_sums")


def leave_one_domain_out(features: Tensor, labels: Tensor, domains: Tensor) -> list[dict[str, float]]:
    """What an encoder's features are worth, with each domain left out once.

    Args:
        features: (N, D), finite.
        labels: (N,) class ids from 0 on.
        domains: (N,) domain ids from 0 on.

    Returns:
        For each domain {"samples", "labels", "density", "stability", "score"}, as the top of this file says; a higher
        score is better.

    Raises:
        ValueError: other shapes, features that are not finite, or all equal once some domain is left out, or what
            `check_domains` refuses.
    """
    check_domains(labels, domains)
    if features.ndim != 2 or len(features) != len(labels) or not features.shape[1]:
        raise ValueError(f"features must be (N, D), N = {len(labels)}, got {tuple(features.shape)}.")
    _check_others_vary(features, domains)
    dimension = features.shape[1]
    if dimension > len(features) and bool(torch.isfinite(features).all()):
        # The same points in as many coordinates as there are points: no part changes under rotation.
        centred = features.double() - features.double().mean(0)
        features = torch.linalg.qr(centred.T, mode="r")[1].T
    statistics = DomainStatistics(int(domains.max()) + 1, int(labels.max()) + 1, features.shape[1])
    statistics.update(features, labels, domains)
    return score_domains(statistics, dimension=dimension)


def _check_others_vary(features: Tensor, domains: Tensor) -> None:
    """Looked at as they are: in sums over the samples what does not vary is lost among rounding errors."""
    ends = [torch.aminmax(features[domains == domain], dim=0) for domain in domains.unique().tolist()]
    lowest = torch.stack([end.min for end in ends])  # (M, D)
    highest = torch.stack([end.max for end in ends])
    nothing = "the features are the same for all samples{}: nothing can be told from them."
    if bool((lowest.amin(0) == highest.amax(0)).all()):
        raise ValueError(nothing.format(""))
    for number in range(len(ends)):
        others = torch.arange(len(ends)) != number
        if bool((lowest[others].amin(0) == highest[others].amax(0)).all()):
            raise ValueError(nothing.format(" but those of one domain"))


def score_domains(statistics: DomainStatistics, *, dimension: int | None = None) -> list[dict[str, float]]:
    """As `leave_one_domain_out`, from sums that were gathered batch by batch.

    Args:
        statistics: of all samples; every class in two domains or more.
        dimension: D, where the sums are of coordinates in a subspace that holds all samples.

    Raises:
        ValueError: a domain or class without samples, or features that are all equal.
    """
    if (statistics.counts < 1).any() or len(statistics.counts) < 2:
        raise ValueError(f"every one of two or more domains needs samples, got {statistics.counts.tolist()}.")
    every = {name: getattr(statistics, name).sum(0) for name in _SUMS}
    mean, shares = every["sums"] / every["counts"], every["class_counts"] / every["counts"]
    total = tridiagonal_of(*_centred(every, mean, shares))
    domains = range(len(statistics.counts))
    return [_score(statistics, left_out, dimension, every, mean, shares, total) for left_out in domains]


def _score(
    statistics: DomainStatistics,
    left_out: int,
    dimension: int | None,
    every: dict,
    grand_mean: np.ndarray,
    grand_shares: np.ndarray,
    total: Tridiagonal | None,
) -> dict[str, float]:
    new = {name: getattr(statistics, name)[left_out] for name in _SUMS}
    old = {name: every[name] - new[name] for name in _SUMS}
    mean = old["sums"] / old["counts"]
    shares = old["class_counts"] / old["counts"]
    old = _centred(old, mean, shares)
    new = _centred(new, mean, shares)
    train = tridiagonal_of(*old) if total is not None else None
    if train is None:
        train, _ = spectrum_of(*old)
        both, _ = spectrum_of(*(first + second for first, second in zip(old, new, strict=True)))
        alpha, beta = maximise_evidence(train)
        predictive = log_predictive(train, both, alpha, beta)
    else:
        alpha, beta = maximise_evidence(train)
        whole = total.moved_evidence(grand_mean - mean, grand_shares - shares, alpha, beta)
        predictive = whole - log_evidence(train, alpha, beta)
    labels = float(predictive.mean() / new[0])
    density, stability = held_out_density(old[1], old[0], new[1], new[0], dimension)
    parts = {"labels": labels, "density": density, "stability": stability}
    return {"samples": int(new[0])} | parts | {"score": labels + stability}


def _centred(sums: dict, mean: np.ndarray, shares: np.ndarray) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """n, X'X, X'Y and the squares of Y of samples about given means, from sums about another point."""
    count = int(sums["counts"])
    half = sums["sums"] - 0.5 * count * mean
    gram = np.stack([half, mean], 1) @ np.stack([mean, half])
    np.subtract(sums["moments"], gram, out=gram)
    products = (sums["class_sums"] - np.outer(sums["class_counts"], mean)).T
    products = products - np.outer(sums["sums"] - count * mean, shares)
    squares = sums["class_counts"] * (1 - 2 * shares) + count * shares**2
    return count, gram, products, squares
