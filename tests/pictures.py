"""Pictures and small image sets that the tests write themselves."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet
import torch
from datasets import Dataset, Features, Image
from PIL import Image as Pillow
from sklearn.datasets import load_sample_images
from torchvision.transforms.v2 import functional as F

CLASSES = ["cat", "dog"]
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


def write_pictures(folder: Path, count: int = 23) -> Path:
    for number in range(count):
        path = folder / CLASSES[number % 2] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Pillow.fromarray(noise(number, 16, 16)).save(path)
    return folder


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes whose header promises width x height pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\0" * 100_000, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


BAD_UPLOADS = {
    "text.png": (b"this is no picture", "no picture of a known type"),
    "empty.png": (b"", "empty"),
    "cut.png": (encoded(noise(0, 64, 64))[:900], "damaged"),
    "drawing.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no picture of a known type"),
    "document.pdf": (b"%PDF-1.4 ...", "no picture of a known type"),
    "other.tiff": (encoded(noise(0), "TIFF"), "no picture of a known type"),
    "bomb.png": (bomb(50_000, 50_000), "too large"),
    "large.png": (bomb(8_000, 8_000), "8000 x 8000 pixels; at most 16 megapixels"),
    "narrow.png": (encoded(noise(0, 1, 64)), "too narrow"),
    "heavy.png": (b"\x89PNG" + b"0" * (5 * 2**20), "at most 5 MiB"),
}
