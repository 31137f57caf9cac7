"""Nearest rows of a codebook, in bounded memory, and what quantisers count about them.

Of few codes the smallest product decides. Of many, cheap products find candidates and an exact comparison decides. With
the half squared norms in further columns, one product gives |v - e|^2 / 2, in bfloat16 where a processor is faster with
it. Its error is at most a margin, so that the nearest code lies within twice the margin of the smallest product. Minima
are found over blocks of codes first, and candidates only within the blocks whose minimum is small enough.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, library

from .matrix_products import ROUNDING, has_fast_bfloat16, product

_TILE_VECTORS, _TILE_CODES, _BLOCK = 2048, 2048, 128  # measured: 8 MiB of bfloat16 products stay in the cache
_GPU_TILE = 8192  # vectors, and codes, of a tile on a GPU
# From which on candidates, found in that precision, are faster than one product and its extremes (measured).
_MANY_CODES = {torch.bfloat16: 512, torch.float32: 2048, torch.float64: 2048}
_MOST_CANDIDATES = {torch.bfloat16: 8, torch.float32: 16, torch.float64: 16}  # of a vector in a tile, on average
_COMPARED_AT_ONCE = 2**17  # elements: within the second-level cache


@torch.no_grad()
def nearest_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index of the Euclidean-nearest row of `codebook` (K, D) for each of `vectors` (N, D): (N,) int64.

    Nearest by the sum of squared differences, in the inputs' precision and at least float32. From 2,048 codes on, and
    from 512 where a CPU is fast in bfloat16, exactly: of equals the first wins, and where more than 16 codes per vector
    agree to the rounding of a product, any of them may be returned. Of fewer codes, among which a search for candidates
    is slower than all products, any may be returned that agrees with the nearest to this rounding: about 1e-6 of the
    squared norms around the codes' mean. An offset of all numbers does no harm. Beyond a copy of the codebook, memory
    is bounded by tiles: 128 MiB (1 GiB on a GPU). A vector with a NaN gets code 0.

    Raises:
        ValueError: shapes that do not fit, or an empty codebook.
    """
    if vectors.ndim != 2 or codebook.ndim != 2 or vectors.shape[1] != codebook.shape[1] or not len(codebook):
        raise ValueError(
            f"vectors (N, D) and codebook (K >= 1, D) do not fit: {tuple(vectors.shape)} and {tuple(codebook.shape)}."
        )
    if torch.compiler.is_dynamo_compiling():
        return _nearest_in_a_graph(vectors, codebook)
    return _nearest(vectors, codebook)


def _nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    full = torch.promote_types(torch.promote_types(vectors.dtype, codebook.dtype), torch.float32)
    parts = vectors.split(_TILE_VECTORS if vectors.device.type == "cpu" else _GPU_TILE)
    fast = full == torch.float32 and has_fast_bfloat16(codebook.device)
    searched = torch.bfloat16 if fast else full
    if len(codebook) < _MANY_CODES[searched]:
        centre = codebook.to(full).mean(0)
        codes = codebook.to(full) - centre
        halves = codes.square().sum(1) / 2
        return torch.cat([product(part.to(full) - centre, codes, -halves).argmax(1) for part in parts])
    search = _Search(codebook.to(full), searched)
    found = []
    for part in parts:
        nearest = search.nearest(part.to(full))
        if nearest is None:  # bfloat16 cannot tell these codes apart
            search = _Search(codebook.to(full), full)
            nearest = search.nearest(part.to(full))
        found.append(nearest)
    return torch.cat(found)


# How many candidates there are the numbers decide: within a graph the search is an operation of its own.
@library.custom_op("hf_dpssl::nearest_codes", mutates_args=(), schema="(Tensor vectors, Tensor codebook) -> Tensor")
def _nearest_in_a_graph(vectors: Tensor, codebook: Tensor) -> Tensor:
    return _nearest(vectors, codebook)


@_nearest_in_a_graph.register_fake
def _(vectors: Tensor, codebook: Tensor) -> Tensor:
    return vectors.new_empty(len(vectors), dtype=torch.int64)


class _Search:
    """A codebook (K, D) prepared for products in `dtype`."""

    def __init__(self, codebook: Tensor, dtype: torch.dtype):
        self.codebook, self.dtype = codebook, dtype
        self.centre = codebook.mean(0)
        size = _TILE_CODES if codebook.device.type == "cpu" else _GPU_TILE
        self.tiles = []
        for codes in codebook.split(size):
            block = min(_BLOCK, len(codes))
            whole = torch.cat([codes, codes[:1].expand(-len(codes) % block, -1)])  # repeats fill the last block
            centred = self.centre - whole
            norms = centred.norm(dim=1)
            rows, rounded = _with_halves(centred, norms, dtype, first=True)
            self.tiles.append((rows, norms.max(), rounded.max(), len(codes), block))

    def nearest(self, vectors: Tensor) -> Tensor | None:
        """(n,) nearest codes of vectors (n, D); None when bfloat16 leaves too many candidates."""
        centred = vectors - self.centre
        norms = centred.norm(dim=1)
        rows, rounded = _with_halves(centred, norms, self.dtype, first=False)
        upper = torch.full_like(norms, torch.inf)  # bound on the half squared distance of the nearest code
        found, first = [], 0
        for codes, radius, rounded_codes, count, block in self.tiles:
            margin = self._error * (norms + radius).square() + rounded * radius + (norms + rounded) * rounded_codes
            products = product(rows, codes)  # (n, tile)
            blocks = _comparable(products).view(len(rows), len(codes) // block, block)
            minima = blocks.amin(2)
            least = minima.amin(1).view(self.dtype).to(norms.dtype)
            upper = torch.minimum(upper, least + self._rounding(least) + margin)
            places = self._at_most(blocks, minima, upper + margin)
            if places is None:
                if self.dtype == torch.bfloat16:
                    return None
                row, best = torch.arange(len(rows), device=rows.device), minima.argmin(1)
                places = row * products.shape[1] + best * block + blocks[row, best].argmin(1)
            vector, code = places // products.shape[1], places % products.shape[1]
            value = products.flatten()[places].to(norms.dtype)
            found.append((vector, first + code.where(code < count, 0), value - self._rounding(value) - margin[vector]))
            first += count
        vector, code, lower = (torch.cat(parts) for parts in zip(*found, strict=True))
        kept = lower <= upper[vector]
        return self._first_nearest(vectors, vector[kept], code[kept])

    @property
    def _error(self) -> float:
        """Of the product, its own rounding apart, and the exact comparison, over the squared sum of the norms.

        A sum of D products errs by at most D epsilon |x||y| to first order (Higham 2002, section 3.1), and all terms
        add up to less than (|v| + |e|)^2. Rounding the factors to bfloat16 adds what was rounded away times the other
        factor, and 2^-16 of the half squared norms, which two numbers hold.
        """
        error = 2 * (self.codebook.shape[1] + 20) * ROUNDING[self.codebook.dtype]  # 20: centring, norms, comparison
        return error + 2.0**-16 if self.dtype == torch.bfloat16 else error

    def _rounding(self, products: Tensor) -> Tensor:
        """What rounding the product itself may have changed."""
        return 1.01 * ROUNDING[self.dtype] * products.abs()

    def _at_most(self, blocks: Tensor, minima: Tensor, limit: Tensor) -> Tensor | None:
        """Places, in the flattened products, of those that are at most `limit` (n,); None if they are too many."""
        # Rounding keeps the order. In bfloat16 all below zero are taken, which as integers they are not sorted by.
        limit = _comparable(
            (limit + self._rounding(limit)).clamp_min(0 if self.dtype == torch.bfloat16 else -torch.inf).to(self.dtype)
        )
        most, (_, per_row, block) = _MOST_CANDIDATES[self.dtype] * len(blocks), blocks.shape
        hit = _true(minima <= limit[:, None])
        if len(hit) > most:
            return None
        within = _true(blocks.view(-1, block).index_select(0, hit) <= limit[hit // per_row, None])
        return None if len(within) > most else hit[within // block] * block + within % block

    def _first_nearest(self, vectors: Tensor, vector: Tensor, code: Tensor) -> Tensor:
        """(n,) of the pairs' codes that with the smallest distance to each vector, the first of equals."""
        squared = vectors.new_empty(len(vector))
        step = max(1, _COMPARED_AT_ONCE // vectors.shape[1])
        for start in range(0, len(vector), step):
            part = slice(start, start + step)
            difference = vectors.index_select(0, vector[part]).sub_(self.codebook.index_select(0, code[part]))
            squared[part] = difference.square_().sum(1)
        least = vectors.new_full((len(vectors),), torch.inf).scatter_reduce_(0, vector, squared, "amin")
        best = squared <= least[vector]
        none = len(self.codebook)
        codes = vector.new_full((len(vectors),), none).scatter_reduce_(0, vector[best], code[best], "amin")
        return codes.where(codes < none, 0)


def _with_halves(centred: Tensor, norms: Tensor, dtype: torch.dtype, first: bool) -> tuple[Tensor, Tensor]:
    """Rows in `dtype` with half their squared norms and ones in further columns; norms of what was rounded away.

    first: the halves before the ones, so that the product of rows of either kind adds the halves of both.
    """
    size, parts = centred.shape[1], 2 if dtype == torch.bfloat16 else 1
    rows = centred.new_ones(len(centred), size + 2 * parts, dtype=dtype)
    rows[:, :size] = centred
    half = norms.square() / 2
    start = size if first else size + parts
    for column in range(start, start + parts):
        rows[:, column] = half
        half = half - rows[:, column].to(half.dtype)
    return rows, torch.zeros_like(norms) if dtype == centred.dtype else (centred - rows[:, :size]).norm(dim=1)


def _comparable(numbers: Tensor) -> Tensor:
    """bfloat16 as integers, which are compared faster: the same order where none is negative."""
    return numbers.view(torch.int16) if numbers.dtype == torch.bfloat16 else numbers


def _true(mask: Tensor) -> Tensor:
    """Flat positions of what is true."""
    if mask.device.type == "cpu":
        try:
            return torch.from_numpy(np.flatnonzero(mask.numpy()))  # several times faster
        except RuntimeError:  # under torch.func.jvp and vjp tensors have no data of their own
            pass
    return mask.flatten().nonzero()[:, 0]


def code_statistics(vectors: Tensor, codes: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """How often each code is used (K,), and the sum of its vectors (K, D)."""
    counts = _counts(codes, num_codes)
    by_code = vectors[codes.argsort(stable=True)]
    # Deterministic on a GPU too, where index_add is not.
    return counts.to(vectors.dtype), torch.segment_reduce(by_code, "sum", lengths=counts, unsafe=True)


def _counts(codes: Tensor, num_codes: int) -> Tensor:
    """How often each code stands in codes (N,): (num_codes,) int64. bincount would make the host wait for a GPU."""
    return codes.new_zeros(num_codes).index_add_(0, codes, torch.ones_like(codes))


def k_means(vectors: Tensor, num_codes: int, iterations: int = 10) -> Tensor:
    """Lloyd's algorithm from a random start (torch's global generator): (num_codes, D).

    With fewer vectors than codes the rest are repeats with a little noise; empty clusters restart
    at random vectors.
    """
    picks = torch.randperm(len(vectors), device=vectors.device)
    repeats = -(-num_codes // len(vectors))
    centres = vectors[picks.repeat(repeats)[:num_codes]].clone()
    if repeats > 1:
        centres += 1e-3 * vectors.std() * torch.randn_like(centres)
    for _ in range(iterations):
        counts, sums = code_statistics(vectors, nearest_codes(vectors, centres), num_codes)
        restarts = vectors[torch.randint(len(vectors), (num_codes,), device=vectors.device)]
        centres = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp_min(1), restarts)
    return centres


def perplexity_of(codes: Tensor, num_codes: int) -> Tensor:
    """exp of the entropy of the codes' frequencies: a scalar in [1, num_codes]."""
    usage = _counts(codes.flatten(), num_codes).float() / codes.numel()
    return torch.exp(-torch.special.xlogy(usage, usage).sum())
