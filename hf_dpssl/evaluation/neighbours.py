"""Nearest neighbours of features, and classification by them: label quality without training anything."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..models.matrix_products import has_fast_bfloat16
from .candidates import Search, inverse

METRICS = ("cosine", "euclidean")
WEIGHTINGS = ("uniform", "exponential", "inverse")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_QUERY_BYTES = 2**26  # of queries searched together
_VOTE_CHUNK = 4096  # queries whose votes are counted at once
_CENTRE_ROWS = 4096  # of the bank whose mean is taken for its centre
# Below so many columns or products, converting to bfloat16 costs more than it saves (measured).
_NARROW_COLUMNS, _FEW_PRODUCTS = 64, 2**31


@torch.no_grad()
def nearest_neighbours(
    bank: Tensor, queries: Tensor, *, k: int, metric: str = "cosine", candidates: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The k rows of `bank` nearest to each query, exactly.

    Memory beyond the arguments and the result is bounded (about 0.1 GB), however many rows there are.

    Args:
        bank: (M, D) features, M < 2^32; half precision is widened tile by tile.
        queries: (Q, D) features.
        k: neighbours, 1 to M.
        metric: "cosine" (a row of zeros has cosine 0) or "euclidean".
        candidates: precision in which candidates are found: "float32", "bfloat16", or "auto" (bfloat16 where the
            CPU multiplies it fast). They are compared in float32 afterwards: the result is the same.

    Returns:
        similarities (Q, k) float32: the cosine, or MINUS the Euclidean distance; best first.
        indices (Q, k) int64: rows of `bank`; of equally similar ones the smaller index comes first.

    Raises:
        ValueError: shapes that do not fit, k outside [1, M], an unknown option, or features that are not finite.
    """
    _check_search(bank, queries, k, metric, candidates)
    spread = bank[:: -(-len(bank) // _CENTRE_ROWS)].float()
    spread = spread * inverse(spread.norm(dim=1))[:, None] if metric == "cosine" else spread
    centre = torch.nan_to_num(spread.mean(0))  # rows that are not finite are found, and named, by the search
    if candidates == "auto":
        worthwhile = bank.shape[1] >= _NARROW_COLUMNS and bank.numel() * len(queries) >= _FEW_PRODUCTS
        candidates = "bfloat16" if worthwhile and has_fast_bfloat16(bank.device) else "float32"
    blocks = max(1, -(-queries.numel() * 4 // _QUERY_BYTES))
    found = []
    for block in queries.chunk(blocks):
        first = sum(len(indices) for _, indices in found)
        search = Search(block.float(), centre, k, metric, _DTYPES[candidates], first)
        search.add(bank)
        found.append(search.result())
    similarities, indices = zip(*found, strict=True)
    return torch.cat(similarities), torch.cat(indices)


@torch.no_grad()
def knn(
    bank: Tensor,
    bank_labels: Tensor,
    features: Tensor,
    labels: Tensor,
    *,
    k: int | Sequence[int] = 20,
    metric: str = "cosine",
    weighting: str = "uniform",
    temperature: float = 0.07,
    candidates: str = "auto",
) -> dict[str, float]:
    """Accuracy of classifying `features` by their k nearest rows of `bank`.

    Args:
        bank: (M, D) features of training images.
        bank_labels: (M,) integer classes, at least 0.
        features: (N, D) features to classify.
        labels: (N,) integer classes, at least 0.
        k: neighbours, 1 to M; several at once, as (1, 20, 200), cost hardly more than the largest.
        metric: "cosine" or "euclidean".
        weighting: votes of neighbours at similarity s (cosine) or distance d. "uniform": 1. "exponential":
            exp(s / temperature) (Wu et al. 2018, section 3.4), for distances exp(-d^2 / (2 temperature)), which is
            the same on the unit sphere. "inverse": 1/d, or 1/(1 - s) for cosines (Dudani 1976; as scikit-learn's
            weights="distance"): neighbours at distance 0 decide alone.
            A tie goes to the smallest class, as in scikit-learn.
        temperature: of the exponential votes, > 0; for distances in squared units of the features.
        candidates: as in `nearest_neighbours`.

    Returns:
        {"knn_top1": percent correct} for one k; {"knn_top1_k1": ..., "knn_top1_k20": ...} for several.

    Raises:
        ValueError: shapes that do not fit, no features, k outside [1, M], unknown options, a temperature
            that is not positive, negative labels, or features that are not finite.
    """
    sizes = [k] if isinstance(k, int) else list(k)
    _check_vote(bank, bank_labels, features, labels, sizes, weighting, temperature)
    similarities, indices = nearest_neighbours(bank, features, k=max(sizes), metric=metric, candidates=candidates)
    # Classes are numbered without gaps, so that a large label costs no memory; their order stays.
    classes, compact = torch.unique(bank_labels, return_inverse=True)
    correct = dict.fromkeys(sizes, 0)
    for first in range(0, len(features), _VOTE_CHUNK):
        part = slice(first, first + _VOTE_CHUNK)
        votes = _votes(similarities[part].double(), metric, weighting, temperature)
        neighbours = compact[indices[part]]  # (n, k) classes, nearest first
        scores = votes.new_zeros(len(votes), len(classes))
        counted = 0
        for size in sorted(correct):
            scores.scatter_add_(1, neighbours[:, counted:size], votes[:, counted:size])
            counted = size
            correct[size] += int((classes[scores.argmax(1)] == labels[part]).sum())
    percent = {size: 100 * hits / len(features) for size, hits in correct.items()}
    return {"knn_top1": percent[k]} if isinstance(k, int) else {f"knn_top1_k{size}": percent[size] for size in sizes}


def _votes(similarities: Tensor, metric: str, weighting: str, temperature: float) -> Tensor:
    """(n, k) votes of neighbours, nearest first; relative to the nearest, so that none overflows."""
    if weighting == "uniform":
        return torch.ones_like(similarities)
    if weighting == "exponential":
        log_votes = similarities if metric == "cosine" else -similarities.square() / 2
        return ((log_votes - log_votes[:, :1]) / temperature).exp()
    distances = (1 - similarities).clamp_min(0) if metric == "cosine" else -similarities
    nearest = distances[:, :1]
    return torch.where(nearest == 0, (distances == 0).to(distances), nearest / distances)


def _check_search(bank, queries, k, metric, candidates) -> None:
    if bank.ndim != 2 or queries.ndim != 2 or bank.shape[1] != queries.shape[1]:
        raise ValueError(f"bank and features must be (M, D) and (N, D), got {bank.shape} and {queries.shape}.")
    if len(queries) == 0 or queries.shape[1] == 0:
        raise ValueError(f"there are no features to search for: got {tuple(queries.shape)}.")
    if not 1 <= k <= len(bank):
        raise ValueError(f"k must lie in [1, {len(bank)}] (the size of the bank), got {k}.")
    if metric not in METRICS or candidates not in ("auto", *_DTYPES):
        allowed = f"metric is one of {METRICS}, candidates of {('auto', *_DTYPES)}"
        raise ValueError(f"{allowed}; got {metric!r}, {candidates!r}.")


def _check_vote(bank, bank_labels, features, labels, sizes, weighting, temperature) -> None:
    if bank_labels.shape != bank.shape[:1] or labels.shape != features.shape[:1]:
        raise ValueError(f"one label per row is needed, got {bank_labels.shape} and {labels.shape}.")
    if len(features) == 0:
        raise ValueError("there are no features to classify.")
    if not sizes or min(sizes) < 1 or max(sizes) > len(bank):
        raise ValueError(f"k must lie in [1, {len(bank)}] (the size of the bank), got {sizes}.")
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting is one of {WEIGHTINGS}; got {weighting!r}.")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}.")
    check_labels(bank_labels, labels)


def check_labels(*labels: Tensor) -> None:
    """ValueError unless all are integers of at least 0."""
    for given in labels:
        if given.dtype.is_floating_point or given.dtype.is_complex or given.dtype == torch.bool:
            raise ValueError(f"labels must be integer class ids, got {given.dtype}.")
        if int(given.min()) < 0:
            raise ValueError(
                f"labels must be 0 or larger, got {int(given.min())}: the data set has images without a class."
            )
