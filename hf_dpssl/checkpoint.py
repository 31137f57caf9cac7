"""Files and folders that appear whole or not at all, and training checkpoints with rotation.

A checkpoint is a folder `step-<number>` with `state.pt` (tensors and plain values, read with
weights_only) and `meta.json`. It is written under a temporary name and renamed; older ones are
removed only after that. So a kill at any moment leaves the previous checkpoint or the new one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch

_STEP_FOLDER = re.compile(r"step-(\d+)")


@contextmanager
def atomic_file(path: str | os.PathLike, mode: str = "w") -> Iterator[IO]:
    """Open a file for writing under a temporary name; it gets its own name when the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Fill a folder under a temporary name; it replaces `path` when the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            os.rename(path, old)
        os.rename(temporary, path)
    finally:
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)


def write_json(path: str | os.PathLike, content: dict) -> None:
    """Write a JSON file in one piece."""
    with atomic_file(path) as file:
        json.dump(content, file, indent=2)
        file.write("\n")


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

    def save(self, step: int, state: dict, meta: dict) -> Path:
        """Write a checkpoint, then remove all but the newest `keep`."""
        target = self.path / f"step-{step:08d}"
        with atomic_folder(target) as folder:
            with atomic_file(folder / "state.pt", "wb") as file:
                torch.save(state, file)
            write_json(folder / "meta.json", meta)
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self.path / f"step-{old:08d}")
        return target

    def load(self, which: str) -> tuple[dict, dict] | None:
        """(state, meta) of "latest" or of a checkpoint folder; None when "latest" finds none.

        Raises:
            FileNotFoundError: a named folder that is no checkpoint.
        """
        if which == "latest":
            if not self.steps():
                return None
            folder = self.path / f"step-{self.steps()[-1]:08d}"
        else:
            folder = Path(which)
        if not (folder / "state.pt").exists():
            raise FileNotFoundError(
                f"{folder} is no checkpoint: give 'latest' or a folder like {self.path}/step-00000500."
            )
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        return torch.load(folder / "state.pt", map_location="cpu", weights_only=True), meta

    def clear(self) -> None:
        """Remove all checkpoints and what a killed process left half-written."""
        shutil.rmtree(self.path, ignore_errors=True)
