"""Files and folders that appear whole or not at all, whenever the process is killed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def atomic_file(path: str | os.PathLike, mode: str = "w") -> Iterator[IO]:
    """Open a file for writing under a temporary name; it gets its own name when the block ends well.

    Raises:
        OSError: the disk is full; says that what stood there is whole.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{_this_process()}.tmp")
    try:
        with _full_disk_named(path):
            with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Fill a folder under a temporary name; it replaces `path` when the block ends well.

    A process that dies between the two renames leaves the folder before as `.NAME.old`, which the next call puts back
    first; a rename that fails is taken back. Files can be read by whoever umask allows.

    Raises:
        OSError: the disk is full; says that what stood there is whole.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{_this_process()}.tmp")
    old = path.with_name(f".{path.name}.old")
    if old.exists() and not path.exists():
        os.rename(old, path)
    for leftover in (old, *_leftovers(path)):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir()
    try:
        with _full_disk_named(path):
            yield temporary
            _settle(temporary)
            _replace_folder(path, temporary, old)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _replace_folder(path: Path, new: Path, old: Path) -> None:
    existed = path.exists()
    if existed:
        os.rename(path, old)
    try:
        os.rename(new, path)
    except BaseException:
        if existed:
            os.rename(old, path)
        raise


def _this_process() -> str:
    return f"{socket.gethostname()}-{os.getpid()}"


def _leftovers(path: Path) -> list[Path]:
    """Half-written folders of processes of this machine that are no more."""
    start = f".{path.name}.{socket.gethostname()}-"
    found = []
    for entry in path.parent.iterdir():
        number = entry.name.removeprefix(start).removesuffix(".tmp")
        if entry.name.startswith(start) and number.isdigit() and not _lives(int(number)):
            found.append(entry)
    return found


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _settle(folder: Path) -> None:
    """Files are on the disk, and for whom umask says: safetensors makes its own for their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~umask)
            with open(path, "rb") as file:
                os.fsync(file.fileno())


@contextmanager
def _full_disk_named(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not _disk_is_full(error, path.parent):
            raise
        before = f"what {path} held before is whole" if path.exists() else "nothing is there under that name"
        raise OSError(errno.ENOSPC, f"the disk is full: {path} could not be written, {before}") from error


def _disk_is_full(error: BaseException | None, folder: Path) -> bool:
    """Whether an error, or what it came from, is a full disk; torch and safetensors wrap that of the system."""
    while error is not None:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC or f"os error {errno.ENOSPC}" in str(error):
            return True
        if "PytorchStreamWriter failed" in str(error):  # whatever the reason
            return shutil.disk_usage(folder).free < 2**20
        error = error.__cause__ or error.__context__
    return False


def write_json(path: str | os.PathLike, content: dict) -> None:
    """Write a JSON file in one piece."""
    with atomic_file(path) as file:
        json.dump(content, file, indent=2)
        file.write("\n")
