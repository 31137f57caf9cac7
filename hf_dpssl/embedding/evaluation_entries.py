"""One evaluation of a checkpoint with all that decides its numbers, and the list of them in a results.json.

Two evaluations compare when their fingerprints differ in the model alone. The same command gives the same fingerprint
(versions stand beside it: another version of a library may change the last digits) and replaces its earlier entry.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from ..runs.atomic_files import write_json
from ..runs.lineage import read_json
from ..runs.redaction import redacted, without_folders
from ..runs.results import command_line, environment
from .feature_extractors import FeatureExtractor

KEY = "evaluations"  # of the list in results.json


@dataclass
class Measured:
    """What measuring a checkpoint gives.

    Args:
        metrics: numbers by key.
        samples: how many images of what.
        model: hash of everything in the checkpoint that decides the numbers.
        data: hash of the real images as they were compared or embedded.
        resize: how images reach the model's size, in words.
        judges: feature extractors by their part, "extractor" or "classifier".
        notes: what a reader of the numbers must know, a sentence each.
        splits: how the data set calls its splits.
    """

    metrics: dict[str, float]
    samples: dict[str, int]
    model: str
    data: str
    resize: str
    judges: dict[str, FeatureExtractor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    splits: dict[str, str] = field(default_factory=dict)


def evaluation_entry(kind: str, measured: Measured, *, dataset: str, seed: int, options: dict) -> dict:
    """The entry for results.json.

    Args:
        kind: of the checkpoint, as `checkpoint_kind` says.
        measured: numbers and hashes.
        dataset: what --dataset said.
        seed: of all draws.
        options: everything else that decides the numbers, plain values.

    Returns:
        {"kind", "metrics", "dataset", "seed", "samples", "options", "notes", "splits", "fingerprint", "command",
        "environment"}; "fingerprint" has "model", "data", "resize", and of each judge its name, hash and resize, and
        "sha256" of all that decides the numbers.
    """
    judges = {
        part: {"name": judge.name, "sha256": judge.fingerprint, "resize": judge.resize}
        for part, judge in measured.judges.items()
    }
    about = {"dataset": without_folders(dataset), "seed": seed, "samples": measured.samples}
    about["options"] = redacted(options)
    fingerprint = {"model": measured.model, "data": measured.data, "resize": measured.resize, **judges}
    text = json.dumps({"kind": kind, **about, **fingerprint}, sort_keys=True)
    fingerprint["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    made = {"command": command_line(), "environment": environment()}
    return (
        {"kind": kind, "metrics": measured.metrics}
        | about
        | {"notes": measured.notes, "splits": measured.splits, "fingerprint": fingerprint}
        | made
    )


def with_entry(results: dict, entry: dict) -> dict:
    """Results with the entry at the end of their list; one of the same fingerprint is replaced where it stands.

    Raises:
        ValueError: "evaluations" is there and is no list of entries.
    """
    entries = results.get(KEY, [])
    try:
        known = [other["fingerprint"]["sha256"] for other in entries]
    except (KeyError, TypeError):
        raise ValueError(f"{KEY!r} in results.json must be a list of evaluations: it is damaged, remove it.") from None
    sha256 = entry["fingerprint"]["sha256"]
    kept = [entry if other == sha256 else old for old, other in zip(entries, known, strict=True)]
    return results | {KEY: kept if sha256 in known else [*entries, entry]}


def append_entry(path: str | os.PathLike, entry: dict) -> None:
    """Put the entry into a JSON file, made when missing, whose other contents stay; ValueError for a damaged file."""
    write_json(path, with_entry(read_json(Path(path)) or {}, entry))
