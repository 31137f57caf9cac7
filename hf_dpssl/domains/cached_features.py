"""Features of pictures and of their views, kept in a folder by encoder, pictures and seed of the views."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save
from torch import Tensor

from ..data.image_table import BadImageError
from ..embedding.embedder import ImageEmbedder
from ..embedding.encoder_evaluation import extract_features, extract_views
from ..models.weight_hashes import combined_sha256
from ..runs.atomic_files import atomic_file
from .domain_data import DomainData


def features_of(embedder: ImageEmbedder, given: DomainData, cache, reading: dict) -> tuple[Tensor, Tensor, bool]:
    """Features (n, D) of the pictures that can be read, their rows (n,), and whether they lay in the cache.

    Raises:
        BadImageError: an unreadable picture, or, where `reading` skips these, a domain without any other.
    """

    def extract() -> dict[str, Tensor]:
        found, rows = extract_features(embedder, given.data, given.images, given.rows, **reading)
        return {"features": found, "rows": rows}

    kept, cached = _kept(embedder, given, cache, reading, {}, extract)
    _check_domains_are_there(given, kept["rows"])
    return kept["features"], kept["rows"], cached


def views_of(
    embedder: ImageEmbedder, given: DomainData, rows: Tensor, cache, reading: dict, *, seed: int
) -> tuple[Tensor, Tensor, bool]:
    """Features (n, D) of two random views of each picture, and whether they lay in the cache.

    Args:
        rows: of the pictures that can be read, as `features_of` returns them.
        seed: of the views.
    """

    def extract() -> dict[str, Tensor]:
        first, second = extract_views(embedder, given.data, given.images, rows.tolist(), seed=seed, **reading)
        return {"first": first, "second": second}

    kept, cached = _kept(embedder, given, cache, reading, {"views": str(seed)}, extract)
    return kept["first"], kept["second"], cached


def _kept(
    embedder: ImageEmbedder,
    given: DomainData,
    cache,
    reading: dict,
    more: dict[str, str],
    extract: Callable[[], dict[str, Tensor]],
) -> tuple[dict[str, Tensor], bool]:
    """What `extract` returns for an encoder and pictures, from the folder `cache` where it lies there."""
    if cache is None:
        return extract(), False
    about = {"encoder": embedder.fingerprint, "images": given.fingerprint, "bad": reading["on_bad_image"]}
    path = Path(cache) / f"{combined_sha256(about | more)[:32]}.safetensors"
    if path.exists():
        return load_file(path), True
    found = extract()
    with atomic_file(path, "wb") as file:
        file.write(save({name: value.contiguous() for name, value in found.items()}))
    return found, False


def _check_domains_are_there(given: DomainData, rows: Tensor) -> None:
    there = set(given.domains[rows].tolist())
    for number, name in enumerate(given.domain_names):
        if number not in there:
            count = int((given.domains[list(given.rows)] == number).sum())
            raise BadImageError(
                f"none of the {count} images of domain {name!r} of {given.data.name!r} can be read: mend them, or "
                "leave that domain out."
            )
