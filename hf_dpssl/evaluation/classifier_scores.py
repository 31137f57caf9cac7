"""How sure a classifier is of each generated image, and how evenly its classes occur among all of them."""

from __future__ import annotations

import torch
from torch import Tensor


def inception_score(logits: Tensor, *, splits: int = 10, generator: torch.Generator | None = None) -> dict[str, float]:
    """exp of the mean KL(p(y | x) || p(y)), in [1, classes]; p(y) is the mean over the split.

    Salimans et al., "Improved techniques for training GANs", NeurIPS 2016, section 4. It sees no real images, and
    means little for images of other classes than the classifier's (Barratt and Sharma 2018).

    Args:
        logits: (N, classes) of generated images.
        splits: parts of the shuffled images that get a score each, at most N.
        generator: of the order; default: seeded with 0.

    Returns:
        {"inception_score": mean over splits, "inception_score_std": standard deviation (divided by their number)}.

    Raises:
        ValueError: another shape, splits outside [1, N], or logits that are not finite.
    """
    if logits.ndim != 2 or not 1 <= splits <= len(logits):
        raise ValueError(f"logits must be (N, classes) and splits in [1, N], got {tuple(logits.shape)} and {splits}.")
    if not torch.isfinite(logits).all():
        raise ValueError("logits must be finite: NaN or infinity was given.")
    order = torch.randperm(len(logits), generator=generator or torch.Generator().manual_seed(0))
    log_p = logits.detach().cpu()[order].double().log_softmax(1)
    edges = [i * len(logits) // splits for i in range(splits + 1)]
    scores = torch.stack([_score(log_p[first:last]) for first, last in zip(edges, edges[1:], strict=False)])
    return {"inception_score": float(scores.mean()), "inception_score_std": float(scores.std(correction=0))}


def _score(log_p: Tensor) -> Tensor:
    log_mean = log_p.logsumexp(0) - torch.tensor(len(log_p), dtype=log_p.dtype).log()
    # A probability that underflows adds 0, whatever its logarithm.
    return (log_p.exp() * (log_p - log_mean)).sum(1).mean().exp()
