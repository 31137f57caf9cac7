"""Folders that the processes of several machines write into together: whether all of them see the same one."""

from __future__ import annotations

import socket
import time
import uuid
from pathlib import Path

import torch

from ..models.gather import is_distributed

_PATIENCE = 60.0  # seconds: storage over a network shows another machine's file up to a minute late


def unseen(paths: list[Path]) -> list[Path]:
    """Which of the files that other machines have written are not seen here, after a while."""
    end = time.monotonic() + _PATIENCE
    while (missing := [path for path in paths if not path.exists()]) and time.monotonic() < end:
        time.sleep(0.05)
    return missing


def check_shared(folder: Path) -> None:
    """Whether all processes see what the first one writes into a folder, which it makes; all of them call this.

    Raises:
        FileNotFoundError: some do not; names their machines.
    """
    if not is_distributed():
        return
    first = torch.distributed.get_rank() == 0
    token = [f".seen-by-all-{uuid.uuid4().hex}"]
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / token[0]).touch()
    torch.distributed.broadcast_object_list(token)
    found: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, (socket.gethostname(), not unseen([folder / token[0]])))
    if first:
        (folder / token[0]).unlink()
    if blind := sorted({machine for machine, sees in found if not sees}):
        raise FileNotFoundError(
            f"{', '.join(blind)}: {folder} is not the folder into which {found[0][0]} writes. All machines need the "
            "same --output_dir on shared storage."
        )
