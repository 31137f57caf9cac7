"""Pictures of three domains and two classes that are easy to tell, and folders of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

DOMAINS, CLASSES, EACH = ["dark", "light", "noisy"], ["green", "red"], 7
PLACES = [(d, c, n) for d in range(len(DOMAINS)) for c in range(len(CLASSES)) for n in range(EACH)]


def picture(domain: int, label: int, number: int) -> Image.Image:
    """16 x 16: the class is a colour, the domain a brightness or noise."""
    random = np.random.default_rng([domain, label, number])
    pixels = random.normal(60 if domain == 0 else 140, 60 if domain == 2 else 20, (16, 16, 3))
    pixels[..., 1 - label] += 60
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_pictures(root: Path, places: Iterable[tuple[int, int, int]] = PLACES) -> Path:
    """root/DOMAIN/CLASS/number.png."""
    for domain, label, number in places:
        folder = root / DOMAINS[domain] / CLASSES[label]
        folder.mkdir(parents=True, exist_ok=True)
        picture(domain, label, number).save(folder / f"{number}.png")
    return root
