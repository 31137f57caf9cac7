"""Random numbers as a function of (seed, stream, epoch, sample), not of a generator's history.

A training step that draws its crops, noise, timesteps and dropped labels from here gives the same
numbers whatever the batch size, the number of processes or workers, and whether or not the run was
killed and resumed in between. The generator is Philox-4x32-10 (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011), evaluated for a whole batch at once on any device.
"""

from __future__ import annotations

import hashlib
import math
import zlib

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def philox_4x32(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Ten Philox rounds on a batch of counters.

    Args:
        counter: (..., 4) int64, each entry in [0, 2^32).
        key: two integers in [0, 2^32).

    Returns:
        (..., 4) int64 in [0, 2^32).
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    key_0, key_1 = key
    for _ in range(10):
        # The product wraps modulo 2^64, so that shift-and-mask still gives its high word.
        product_0 = c0 * _MULTIPLIERS[0]
        product_1 = c2 * _MULTIPLIERS[1]
        high_0 = (product_0 >> 32) & _MASK
        low_0 = product_0 & _MASK
        high_1 = (product_1 >> 32) & _MASK
        low_1 = product_1 & _MASK
        c0 = high_1 ^ c1 ^ key_0
        c1 = low_1
        c2 = high_0 ^ c3 ^ key_1
        c3 = low_0
        key_0 = (key_0 + _WEYL_INCREMENTS[0]) & _MASK
        key_1 = (key_1 + _WEYL_INCREMENTS[1]) & _MASK
    return torch.stack([c0, c1, c2, c3], dim=-1)


def derive_seed(seed: int, *parts: int | str) -> int:
    """A 63-bit seed that depends on every part, e.g. `derive_seed(0, "order", epoch)`."""
    text = "/".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def _bits(sample_ids: Tensor, count: int, seed: int, stream: str, epoch: int) -> Tensor:
    if sample_ids.dtype != torch.int64 or sample_ids.ndim != 1:
        raise ValueError(
            f"sample_ids must be a 1-D int64 tensor, got shape {tuple(sample_ids.shape)} of {sample_ids.dtype}."
        )
    blocks = -(-count // 4)
    block = torch.arange(blocks, device=sample_ids.device).expand(len(sample_ids), blocks)
    sample = sample_ids[:, None].expand(-1, blocks)
    counter = torch.stack(
        [block, sample & _MASK, (sample >> 32) & _MASK, torch.full_like(block, epoch & _MASK)], dim=-1
    )
    key = derive_seed(seed, zlib.crc32(stream.encode()))
    return philox_4x32(counter, (key & _MASK, (key >> 32) & _MASK)).flatten(1)[:, :count]


def uniform(sample_ids: Tensor, count: int, *, seed: int, stream: str, epoch: int = 0) -> Tensor:
    """Uniform numbers in [0, 1), bit-identical on every device.

    Args:
        sample_ids: (B,) int64, what makes each row's numbers its own.
        count: numbers per sample.
        seed: random seed of the run.
        stream: name of what is drawn ("noise", "crop", ...); streams are independent.
        epoch: epoch or step.

    Returns:
        (B, count) float32.
    """
    return (_bits(sample_ids, count, seed, stream, epoch) >> 8).to(torch.float32) * 2.0**-24


def normal(sample_ids: Tensor, shape: tuple[int, ...], *, seed: int, stream: str, epoch: int = 0) -> Tensor:
    """Standard normal numbers (Box-Muller) of shape (B, *shape), float32; arguments as in `uniform`."""
    count = math.prod(shape)
    half = -(-count // 2)
    bits = _bits(sample_ids, 2 * half, seed, stream, epoch)
    radius_bits = bits[:, :half]
    angle_bits = bits[:, half:]
    radius = ((radius_bits + 1).to(torch.float32) * 2.0**-32).log().mul(-2).sqrt()
    angle = (angle_bits >> 8).to(torch.float32) * (2.0**-24 * 2 * math.pi)
    values = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :count]
    return values.reshape(len(sample_ids), *shape)


def permutation(size: int, *, seed: int, epoch: int) -> Tensor:
    """The order in which an epoch visits `size` samples: (size,) int64, on the CPU."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    return torch.randperm(size, generator=generator)


def seed_step(seed: int, step: int, process_index: int = 0) -> None:
    """Seed torch's global generator for one step, so that dropout is a function of the step too."""
    torch.manual_seed(derive_seed(seed, "step", step, process_index))
