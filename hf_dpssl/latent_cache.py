"""Latents of a data set on disk: encoded once, in shards, recognised by the fingerprints of what they were made from.

A folder holds `latents-00000.npy`, ... (memory-mapped when read), `labels.npy` and, last of all,
`index.json`. Shards appear whole or not at all; without a matching index the cache is not trusted,
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


class LatentTable(torch.utils.data.Dataset):
    """Map-style latents of a finished cache; items are (epoch, row) pairs, batches are dicts.

    Keys of a batch: latents float32 (B, C, h, w), labels (B,) int64, sample_ids (B,) int64, epoch.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        index = json.loads((self.folder / "index.json").read_text(encoding="utf-8"))
        self.fingerprint = index["fingerprint"]
        self.labels = torch.from_numpy(np.load(self.folder / "labels.npy"))
        shards = (self.folder / name for name in index["shards"])
        self.shards = [np.load(shard, mmap_mode="r") for shard in shards]
        self.ends = np.cumsum([len(shard) for shard in self.shards])

    def __len__(self) -> int:
        return len(self.labels)

    def latents(self, rows: Tensor) -> Tensor:
        """Latents (B, C, h, w) of rows (B,)."""
        shard_of = np.searchsorted(self.ends, rows.numpy(), side="right")
        starts = np.concatenate([[0], self.ends])[shard_of]
        picked = [self.shards[shard][row - start] for shard, row, start in zip(shard_of, rows, starts, strict=True)]
        return torch.from_numpy(np.stack(picked))

    def __getitems__(self, items: list[tuple[int, int]]) -> dict:
        rows = torch.tensor([row for _, row in items])
        return dict(latents=self.latents(rows), labels=self.labels[rows], sample_ids=rows, epoch=items[0][0])


def cache_fingerprint(autoencoder: VQAutoencoder, table: ImageTable) -> str:
    """Hash of what decides the cached numbers: autoencoder, data set, image size."""
    parts = {"autoencoder": autoencoder.fingerprint(), "data": table.data.fingerprint, "size": str(table.image_size)}
    rows = "stream" if isinstance(table.split, IterableDataset) else str(len(table))
    return combined_sha256(parts | {"rows": rows})


@torch.no_grad()
def build_latent_cache(
    autoencoder: VQAutoencoder,
    table: ImageTable,
    folder: str | Path,
    *,
    batch_size: int = 256,
    rows_per_shard: int = 4096,
) -> LatentTable:
    """Encode all images of a table into `folder`, or reuse what is there when its fingerprint matches.

    Args:
        autoencoder: in eval mode.
        table: images in order, without augmentation; its split may be a stream, which is read once.
        folder: of the cache; one of another fingerprint is removed first.
        batch_size: images encoded at once.
        rows_per_shard: at most so many latents, and rows of a stream, are held in memory.
    """
    folder, fingerprint = Path(folder), cache_fingerprint(autoencoder, table)
    if (folder / "index.json").exists():
        cached = LatentTable(folder)
        if cached.fingerprint == fingerprint:
            return cached
    stamp, plan = folder / "building", f"{fingerprint} {rows_per_shard}"
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != plan:
        shutil.rmtree(folder, ignore_errors=True)
        with atomic_file(stamp) as file:
            file.write(plan)
    names = []
    for number, (part, rows) in enumerate(tqdm(_parts(table, rows_per_shard), "caching latents", leave=False)):
        path = folder / f"latents-{number:05d}.npy"
        names.append(path.name)
        if not path.exists():
            _write_shard(autoencoder, part, path, rows, batch_size)
    labels = np.concatenate([np.load(folder / f"{name}.labels.npy") for name in names])
    with atomic_file(folder / "labels.npy", "wb") as file:
        np.save(file, labels)
    write_json(folder / "index.json", {"fingerprint": fingerprint, "shards": names})
    return LatentTable(folder)


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


def _write_shard(autoencoder: VQAutoencoder, table: ImageTable, path: Path, rows: range, batch_size: int) -> None:
    config = autoencoder.config
    side = table.image_size * config.latent_size // config.image_size
    latents = [np.empty((0, config.latent_channels, side, side), np.float32)]
    labels = [np.empty(0, np.int64)]  # all that is left of a shard without a readable picture
    for batch in evaluation_batches(table, batch_size, rows):
        pixel_values = batch["images"].to(autoencoder.device, torch.float32) / 127.5 - 1
        latents.append(autoencoder.encode(pixel_values).latents.float().cpu().numpy())
        labels.append(batch["labels"].numpy())
    with atomic_file(path.with_name(f"{path.name}.labels.npy"), "wb") as file:
        np.save(file, np.concatenate(labels))
    with atomic_file(path, "wb") as file:
        np.save(file, np.concatenate(latents))
