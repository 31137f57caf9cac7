"""Figures on data sets of the Hub as `.eval_results/<org>--<name>.yaml`, where the Hub's leaderboards look for them.

Source: https://huggingface.co/docs/hub/eval-results. Other data sets' figures stand in the card's model-index alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml


def eval_files(results: Iterable[EvalResult], read: Callable[[str], bytes | None]) -> dict[str, str]:
    """Content of each file by path, with what stands in it already of other measurements.

    Args:
        results: as the card's model-index has them; a label and what the figure depends on become an entry's notes.
        read: content of a path of the repository or folder, None where there is none.

    Raises:
        ValueError: a file that is there and is no list of entries.
    """
    found: dict[str, list[dict]] = {}
    for result in results:
        if "/" not in result.dataset_type:  # no id of the Hub
            continue
        arguments = "".join(f"; {name} {value}" for name, value in (result.metric_args or {}).items())
        notes = f"{result.metric_name}; split {result.dataset_split}{arguments}"
        entry = EvalResultEntry(result.dataset_type, result.metric_type, result.metric_value, notes=notes)
        path = f".eval_results/{result.dataset_type.replace('/', '--')}.yaml"
        found.setdefault(path, []).extend(eval_result_entries_to_yaml([entry]))
    return {path: merged(path, read(path), entries) for path, entries in found.items()}


def eval_files_of_folder(results: Iterable[EvalResult], folder: Path) -> dict[str, str]:
    """`eval_files` with what a folder's own files hold; errors as there."""
    return eval_files(results, lambda path: (folder / path).read_bytes() if (folder / path).is_file() else None)


def merged(path: str, present: bytes | None, entries: list[dict]) -> str:
    """Content of a file with these entries and what stands in it already of other measurements; errors as above."""
    measured = [(entry.get("dataset"), entry.get("notes")) for entry in entries]
    kept = [old for old in read_entries(path, present) if (old.get("dataset"), old.get("notes")) not in measured]
    return yaml.safe_dump(kept + entries, sort_keys=False, allow_unicode=True)


def read_entries(path: str, content: bytes | None) -> list[dict]:
    """Entries of a file, none where it is not there; ValueError for one that is no list of them."""
    try:
        entries = yaml.safe_load(content or b"[]")
    except yaml.YAMLError:
        entries = None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path} must be a list of evaluation results: it is damaged, mend or remove it.")
    return entries
