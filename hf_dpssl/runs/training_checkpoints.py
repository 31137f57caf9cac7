"""Training checkpoints with rotation, from which a run resumes.

A checkpoint is a folder `step-<number>` with `state.pt` (tensors and plain values, read with
weights_only), `meta.json` and, of a sharded model, `parts/`. It is written under a temporary name
and renamed; older ones are removed only after that. So a kill at any moment leaves the previous
checkpoint or the new one.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path

import torch

from .atomic_files import atomic_folder, write_json

_STEP_FOLDER = re.compile(r"step-(\d+)")


class CheckpointFolder:
    """The checkpoints of one training loop.

    Args:
        path: folder that holds the `step-<number>` folders.
        keep: how many of the newest stay.
    """

    def __init__(self, path: str | os.PathLike, keep: int = 2):
        self.path, self.keep = Path(path), keep

    def steps(self) -> list[int]:
        """Steps of all whole checkpoints, ascending."""
        if not self.path.exists():
            return []
        found = (_STEP_FOLDER.fullmatch(entry.name) for entry in self.path.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def save(self, step: int, state: dict, meta: dict, parts: Path | None = None) -> Path:
        """Write a checkpoint, then remove all but the newest `keep`; a folder `parts` is moved into it.

        Raises:
            OSError: the disk is full; says which checkpoint is whole.
        """
        target = self.folder_of(step)
        try:
            with atomic_folder(target) as folder:
                with open(folder / "state.pt", "wb") as file:
                    torch.save(state, file)
                write_json(folder / "meta.json", meta)
                if parts is not None:
                    os.replace(parts, folder / "parts")
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            whole = self.steps()
            last = f"the last whole checkpoint is {self.folder_of(whole[-1])}" if whole else "there is none before"
            raise OSError(errno.ENOSPC, f"the disk is full at step {step}; {last}") from error
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self.folder_of(old))
        for left in self.path.glob(".parts-*"):  # by a killed run
            shutil.rmtree(left)
        return target

    def load(self, which: str) -> tuple[dict, dict] | None:
        """(state, meta) of "latest" or of a checkpoint folder; None when "latest" finds none; raises as `read_meta`.

        Tensors lie in the file until they are read, and so only once for all processes of a machine.
        """
        meta = self.read_meta(which)
        if meta is None:
            return None
        file = str(self._folder(which) / "state.pt")
        return torch.load(file, map_location="cpu", mmap=True, weights_only=True), meta

    def place_of_parts(self, step: int) -> Path:
        """Where the processes write their parts of a checkpoint that `save` will complete."""
        return self.path / f".parts-{step:08d}"

    def read_meta(self, which: str) -> dict | None:
        """What `save` got as `meta`, of "latest" or of a checkpoint folder; None when "latest" finds none.

        Raises:
            FileNotFoundError: a named folder that is no checkpoint.
        """
        folder = self._folder(which)
        if folder is None:
            return None
        if not (folder / "state.pt").exists():
            raise FileNotFoundError(
                f"{folder} is no checkpoint: give 'latest' or a folder like {self.path}/step-00000500."
            )
        return json.loads((folder / "meta.json").read_text(encoding="utf-8"))

    def _folder(self, which: str) -> Path | None:
        if which != "latest":
            return Path(which)
        steps = self.steps()
        return self.folder_of(steps[-1]) if steps else None

    def folder_of(self, step: int) -> Path:
        """Where the checkpoint of a step stands, or would."""
        return self.path / f"step-{step:08d}"

    def clear(self) -> None:
        """Remove all checkpoints and what a killed process left half-written."""
        shutil.rmtree(self.path, ignore_errors=True)
