"""How probable the second view of a picture is, given the first one, among those of all pictures of a domain."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..data.subsets import random_rows

_SCALES = torch.logspace(-3, 5, 33, dtype=torch.float64)  # of squared distances, in units of their mean
_MOST = 1000  # pictures of a domain: all pairs are compared


def held_out_views(first: Tensor, second: Tensor, domains: Tensor, *, seed: int = 0) -> list[float]:
    """Mean log likelihood of second views above chance, in nats, with each domain left out once.

    q(j | i) is proportional to 1 / (1 + s |x_i - y_j|^2), the Student-t kernel of one degree of freedom, over the
    second views y of a domain's pictures. The scale s is the one that is best for the other domains, so that none was
    fitted to the views that it is measured on. 0 is chance, log n the most for n pictures.

    Args:
        first, second: (N, D) features of two views of the same pictures. domains: (N,) ids, of two domains or more.
        seed: of the pictures that are compared, where a domain has more than 1,000.

    Returns:
        One number for each domain, in ascending order of ids.
    """
    curves = []
    for domain in domains.unique().tolist():
        inside = (domains == domain).nonzero()[:, 0]
        chosen = inside[torch.tensor(list(random_rows(len(inside), _MOST, seed=seed)))]
        curves.append(_curve(first[chosen].double(), second[chosen].double()))
    total = sum(curves)
    return [float(curve[(total - curve).argmax()]) for curve in curves]


def _curve(first: Tensor, second: Tensor) -> Tensor:
    """(S,) mean log likelihood above chance at each scale."""
    distances = torch.cdist(first, second).square()
    distances = distances / distances.mean().clamp_min(1e-300)
    found = []
    for scale in _SCALES:
        logits = -torch.log1p(scale * distances)
        found.append((logits.diagonal() - logits.logsumexp(1)).mean() + math.log(len(first)))
    return torch.stack(found)
