"""Latents or codes of a data set on disk: encoded once, in shards, recognised by what they were made from.

A folder holds `latents-00000.npy` or `codes-00000.npy`, ... (memory-mapped when read), `labels.npy` and, last
of all, `index.json`. Shards appear whole or not at all; without a matching index the cache is not trusted,
and whole shards of an interrupted build with the same fingerprint are kept.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from tqdm.auto import tqdm

from .batches import evaluation_batches
from .checkpoint import atomic_file, write_json
from .image_table import ImageTable
from .modeling_vq import VQAutoencoder
from .weights import combined_sha256


class _CachedTable(torch.utils.data.Dataset):
    """Map-style rows of a finished cache; items are (epoch, row) pairs, batches are dicts."""

    content = ""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        index = json.loads((self.folder / "index.json").read_text(encoding="utf-8"))
        held = index.get("content", "latents")
        if held != self.content:
            raise ValueError(f"{folder} is a cache of {held}, not of {self.content}: build one in another folder.")
        self.fingerprint = index["fingerprint"]
        self.labels = torch.from_numpy(np.load(self.folder / "labels.npy"))
        shards = (self.folder / name for name in index["shards"])
        self.shards = [np.load(shard, mmap_mode="r") for shard in shards]
        self.ends = np.cumsum([len(shard) for shard in self.shards])

    def __len__(self) -> int:
        return len(self.labels)

    def _rows(self, rows: Tensor) -> Tensor:
        shard_of = np.searchsorted(self.ends, rows.numpy(), side="right")
        starts = np.concatenate([[0], self.ends])[shard_of]
        picked = [self.shards[shard][row - start] for shard, row, start in zip(shard_of, rows, starts, strict=True)]
        return torch.from_numpy(np.stack(picked))

    def __getitems__(self, items: list[tuple[int, int]]) -> dict:
        rows = torch.tensor([row for _, row in items])
        values = {self.content: getattr(self, self.content)(rows)}
        return values | dict(labels=self.labels[rows], sample_ids=rows, epoch=items[0][0])


class LatentTable(_CachedTable):
    """Cached latents. Keys of a batch: latents float32 (B, C, h, w), labels (B,) int64, sample_ids (B,) int64, epoch.

    Raises:
        ValueError: the folder is a cache of codes.
    """

    content = "latents"

    def latents(self, rows: Tensor) -> Tensor:
        """Latents (B, C, h, w) of rows (B,)."""
        return self._rows(rows)


class CodeTable(_CachedTable):
    """Cached code ids. Keys of a batch: codes int64 (B, h, w), labels (B,) int64, sample_ids (B,) int64, epoch.

    On disk an id takes two bytes where the codebook has at most 32,768 codes, and four otherwise.

    Raises:
        ValueError: the folder is a cache of latents.
    """

    content = "codes"

    def codes(self, rows: Tensor | None = None) -> Tensor:
        """Code ids (B, h, w) int64 of rows (B,); of all rows by default."""
        if rows is None:
            return torch.cat([torch.from_numpy(np.array(shard)) for shard in self.shards]).long()
        return self._rows(rows).long()


_TABLES = {"latents": LatentTable, "codes": CodeTable}


def cache_fingerprint(autoencoder: VQAutoencoder, table: ImageTable, content: str = "latents") -> str:
    """Hash of what decides the cached numbers: autoencoder with its codebook, data set and split, image size."""
    parts = {"autoencoder": autoencoder.fingerprint(), "data": table.data.fingerprint, "size": str(table.image_size)}
    if content != "latents":
        parts["content"] = content
    if table.split is table.data.evaluation:
        parts["split"] = "evaluation"
    rows = "stream" if isinstance(table.split, IterableDataset) else str(len(table))
    return combined_sha256(parts | {"rows": rows})


@torch.no_grad()
def build_latent_cache(
    autoencoder: VQAutoencoder,
    table: ImageTable,
    folder: str | Path,
    *,
    content: str = "latents",
    batch_size: int = 256,
    rows_per_shard: int = 4096,
) -> LatentTable | CodeTable:
    """Encode all images of a table into `folder`, or reuse what is there when its fingerprint matches.

    Args:
        autoencoder: in eval mode.
        table: images in order, without augmentation; its split may be a stream, which is read once.
        folder: of the cache; one of another fingerprint is removed first.
        content: "latents" before quantisation (gives a LatentTable), or "codes" (gives a CodeTable).
        batch_size: images encoded at once.
        rows_per_shard: at most so many latents, and rows of a stream, are held in memory.

    Raises:
        ValueError: an unknown content, or codes of an autoencoder that has none.
    """
    if content not in _TABLES:
        raise ValueError(f"content must be one of {tuple(_TABLES)}, got {content!r}.")
    if content == "codes" and autoencoder.quantizer is None:
        raise ValueError(
            f"this autoencoder (quantizer={autoencoder.config.quantizer!r}) has no codes to cache: "
            "take one with a codebook, or cache its latents."
        )
    folder, fingerprint = Path(folder), cache_fingerprint(autoencoder, table, content)
    if (folder / "index.json").exists():
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        if index["fingerprint"] == fingerprint:
            return _TABLES[content](folder)
    stamp, plan = folder / "building", f"{fingerprint} {rows_per_shard}"
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != plan:
        shutil.rmtree(folder, ignore_errors=True)
        with atomic_file(stamp) as file:
            file.write(plan)
    names = []
    for number, (part, rows) in enumerate(tqdm(_parts(table, rows_per_shard), f"caching {content}", leave=False)):
        path = folder / f"{content}-{number:05d}.npy"
        names.append(path.name)
        if not path.exists():
            _write_shard(autoencoder, part, path, rows, batch_size, content)
    labels = np.concatenate([np.load(folder / f"{name}.labels.npy") for name in names])
    with atomic_file(folder / "labels.npy", "wb") as file:
        np.save(file, labels)
    write_json(folder / "index.json", {"fingerprint": fingerprint, "content": content, "shards": names})
    return _TABLES[content](folder)


def _parts(table: ImageTable, size: int) -> Iterator[tuple[ImageTable, range]]:
    """Tables and rows that together are the whole table, `size` rows at a time."""
    if not isinstance(table.split, IterableDataset):
        yield from ((table, range(first, min(first + size, len(table)))) for first in range(0, len(table), size))
        return
    rows, first = iter(table.split), 0
    while chunk := list(itertools.islice(rows, size)):
        split = Dataset.from_list(chunk, features=table.split.features)
        part = ImageTable(table.data, split, table.image_size, table.on_bad_image, first_row=first)
        part.skipped, first = table.skipped, first + len(chunk)
        yield part, range(len(chunk))


def _write_shard(
    autoencoder: VQAutoencoder, table: ImageTable, path: Path, rows: range, batch_size: int, content: str
) -> None:
    config = autoencoder.config
    side = table.image_size * config.latent_size // config.image_size
    shape, dtype = (config.latent_channels, side, side), np.float32
    if content == "codes":
        shape, dtype = (side, side), np.int16 if config.num_codes <= 2**15 else np.int32
    values = [np.empty((0, *shape), dtype)]
    labels = [np.empty(0, np.int64)]  # all that is left of a shard without a readable picture
    for batch in evaluation_batches(table, batch_size, rows):
        pixel_values = batch["images"].to(autoencoder.device, torch.float32) / 127.5 - 1
        encoded = getattr(autoencoder.encode(pixel_values), content)
        values.append(encoded.cpu().float().numpy() if content == "latents" else encoded.cpu().numpy().astype(dtype))
        labels.append(batch["labels"].numpy())
    with atomic_file(path.with_name(f"{path.name}.labels.npy"), "wb") as file:
        np.save(file, np.concatenate(labels))
    with atomic_file(path, "wb") as file:
        np.save(file, np.concatenate(values))
