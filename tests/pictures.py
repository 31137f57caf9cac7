"""Pictures and small image sets that the tests write themselves."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet
import torch
from datasets import Dataset, Features, Image
from PIL import Image as Pillow
from sklearn.datasets import load_sample_images
from torchvision.transforms.v2 import functional as F

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


def batch(count: int = 8, size: int = 16, width: int | None = None) -> torch.Tensor:
    """Noisy and smooth colour images by turns, uint8 (count, 3, size, width)."""
    arrays = [torch.from_numpy(noise(i, size, width or size)).permute(2, 0, 1) for i in range(count)]
    images = torch.stack(arrays)
    return torch.where(torch.arange(count).view(-1, 1, 1, 1) % 2 == 0, images, F.gaussian_blur(images, 5))


def unit(count: int = 8, size: int = 16) -> torch.Tensor:
    """As `batch`, in [0, 1]."""
    return batch(count, size).float() / 255


def each(images: torch.Tensor, function: Callable, *values: torch.Tensor) -> torch.Tensor:
    """The operation of torchvision on one image at a time, each with its own parameters."""
    return torch.stack([function(image, *(v[i].item() for v in values)) for i, image in enumerate(images)])


def photograph_patches(count: int, size: int) -> torch.Tensor:
    """Random square parts of scikit-learn's two sample photographs, resized: uint8 (count, 3, size, size)."""
    photographs = [torch.from_numpy(image.copy()).permute(2, 0, 1) for image in load_sample_images().images]
    generator, patches = np.random.default_rng(0), []
    for i in range(count):
        photograph = photographs[i % 2]
        side = int(generator.integers(min(size, 300), 400))
        top, left = (int(generator.integers(0, length - side)) for length in photograph.shape[1:])
        patches.append(F.resized_crop(photograph, top, left, side, side, [size, size]))
    return torch.stack(patches)
