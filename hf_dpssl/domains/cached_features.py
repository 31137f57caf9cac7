"""Features of pictures, kept in a folder by encoder and pictures."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save
from torch import Tensor

from ..embedding.embedder import ImageEmbedder
from ..embedding.encoder_evaluation import extract_features
from ..models.weight_hashes import combined_sha256
from ..runs.atomic_files import atomic_file
from .domain_data import DomainData


def features_of(embedder: ImageEmbedder, given: DomainData, cache, reading: dict) -> tuple[Tensor, Tensor, bool]:
    """Features (n, D) of the pictures that can be read, their rows (n,), and whether they lay in the cache."""
    key = combined_sha256(
        {"encoder": embedder.fingerprint, "images": given.fingerprint, "bad": reading["on_bad_image"]}
    )
    path = Path(cache) / f"{key[:32]}.safetensors" if cache is not None else None
    if path is not None and path.exists():
        kept = load_file(path)
        return kept["features"], kept["rows"], True
    found, rows = extract_features(embedder, given.data, given.images, given.rows, **reading)
    if path is not None:
        with atomic_file(path, "wb") as file:
            file.write(save({"features": found.contiguous(), "rows": rows}))
    return found, rows, False
