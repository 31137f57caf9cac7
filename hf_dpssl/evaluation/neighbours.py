"""Nearest neighbours of features, and classification by them: label quality without training anything."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..models.matrix_products import ROUNDING, has_fast_bfloat16, product
from .choices import METRICS, WEIGHTINGS
from .feature_checks import check_labels, finite_norms

_TILE_ROWS, _CHUNK_QUERIES = 2**15, 256  # 32 MiB of products at once; each tile costs a topk
_TILE_ELEMENTS = 2**24  # of the bank, widened and scaled at once
_CENTRE_ROWS = 4096  # of the bank whose mean is taken for its centre
_GATHERED = 2**22  # numbers of neighbours held at once
_FOLDS = 8  # of products, of whose maxima few are looked under
_NARROW, _FEW_PRODUCTS = 64, 2**31  # numbers of a row, and products in all, below which bfloat16 gains nothing
_ROUNDED_QUERIES = 1024  # with a tile of the bank: 32 MiB of bfloat16 products at once
_BLOCK_ELEMENTS = 2**17  # rounded at once
_TOO_MANY = 8  # rows that may be among the k nearest, for each of them
_MOST_PAIRS = 2**21  # of a query and such a row, compared at once
_NEAR = 1 / 4  # share of the squared norm below which a squared distance loses too much in a float32 product
_VOTE_CHUNK = 4096  # queries whose votes are counted at once


@torch.no_grad()
def nearest_neighbours(bank: Tensor, queries: Tensor, *, k: int, metric: str = "cosine") -> tuple[Tensor, Tensor]:
    """The k rows of `bank` nearest to each query: all rows are compared, in float32.

    A row that is left out is not nearer than the last one found by more than 1e-6, of the cosine or relatively of the
    distance. Memory beyond the arguments and the result is bounded (about 0.3 GB), however many rows there are.

    Args:
        bank: (M, D) features; half precision is widened tile by tile.
        queries: (Q, D) features.
        k: neighbours, 1 to M.
        metric: "cosine" (a row of zeros has cosine 0) or "euclidean".

    Returns:
        similarities (Q, k) float32: the cosine, or MINUS the Euclidean distance, 0 for equal rows; best first.
        indices (Q, k) int64: rows of `bank`. Among rows that are equally similar up to rounding any may be found;
        found ones of the same similarity stand in the order of the bank.

    Raises:
        ValueError: shapes that do not fit, k outside [1, M], an unknown option, or features that are not finite.
    """
    _check_search(bank, queries, k, metric)
    if metric == "cosine":
        worthwhile = bank.shape[1] >= _NARROW and bank.numel() * len(queries) >= _FEW_PRODUCTS
        narrow = worthwhile and has_fast_bfloat16(bank.device)
        return _in_order(*(_largest_cosines(bank, queries, k) if narrow else _largest(bank, queries, k)))
    centre = torch.nan_to_num(bank[:: -(-len(bank) // _CENTRE_ROWS)].float().mean(0))
    products, indices = _largest(bank, queries, k, centre, torch.float32)
    norms = torch.cat([(part.float() - centre).square().sum(1) for part in queries.split(_CHUNK_QUERIES)])[:, None]
    squares = norms - 2 * products
    # A small difference of large numbers is lost: where the last one is small, others may be the nearest.
    lost = (squares[:, -1:] < _NEAR * norms).nonzero()[:, 0]
    if len(lost):
        indices[lost] = _largest(bank, queries[lost], k, centre.double(), torch.float64)[1]
        squares[lost] = 0.0
    distances = squares.clamp_min(0).sqrt()
    pairs = (squares < _NEAR * norms).nonzero()
    for query, place in (part.T for part in pairs.split(max(1, _GATHERED // bank.shape[1]))):
        differences = bank[indices[query, place]].float().sub_(queries[query].float())
        distances[query, place] = differences.norm(dim=1)
    return _in_order(-distances, indices)


def _largest(
    bank: Tensor, queries: Tensor, k: int, centre: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """(Q, k) largest cosines of rows; given their centre largest q.b - |b|^2 / 2 of centred rows. And indices."""
    best = torch.full((len(queries), k), -torch.inf, dtype=dtype, device=queries.device)
    indices = torch.zeros_like(best, dtype=torch.int64)
    size = max(1, min(_TILE_ROWS, _TILE_ELEMENTS // bank.shape[1]))
    tiles = tqdm(bank.split(size), "nearest neighbours", unit="tile", leave=False, delay=5)
    for number, tile in enumerate(tiles):
        first = number * size
        rows = _prepared(tile, "bank", first, centre, dtype)
        bias = None if centre is None else -rows.square().sum(1) / 2
        for start in range(0, len(queries), _CHUNK_QUERIES):
            part = slice(start, start + _CHUNK_QUERIES)
            similarity = product(_prepared(queries[part], "queries", start, centre, dtype), rows, bias)  # (n, M)
            found, places = _largest_of_each(similarity, min(k, len(rows)))
            best[part], order = torch.cat([best[part], found], 1).topk(k)
            indices[part] = torch.cat([indices[part], places + first], 1).gather(1, order)
    return best, indices


def _largest_of_each(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(n, k) largest of each row (n, M), best first, and their places, as torch.topk, which reads far fewer here.

    With the columns folded, the k largest lie under the k largest maxima of a fold: above any other lie k as large.
    """
    width = values.shape[1] // _FOLDS
    if width < 2 * k:
        return values.topk(k)
    folded = values[:, : width * _FOLDS].view(len(values), _FOLDS, width)
    columns = folded.amax(1).topk(k, sorted=False).indices
    places = (columns[:, None] + width * torch.arange(_FOLDS, device=values.device)[:, None]).flatten(1)
    rest = torch.arange(width * _FOLDS, values.shape[1], device=values.device).expand(len(values), -1)
    places = torch.cat([places, rest], 1)
    found, order = values.gather(1, places).topk(k)
    return found, places.gather(1, order)


def _largest_cosines(bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As `_largest`, sooner where bfloat16 is fast: its products leave few rows, which are compared in float32."""
    best = torch.full((len(queries), k), -torch.inf)
    indices = torch.zeros_like(best, dtype=torch.int64)
    size = max(1, _TILE_ELEMENTS // 2 // bank.shape[1])
    for number, tile in enumerate(tqdm(bank.split(size), "nearest neighbours", unit="tile", leave=False, delay=5)):
        tile = tile.float()
        norms = finite_norms(tile, "bank", number * size).clamp_min(1e-12)
        rounded, lost = _rounded(tile, norms)
        for start in range(0, len(queries), _ROUNDED_QUERIES):
            part = slice(start, start + _ROUNDED_QUERIES)
            given = _prepared(queries[part], "queries", start, None, torch.float32)
            similarity = product(given.bfloat16(), rounded)  # (n, M)
            # |q.b - q'.b'| <= |q - q'| |b| + |q'| |b - b'|, and sums of D float32 products.
            margin = (given - given.bfloat16()).norm(dim=1) + 1.01 * lost + bank.shape[1] * ROUNDING[torch.float32] * 2
            where = _may_be_largest(similarity, best[part], margin, k)
            # Too many: near to each other beyond what bfloat16 tells apart, or nearly all are asked for.
            if len(where) > min(_TOO_MANY * k * len(given), _MOST_PAIRS):
                found, places = _largest_of_each(product(given, tile / norms[:, None]), min(k, len(tile)))
            else:
                query, row = where // len(tile), where % len(tile)
                values = _sampled_product(tile, given, row, query) / norms[row]
                found, places = _listed(query, row, values, len(given))
            best[part], order = torch.cat([best[part], found], 1).topk(k)
            indices[part] = torch.cat([indices[part], places + number * size], 1).gather(1, order)
    return best, indices


def _rounded(rows: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of unit length in bfloat16, and the largest norm of what that leaves out; block by block, in the cache."""
    rounded, lost = torch.empty_like(rows, dtype=torch.bfloat16), torch.zeros(())
    step = max(1, _BLOCK_ELEMENTS // rows.shape[1])
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        scaled = rows[part] / norms[part, None]
        rounded[part] = scaled
        lost = torch.maximum(lost, scaled.sub_(rounded[part]).norm(dim=1).max())
    return rounded, lost


def _may_be_largest(similarity: Tensor, known: Tensor, margin: Tensor, k: int) -> Tensor:
    """Ascending positions, in the flattened (n, M) bfloat16 matrix, of what may be among a row's k largest.

    Args:
        known: (n, k) exact similarities of other columns.
        margin: (n,) bound on the error of a number, its own rounding aside.
    """
    width = max(1, similarity.shape[1] // _FOLDS)
    maxima = similarity[:, : width * _FOLDS].unflatten(1, (-1, width)).amax(1).float()
    # Of the known ones and of what maxima are at least, the k-th largest is at most that of the whole.
    bounds = torch.cat([known, maxima - 2 * ROUNDING[torch.bfloat16] * maxima.abs() - margin[:, None]], 1)
    place = bounds.shape[1] - k
    least = torch.from_numpy(np.partition(bounds.numpy(), place, axis=1)[:, place].copy()) - margin
    least = least.bfloat16()[:, None]  # rounding keeps the order
    if bool((least > 0).all()):  # so do bits as integers, which numpy compares in a fifth of the time
        return torch.from_numpy(np.flatnonzero(similarity.view(torch.int16).numpy() >= least.view(torch.int16).numpy()))
    return torch.from_numpy(np.flatnonzero((similarity >= least).numpy()))


def _sampled_product(rows: Tensor, columns: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """(P,) products rows[row].columns[column] in float32, reading the rows in order and each once."""
    order = row.argsort()
    ends = torch.bincount(row, minlength=len(rows)).cumsum(0)
    offsets = torch.cat([ends.new_zeros(1), ends])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        size = (len(rows), len(columns))
        pattern = torch.sparse_csr_tensor(offsets, column[order], torch.zeros(len(row)), size, check_invariants=False)
        values = torch.sparse.sampled_addmm(pattern, rows, columns.T, beta=0.0).values()
    return torch.empty_like(values).scatter_(0, order, values)


def _listed(query: Tensor, place: Tensor, values: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Values (P,) and places (P,), in ascending order of their query, as rows (number, longest), -inf where none is."""
    counts = torch.bincount(query, minlength=number)
    column = torch.arange(len(query)) - (counts.cumsum(0) - counts)[query]
    found = torch.full((number, int(counts.max())), -torch.inf)
    places = torch.zeros_like(found, dtype=torch.int64)
    found[query, column], places[query, column] = values, place
    return found, places


def _prepared(rows: Tensor, name: str, first: int, centre: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Rows of unit length, or centred; ValueError unless they are finite."""
    norms = finite_norms(rows.float(), name, first)
    rows = rows.to(dtype)
    return rows / norms.clamp_min(1e-12)[:, None] if centre is None else rows - centre


def _in_order(similarities: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Both (Q, k), best first, of equals the smaller index."""
    indices, order = indices.sort(1)
    similarities, best = similarities.gather(1, order).sort(dim=1, descending=True, stable=True)
    return similarities, indices.gather(1, best)


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

    Returns:
        {"knn_top1": percent correct} for one k; {"knn_top1_k1": ..., "knn_top1_k20": ...} for several.

    Raises:
        ValueError: shapes that do not fit, no features, k outside [1, M], unknown options, a temperature
            that is not positive, negative labels, or features that are not finite.
    """
    sizes = [k] if isinstance(k, int) else list(k)
    _check_vote(bank, bank_labels, features, labels, sizes, weighting, temperature)
    similarities, indices = nearest_neighbours(bank, features, k=max(sizes), metric=metric)
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


def _check_search(bank: Tensor, queries: Tensor, k: int, metric: str) -> None:
    if bank.ndim != 2 or queries.ndim != 2 or bank.shape[1] != queries.shape[1]:
        raise ValueError(f"bank and features must be (M, D) and (N, D), got {bank.shape} and {queries.shape}.")
    if len(queries) == 0 or queries.shape[1] == 0:
        raise ValueError(f"there are no features to search for: got {tuple(queries.shape)}.")
    if not 1 <= k <= len(bank):
        raise ValueError(f"k must lie in [1, {len(bank)}] (the size of the bank), got {k}.")
    if metric not in METRICS:
        raise ValueError(f"metric is one of {METRICS}; got {metric!r}.")


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
