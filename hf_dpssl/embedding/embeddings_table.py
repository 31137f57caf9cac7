"""Embeddings of a data set as parquet files, and search for the nearest neighbours of pictures among them.

    FOLDER/plan.json                              what is embedded by what; decides whether a run may go on
    FOLDER/data/train-00000-of-00012.parquet      row, file, label, embedding (D float32 each)
    FOLDER/manifest.json                          the plan, counts, unreadable pictures, versions; written last

The split "evaluation" is validation and test: "split_names" of the plan tells what the data set calls them, in the
order of the rows, and "left_out" how much of the data set is not embedded, and why.
embedding_job.py writes it; `datasets.load_dataset("parquet", data_dir=FOLDER)` reads it too.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Features
from PIL import Image
from torch import Tensor

from ..data.decoding import decode_image
from ..data.image_data import load_images
from ..data.image_table import decode_row
from ..evaluation import nearest_neighbours
from ..models.weight_hashes import combined_sha256
from ..runs.atomic_files import atomic_file
from ..runs.lineage import read_json, well_formed
from .embedder import ImageEmbedder


class EmbeddingsTable:
    """A finished folder of embeddings, in the order of the data set.

    Attributes:
        embeddings: (N, D) float32. rows: (N,) int64, row in its split. splits, files: N names each; a file is
            relative to the data set's folder, or None. labels: (N,) int64, -1 without one; class_names: list or None.
        manifest: what made them.

    Raises:
        FileNotFoundError: no embeddings there, or not all of them yet.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        if not (self.folder / "manifest.json").exists():
            state = "unfinished: run the same hf-dpssl embed again" if (self.folder / "plan.json").exists() else "none"
            raise FileNotFoundError(f"embeddings in {self.folder}: {state}.")
        self.manifest = read_json(self.folder / "manifest.json")
        with well_formed(self.folder):
            self._read()

    def _read(self) -> None:
        self.class_names = self.manifest["class_names"]
        tables = [(shard["split"], pq.read_table(self.folder / shard["file"])) for shard in self.manifest["shards"]]
        self.splits = [split for split, table in tables for _ in range(len(table))]
        table = pa.concat_tables([table for _, table in tables])
        flat = table["embedding"].combine_chunks().flatten().to_numpy()
        self.embeddings = torch.from_numpy(flat.reshape(len(table), self.manifest["dimension"]).copy())
        self.rows = table["row"].to_numpy()
        self.files = table["file"].to_pylist()
        labels = table["label"].fill_null(-1).to_numpy() if self.class_names else np.full(len(table), -1)
        self.labels = torch.from_numpy(labels.copy())

    def __len__(self) -> int:
        return len(self.embeddings)

    def search(self, queries: Tensor, *, k: int = 5, metric: str = "cosine") -> list[list[dict]]:
        """The k nearest pictures of each query, best first.

        Args:
            queries: (Q, D), of the same encoder.
            k: 1 to N.
            metric: "cosine" or "euclidean".

        Returns:
            Q lists of k dicts: index (in this table), similarity (cosine, or negative Euclidean distance), split,
            row, file, label (name of the class) as far as there is one.

        Raises:
            ValueError: another number of dimensions, or k that is less than 1 or larger than the table.
        """
        similarities, indices = nearest_neighbours(self.embeddings, queries.float(), k=k, metric=metric)
        return [
            [self._describe(index) | {"similarity": value} for index, value in zip(*pair, strict=True)]
            for pair in zip(indices.tolist(), similarities.tolist(), strict=True)
        ]

    def _describe(self, index: int) -> dict:
        label = int(self.labels[index])
        name = self.class_names[label] if label >= 0 else None
        return {"index": index, "split": self.splits[index], "row": int(self.rows[index]), "file": self.files[index],
                "label": name}  # fmt: skip

    def embedder(self, encoder: str | None = None) -> ImageEmbedder:
        """The encoder that made this table, loaded from where it was or from `encoder`; ValueError if it is another."""
        with well_formed(self.folder):
            source, kind = encoder or self.manifest["encoder"], self.manifest["features"]
        embedder = ImageEmbedder(source, kind=kind)
        if embedder.fingerprint != self.manifest["encoder_fingerprint"]:
            raise ValueError(
                f"{embedder.name!r} ({embedder.fingerprint[:12]}) is not the encoder that made {self.folder} "
                f"({self.manifest['encoder_fingerprint'][:12]}): pass that one with --encoder, or embed again."
            )
        return embedder

    def pictures(self, indices: list[int]) -> list[Image.Image]:
        """RGB pictures of places in this table, from the data set; ValueError when that has changed."""
        data, splits = load_splits(self.manifest)
        if dataset_fingerprint(splits) != self.manifest["dataset_fingerprint"]:
            raise ValueError(
                f"the data set {data.name!r} is not what it was when {self.folder} was made: embed it again."
            )
        places = [(self.splits[index], int(self.rows[index])) for index in indices]
        return [decode_row(data, splits[split][row], f"row {row} of {split}")[0] for split, row in places]


def search_images(
    table: EmbeddingsTable,
    pictures: list[str | os.PathLike],
    *,
    k: int = 5,
    metric: str = "cosine",
    encoder: str | None = None,
) -> list[list[dict]]:
    """The k nearest pictures of each picture file, as `EmbeddingsTable.search`.

    Args:
        table: where to search.
        pictures: files to search for.
        k, metric: as there.
        encoder: where the table's encoder is now, when it has moved.

    Raises:
        ValueError: a file that is no picture, another encoder than the table's, or a k that does not fit.
    """
    if not 1 <= k <= len(table):  # before the encoder is loaded
        raise ValueError(f"k must lie in [1, {len(table)}], the number of embeddings in {table.folder}, got {k}.")
    queries = [read_picture(path) for path in pictures]
    embed = table.embedder(encoder).embed_pictures
    return table.search(torch.cat([embed([picture]) for picture in queries]), k=k, metric=metric)


def read_picture(path: str | os.PathLike) -> Image.Image:
    """An RGB picture from a file; ValueError that names the file when it is none."""
    try:
        return decode_image(str(path))
    except ValueError as error:
        raise ValueError(f"{path} is not a readable picture: {error}.") from error


def load_splits(plan: dict) -> tuple:
    """(ImageData, {"train", "evaluation": Dataset}) that a plan or manifest speaks of; validation and test in one."""
    options = {name: plan[name] for name in ("image_column", "label_column", "revision")}
    options["evaluation_split"] = None if plan["split"] == "train" else "every"
    data = load_images(plan["dataset"], **options, hold_out=False)
    splits = {"train": data.train, "evaluation": data.evaluation}
    return data, {name: splits[name] for name in splits if splits[name] is not None and plan["split"] in (None, name)}


def dataset_fingerprint(splits: dict) -> str:
    """Hash of the rows of all splits, without reading the pictures."""
    return combined_sha256({name: split._fingerprint for name, split in splits.items()})


def write_columns(path: Path, columns: dict, features: Features, metadata: dict[bytes, bytes] | None = None) -> None:
    """Write columns as one parquet file that `datasets` reads with these features, whole or not at all.

    columns: name -> list, or float32 array (N, D) for a feature List(Value("float32"), length=D).
    """
    schema = features.arrow_schema
    schema = schema.with_metadata((schema.metadata or {}) | (metadata or {}))
    arrays = []
    for field in schema:
        values = columns[field.name]
        if pa.types.is_fixed_size_list(field.type):
            flat = pa.array(np.ascontiguousarray(values, dtype=np.float32).reshape(-1))
            arrays.append(pa.FixedSizeListArray.from_arrays(flat, type=field.type))
        else:
            arrays.append(pa.array(values, field.type))
    with atomic_file(path, "wb") as file:
        pq.write_table(pa.Table.from_arrays(arrays, schema=schema), file)
