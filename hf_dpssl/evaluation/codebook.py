"""How much of a codebook is really used."""

from __future__ import annotations

import torch
from torch import Tensor


def codebook_usage(codes: Tensor, num_codes: int) -> dict[str, float]:
    """Usage of a codebook over a set of images.

    Args:
        codes: int64 code ids of any shape, of all images.
        num_codes: size of the codebook.

    Returns:
        code_usage: percent of the codes that occur; code_perplexity: exp of the entropy (nats) of
        their frequencies, in [1, num_codes]; dead_codes: codes that never occur.

    Raises:
        ValueError: no codes, or an id outside [0, num_codes).
    """
    if codes.numel() == 0 or int(codes.min()) < 0 or int(codes.max()) >= num_codes:
        raise ValueError(f"codes must be non-empty and lie in [0, {num_codes - 1}].")
    counts = torch.bincount(codes.flatten(), minlength=num_codes).double()
    frequency = counts / counts.sum()
    entropy = -torch.special.xlogy(frequency, frequency).sum()
    dead = int((counts == 0).sum())
    return {
        "code_usage": 100 * (1 - dead / num_codes),
        "code_perplexity": float(entropy.exp()),
        "dead_codes": float(dead),
    }
