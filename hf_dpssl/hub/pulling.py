"""Repositories of the Hub as folders here: downloaded whole or not at all, and replayed without their code."""

from __future__ import annotations

import shutil
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError

from ..runs.atomic_files import atomic_folder
from ..runs.console import one_line
from . import replay


def pull(repo_id: str, output_dir: str | Path, revision: str | None = None) -> float | None:
    """Download a repository into a folder, whole or not at all.

    Returns:
        The largest difference of the stored pair's outputs, see replay.py; None where there is no pair.

    Raises:
        FileExistsError: the folder holds something.
        OSError: the repository cannot be read.
        ValueError: a malformed id, or the model does not reproduce its pair.
    """
    target = Path(output_dir)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} is there already: choose another --output_dir, or remove it first.")
    snapshot = download(repo_id, revision)
    with atomic_folder(target) as folder:
        shutil.copytree(snapshot, folder, dirs_exist_ok=True, ignore=_all_but_data)
        try:
            has_pair = (folder / replay.FILE_NAME).is_file()
            difference = replay.replay(folder, folder / replay.FILE_NAME) if has_pair else None
        except ValueError as error:  # which names a folder that is gone
            raise ValueError(str(error).replace(str(folder), repo_id)) from error
        shutil.copytree(snapshot, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".gitattributes"))
        return difference


def _all_but_data(folder: str, names: list[str]) -> list[str]:
    """What no model is made of; a repository's code is not there while it is replayed."""
    return [name for name in names if not (name.endswith((".json", ".safetensors")) or Path(folder, name).is_dir())]


def download(repo_id: str, revision: str | None = None, **options) -> Path:
    """The folder of a repository in the cache, fetched if need be; options as of `snapshot_download`.

    Raises:
        OSError: the repository cannot be read. ValueError: a malformed id.
    """
    try:
        return Path(snapshot_download(repo_id, revision=revision, **options))
    except HFValidationError:
        raise
    except Exception as error:
        raise OSError(
            f"cannot pull {repo_id} at revision {revision or 'main'!r} from {constants.ENDPOINT} "
            f"({type(error).__name__}: {one_line(error)}). Is the name right? A private repository needs "
            "`hf auth login` or HF_TOKEN."
        ) from error
