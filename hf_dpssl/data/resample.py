"""Crops and blur of whole batches, each image with its own box and sigma, as torchvision v2 computes them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

CROP_TRIES = 10  # torchvision's
_LARGEST_BY_MATRICES = 48  # side in pixels: above, interpolating one image at a time is faster on a CPU


def resized_crop_boxes(
    tries: Tensor,
    place: Tensor,
    height: int | Tensor,
    width: int | Tensor,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Tensor:
    """Boxes of random-resized-crop in whole pixels, distributed as those of v2.RandomResizedCrop.

    The first of ten tries that fits into the image counts; if none does, the largest central crop of an allowed ratio.

    Args:
        tries: (B, 10, 2) uniform numbers: area and log-ratio of each try.
        place: (B, 2) uniform numbers: x and y.
        height, width: of the images, in pixels; one number, or (B,).
        scale: range of the area, as a share of the image. ratio: range of width / height.

    Returns:
        (B, 4) int64: top, left, height, width.
    """
    sides = (torch.as_tensor(side).to(tries.device, non_blocking=True) for side in (height, width))
    height, width = (side.expand(len(tries))[:, None] for side in sides)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * tries[..., 0])
    log_low = math.log(ratio[0])
    log_high = math.log(ratio[1])
    aspect = torch.exp(log_low + (log_high - log_low) * tries[..., 1])
    tried_width = (area * aspect).sqrt().round()
    tried_height = (area / aspect).sqrt().round()
    fits = (tried_width > 0) & (tried_width <= width) & (tried_height > 0) & (tried_height <= height)
    first = fits.to(torch.uint8).argmax(1, keepdim=True)
    any_fits = fits.any(1, keepdim=True)
    central_width = torch.minimum(width, (height * ratio[1]).round())
    central_height = torch.minimum(height, (width / ratio[0]).round())
    crop_width = torch.where(any_fits, tried_width.gather(1, first), central_width)
    crop_height = torch.where(any_fits, tried_height.gather(1, first), central_height)
    free_x = width - crop_width
    free_y = height - crop_height
    random_left = torch.minimum((place[:, :1] * (free_x + 1)).floor(), free_x)
    random_top = torch.minimum((place[:, 1:] * (free_y + 1)).floor(), free_y)
    left = torch.where(any_fits, random_left, (free_x / 2).floor())
    top = torch.where(any_fits, random_top, (free_y / 2).floor())
    return torch.cat([top, left, crop_height, crop_width], dim=1).to(torch.int64)


def resized_crop(
    images: Tensor, boxes: Tensor, flip: Tensor, size: tuple[int, int], *, may_round: bool = False
) -> Tensor:
    """Cut each image's box, resize it to `size` (antialiased bilinear), mirror where `flip`.

    The pixels are those of torchvision's v2 `resized_crop(..., antialias=True)` on float images, to 1e-4 of the range,
    for enlarging and for reducing. On a CPU large images are interpolated one by one; otherwise (and on every other
    device) the whole batch is two batched matrix products, with each image's interpolation weights as the matrix.

    Args:
        images: (B, C, H, W), uint8 or float.
        boxes: (B, 4) int64: top, left, height, width, within the image.
        flip: (B,) bool.
        size: height and width of the result.
        may_round: where uint8 images are interpolated one by one, do it in 8 bits, twice as fast: values are then
            rounded to whole numbers, off by at most 1.

    Returns:
        (B, C, *size) float32 in the range of the input.
    """
    if images.device.type == "cpu" and max(size) > _LARGEST_BY_MATRICES:
        return _crop_one_by_one(images if may_round else images.to(torch.float32), boxes, flip, size)
    top, left, height, width = boxes.unbind(1)
    across = _interpolation_weights(left, width, images.shape[3], size[1], flip)
    down = _interpolation_weights(top, height, images.shape[2], size[0], torch.zeros_like(flip))
    rows = torch.bmm(images.to(torch.float32).flatten(1, 2), across.mT).view(*images.shape[:3], size[1])
    result = rows.new_empty(*images.shape[:2], *size)
    for channel in range(images.shape[1]):  # expanding the weights over channels would copy them
        result[:, channel] = torch.bmm(down, rows[:, channel])
    return result


def _interpolation_weights(start: Tensor, length: Tensor, size_in: int, size_out: int, flip: Tensor) -> Tensor:
    """(B, size_out, size_in): rows of triangles as wide as a pixel of the larger of crop and result."""
    start = start[:, None].float()
    length = length[:, None].float()
    scale = length / size_out
    centre = (torch.arange(size_out, device=start.device) + 0.5) * scale
    centre = torch.where(flip[:, None], length - centre, centre) + start
    pixel = torch.arange(size_in, device=start.device) + 0.5
    weights = (pixel - centre[:, :, None]).abs_().div_(-scale.clamp(min=1)[:, :, None]).add_(1).clamp_(min=0)
    weights *= ((pixel > start) & (pixel < start + length)).float()[:, None]
    return weights.div_(weights.sum(2, keepdim=True))


def _crop_one_by_one(images: Tensor, boxes: Tensor, flip: Tensor, size: tuple[int, int]) -> Tensor:
    result = torch.empty(*images.shape[:2], *size)
    parameters = zip(boxes.tolist(), flip.tolist(), strict=True)
    for i, ((top, left, height, width), mirrored) in enumerate(parameters):
        crop = images[i : i + 1, :, top : top + height, left : left + width]
        crop = F.interpolate(crop, size, mode="bilinear", antialias=True)[0]
        result[i] = crop.flip(-1) if mirrored else crop
    return result


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Blur each image (B, C, H, W) with its own sigma (B,) in pixels; reflected border, kernel of about H / 10."""
    batch, channels, height, width = images.shape
    radius = max(1, min(round(0.1 * min(height, width)) // 2, min(height, width) - 1))
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (offsets[None] / sigma[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    padded = F.pad(images, [radius] * 4, mode="reflect")
    stacked = padded.reshape(1, batch * channels, height + 2 * radius, width + 2 * radius)
    stacked = F.conv2d(stacked, kernel[:, None, None, :], groups=batch * channels)
    stacked = F.conv2d(stacked, kernel[:, None, :, None], groups=batch * channels)
    return stacked.view(batch, channels, height, width)
