"""Momentum encoder and feature queue of MoCo: the two in-place updates.

Source: He et al. 2020, algorithm 1. The queue takes any batch size, also at its end, and says how
many of its rows are real, so that a loss never sees a row that nothing was written to.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def ema_update_(target: Iterable[Tensor], source: Iterable[Tensor], momentum: float) -> None:
    """target <- momentum * target + (1 - momentum) * source, in place.

    Args:
        target: tensors to move, e.g. the key encoder's parameters.
        source: tensors to move towards, in the same order.
        momentum: share kept of the old value, in [0, 1].
    """
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum is the share kept of the old value and lies in [0, 1], got {momentum}.")
    target, source = list(target), list(source)
    if target:
        torch._foreach_lerp_(target, source, 1 - momentum)


@torch.no_grad()
def enqueue_(queue: Tensor, cursor: Tensor, filled: Tensor, keys: Tensor) -> None:
    """Write keys over the oldest rows of a ring buffer, in place.

    Args:
        queue: (K, D) ring buffer.
        cursor: () int64, the row written next.
        filled: () int64, rows that hold a key, at most K.
        keys: (B, D) new keys, of every process; the last K of them are kept when B > K.
    """
    size, count = len(queue), len(keys)
    rows = (int(cursor) + torch.arange(count, device=queue.device)[-size:]) % size
    queue[rows] = keys[-size:].to(queue.dtype)
    cursor.fill_((int(cursor) + count) % size)
    filled.fill_(min(size, int(filled) + count))
