"""Sums over the samples of each domain, gathered batch by batch: all that the score of an encoder needs to know."""

from __future__ import annotations

import numpy as np
import torch
from scipy.linalg import blas
from torch import Tensor

_ROWS = 4096  # converted to float64 at once


class DomainStatistics:
    """Counts, sums and second moments of features and classes, one set for each of M domains, in float64.

    Features are counted from the first sample on, so that a large common offset costs no digits. Memory: M D^2 numbers
    of 8 bytes, however many samples there are.

    Args:
        domains: M, at least 2.
        classes: C, at least 2; 0 without labels.
        dimension: D.
    """

    def __init__(self, domains: int, classes: int, dimension: int):
        self.counts = np.zeros(domains, dtype=np.int64)
        self.sums = np.zeros((domains, dimension))
        self.moments = np.zeros((domains, dimension, dimension))
        self.class_counts = np.zeros((domains, classes))
        self.class_sums = np.zeros((domains, classes, dimension))
        self.origin: np.ndarray | None = None

    def update(self, features: Tensor, labels: Tensor | None, domains: Tensor) -> None:
        """Add samples: features (N, D), class ids (N,) or None where there are 0 classes, domain ids (N,).

        Raises:
            ValueError: other shapes, ids outside [0, C) or [0, M), or features that are not finite.
        """
        self._check(features, labels, domains)
        if self.origin is None:
            self.origin = features[0].detach().cpu().double().numpy().copy()
        for domain in domains.unique().tolist():
            for chosen in (domains == domain).nonzero()[:, 0].split(_ROWS):
                inside = features[chosen].detach().cpu().double().numpy()
                inside -= self.origin
                self.counts[domain] += len(inside)
                self.sums[domain] += inside.sum(0)
                # Half of the products, which numpy's @ would mirror at once, number by number.
                upper = self.moments[domain].T
                blas.dsyrk(1.0, inside.T, beta=1.0, c=upper, lower=1, overwrite_c=1)
                if labels is not None:
                    one_hot = np.eye(self.class_counts.shape[1])[labels[chosen].cpu().numpy()]
                    self.class_counts[domain] += one_hot.sum(0)
                    self.class_sums[domain] += one_hot.T @ inside
            _mirror_(self.moments[domain])

    def _check(self, features: Tensor, labels: Tensor | None, domains: Tensor) -> None:
        classes, dimension = self.class_sums.shape[1:]
        if features.ndim != 2 or features.shape[1] != dimension or not len(features):
            raise ValueError(f"features must be (N, {dimension}) with N >= 1, got {tuple(features.shape)}.")
        if (labels is None) != (classes == 0):
            raise ValueError(
                f"labels must be {'left out' if classes == 0 else 'given'} where there are {classes} classes."
            )
        ids = {"domains": (domains, len(self.counts))} | ({} if labels is None else {"labels": (labels, classes)})
        for name, (values, limit) in ids.items():
            if values.shape != features.shape[:1] or values.is_floating_point():
                raise ValueError(
                    f"{name} must be {len(features)} whole numbers, got {tuple(values.shape)} {values.dtype}."
                )
            if not 0 <= int(values.min()) <= int(values.max()) < limit:
                raise ValueError(f"{name} must lie in [0, {limit}), got {int(values.min())} to {int(values.max())}.")
        if bool(features.sum().isfinite()):
            return  # so is every one of them
        finite = torch.isfinite(features).all(1)
        if not bool(finite.all()):
            raise ValueError(f"row {int((~finite).nonzero()[0])} of the features is NaN or infinite.")


def _mirror_(square: np.ndarray, block: int = 256) -> None:
    """Copy the upper half of a square matrix to its lower one, in place."""
    for start in range(0, len(square), block):
        rows = slice(start, start + block)
        square[rows, :start] = square[:start, rows].T
        corner = square[rows, rows]
        corner[:] = np.triu(corner) + np.triu(corner, 1).T
