"""What a data set holds, wherever it lies: a digest by which a continued run knows its images again."""

from __future__ import annotations

import hashlib
import json
import os

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset


def content_digest(split: Dataset, image_column: str, label_column: str | None, class_names: list[str] | None) -> str:
    """Hexadecimal digest (64) of a split's class names, labels, and size and file name of each picture, in their order.

    Paths and times do not count, so a copy of a folder has the digest of the folder. Neither do pixels: a picture that
    is replaced by another of the same name and the same number of bytes is not noticed.
    """
    digest = hashlib.sha256(json.dumps([len(split), class_names]).encode())
    if label_column:
        digest.update(json.dumps(split[label_column][:]).encode())
    if split._indices is not None:  # rows that were selected of a larger table
        digest.update(pc.cast(split._indices.column(0), pa.uint64()).to_numpy().tobytes())
    for chunk in split.data.column(image_column).chunks:
        if not pa.types.is_struct(chunk.type):
            digest.update(str(chunk.nbytes).encode())
            continue
        sizes = pc.binary_length(pc.struct_field(chunk, "bytes")).to_pylist()
        for size, path in zip(sizes, pc.struct_field(chunk, "path").to_pylist(), strict=True):
            size = os.path.getsize(path) if size is None and path else size
            digest.update(f"{size} {os.path.basename(path or '')};".encode())
    return digest.hexdigest()
