"""The sizes of the DiT paper, with parameters and operations by formula.

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


def parameters_without_embedders(size: DiTSize, *, in_channels: int, out_channels: int) -> int:
    """Parameters of patch embedding, blocks and output; those of time and label embedders not counted.

    A block holds 4 d^2 of attention, 8 d^2 of its MLP and 6 d^2 of adaLN, with biases 4 d, 5 d and 6 d; the output
    2 d^2 + 2 d of adaLN and a linear layer. The fixed sine and cosine table of positions counts nothing.

    Args:
        size: of the transformer; all its linear layers have biases.
        in_channels: of the latents.
        out_channels: of the prediction, twice as many with learned variance.
    """
    width, pixels = size.width, size.patch_size**2
    block = 18 * width**2 + 15 * width
    patches = in_channels * pixels * width + width
    output = 2 * width**2 + 2 * width + (width + 1) * pixels * out_channels
    return size.num_layers * block + patches + output


def embedder_parameters(width: int, num_classes: int) -> int:
    """Parameters of one time embedder (256 frequencies, two layers) and one label table with its null class."""
    return 256 * width + width + width**2 + width + (num_classes + 1) * width


def surplus_parameters(size: DiTSize, num_classes: int) -> int:
    """By how many parameters diffusers' transformer exceeds the paper's: it has both embedders in every block."""
    return (size.num_layers - 1) * embedder_parameters(size.width, num_classes)


def multiplications(size: DiTSize, *, latent_size: int, in_channels: int, out_channels: int, embedders: int = 1) -> int:
    """Multiply-adds of one forward pass of one image, which the paper calls Gflops.

    Args:
        size: of the transformer.
        latent_size: side of the latents.
        in_channels, out_channels: as of `parameters_without_embedders`.
        embedders: evaluations of the time embedder: 1 in the paper, `num_layers` + 1 in diffusers' transformer.
    """
    width, pixels, tokens = size.width, size.patch_size**2, (latent_size // size.patch_size) ** 2
    block = 12 * tokens * width**2 + 2 * tokens**2 * width + 6 * width**2
    ends = tokens * width * pixels * (in_channels + out_channels) + 2 * width**2
    return size.num_layers * block + ends + embedders * (256 * width + width**2)
