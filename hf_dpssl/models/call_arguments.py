"""Arguments of calls, as users and trainers give them: pictures, random states, labels.

Pixel values of another range give wrong numbers, and no error: they are looked at where they come in.
"""

from __future__ import annotations

import torch
from torch import Tensor

Generators = torch.Generator | int | list | tuple | None  # or seeds: one for all images, or one per image
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


def read_generator(generator: Generators, count: int) -> torch.Generator | list[torch.Generator] | None:
    """Generators as given, seeds turned into generators.

    Raises:
        ValueError: negative seeds, another number than `count`, or something else.
    """
    if isinstance(generator, list | tuple):
        if len(generator) != count:
            raise ValueError(f"{count} images need one generator or {count}, got {len(generator)}.")
        return [read_generator(one, 1) for one in generator]
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    if isinstance(generator, bool) or not isinstance(generator, int):
        raise ValueError(f"generator must be torch.Generators or seeds (integers), got {type(generator).__name__}.")
    if not 0 <= generator < 2**63:
        raise ValueError(f"seeds must lie in [0, 2^63), got {generator}.")
    return torch.Generator().manual_seed(generator)


def ignore_labels(others: dict) -> None:
    """Take note of no `labels`; they are no argument of `forward`, or Trainer would report no loss without them.

    Raises:
        TypeError: another argument, misspelt perhaps.
    """
    unknown = sorted(others.keys() - {"labels"})
    if unknown:
        raise TypeError(f"forward() got an unexpected keyword argument {unknown[0]!r}")
