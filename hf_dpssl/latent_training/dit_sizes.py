"""The sizes of the DiT paper.

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
