"""The embedded data set: scikit-learn's handwritten digits as `datasets` splits, with no network."""

from __future__ import annotations

import functools
import io

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Pillow
from sklearn.datasets import load_digits as load
from sklearn.model_selection import train_test_split


@functools.cache
def load_digits() -> dict[str, Dataset]:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey: a stratified split into 1,437 train and 360 test images."""
    source = load()
    pixels = np.rint(source.images * (255 / 16)).astype(np.uint8)
    rows = train_test_split(np.arange(len(pixels)), test_size=360, stratify=source.target, random_state=0)
    features = Features({"image": Image(), "label": ClassLabel(names=[str(d) for d in range(10)])})
    splits = {}
    for split, chosen in zip(("train", "test"), rows, strict=True):
        columns = {"image": [_png(pixels[i]) for i in chosen], "label": source.target[chosen].tolist()}
        splits[split] = Dataset.from_dict(columns, features=features)
    return splits


def _png(pixels: np.ndarray) -> dict:
    buffer = io.BytesIO()
    Pillow.fromarray(pixels).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}
