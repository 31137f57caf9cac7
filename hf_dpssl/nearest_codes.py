"""Nearest rows of a codebook, exactly, in bounded memory, and what quantisers count about them.

With the half squared norms folded into the product, |v - e|^2 / 2 = |v|^2 / 2 - (v e - |e|^2 / 2): the nearest code
has the largest score. Scores are made tile by tile (they stay in the cache), and the maximum of a tile is found in two
levels, over blocks of codes and then within the best block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .products import product

_TILE_VECTORS, _TILE_CODES, _BLOCK = 512, 2048, 128  # measured: 512 x 2048 scores are 4 MiB


@torch.no_grad()
def nearest_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index of the Euclidean-nearest row of `codebook` (K, D) for each of `vectors` (N, D): (N,) int64.

    Both are first moved by the mean of the codebook, so that an offset does not swallow small differences. Beyond
    them, memory is bounded by a tile of 4 MiB. Of codes whose distances agree to rounding any may be returned.

    Raises:
        ValueError: shapes that do not fit, or an empty codebook.
    """
    if vectors.ndim != 2 or codebook.ndim != 2 or vectors.shape[1] != codebook.shape[1] or not len(codebook):
        raise ValueError(
            f"vectors (N, D) and codebook (K >= 1, D) do not fit: {tuple(vectors.shape)} and {tuple(codebook.shape)}."
        )
    centre = codebook.mean(0)
    centred = codebook - centre
    tiles = list(zip(centred.split(_TILE_CODES), (centred.pow(2).sum(1) / -2).split(_TILE_CODES), strict=True))
    parts = []
    for part in vectors.split(_TILE_VECTORS):
        part = part - centre
        best, chosen = _tile_maximum(product(part, *tiles[0]))
        for number, tile in enumerate(tiles[1:], 1):
            maximum, index = _tile_maximum(product(part, *tile))
            chosen = torch.where(maximum > best, index + number * _TILE_CODES, chosen)
            best = torch.maximum(best, maximum)
        parts.append(chosen)
    return torch.cat(parts) if parts else vectors.new_empty(0, dtype=torch.int64)


def _tile_maximum(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Largest score of each row and its column; over blocks first, which a processor does with whole registers."""
    rows, columns = scores.shape
    if columns % _BLOCK or columns == _BLOCK:
        return scores.max(1)
    blocks = scores.view(rows, -1, _BLOCK)
    maximum, block = blocks.amax(2).max(1)
    inner = blocks[torch.arange(rows, device=scores.device), block].argmax(1)
    return maximum, block * _BLOCK + inner


def code_statistics(vectors: Tensor, codes: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """How often each code is used (K,), and the sum of its vectors (K, D)."""
    counts = torch.bincount(codes, minlength=num_codes)
    by_code = vectors[codes.argsort(stable=True)]
    # Deterministic on a GPU too, where index_add is not.
    return counts.to(vectors.dtype), torch.segment_reduce(by_code, "sum", lengths=counts)


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
    usage = torch.bincount(codes.flatten(), minlength=num_codes).float() / codes.numel()
    return torch.exp(-torch.special.xlogy(usage, usage).sum())
