"""Fidelity and diversity of generated features as two numbers each, from balls around samples.

A ball has the radius of the distance to the k-th nearest neighbour within its own set. Precision and recall:
Kynkaanniemi et al., "Improved precision and recall metric for assessing generative models", NeurIPS 2019, equation 2.
Density and coverage: Naeem et al., "Reliable fidelity and diversity metrics for generative models", ICML 2020,
equations 4 and 5. Outliers widen the balls of precision and recall; density and coverage mind them less.

What is counted is that of float64: distances are first enclosed between bounds by products in float32, and those whose
bounds leave open on which side of a radius they lie are computed again, from differences in float64.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..models.matrix_products import ROUNDING, product
from .feature_checks import check_clouds, widened

_CHUNK = 1024
_FEW = 0.01  # of a chunk's pairs: more than that are enclosed anew by products in float64, before differences are taken
_MANY = 100_000  # pairs, from which on repeated features are looked for
_NUMBERS = 2**22  # at once, of features whose differences are taken


def manifold_overlap(real: Tensor, generated: Tensor, *, k: int = 5) -> dict[str, float]:
    """Precision, recall, density and coverage, with Euclidean distances, in chunks of rows, where the features lie.

    Args:
        real, generated: features (N, D) and (M, D).
        k: neighbours that set the radii, below N and M. Kynkaanniemi use 3, Naeem 5.

    Returns:
        {"precision": share of generated features inside some real ball,
         "recall": share of real features inside some generated ball,
         "density": mean number of real balls around a generated feature, divided by k (may exceed 1),
         "coverage": share of real balls that hold a generated feature}.
        All but density in [0, 1]. Coverage of fresh real features by M = N others is 1 - ((N - 1) ... (N - k)) /
        ((2N - 1) ... (2N - k)), about 1 - 2^-k (Naeem et al., equation 8).

    Raises:
        ValueError: shapes that do not fit, k outside [1, min(N, M) - 1], or values that are not finite.
    """
    check_clouds(real, generated)
    if not 1 <= k < min(len(real), len(generated)):
        raise ValueError(f"k must lie in [1, {min(len(real), len(generated)) - 1}] (features - 1), got {k}.")
    features = widened(real), widened(generated)
    centre = features[0].mean(0)  # distances do not change by a shift, but the rounding of products does
    largest = torch.stack([(cloud - centre).abs().max() for cloud in features]).max()
    scale = 2.0 ** -int(largest.frexp().exponent)  # which rounds nothing
    real, generated = (_Cloud(cloud, centre, scale) for cloud in features)
    real_radii, generated_radii = _radii(real, k), _radii(generated, k)
    inside = torch.zeros_like(generated_radii, dtype=torch.int64)  # real balls around each generated feature
    recalled, covered = [], []
    for part in real.chunks():
        balls, others = _within(real, part, generated, real_radii[part, None], generated_radii[None])
        inside += balls.sum(0)
        covered.append(balls.any(1))
        recalled.append(others.any(1))
    return {
        "precision": float((inside > 0).double().mean()),
        "recall": float(torch.cat(recalled).double().mean()),
        "density": float(inside.double().mean()) / k,
        "coverage": float(torch.cat(covered).double().mean()),
    }


class _Cloud:
    """Features (N, D) in float64, and as products take them: centred, and scaled to numbers of at most 1."""

    def __init__(self, features: Tensor, centre: Tensor, scale: float):
        self.features = features
        self.scale = scale
        centred = (features - centre) * scale
        self.squares = centred.square().sum(1)
        self.rounded = {torch.float32: centred.float(), torch.float64: centred}  # coarse first

    def chunks(self) -> Iterator[slice]:
        """Of rows."""
        count = len(self.features)
        return (slice(first, min(first + _CHUNK, count)) for first in range(0, count, _CHUNK))


def _bounds(rows: _Cloud, part: slice, columns: _Cloud, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Lower and upper bounds (n, M) of the scaled squared distances of some rows and all columns, by products.

    A product of D rounded numbers errs by no more than about D + 2 roundings of |x| |y| <= (|x|^2 + |y|^2) / 2,
    whatever the order of its sums (Higham 2002, section 3.1); what underflows is below the last term. So do the
    distances in float64 that are enclosed, by roundings of float64.
    """
    dimension = rows.features.shape[1]
    error = (1.1 * dimension + 10) * (ROUNDING[dtype] + 4 * ROUNDING[torch.float64])
    underflow = dimension * 2.0**-120
    sums = rows.squares[part, None].to(dtype) + columns.squares.to(dtype)
    products = product(rows.rounded[dtype][part], columns.rounded[dtype]).mul_(-2)
    return (
        torch.add(products, sums, alpha=1 - error).sub_(underflow),
        products.add_(sums, alpha=1 + error).add_(underflow),
    )


def _radii(cloud: _Cloud, k: int) -> Tensor:
    """(N,) distance of each feature to its k-th nearest other one."""
    parts = []
    for part in cloud.chunks():
        for dtype in cloud.rounded:
            lower, upper = _bounds(cloud, part, cloud, dtype)
            for bound in (lower, upper):
                bound.diagonal(part.start).fill_(torch.inf)  # itself; an equal other feature is at distance 0
            at_least, at_most = (bound.topk(k, dim=1, largest=False).values[:, -1:] for bound in (lower, upper))
            nearer = upper < at_least
            candidates = (lower <= at_most) & ~nearer
            if int(candidates.sum()) <= _FEW * candidates.numel():
                break
        row, column = candidates.nonzero(as_tuple=True)
        counts = candidates.sum(1)
        distances = cloud.features.new_full((len(counts), int(counts.max())), torch.inf)
        places = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
        distances[row, places] = _distances(cloud.features[part], cloud.features, row, column)
        rank = k - nearer.sum(1, keepdim=True)  # among the candidates, the first is 1
        parts.append(distances.sort(1).values.gather(1, rank - 1)[:, 0])
    return torch.cat(parts)


def _within(rows: _Cloud, part: slice, columns: _Cloud, *radii: Tensor) -> list[Tensor]:
    """For each of `radii`, (n, 1) or (1, M): which of some rows and all columns are no further apart, bool (n, M)."""
    for dtype in rows.rounded:
        lower, upper = _bounds(rows, part, columns, dtype)
        slack = 4 * ROUNDING[dtype] + (2 * rows.features.shape[1] + 6) * ROUNDING[torch.float64]
        squares = [(radius * rows.scale).square() for radius in radii]
        surely = [upper <= (square * (1 - slack)).to(dtype) for square in squares]
        perhaps = [lower <= (square * (1 + slack)).to(dtype) for square in squares]
        undecided = [within & ~sure for within, sure in zip(perhaps, surely, strict=True)]
        if int(sum(pairs.sum() for pairs in undecided)) <= _FEW * lower.numel():
            break
    for radius, sure, pairs in zip(radii, surely, undecided, strict=True):
        row, column = pairs.nonzero(as_tuple=True)
        distances = _distances(rows.features[part], columns.features, row, column)
        sure[row, column] = distances <= radius.expand_as(sure)[row, column]
    return surely


def _distances(rows: Tensor, columns: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """(P,) float64 distances of rows[row] and columns[column], by differences: the same of a pair whoever asks."""
    if len(row) > _MANY:  # of a collapsed generator nearly all are distances of the same few features
        _, kinds = torch.unique(torch.cat([rows, columns]), dim=0, return_inverse=True)
        count = len(rows) + len(columns)
        pairs, back = torch.unique(kinds[row] * count + kinds[len(rows) + column], return_inverse=True)
        if len(pairs) < len(row) / 2:
            first = row.new_empty(len(pairs)).scatter_(0, back, torch.arange(len(row), device=row.device))
            return _distances_of(rows, columns, row[first], column[first])[back]
    return _distances_of(rows, columns, row, column)


def _distances_of(rows: Tensor, columns: Tensor, row: Tensor, column: Tensor) -> Tensor:
    at_once = max(1, _NUMBERS // rows.shape[1])
    parts = [
        torch.cdist(rows[i][:, None], columns[j][:, None], compute_mode="donot_use_mm_for_euclid_dist").flatten()
        for i, j in zip(row.split(at_once), column.split(at_once), strict=True)
    ]
    return torch.cat(parts) if parts else rows.new_empty(0)
