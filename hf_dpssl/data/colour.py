"""Colour jitter of whole batches, each image with its own factors: exactly torchvision v2's, or as one matrix.

Exact: brightness, contrast, saturation and hue one after the other in any order, each clamped to [0, 1]
(`torchvision.transforms.v2.ColorJitter` on float images). Fused: the same four in this fixed order as one 3 x 3 matrix
and an offset, with hue as a rotation and a single clamp at the end (the caller's).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations

import torch
from torch import Tensor

_GREY_WEIGHTS = (0.2989, 0.587, 0.114)  # torchvision's, ITU-R 601-2
# All orders of 0 brightness, 1 contrast, 2 saturation, 3 hue; an image's `order` is its place in this list.
ORDERS = tuple(permutations(range(4)))


def to_grey(images: Tensor) -> Tensor:
    """Luma in all three channels, (B, 3, H, W) like the input."""
    return _luma(images).expand_as(images)


def _luma(images: Tensor) -> Tensor:
    """(B, 1, H, W) of (B, 3, H, W)."""
    red, green, blue = images.split(1, dim=1)
    return (red * _GREY_WEIGHTS[0]).add_(green, alpha=_GREY_WEIGHTS[1]).add_(blue, alpha=_GREY_WEIGHTS[2])


def jitter_(
    images: Tensor,
    brightness: Tensor,
    contrast: Tensor,
    saturation: Tensor,
    hue: Tensor,
    order: Sequence[int] = (0, 1, 2, 3),
) -> Tensor:
    """As torchvision's v2.ColorJitter on float images, with each image's own parameters; overwrites `images`.

    Args:
        images: (B, 3, H, W) in [0, 1].
        brightness, contrast, saturation: (B,) factors >= 0; 1 changes nothing.
        hue: (B,) in [-0.5, 0.5] turns of the HSV circle.
        order: what comes first, second, ...: 0 brightness, 1 contrast, 2 saturation, 3 hue; any may be left out.

    Returns:
        `images`, in [0, 1]; within 1e-4 of torchvision.
    """
    factors = [_per_image(factor) for factor in (brightness, contrast, saturation, hue)]
    for operation in order:
        _OPERATIONS[operation](images, factors[operation])
    return images


def _adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    return images.mul_(factor).clamp_(0, 1)


def _adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    mean_luma = _luma(images.mean((2, 3), keepdim=True))
    return images.mul_(factor).add_((1 - factor) * mean_luma).clamp_(0, 1)


def _adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    grey = _luma(images).mul_(1 - factor)
    return images.mul_(factor).add_(grey).clamp_(0, 1)


def _shift_hue(images: Tensor, turns: Tensor) -> Tensor:
    red, green, blue = images.unbind(1)
    largest = torch.maximum(torch.maximum(red, green), blue)
    smallest = torch.minimum(torch.minimum(red, green), blue)
    chroma = largest - smallest
    # Hue in sixths of the circle, times chroma. Masks of numbers and lerp: `where` is many times slower on a CPU.
    sector = (red - green).add_(chroma, alpha=4)
    mask = torch.empty_like(chroma)
    sector.lerp_((blue - red).add_(chroma, alpha=2), torch.eq(green, largest, out=mask))
    sector.lerp_(green - blue, torch.eq(red, largest, out=mask))
    sector.div_(chroma.clamp(min=torch.finfo(chroma.dtype).tiny)).add_(6 * turns[:, 0])
    sector.sub_((sector / 6).floor_(), alpha=6)  # in [0, 6]
    # Each channel is smallest + chroma * (a trapezium over the circle).
    for channel, (centre, sign, height) in enumerate(((3, 1, -1), (2, -1, 2), (4, -1, 2))):
        share = torch.sub(sector, centre, out=mask).abs_().mul_(sign).add_(height).clamp_(0, 1)
        torch.addcmul(smallest, chroma, share, out=images[:, channel])
    return images


_OPERATIONS = (_adjust_brightness, _adjust_contrast, _adjust_saturation, _shift_hue)


def colour_matrix(
    brightness: Tensor, contrast: Tensor, saturation: Tensor, hue: Tensor, mean_colour: Tensor
) -> tuple[Tensor, Tensor]:
    """Brightness, contrast, saturation, hue in this order as one affine map of colours.

    Hue is a rotation about the grey axis of RGB, which keeps the mean of the channels and takes red to green to blue
    exactly as the HSV circle does; a rotation of I and Q in YIQ lies twice as far from it, because the HSV circle does
    not keep the luma. Nothing is clamped between the four.

    Args:
        brightness, contrast, saturation, hue: (B,) as for `jitter_`.
        mean_colour: (B, 3) of each image.

    Returns:
        matrix (B, 3, 3) and offset (B, 3), in the unit of the mean: the new colour is matrix @ colour + offset.
    """
    identity = torch.eye(3, device=hue.device)
    grey = grey_matrix(mean_colour)
    turn = _constant([[0, -1, 1], [1, 0, -1], [-1, 1, 0]], mean_colour) / math.sqrt(3)  # cross product with the axis
    brightness = brightness.view(-1, 1, 1)
    contrast = contrast.view(-1, 1, 1)
    saturation = saturation.view(-1, 1, 1)
    angle = 2 * math.pi * hue.view(-1, 1, 1)
    rotation = angle.cos() * identity + angle.sin() * turn + (1 - angle.cos()) / 3
    matrix = contrast * brightness * (rotation @ (saturation * identity + (1 - saturation) * grey))
    offset = (1 - contrast) * brightness * (mean_colour @ grey.mT)[:, :, None]
    return matrix, offset[:, :, 0]


def grey_matrix(like: Tensor) -> Tensor:
    """(3, 3): the map of colours that `to_grey` is."""
    return _constant(_GREY_WEIGHTS, like).expand(3, 3)


def _constant(values, like: Tensor) -> Tensor:
    """Numbers on a tensor's device, in its precision; a GPU is not waited for."""
    return torch.tensor(values, dtype=like.dtype).to(like.device, non_blocking=True)


def apply_matrix(images: Tensor, matrix: Tensor, offset: Tensor) -> Tensor:
    """matrix @ colour + offset of every pixel: (B, 3, H, W), (B, 3, 3), (B, 3) -> (B, 3, H, W)."""
    return torch.baddbmm(offset[:, :, None], matrix, images.flatten(2)).view_as(images)


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)
