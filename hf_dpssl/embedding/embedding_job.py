"""Embedding a data set into parquet shards: by one or several processes, and going on after a kill.

A shard appears whole or not at all, and who writes it changes nothing in it. So a killed run goes on with
the shards that lack, and process r of n takes every n-th shard without a word to the others; whoever
finds all of them written writes the manifest.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..data.image_data import ImageData
from ..data.image_table import BadImageError, decode_row
from ..models.matrix_products import allow_tf32
from ..runs.atomic_files import write_json
from ..runs.local_processes import divide_work, stop_without_parent
from ..runs.results import command_line, environment
from .choices import SPLITS
from .embedder import ImageEmbedder, Preprocessor, best_device
from .embeddings_table import EmbeddingsTable, dataset_fingerprint, load_splits, write_columns

# Entries of a plan that decide the files.
_DECIDES = ["features", "encoder_fingerprint", "dataset_fingerprint", "splits", "rows_per_shard"]
_METADATA = b"hf_dpssl"  # of a shard's schema, beside the one of datasets


@dataclass(frozen=True)
class EmbedJob:
    """What to embed, by what, and where to.

    Args:
        encoder: folder or Hub id, as `ImageEmbedder` takes it.
        dataset: folder of pictures, or any data set that `load_images` knows.
        folder: of the result.
        features: "features" (of the backbone) or "embeddings" (of the head).
        split: "train", "evaluation" (validation and test), or None for both; nothing is held out of a single split.
        image_column, label_column, revision: as in `load_images`.
        on_bad_image: "error", or "skip": unreadable pictures have no row, and are named in the manifest.
        batch_size: pictures embedded at once; may change when a run goes on.
        rows_per_shard: pictures of a shard; what a kill may cost.
        num_workers: loader processes of each process.

    Raises:
        ValueError: a number that is too small, or an unknown split or way to treat bad pictures.
    """

    encoder: str
    dataset: str
    folder: str
    features: str = "features"
    split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    revision: str | None = None
    on_bad_image: str = "error"
    batch_size: int = 64
    rows_per_shard: int = 1024
    num_workers: int = 0

    def __post_init__(self):
        for name, least in (("batch_size", 1), ("rows_per_shard", 1), ("num_workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        if self.split not in (None, *SPLITS):
            raise ValueError(f"split must be one of {SPLITS}, or left out for all, got {self.split!r}.")
        if self.on_bad_image not in ("error", "skip"):
            raise ValueError(f"on_bad_image must be 'error' or 'skip', got {self.on_bad_image!r}.")


def embed_images(job: EmbedJob, *, num_processes: int = 1, overwrite: bool = False) -> EmbeddingsTable | None:
    """Embed what is not embedded yet, and return the table.

    Under torchrun or accelerate launch every process calls this and takes its share; the table is
    returned to those that find all shards written, None to the others.

    Args:
        job: see `EmbedJob`.
        num_processes: to use on this machine, each with its share of the threads; 1 under a launcher.
        overwrite: remove embeddings that are in the folder already.

    Raises:
        ValueError: empty folder, unknown data set or encoder, a folder that holds something else, or embeddings
            by another encoder, of other data or in other shards; says which.
        BadImageError: an unreadable picture, with on_bad_image="error".
        RuntimeError: a process started here ended with an error.
    """
    divide_work(_embed_share, job, num_processes=num_processes, overwrite=overwrite)
    folder = Path(job.folder)
    _finish(folder)
    return EmbeddingsTable(folder) if (folder / "manifest.json").exists() else None


def _embed_share(job: EmbedJob, rank: int, world: int, start_others: Callable[[], None]) -> None:
    """Embed every `world`-th shard from number `rank` on, those that lack."""
    data, splits = load_splits(asdict(job))
    if not splits:
        raise ValueError(f"data set {job.dataset!r} has no evaluation split: leave --split out.")
    device = best_device(int(os.environ.get("LOCAL_RANK", rank)))
    allow_tf32(device)
    embedder = ImageEmbedder(job.encoder, kind=job.features, device=device)
    plan = _plan(job, data, splits, embedder)
    _claim(Path(job.folder), plan)
    shards = list(_shards(job.folder, plan))
    if all(shard.is_written() for shard in shards):
        return
    start_others()
    mine = [shard for shard in shards[rank::world] if not shard.is_written()]
    batches = [(shard, batch) for shard in mine for batch in shard.batches(job.batch_size)]
    pictures = _Pictures(data, splits, embedder.preprocess, job.on_bad_image)
    spawn = "spawn" if job.num_workers and torch.cuda.is_available() else None
    loader = DataLoader(
        pictures,
        batch_sampler=[[(shard.split, row) for row in batch] for shard, batch in batches],
        collate_fn=_identity,
        num_workers=job.num_workers,
        multiprocessing_context=spawn,
    )
    silent = {} if rank == 0 else {"disable": True}  # else TQDM_DISABLE decides
    text = "embedding" if world == 1 else f"embedding, 1 of {world} processes"
    bar = tqdm(total=sum(len(shard.rows) for shard in mine), desc=text, unit="img", **silent)
    loaded = iter(loader)
    for shard in mine:
        parts = []
        for rows in shard.batches(job.batch_size):
            batch = next(loaded)
            pixel_values = batch.pop("pixel_values")
            parts.append(batch | {"embedding": None if pixel_values is None else embedder(pixel_values).numpy()})
            bar.update(len(rows))
            stop_without_parent()
        _write(shard, parts, data, embedder.dimension)
    bar.close()


def _plan(job: EmbedJob, data: ImageData, splits: dict[str, Dataset], embedder: ImageEmbedder) -> dict:
    settings = {name: value for name, value in asdict(job).items() if name not in ("folder", "num_workers")}
    return settings | {
        "encoder_fingerprint": embedder.fingerprint,
        "dimension": embedder.dimension,
        "dataset_fingerprint": dataset_fingerprint(splits),
        "splits": {name: len(split) for name, split in splits.items()},
        "split_names": {name: data.splits[name] for name in splits},
        "left_out": data.left_out,
        "class_names": data.class_names,
    }


def _claim(folder: Path, plan: dict) -> None:
    """Write the plan, or compare with the one that is there; ValueError when this run would not continue that one."""
    path = folder / "plan.json"
    if not path.exists():
        if folder.exists() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
            if not path.exists():  # still: another process may have been first
                raise ValueError(f"{folder} is not empty and holds no embeddings: choose another folder for them.")
        write_json(path, plan)
    then = json.loads(path.read_text(encoding="utf-8"))
    different = []
    for name in _DECIDES:
        same_weights = name == "encoder_fingerprint" and then["features"] != plan["features"]  # as far as one can say
        if then[name] != plan[name] and not same_weights:
            kind = name.removesuffix("_fingerprint")
            old = then[kind]
            new = plan[kind]
            changed = f" ({then[name][:12]}, now {plan[name][:12]})" if kind != name else ""
            different.append(f"{kind} {old!r}, not {new!r}{changed}")
    if different:
        raise ValueError(
            f"{folder} was begun with {'; '.join(different)}: it cannot go on with that. Choose another folder, or "
            "discard what it holds with --overwrite."
        )


@dataclass(frozen=True)
class _Shard:
    path: Path
    split: str
    rows: range

    @property
    def empty_path(self) -> Path:
        return self.path.with_name(f".{self.path.name}.empty")  # which datasets does not see: it cannot read it

    def is_written(self) -> bool:
        return self.path.exists() or self.empty_path.exists()

    def batches(self, size: int) -> list[range]:
        return [self.rows[first : first + size] for first in range(0, len(self.rows), size)]


def _shards(folder: str | os.PathLike, plan: dict) -> Iterator[_Shard]:
    for split, size in plan["splits"].items():
        step = plan["rows_per_shard"]
        count = -(-size // step)
        for number in range(count):
            path = Path(folder) / "data" / f"{split}-{number:05d}-of-{count:05d}.parquet"
            yield _Shard(path, split, range(number * step, min((number + 1) * step, size)))


class _Pictures(torch.utils.data.Dataset):
    """Batches, ready for the encoder, of (split, row) pairs."""

    def __init__(self, data: ImageData, splits: dict[str, Dataset], preprocess: Preprocessor, on_bad_image: str):
        self.data = data
        self.splits = splits
        self.preprocess = preprocess
        self.on_bad_image = on_bad_image
        root = Path(data.name).expanduser()
        self.root = Path(os.path.abspath(root)) if root.is_dir() else None  # links stay, as in the paths of pictures

    def __getitems__(self, items: list[tuple[str, int]]) -> dict:
        batch: dict = {"row": [], "file": [], "label": [], "skipped": {}}
        pictures = []
        for split, row in items:
            values = self.splits[split][row]
            try:
                picture, label = decode_row(self.data, values, f"row {row} of {split}")
            except BadImageError as error:
                if self.on_bad_image == "error":
                    raise
                batch["skipped"][f"{split} row {row}"] = str(error)
                continue
            pictures.append(picture)
            batch["row"].append(row)
            batch["label"].append(None if label < 0 else label)
            batch["file"].append(self._file(values[self.data.image_column]))
        return batch | {"pixel_values": self.preprocess(pictures) if pictures else None}

    def _file(self, value) -> str | None:
        path = value.get("path") if isinstance(value, dict) else value if isinstance(value, str) else None
        whole = Path(os.path.abspath(path or ""))
        if path and self.root and whole.is_relative_to(self.root):
            return whole.relative_to(self.root).as_posix()
        return path


def _identity(batch: dict) -> dict:
    return batch


def _write(shard: _Shard, parts: list[dict], data: ImageData, dimension: int) -> None:
    features = Features({"row": Value("int64"), "file": Value("string")})
    if data.class_names is not None:
        features["label"] = ClassLabel(names=data.class_names)
    features["embedding"] = List(Value("float32"), length=dimension)
    columns = {name: [value for part in parts for value in part[name]] for name in ("row", "file", "label")}
    vectors = [part["embedding"] for part in parts if part["embedding"] is not None]
    columns["embedding"] = np.concatenate([np.empty((0, dimension), np.float32), *vectors])
    skipped = {place: reason for part in parts for place, reason in part["skipped"].items()}
    metadata = {_METADATA: json.dumps({"skipped": skipped}).encode()}
    write_columns(shard.path if vectors else shard.empty_path, columns, features, metadata)


def _finish(folder: Path) -> None:
    """Write the manifest, if every shard is there."""
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    shards = list(_shards(folder, plan))
    if (folder / "manifest.json").exists() or not all(shard.is_written() for shard in shards):
        return
    written = []
    skipped = {}
    for shard in shards:
        path = shard.path if shard.path.exists() else shard.empty_path
        metadata = pq.read_metadata(path)
        skipped |= json.loads(metadata.metadata[_METADATA])["skipped"]
        if path == shard.path:
            name = path.relative_to(folder).as_posix()
            written.append({"file": name, "split": shard.split, "rows": metadata.num_rows})
    if not written:
        raise ValueError(f"none of the {len(skipped)} pictures can be read: {next(iter(skipped.values()))}")
    counts = {"rows": sum(shard["rows"] for shard in written), "skipped": {"count": len(skipped), "images": skipped}}
    made = {"command": command_line(), "environment": environment()}
    write_json(folder / "manifest.json", plan | counts | {"shards": written} | made)
    for leftover in (folder / "data").glob(".*.tmp"):  # of killed processes
        leftover.unlink(missing_ok=True)
