"""k-nearest-neighbour classification of features: label quality of a representation without training anything."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

METRICS = ("cosine", "euclidean")
WEIGHTINGS = ("uniform", "exponential")
_CHUNK = 1024  # queries whose similarities to the whole bank are held at once


@torch.no_grad()
def knn(
    bank: Tensor,
    bank_labels: Tensor,
    features: Tensor,
    labels: Tensor,
    *,
    k: int = 20,
    metric: str = "cosine",
    weighting: str = "uniform",
    temperature: float = 0.07,
) -> dict[str, float]:
    """Accuracy of classifying `features` by their k nearest rows of `bank`.

    Args:
        bank: (M, D) features of training images.
        bank_labels: (M,) int64 classes, at least 0.
        features: (N, D) features to classify.
        labels: (N,) int64 their classes.
        k: neighbours, 1 to M.
        metric: "cosine" or "euclidean".
        weighting: "uniform" (a tie goes to the smallest class, as in scikit-learn), or "exponential":
            votes of exp(cosine / temperature), Wu et al. 2018; needs metric="cosine".
        temperature: of the exponential votes.

    Returns:
        {"knn_top1": percent correct}.

    Raises:
        ValueError: shapes that do not fit, no features, k outside [1, M], unknown options, a temperature
            that is not positive, or negative labels.
    """
    _check(bank, bank_labels, features, labels, k, metric, weighting, temperature)
    num_classes = int(max(bank_labels.max(), labels.max())) + 1
    bank, features = bank.float(), features.float()
    if metric == "cosine":
        bank, features = F.normalize(bank, dim=1), F.normalize(features, dim=1)
    else:  # distances do not change, cancellation shrinks
        centre = bank.mean(0)
        bank, features = bank - centre, features - centre
    half_norms = bank.pow(2).sum(1) / 2
    correct = 0
    for query, label in zip(features.split(_CHUNK), labels.split(_CHUNK), strict=True):
        similarity = query @ bank.T
        ranking = similarity if metric == "cosine" else similarity - half_norms
        top, neighbours = ranking.topk(k, dim=1)
        # Relative to the nearest: the same winner, and no overflow at a low temperature.
        votes = torch.ones_like(top) if weighting == "uniform" else ((top - top[:, :1]) / temperature).exp()
        scores = torch.zeros(len(query), num_classes, device=query.device, dtype=votes.dtype)
        scores.scatter_add_(1, bank_labels[neighbours], votes)
        correct += int((scores.argmax(1) == label).sum())
    return {"knn_top1": 100 * correct / len(features)}


def _check(bank, bank_labels, features, labels, k, metric, weighting, temperature) -> None:
    if bank.ndim != 2 or features.ndim != 2 or bank.shape[1] != features.shape[1]:
        raise ValueError(f"bank and features must be (M, D) and (N, D), got {bank.shape} and {features.shape}.")
    if bank_labels.shape != bank.shape[:1] or labels.shape != features.shape[:1]:
        raise ValueError(f"one label per row is needed, got {bank_labels.shape} and {labels.shape}.")
    if len(features) == 0:
        raise ValueError("there are no features to classify.")
    if not 1 <= k <= len(bank):
        raise ValueError(f"k must lie in [1, {len(bank)}] (the size of the bank), got {k}.")
    if metric not in METRICS or weighting not in WEIGHTINGS:
        raise ValueError(f"metric is one of {METRICS}, weighting of {WEIGHTINGS}; got {metric!r}, {weighting!r}.")
    if weighting == "exponential" and metric != "cosine":
        raise ValueError("weighting='exponential' is defined for metric='cosine'.")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}.")
    if int(bank_labels.min()) < 0 or int(labels.min()) < 0:
        raise ValueError("labels must be 0 or larger: the data set has images without a class.")
