"""Latents or codes of a data set on disk: encoded once, in shards, recognised by what they were made from.

    FOLDER/plan.json             what is encoded by what; decides whether an interrupted build goes on
    FOLDER/latents-00000.npy     (or codes-...) (n, C, h, w), memory-mapped when read; (n, 2, C, h, w) if mirrored too
    FOLDER/latents-00000.json    labels, unreadable rows and check sum of that shard; written after it
    FOLDER/labels.npy            of all rows
    FOLDER/index.json            written last

Without a matching index the cache is not trusted: whole shards of an interrupted build with the same plan are kept,
those that are truncated or of another build are encoded again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from tqdm.auto import tqdm

from ..data import keyed_random
from ..data.batches import evaluation_batches, unit_pixels
from ..data.image_table import ImageTable
from ..models.modeling_vq import VQAutoencoder
from ..models.weight_hashes import combined_sha256
from ..runs.atomic_files import atomic_file, write_json
from ..runs.shared_storage import unseen

logger = logging.getLogger(__name__)
_BLOCK = 4096  # bytes that a shard's check sum reads at a time
_BLOCKS = 16  # places of a shard that it reads


class _CachedTable(torch.utils.data.Dataset):
    """Map-style rows of a finished cache; items are (epoch, row) pairs, batches are dicts."""

    content = ""

    def __init__(self, folder: str | Path, flip_seed: int | None = None):
        self.folder = Path(folder)
        self.flip_seed = flip_seed
        self.unlabelled = False
        index = _read(self.folder / "index.json")
        if index is None:
            raise FileNotFoundError(f"{folder} holds no finished cache: build it with build_latent_cache.")
        held = index.get("content", "latents")
        if held != self.content:
            raise ValueError(f"{folder} is a cache of {held}, not of {self.content}: build one in another folder.")
        self.fingerprint = index["fingerprint"]
        self.flipped = index["flipped"]
        if flip_seed is not None and not self.flipped:
            raise ValueError(f"{folder} holds no mirrored copies to draw from: build it with flipped=True.")
        self.labels = torch.from_numpy(np.load(self.folder / "labels.npy"))
        self.shards = [_open_shard(self.folder / shard["name"], shard["rows"]) for shard in index["shards"]]
        self.ends = np.cumsum([len(shard) for shard in self.shards])

    def __reduce__(self) -> tuple:
        # A loader worker opens the shards itself: pickled, a memory-mapped array would be sent whole.
        return _opened_again, (type(self), self.folder, self.flip_seed, self.unlabelled)

    def __len__(self) -> int:
        return len(self.labels)

    def forget_labels(self) -> None:
        """From now on all labels are -1."""
        self.unlabelled = True
        self.labels.fill_(-1)

    def mirrored(self, rows: Tensor, epoch: int) -> Tensor:
        """Whether an epoch shows the mirrored copy of rows (B,): bool (B,), a function of (flip_seed, epoch, row)."""
        if self.flip_seed is None:
            return torch.zeros(len(rows), dtype=torch.bool)
        return keyed_random.uniform(rows, 1, seed=self.flip_seed, stream="cached flip", epoch=epoch)[:, 0] < 0.5

    def _rows(self, rows: Tensor, mirrored: Tensor | None) -> Tensor:
        if mirrored is not None and not self.flipped:
            raise ValueError(f"{self.folder} holds no mirrored copies: build it with flipped=True.")
        shard_of = np.searchsorted(self.ends, rows.numpy(), side="right")
        places = (rows.numpy() - np.concatenate([[0], self.ends])[shard_of]).tolist()
        copies = [0] * len(places) if mirrored is None else mirrored.tolist()
        if not self.flipped:
            picked = [self.shards[shard][place] for shard, place in zip(shard_of, places, strict=True)]
        else:
            both = zip(shard_of, places, copies, strict=True)
            picked = [self.shards[shard][place, int(copy)] for shard, place, copy in both]
        return torch.from_numpy(np.stack(picked))

    def __getitems__(self, items: list[tuple[int, int]]) -> dict:
        epoch = items[0][0]
        rows = torch.tensor([row for _, row in items])
        batch = dict(labels=self.labels[rows], sample_ids=rows, epoch=epoch)
        if self.flip_seed is not None:
            batch["mirrored"] = self.mirrored(rows, epoch)
        return batch | {self.content: getattr(self, self.content)(rows, batch.get("mirrored"))}


def _opened_again(kind: type[_CachedTable], folder: Path, flip_seed: int | None, unlabelled: bool) -> _CachedTable:
    table = kind(folder, flip_seed)
    if unlabelled:
        table.forget_labels()
    return table


class LatentTable(_CachedTable):
    """Cached latents. Keys of a batch: latents float32 (B, C, h, w), labels (B,) int64, sample_ids (B,) int64, epoch.

    Args:
        folder: of the cache.
        flip_seed: random seed by which each epoch shows half of the images mirrored (bool (B,) under "mirrored"
            in the batch); None: never. The cache must hold mirrored copies.

    Raises:
        FileNotFoundError: no finished cache there.
        ValueError: the folder is a cache of codes, holds no mirrored copies, or a shard is damaged.
    """

    content = "latents"

    def latents(self, rows: Tensor, mirrored: Tensor | None = None) -> Tensor:
        """Latents (B, C, h, w) of rows (B,), where `mirrored` (bool, (B,)) says so of the mirrored images."""
        return self._rows(rows, mirrored)


class CodeTable(_CachedTable):
    """Cached code ids. Keys of a batch: codes int64 (B, h, w), labels (B,) int64, sample_ids (B,) int64, epoch.

    On disk an id takes two bytes where the codebook has at most 32,768 codes, and four otherwise.
    Args and Raises as of `LatentTable`.
    """

    content = "codes"

    def codes(self, rows: Tensor | None = None, mirrored: Tensor | None = None) -> Tensor:
        """Code ids (B, h, w) int64 of rows (B,), mirrored or not; by default of all rows."""
        if rows is None:
            shards = [shard[:, 0] if self.flipped else shard for shard in self.shards]
            return torch.cat([torch.from_numpy(np.array(shard)) for shard in shards]).long()
        return self._rows(rows, mirrored).long()


_TABLES = {"latents": LatentTable, "codes": CodeTable}


def _sources(autoencoder: VQAutoencoder, table: ImageTable, content: str, flipped: bool) -> dict[str, str]:
    """What decides the cached numbers: autoencoder with its codebook, data set and split, image size."""
    rows = "stream" if isinstance(table.split, IterableDataset) else str(len(table))
    return {
        "autoencoder": autoencoder.fingerprint(),
        "data set": table.data.fingerprint,
        "split": "evaluation" if table.split is table.data.evaluation else "train",
        "image size": str(table.image_size),
        "content": content,
        "mirrored copies": "yes" if flipped else "no",
        "number of images": rows,
    }


@torch.no_grad()
def build_latent_cache(
    autoencoder: VQAutoencoder,
    table: ImageTable,
    folder: str | Path,
    *,
    content: str = "latents",
    flipped: bool = False,
    batch_size: int = 256,
    rows_per_shard: int = 4096,
    process: tuple[int, int] = (0, 1),
    wait: Callable[[], None] = lambda: None,
) -> LatentTable | CodeTable:
    """Encode all images of a table into `folder`, or reuse what is there when its fingerprint matches.

    Args:
        autoencoder: in eval mode.
        table: images in order, without augmentation; its split may be a stream, whose every shard one process reads.
        folder: of the cache; one of another fingerprint is removed first, and a warning says what has changed.
        content: "latents" before quantisation (gives a LatentTable), or "codes" (gives a CodeTable).
        flipped: encode each image's mirror image too.
        batch_size: images encoded at once.
        rows_per_shard: at most so many latents (mirrored ones count), and rows of a stream, are held in memory.
        process: (index, count) of this process; of several each calls this, and encodes every count-th shard, of a
            stream what every count-th of its own shards holds.
        wait: returns when all processes have called it, as `Accelerator.wait_for_everyone`.

    Raises:
        ValueError: an unknown content, codes of an autoencoder that has none, or a folder of something else.
    """
    if content not in _TABLES:
        raise ValueError(f"content must be one of {tuple(_TABLES)}, got {content!r}.")
    if content == "codes" and autoencoder.quantizer is None:
        raise ValueError(
            f"this autoencoder (quantizer={autoencoder.config.quantizer!r}) has no codes to cache: "
            "take one with a codebook, or cache its latents."
        )
    folder = Path(folder)
    sources = _sources(autoencoder, table, content, flipped)
    fingerprint = combined_sha256(sources)
    index, count = process
    if index == 0:
        _claim(folder, {"fingerprint": fingerprint, "sources": sources, "rows_per_shard": rows_per_shard})
    wait()
    if not (folder / "index.json").exists():  # the same for all: nobody writes it before all have built their shards
        size = max(1, rows_per_shard // (2 if flipped else 1))
        stream = isinstance(table.split, IterableDataset)
        parts = _parts_of_stream(table, size, process) if stream else _parts(table, size, process)
        silent = {} if index == 0 else {"disable": True}  # else TQDM_DISABLE decides
        for name, part, rows in tqdm(parts, f"caching {content}", leave=False, **silent):
            path = folder / f"{content}-{name}.npy"
            if _record_of_whole(path, fingerprint) is None:
                _write_shard(autoencoder, part, path, rows, batch_size, content, flipped, fingerprint)
        wait()
        if index == 0:
            paths = sorted(folder.glob(f"{content}-*.npy"))  # in the order of the images
            if not stream:
                paths = [folder / f"{content}-{number:05d}.npy" for number in range(-(-len(table) // size))]
            _finish(folder, paths, {"fingerprint": fingerprint, "sources": sources, "content": content})
        wait()
    table.skipped |= _read(folder / "index.json")["skipped"]
    return _TABLES[content](folder)


def _claim(folder: Path, plan: dict) -> None:
    """Leave what goes on with this plan, and say what does not; afterwards there is an index only of a whole cache."""
    index = _read(folder / "index.json")
    then = _read(folder / "plan.json")
    if index is None and then is None and folder.exists():
        if foreign := [entry.name for entry in folder.iterdir() if not entry.name.startswith(".")]:
            raise ValueError(f"{folder} holds {foreign[:3]} and no cache: choose another folder for the latents.")
    if index is not None and index["fingerprint"] == plan["fingerprint"]:
        shards = [folder / shard["name"] for shard in index.get("shards", ())]
        if (folder / "labels.npy").exists() and all(_record_of_whole(s, plan["fingerprint"]) for s in shards):
            return
        (folder / "index.json").unlink()
    elif index is not None or then is not None:
        old = (index or then).get("sources", {})
        new = plan["sources"]
        changed = [f"{k} ...{old[k][-24:]}, now ...{new[k][-24:]}" for k in new if k in old and old[k] != new[k]]
        if (index or then)["fingerprint"] != plan["fingerprint"]:
            reason = "; ".join(changed) or "by an older version"
            logger.warning("%s was made from something else (%s): encoding anew", folder, reason)
    if then != plan:
        shutil.rmtree(folder, ignore_errors=True)
        write_json(folder / "plan.json", plan)


def _read(path: Path) -> dict | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _open_shard(path: Path, rows: int) -> np.ndarray:
    try:
        shard = np.load(path, mmap_mode="r")
        if len(shard) != rows:
            raise ValueError(f"{len(shard)} rows instead of {rows}")
        return shard
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}): start the run again, which encodes it anew.") from error


def _check_sum(path: Path) -> str:
    """Of the size and of blocks spread over the file: tells a truncated or foreign shard, at no cost."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for i in range(_BLOCKS):
            file.seek(max(0, size - _BLOCK) * i // (_BLOCKS - 1))
            digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def _record_of_whole(path: Path, fingerprint: str) -> dict | None:
    """What was noted of a shard when it was written; None if it is not whole, or not of this cache."""
    record = _read(path.with_suffix(".json"))
    if record is None and not path.exists():
        return None
    if record and path.exists() and record["fingerprint"] == fingerprint and record["sha256"] == _check_sum(path):
        return record
    logger.warning("%s is truncated, or not what this run would write: encoding it again", path)
    return None


def _parts(table: ImageTable, size: int, process: tuple[int, int]) -> Iterator[tuple[str, ImageTable, range]]:
    """Name, table and rows of each part that is this process's; all together are the whole table."""
    for number, first in enumerate(range(0, len(table), size)):
        if number % process[1] == process[0]:
            yield f"{number:05d}", table, range(first, min(first + size, len(table)))


def _parts_of_stream(table: ImageTable, size: int, process: tuple[int, int]) -> Iterator[tuple[str, ImageTable, range]]:
    """As `_parts`, at most `size` rows in memory; nothing is read of the shards of other processes.

    Of fewer shards than processes each process reads all, and encodes every n-th part.
    """
    count = table.split.num_shards
    whole_shards = count >= process[1]
    part_number = 0
    for number in range(process[0], count, process[1]) if whole_shards else range(count):
        rows = iter(table.split.shard(count, number))
        place = f"shard {number}, " if count > 1 else ""
        first = 0
        while chunk := list(itertools.islice(rows, size)):
            if whole_shards or part_number % process[1] == process[0]:
                split = Dataset.from_list(chunk, features=table.split.features)
                part = ImageTable(table.data, split, table.image_size, table.on_bad_image, first_row=first, place=place)
                part.skipped = table.skipped
                yield f"{number:05d}-{first // size:05d}", part, range(len(chunk))
            first += len(chunk)
            part_number += 1


def _write_shard(
    autoencoder: VQAutoencoder,
    table: ImageTable,
    path: Path,
    rows: range,
    batch_size: int,
    content: str,
    flipped: bool,
    fingerprint: str,
) -> None:
    config = autoencoder.config
    side = table.image_size * config.latent_size // config.image_size
    shape = (config.latent_channels, side, side)
    dtype = np.float32
    if content == "codes":
        shape = (side, side)
        dtype = np.int16 if config.num_codes <= 2**15 else np.int32
    values = np.empty((len(rows), 1 + flipped, *shape), dtype)
    labels: list[int] = []
    for batch in evaluation_batches(table, batch_size, rows):
        pixel_values = unit_pixels(batch["images"].to(autoencoder.device), config.num_channels)
        place = slice(len(labels), len(labels) + len(pixel_values))
        for copy in range(1 + flipped):
            images = pixel_values.flip(-1) if copy else pixel_values
            if content == "latents":  # nothing is quantised for them
                encoded = autoencoder.encode_latents(images).float()
            else:
                encoded = autoencoder.encode(images).codes
            values[place, copy] = encoded.cpu().numpy()
        labels += batch["labels"].tolist()
    values = values[: len(labels)] if flipped else values[: len(labels), 0]
    path.with_suffix(".json").unlink(missing_ok=True)
    with atomic_file(path, "wb") as file:
        np.save(file, values)
    places = (f"{table.place}row {table.first_row + row}" for row in rows)
    skipped = {place: table.skipped[place] for place in places if place in table.skipped}
    record = {"fingerprint": fingerprint, "sha256": _check_sum(path), "labels": labels, "skipped": skipped}
    write_json(path.with_suffix(".json"), record)


def _finish(folder: Path, paths: list[Path], index: dict) -> None:
    """Write labels and index of a cache; FileNotFoundError where shards of other processes are not seen here."""
    if missing := unseen([path.with_suffix(".json") for path in paths]):
        raise FileNotFoundError(
            f"{folder} lacks {len(missing)} of {len(paths)} shards ({missing[0].stem}, ...), which other processes "
            "have written elsewhere: all machines need the same --output_dir on shared storage."
        )
    records = [_read(path.with_suffix(".json")) for path in paths]
    labels = np.concatenate([np.array(record["labels"], np.int64) for record in records] or [np.empty(0, np.int64)])
    with atomic_file(folder / "labels.npy", "wb") as file:
        np.save(file, labels)
    shards = [{"name": p.name, "rows": len(r["labels"])} for p, r in zip(paths, records, strict=True)]
    skipped = {row: reason for record in records for row, reason in record["skipped"].items()}
    flipped = index["sources"]["mirrored copies"] == "yes"
    write_json(folder / "index.json", index | {"flipped": flipped, "shards": shards, "skipped": skipped})
    for leftover in folder.glob(".*.tmp"):  # of killed processes
        leftover.unlink(missing_ok=True)
