"""Momentum encoder and feature queue of MoCo: momentum of a step, size of the queue, the two in-place updates.

Source: He et al. 2020, algorithm 1. The queue takes any batch size, also at its end, and says how
many of its rows are real, so that a loss never sees a row that nothing was written to.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ..models.choices import MOMENTUM_SCHEDULES

_LARGEST_QUEUE = 65536  # He et al. 2020, on ImageNet: 5 % of its images


def momentum_at(step: int, total_steps: int, *, momentum: float, schedule: str = "constant") -> float:
    """Momentum of one step, a function of the step alone: a resumed run needs no state for it.

    "constant": `momentum`. "cosine": from `momentum` at step 0 to 1 at `total_steps`,
    1 - (1 - momentum) * (1 + cos(pi * step / total_steps)) / 2.

    Args:
        step: steps done before this one, 0 to `total_steps`.
        total_steps: of the whole run, at least 1.
        momentum: share kept of the old key encoder at step 0, in [0, 1].
        schedule: "constant" (MoCo) or "cosine".

    Raises:
        ValueError: on a value out of range.

    Source: Grill et al. 2020 (BYOL), appendix; Chen, Xie and He 2021 (MoCo-v3).
    """
    if schedule not in MOMENTUM_SCHEDULES:
        raise ValueError(f"schedule must be one of {MOMENTUM_SCHEDULES}, got {schedule!r}.")
    if not 0 <= step <= total_steps or total_steps < 1:
        raise ValueError(f"step must lie in [0, total_steps] and total_steps be positive, got {step}, {total_steps}.")
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum is the share kept of the old value and lies in [0, 1], got {momentum}.")
    if schedule == "constant":
        return momentum
    return 1 - (1 - momentum) * (1 + math.cos(math.pi * step / total_steps)) / 2


def choose_queue_size(num_images: int | None, batch_size: int) -> int:
    """Size of MoCo's queue: the largest power of two within half of the data set, at most 65,536.

    A queue as long as the data set holds keys that are a whole epoch old, and another view of nearly every query's
    own image as a negative: 65,536 on 10,000 images is 6.5 epochs stale, this gives 4,096.

    Args:
        num_images: of the data set; None where not known (a stream), which gives 65,536.
        batch_size: of all processes; the queue holds at least one batch.
    """
    size = _LARGEST_QUEUE if num_images is None else min(_LARGEST_QUEUE, 2 ** int(math.log2(max(2, num_images) / 2)))
    return max(size, batch_size)


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
    target = list(target)
    source = list(source)
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
    size = len(queue)
    count = len(keys)
    rows = (cursor + torch.arange(count, device=queue.device)[-size:]) % size
    queue[rows] = keys[-size:].to(queue.dtype)
    cursor.add_(count).remainder_(size)
    filled.add_(count).clamp_(max=size)
