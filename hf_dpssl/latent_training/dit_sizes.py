"""The sizes of the DiT paper, and their operations by formula.

Source: Peebles and Xie 2023, tables 1 and 4.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass


@dataclass(frozen=True)
class DiTSize:
    """Depth, width and heads of a transformer, and its patch."""

    num_layers: int
    width: int
    num_heads: int
    patch_size: int


_SIZES = {"s": (12, 384, 6), "b": (12, 768, 12), "l": (24, 1024, 16), "xl": (28, 1152, 16)}
PRESETS = {f"dit-{letters}-{patch}": DiTSize(*size, patch) for letters, size in _SIZES.items() for patch in (2, 4, 8)}


def preset(name: str) -> DiTSize:
    """The size of that name, such as "dit-s-2"; ValueError, with the closest names, when there is none."""
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, 3, cutoff=0) or list(PRESETS)
        raise ValueError(f"no size {name!r}; the closest are {close}, all are {list(PRESETS)}.")
    return PRESETS[name]


def multiplications(size: DiTSize, *, latent_size: int, in_channels: int, out_channels: int, embedders: int = 1) -> int:
    """Multiply-adds of one forward pass of one image, which the paper calls Gflops.

    Args:
        size: of the transformer.
        latent_size: side of the latents.
        in_channels: of the latents.
        out_channels: of the prediction, twice as many with learned variance.
        embedders: evaluations of the time embedder: 1 in the paper, `num_layers` + 1 in diffusers' transformer.
    """
    width = size.width
    pixels = size.patch_size**2
    tokens = (latent_size // size.patch_size) ** 2
    block = 12 * tokens * width**2 + 2 * tokens**2 * width + 6 * width**2
    ends = tokens * width * pixels * (in_channels + out_channels) + 2 * width**2
    return size.num_layers * block + ends + embedders * (256 * width + width**2)
