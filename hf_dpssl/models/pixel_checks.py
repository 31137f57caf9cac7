"""What pixel values must be where they come in: those of another range give wrong numbers, and no error."""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDING = 0.01  # beyond -1 and 1: half precision, interpolation


def check_pixel_values(images: Tensor, name: str = "pixel_values") -> None:
    """Refuse what cannot be pictures in [-1, 1]: other types, 0 to 255, normalised by a mean and deviation, NaN.

    Args:
        images: (B, C, H, W).
        name: of the argument, for the message.

    Raises:
        ValueError: integers, another number of dimensions, or values that are not finite or outside [-1, 1].
    """
    if images.ndim != 4 or not images.is_floating_point():
        given = f"{str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}"
        raise ValueError(
            f"{name} must be float (B, C, H, W) in [-1, 1], got {given}: of pictures in 0 to 255 give x / 127.5 - 1."
        )
    if images.numel() == 0:
        return
    low, high = (float(value) for value in torch.aminmax(images.detach()))
    if not (low >= -1 - _ROUNDING and high <= 1 + _ROUNDING):  # NaN is neither
        raise ValueError(
            f"{name} must be finite and lie in [-1, 1], got [{low:.3g}, {high:.3g}]: of pictures in [0, 1] give "
            "2 * x - 1, in 0 to 255 x / 127.5 - 1; clamp what a decoder gives."
        )
