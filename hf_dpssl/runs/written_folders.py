"""Folders of results that only what wrote them may replace: a list of their files lies beside them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from .atomic_files import write_json
from .lineage import read_json, well_formed

RECORD = "exported_files.json"  # in every such folder: what --overwrite may delete


def check_target(target: Path, overwrite: bool, what: str, formats: Collection[str]) -> None:
    """FileExistsError unless `target` is free, or with `overwrite` holds an earlier result and nothing else.

    what: the result, for the message, as "exported model". formats: those of `record_files` that are such a result.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        if not overwrite:
            raise FileExistsError(f"{target} is there already: choose another folder, or pass --overwrite.")
        with well_formed(target):
            record = read_json(target / RECORD) or {"format": None, "files": []}
            found_format, ours = record["format"], {RECORD, *record["files"]}
        if found_format not in formats:
            raise FileExistsError(f"{target} is no {what} and is not replaced: choose another folder.")
        found = {path.relative_to(target).as_posix() for path in target.rglob("*") if not path.is_dir()}
        if others := sorted(found - ours):
            raise FileExistsError(
                f"{target} holds {len(others)} files of others ({', '.join(others[:5])}) and is not replaced: "
                "move them, or choose another folder."
            )


def record_files(folder: Path, format: str) -> dict[str, int]:
    """Write the list of a folder's files; returns their bytes by path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    write_json(folder / RECORD, {"format": format, "files": files})
    return files
