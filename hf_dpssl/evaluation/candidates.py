"""The search behind `nearest_neighbours`: cheap products find candidates, an exact comparison ranks them.

For a tile of the bank and a chunk of queries, one matrix product in float32 or bfloat16 gives
    r = q'.b' + bias_b, the cosine or -|q - b|^2 / 2 up to a constant of the query (q', b': centred).
Its error is at most `margin`, so that a true neighbour lies within twice the margin of the k-th best r. All rows
that do are compared again by one function of the two rows alone, and of equal ones the first row wins: the
neighbours are the same whatever the precision, the tile and the chunk.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..models.matrix_products import PRODUCT_ERROR, ROUNDING, product

_TILE_BYTES = 2**24  # of the bank, prepared at once
_CHUNK_BYTES = 2**25  # of approximate similarities, held at once
_BLOCK_ELEMENTS = 2**17  # prepared or gathered at once: within the second-level cache
_MAX_PAIRS = 2**21  # compared at once
_TOO_MANY = 8  # candidates per neighbour from which on bfloat16 separates too badly
_NONE = torch.iinfo(torch.int64).max  # key of a neighbour that is still missing


def finite_norms(rows: Tensor, name: str, first: int = 0) -> Tensor:
    """(N,) norms; ValueError naming the first row with a NaN, an infinity, or a number too large to be squared."""
    norms = rows.norm(dim=1)
    if not bool(norms.isfinite().all()):
        row = int((~norms.isfinite()).nonzero()[0])
        what = "too large for float32" if bool(rows[row].isfinite().all()) else "NaN or infinite"
        raise ValueError(f"row {first + row} of {name} is {what}: features must be finite, with a finite norm.")
    return norms


def inverse(norms: Tensor) -> Tensor:
    """(N,) factors that make rows unit length, as in torch.nn.functional.normalize."""
    return 1 / norms.clamp_min(1e-12)


class _Tile:
    """Rows of the bank, and what the product needs of them: centred, with the bias in further columns."""

    def __init__(self, bank: Tensor, norms: Tensor, centre: Tensor, metric: str, dtype: torch.dtype):
        self.bank, self.norms = bank, norms
        self.scale = inverse(norms) if metric == "cosine" else None  # (M,)
        parts = 1 if dtype == torch.float32 else 3  # of the bias: three bfloat16 numbers hold a float32
        size = bank.shape[1]
        self.rows = torch.empty(len(bank), size + parts, dtype=dtype, device=bank.device)
        self.radius = self.rounded = torch.zeros((), device=bank.device)  # largest norms of a row and its rounding
        step = max(1, _BLOCK_ELEMENTS // size)
        for first in range(0, len(bank), step):
            part = slice(first, first + step)
            scaled = bank[part] if self.scale is None else bank[part] * self.scale[part, None]
            centred = scaled - centre
            norms = centred.norm(dim=1)
            bias = centred @ centre if metric == "cosine" else -norms.square() / 2
            self.radius = torch.maximum(self.radius, norms.max())
            self.rows[part, :size] = centred
            if dtype == torch.bfloat16:
                self.rounded = torch.maximum(self.rounded, centred.sub_(self.rows[part, :size]).norm(dim=1).max())
            for column in range(size, size + parts):
                self.rows[part, column] = bias
                bias = bias - self.rows[part, column].float()


class Search:
    """The k nearest rows, among those added so far, of each query.

    Args:
        queries: (Q, D) float32.
        centre: (D,) any vector; near the middle of the bank it makes the margin small.
        k: neighbours.
        metric: "cosine" or "euclidean".
        dtype: of the products that find candidates, torch.float32 or torch.bfloat16.
        first: number of the first query, for messages.

    Raises:
        ValueError: a query that is not finite.
    """

    def __init__(self, queries: Tensor, centre: Tensor, k: int, metric: str, dtype: torch.dtype, first: int = 0):
        self.centre, self.k, self.metric, self.dtype = centre, k, metric, dtype
        norms = finite_norms(queries, "queries", first)
        self.queries = queries * inverse(norms)[:, None] if metric == "cosine" else queries
        self.centred = self.queries - centre
        self.norms = self.centred.norm(dim=1)  # (Q,)
        self.rounded = (self.centred - self.centred.to(dtype)).norm(dim=1)  # (Q,)
        # What r lacks to the cosine, or to minus half the squared distance.
        self.constant = self.queries @ centre if metric == "cosine" else -self.norms.square() / 2
        self.keys = torch.full((len(queries), k), _NONE, device=queries.device)  # ascending: best first
        self.seen = 0

    def result(self) -> tuple[Tensor, Tensor]:
        """(similarities (Q, k), indices (Q, k)), best first; at least k rows must have been added."""
        return _unpack(self.keys)

    def add(self, bank: Tensor) -> None:
        """Search further rows (M, D), a tile at a time.

        Raises:
            ValueError: a row that is not finite, or too large to be squared in float32.
        """
        tiles = max(1, -(-bank.numel() * self.dtype.itemsize // _TILE_BYTES))
        for rows in tqdm(bank.chunk(tiles), "nearest neighbours", unit="tile", leave=False, delay=5):
            self._add_tile(rows.float())

    def _add_tile(self, bank: Tensor) -> None:
        tile = _Tile(bank, finite_norms(bank, "bank", self.seen), self.centre, self.metric, self.dtype)
        step = max(1, _CHUNK_BYTES // (len(bank) * self.dtype.itemsize))
        for first in range(0, len(self.queries), step):
            part = slice(first, min(first + step, len(self.queries)))
            if not self._narrow(tile, part):
                if tile.rows.dtype == torch.bfloat16:
                    tile = _Tile(bank, tile.norms, self.centre, self.metric, torch.float32)
                self._narrow_or_split(tile, part)
        self.seen += len(bank)

    def _narrow_or_split(self, tile: _Tile, part: slice) -> None:
        if not self._narrow(tile, part):
            middle = (part.start + part.stop) // 2
            self._narrow_or_split(tile, slice(part.start, middle))
            self._narrow_or_split(tile, slice(middle, part.stop))

    def _narrow(self, tile: _Tile, part: slice) -> bool:
        """Find the neighbours of some queries in a tile; False, and nothing done, when too many rows may be one."""
        extra = torch.ones(part.stop - part.start, tile.rows.shape[1] - len(self.centre), device=self.centred.device)
        similarity = product(torch.cat([self.centred[part], extra], 1).to(tile.rows.dtype), tile.rows)  # (n, M)
        where = _at_least(similarity, self._threshold(similarity, tile, part))
        limit = _MAX_PAIRS
        if tile.rows.dtype == torch.bfloat16:
            limit = min(limit, _TOO_MANY * self.k * len(similarity))
        if len(where) > limit and len(similarity) > 1:
            return False
        query, row = where // len(tile.bank), where % len(tile.bank)
        found = _pack(self._compare(tile, self.queries[part], query, row), row + self.seen)
        self.keys[part] = _best(self.keys[part], query, found)
        return True

    def _threshold(self, similarity: Tensor, tile: _Tile, part: slice) -> Tensor:
        """(n,) the least approximate similarity with which a row can be among the k nearest."""
        known, _ = _unpack(self.keys[part])
        known = (known if self.metric == "cosine" else -known.square() / 2) - self.constant[part, None]
        known = known.masked_fill(self.keys[part] == _NONE, -torch.inf)
        maxima = _group_maxima(similarity, self.k, self.metric == "cosine")
        kth = _kth_largest(torch.cat([known, maxima], 1), self.k)
        if similarity.dtype == torch.bfloat16:
            kth = kth - ROUNDING[torch.bfloat16] * kth.abs()  # before the sum was rounded
        return (kth - 2 * self._margin(tile, part)).to(similarity.dtype)  # rounding keeps the order

    def _margin(self, tile: _Tile, part: slice) -> Tensor:
        """(n,) bound on the error of r plus that of the exact comparison, in units of r.

        A sum of D float32 products errs by at most D epsilon |x||y| to first order (Higham 2002, section 3.1);
        the terms of r and of the comparison add up to less than 2 (|q'| + |b'| + |centre|)^2. Rounding the
        factors to bfloat16 adds what was rounded away times the other factor.
        """
        norms, rounded = self.norms[part], self.rounded[part]
        reach = norms + tile.radius + (self.centre.norm() if self.metric == "cosine" else 0.0)
        terms = len(self.centre) + 16  # 16: scaling, centring, bias
        error = 2 * terms * ROUNDING[torch.float32] + PRODUCT_ERROR[torch.get_float32_matmul_precision()]
        margin = error * reach.square()
        if tile.rows.dtype == torch.bfloat16:
            margin = margin + rounded * tile.radius + (norms + rounded) * tile.rounded
        return margin

    def _compare(self, tile: _Tile, queries: Tensor, query: Tensor, row: Tensor) -> Tensor:
        """(P,) cosine or minus the distance of pairs of rows, each a function of the two alone."""
        if self.metric == "cosine" and queries.device.type == "cpu":
            return _sampled_product(tile.bank, queries, row, query) * tile.scale[row]
        return self._compare_gathered(tile, queries, query, row)

    def _compare_gathered(self, tile: _Tile, queries: Tensor, query: Tensor, row: Tensor) -> Tensor:
        similarity = queries.new_empty(len(query))
        step = max(1, _BLOCK_ELEMENTS // queries.shape[1])
        for first in range(0, len(query), step):
            part = slice(first, first + step)
            rows, others = tile.bank.index_select(0, row[part]), queries.index_select(0, query[part])
            if self.metric == "cosine":
                similarity[part] = rows.mul_(others).sum(1) * tile.scale[row[part]]
            else:
                similarity[part] = -rows.sub_(others).norm(dim=1)
        return similarity


def _group_maxima(similarity: Tensor, k: int, mostly_positive: bool) -> Tensor:
    """(n, w) float32 maxima of disjoint groups of each row: their k-th largest is at most that of the row."""
    columns = similarity.shape[1]
    groups = max(1, min(16, columns // (8 * k)))  # few enough that it is hardly less
    width = columns // groups
    grouped = similarity[:, : groups * width].unflatten(1, (groups, width))
    if similarity.dtype == torch.bfloat16 and mostly_positive:
        # Integers are compared faster; where a group has no positive number it gives another of its numbers, which
        # bounds the k-th largest as well, only less tightly.
        return grouped.view(torch.int16).amax(1).view(torch.bfloat16).float()
    return grouped.amax(1).float()


def _kth_largest(numbers: Tensor, k: int) -> Tensor:
    """(n,) k-th largest number of each row."""
    if numbers.device.type == "cpu":  # numpy partitions with vector instructions
        place = numbers.shape[1] - k
        return torch.from_numpy(np.partition(numbers.numpy(), place, axis=1)[:, place].copy())
    return numbers.topk(k).values[:, -1]


def _at_least(similarity: Tensor, threshold: Tensor) -> Tensor:
    """Positions, in the flattened matrix and ascending, of what reaches its row's threshold."""
    if similarity.device.type != "cpu":
        return (similarity >= threshold[:, None]).flatten().nonzero()[:, 0]
    if similarity.dtype == torch.bfloat16:
        if not bool((threshold > 0).all()):
            return torch.from_numpy(np.flatnonzero((similarity >= threshold[:, None]).numpy()))
        # As integers, positive numbers keep their order and negative ones are below.
        similarity, threshold = similarity.view(torch.int16), threshold.view(torch.int16)
    return torch.from_numpy(np.flatnonzero(similarity.numpy() >= threshold[:, None].numpy()))


def _sampled_product(rows: Tensor, columns: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """(P,) rows[row].columns[column], reading the rows in order and each once."""
    order = row.argsort()
    counts = torch.bincount(row, minlength=len(rows))
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        pattern = torch.sparse_csr_tensor(
            offsets, column[order], rows.new_zeros(len(row)), (len(rows), len(columns)), check_invariants=False
        )
        values = torch.sparse.sampled_addmm(pattern, rows, columns.T, beta=0.0).values()
    return torch.empty_like(values).scatter_(0, order, values)


def _pack(similarity: Tensor, index: Tensor) -> Tensor:
    """int64 keys that sort by similarity, largest first, then by index, smallest first."""
    bits = (similarity + 0.0).view(torch.int32)  # + 0.0: -0.0 ties with 0.0
    ascending = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (~ascending).long() << 32 | index


def _unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    ascending = ~(keys >> 32).int()
    return torch.where(ascending < 0, ascending ^ 0x7FFFFFFF, ascending).view(torch.float32), keys & 0xFFFFFFFF


def _best(known: Tensor, query: Tensor, found: Tensor) -> Tensor:
    """(n, k) the smallest keys of each query, of those known (n, k) and those found (P,), sorted by query."""
    counts = torch.bincount(query, minlength=len(known))
    k, most = known.shape[1], int(counts.max())
    place = torch.arange(len(query), device=query.device) - (counts.cumsum(0) - counts)[query]
    keys = known.new_full((len(known), k + most), _NONE)
    keys[:, :k] = known
    keys[query, k + place] = found
    if keys.device.type == "cpu":
        return torch.from_numpy(np.sort(keys.numpy(), axis=1)[:, :k])
    return keys.sort(1).values[:, :k]
