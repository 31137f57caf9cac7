"""Images decoded once on a machine, and held in its memory once, for all processes of a launch there."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

Decode = Callable[[range, Tensor, Tensor], dict[int, str]]


def decoded_once(decode: Decode, count: int, side: int, *, together: bool) -> tuple[Tensor, Tensor, dict[int, str]]:
    """All images and labels, of which each process of this machine decodes its share.

    The memory of several processes is one file in the folder for temporary files, which has no name any more once they
    have opened it.

    Args:
        decode: called with rows and with all images and labels, fills these rows in place; returns {row: reason} of
            rows that cannot be read.
        count, side: number and side of the images.
        together: all processes of the launch call this, at the same time; else this one decodes all, for itself.

    Returns:
        Images uint8 (count, 3, side, side), labels int64 (count,), and the reasons of all rows, in their order.
    """
    rank, world = local_process() if together else (0, 1)
    labels = torch.full((count,), -1)
    if world == 1:
        images = torch.empty((count, 3, side, side), dtype=torch.uint8)
        return images, labels, decode(range(count), images, labels)
    token = [secrets.token_hex(8)]
    torch.distributed.broadcast_object_list(token)
    path = Path(tempfile.gettempdir()) / f"hf_dpssl-images-{token[0]}"
    size = count * 3 * side**2
    if rank == 0:
        with open(path, "xb") as file:
            file.truncate(size)
    torch.distributed.barrier()
    images = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8).view(count, 3, side, side)
    torch.distributed.barrier()
    if rank == 0:
        path.unlink()
    share = range(rank * count // world, (rank + 1) * count // world)
    bad = decode(share, images, labels)
    parts: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, (share.start, labels[share.start : share.stop].tolist(), bad))
    for start, values, _ in parts:
        labels[start : start + len(values)] = torch.tensor(values, dtype=torch.int64)
    return images, labels, dict(sorted((row, reason) for *_, reasons in parts for row, reason in reasons.items()))


def local_process() -> tuple[int, int]:
    """Number of this process among those of its machine, and how many they are; (0, 1) outside a launch."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    return int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
