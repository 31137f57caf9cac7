"""Augmentation of whole batches on the device where they live, with a random number per (seed, epoch, sample).

Two random views of each image for contrastive learning (crop, flip, rotation, colour jitter, grey,
blur), and the plain scaling to [-1, 1] with an optional flip for generative models. Nothing is
drawn from a global generator: the same image in the same epoch gets the same views whatever the
batch, the number of processes or workers, and after a resume.

Source: Chen et al. 2020, appendix A; the t-SimCLR code uses the same without blur.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from . import keyed_random

_GREY_WEIGHTS = (0.2989, 0.587, 0.114)  # torchvision's, ITU-R 601-2
_DRAWS_PER_VIEW = 16


@dataclass(frozen=True)
class Augmentation:
    """What a random view may differ in; a strength of 0 switches its part off.

    crop_scale: area of the crop, as a share of the image. crop_ratio: its width / height.
    translation: largest shift of the crop each way, as a share of the image's side; rotation: largest angle
    in degrees; padding: what lies beyond the image, its "border" pixels or "zeros" (black).
    flip: probability of a mirror image.
    jitter: probability of colour jitter; brightness, contrast, saturation: factors in [1 - s, 1 + s];
    hue: shift in [-h, h] turns, at most 0.5. grey: probability of grey.
    blur: probability of a Gaussian blur with sigma in [0.1, 2] pixels.
    """

    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    rotation: float = 0.0
    translation: float = 0.0
    padding: str = "border"
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    grey: float = 0.2
    blur: float = 0.0

    def __post_init__(self):
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale must satisfy 0 < low <= high <= 1, got {self.crop_scale}.")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"crop_ratio must satisfy 0 < low <= high, got {self.crop_ratio}.")
        for name in ("flip", "jitter", "grey", "blur"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability in [0, 1], got {getattr(self, name)}.")
        for name in ("brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a strength in [0, 1], got {getattr(self, name)}.")
        if self.padding not in ("border", "zeros"):
            raise ValueError(f"padding must be 'border' or 'zeros', got {self.padding!r}.")
        if not 0 <= self.translation <= 1:
            raise ValueError(f"translation is a share of the image's side in [0, 1], got {self.translation}.")
        if not 0 <= self.rotation <= 180:
            raise ValueError(f"rotation lies in [0, 180] degrees, got {self.rotation}.")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"hue lies in [0, 0.5] turns, got {self.hue}.")


NATURAL = Augmentation()
IMAGENET = replace(NATURAL, blur=0.5)
# Neither a mirror image nor another hue nor a grey copy of a digit is the same digit seen again, but one that stands
# elsewhere is. Digits on black are black beyond the edge.
DIGITS = Augmentation(
    crop_scale=(0.7, 1.0), crop_ratio=(0.8, 1.25), flip=0.0, rotation=20.0, translation=0.1, padding="zeros",
    jitter=0.0, hue=0.0, grey=0.0,
)  # fmt: skip
DIGITS_ON_PHOTOS = replace(DIGITS, padding="border")
TEXTURES = replace(NATURAL, blur=0.5)
FACES = replace(NATURAL, crop_scale=(0.5, 1.0), blur=0.5)
PRESETS = {
    "natural": NATURAL, "imagenet": IMAGENET, "textures": TEXTURES, "faces": FACES,
    "digits": DIGITS, "digits-on-photos": DIGITS_ON_PHOTOS,
}  # fmt: skip


def crop_boxes(augmentation: Augmentation, draws: Tensor) -> Tensor:
    """Random-resized-crop boxes (B, 4): left, top, right, bottom as shares of the image.

    draws: (B, 4) uniform numbers: area, log-ratio, x, y. A crop wider or higher than the image is
    clipped to it (torchvision tries again instead; the share of such crops is small).
    """
    low, high = augmentation.crop_scale
    area = low + (high - low) * draws[:, 0]
    log_low, log_high = (math.log(r) for r in augmentation.crop_ratio)
    ratio = torch.exp(log_low + (log_high - log_low) * draws[:, 1])
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    left, top = draws[:, 2] * (1 - width), draws[:, 3] * (1 - height)
    return torch.stack([left, top, left + width, top + height], dim=1)


class TwoViews:
    """Two random views of each image of a batch, normalised for the encoder.

    Args:
        augmentation: strengths and probabilities.
        mean, std: per channel, of images in [0, 1].
        seed: random seed of the run.
        crop: False when the loader has cropped already (large images of different sizes).
    """

    def __init__(self, augmentation: Augmentation, mean: list[float], std: list[float], seed: int, crop: bool = True):
        self.augmentation, self.seed, self.crop = augmentation, seed, crop
        self.mean, self.std = torch.tensor(mean).view(1, -1, 1, 1), torch.tensor(std).view(1, -1, 1, 1)

    def draws(self, sample_ids: Tensor, epoch: int, view: int) -> Tensor:
        """The uniform numbers (B, 16) that decide view 1 or 2 of these samples in this epoch."""
        return keyed_random.uniform(sample_ids, _DRAWS_PER_VIEW, seed=self.seed, stream=f"view {view}", epoch=epoch)

    def __call__(self, images: Tensor, sample_ids: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Views of uint8 images (B, C, H, W), or (B, 2, C, H, W) when the loader cropped: two float (B, C, H, W)."""
        images = images.to(torch.float32) / 255
        first, second = images.unbind(1) if images.ndim == 5 else (images, images)
        return self._view(first, sample_ids, epoch, 1), self._view(second, sample_ids, epoch, 2)

    def _view(self, images: Tensor, sample_ids: Tensor, epoch: int, view: int) -> Tensor:
        a, u = self.augmentation, self.draws(sample_ids, epoch, view)
        images = move(images, a, torch.cat([u[:, :6], u[:, 14:16]], dim=1), self.crop)
        if a.jitter > 0:
            images = torch.where(_chosen(u[:, 6], a.jitter), jitter(images, a, u[:, 7:11]), images)
        if a.grey > 0:
            images = torch.where(_chosen(u[:, 11], a.grey), to_grey(images), images)
        if a.blur > 0:
            sigma = 0.1 + 1.9 * u[:, 13]
            images = torch.where(_chosen(u[:, 12], a.blur), gaussian_blur(images, sigma), images)
        return normalize(images, self.mean, self.std)


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(images - mean) / std for images in [0, 1]."""
    return (images - mean.to(images)) / std.to(images)


def move(images: Tensor, augmentation: Augmentation, draws: Tensor, crop: bool = True) -> Tensor:
    """Crop, flip, rotation and translation in one bilinear resampling.

    images: (B, C, H, W) in [0, 1]; draws: (B, 8) uniform: area, ratio, x, y, flip, angle, translation in x and y.
    """
    a, size = augmentation, len(images)
    box = crop_boxes(a, draws[:, :4]) if crop else torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(size, 4).to(draws)
    if not crop and a.flip == a.rotation == a.translation == 0:
        return images
    centre_x, centre_y = box[:, 0] + box[:, 2] - 1, box[:, 1] + box[:, 3] - 1  # in [-1, 1]
    centre_x = centre_x + 2 * a.translation * (2 * draws[:, 6] - 1)
    centre_y = centre_y + 2 * a.translation * (2 * draws[:, 7] - 1)
    half_width, half_height = box[:, 2] - box[:, 0], box[:, 3] - box[:, 1]
    sign = torch.where(draws[:, 4] < a.flip, -1.0, 1.0)
    angle = (2 * draws[:, 5] - 1) * math.radians(a.rotation)
    cos, sin = angle.cos(), angle.sin()
    row_x = torch.stack([half_width * cos * sign, -half_height * sin, centre_x], dim=1)
    row_y = torch.stack([half_width * sin * sign, half_height * cos, centre_y], dim=1)
    grid = F.affine_grid(torch.stack([row_x, row_y], dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode=a.padding, align_corners=False)


def jitter(images: Tensor, augmentation: Augmentation, draws: Tensor) -> Tensor:
    """Brightness, contrast, saturation, hue in this order, one random factor per image; draws: (B, 4) uniform."""
    a = augmentation
    brightness, contrast, saturation = (
        _per_image(1 + strength * (2 * draws[:, i] - 1))
        for i, strength in enumerate((a.brightness, a.contrast, a.saturation))
    )
    images = (images * brightness).clamp(0, 1)
    mean_grey = to_grey(images).mean((1, 2, 3), keepdim=True)
    images = (contrast * images + (1 - contrast) * mean_grey).clamp(0, 1)
    images = (saturation * images + (1 - saturation) * to_grey(images)).clamp(0, 1)
    return shift_hue(images, a.hue * (2 * draws[:, 3] - 1)) if a.hue > 0 else images


def to_grey(images: Tensor) -> Tensor:
    """Luma in all three channels, (B, 3, H, W) like the input."""
    weights = images.new_tensor(_GREY_WEIGHTS).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True).expand_as(images)


def shift_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Rotate the hue of RGB images (B, 3, H, W) in [0, 1] by `turns` (B,) of the HSV circle."""
    red, green, blue = images.unbind(1)
    value, smallest = images.amax(1), images.amin(1)
    chroma = value - smallest
    safe = torch.where(chroma > 0, chroma, 1)
    sector = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    hue = (sector / 6 + turns.view(-1, 1, 1)) % 1.0
    # Each channel is value - chroma * clamp(min(k, 4 - k), 0, 1), with k = (n + 6 hue) mod 6.
    channels = []
    for n in (5, 3, 1):
        k = (n + 6 * hue) % 6
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, dim=1)


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Blur each image (B, C, H, W) with its own sigma (B,) in pixels; reflected border, kernel of about H / 10."""
    batch, channels, height, width = images.shape
    radius = max(1, min(round(0.1 * min(height, width)) // 2, min(height, width) - 1))
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (offsets[None] / sigma[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    stacked = F.pad(images, [radius] * 4, mode="reflect").reshape(1, batch * channels, *_padded(images, radius))
    stacked = F.conv2d(stacked, kernel[:, None, None, :], groups=batch * channels)
    stacked = F.conv2d(stacked, kernel[:, None, :, None], groups=batch * channels)
    return stacked.view(batch, channels, height, width)


def to_model_range(images: Tensor, sample_ids: Tensor, epoch: int, *, seed: int, flip: float) -> Tensor:
    """uint8 images (B, C, H, W) to float in [-1, 1], mirrored with probability `flip`: input of the autoencoder."""
    images = images.to(torch.float32) / 127.5 - 1
    if flip == 0:
        return images
    draws = keyed_random.uniform(sample_ids, 1, seed=seed, stream="flip", epoch=epoch)
    return torch.where(_chosen(draws[:, 0], flip), images.flip(-1), images)


def _chosen(draws: Tensor, probability: float) -> Tensor:
    return _per_image(draws < probability)


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _padded(images: Tensor, radius: int) -> tuple[int, int]:
    return images.shape[2] + 2 * radius, images.shape[3] + 2 * radius
