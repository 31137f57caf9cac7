"""Pictures and small image sets that the tests write themselves."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet
from datasets import Dataset, Features, Image
from PIL import Image as Pillow

BROKEN = {"bytes": b"this is no picture", "path": "broken.png"}


def encoded(picture: Pillow.Image | np.ndarray, format: str = "PNG", **options) -> bytes:
    """The bytes of a picture file."""
    if isinstance(picture, np.ndarray):
        picture = Pillow.fromarray(picture)
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def noise(seed: int, height: int = 8, width: int = 8) -> np.ndarray:
    """A random RGB picture, uint8 (height, width, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def row(seed: int, height: int = 8, width: int = 8) -> dict:
    """A random picture as an image column holds it."""
    return {"bytes": encoded(noise(seed, height, width)), "path": None}


def write_parquet(path: Path, images: list, image_column: str = "image", **columns) -> Path:
    """A parquet file of an image column and of others, each name=(values, feature)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    features = Features({image_column: Image()} | {name: feature for name, (_, feature) in columns.items()})
    values = {image_column: images} | {name: list(values) for name, (values, _) in columns.items()}
    pyarrow.parquet.write_table(Dataset.from_dict(values, features=features).data.table, path)
    return path
