"""Augmentation of whole batches on the device where they live, with a random number per (seed, epoch, sample).

Two random views of each image for contrastive learning (crop, flip, rotation, colour jitter, grey,
blur), and the plain scaling to [-1, 1] with an optional flip for generative models. Nothing is
drawn from a global generator: the same image in the same epoch gets the same views whatever the
batch, the number of processes or workers, and after a resume.

Source: Chen et al. 2020, appendix A; the t-SimCLR code uses the same without blur. Parameters are distributed as those
of torchvision's v2 RandomResizedCrop, RandomHorizontalFlip, ColorJitter, RandomGrayscale and GaussianBlur.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from . import keyed_random
from .choices import AUGMENTATIONS, MODES
from .colour import ORDERS, apply_matrix, colour_matrix, grey_matrix, jitter_, to_grey
from .resample import CROP_TRIES, gaussian_blur, resized_crop, resized_crop_boxes

# Uniform numbers of a view: 0 area, 1 log-ratio, 2 x, 3 y, 4 flip, 5 angle, 6 jitter, 7 - 10 its factors, 11 grey,
# 12 blur, 13 sigma, 14 and 15 translation, 16 order of the jitter, then area and log-ratio of the further tries.
_DRAWS_PER_VIEW = 17 + 2 * (CROP_TRIES - 1)
# Pixels worked on at a time on a CPU, so that they stay in its cache; a blur of few images would be slow.
_PIXELS_AT_A_TIME = 2**17
_BLURRED_PIXELS_AT_A_TIME = 2**18


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
PRESETS = dict(zip(AUGMENTATIONS, (NATURAL, IMAGENET, TEXTURES, FACES, DIGITS, DIGITS_ON_PHOTOS), strict=True))


@dataclass(frozen=True)
class ViewParameters:
    """What was drawn for one view of each image, (B,) tensors but for the boxes.

    boxes: (B, 4) int64 top, left, height, width in pixels. flip, jitter, grey, blur: whether it is done.
    brightness, contrast, saturation: factors; hue: turns; order: place in `colour.ORDERS`; sigma: pixels.
    """

    boxes: Tensor
    flip: Tensor
    jitter: Tensor
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    order: Tensor
    grey: Tensor
    blur: Tensor
    sigma: Tensor

    def take(self, rows: Tensor) -> ViewParameters:
        """Those of some views only."""
        return ViewParameters(*(getattr(self, field.name).index_select(0, rows) for field in fields(self)))


def view_parameters(
    augmentation: Augmentation, draws: Tensor, height: int | Tensor, width: int | Tensor
) -> ViewParameters:
    """The parameters that uniform numbers (B, 35), as of `TwoViews.draws`, mean for images of this size in pixels."""
    a = augmentation
    u = draws
    tries = torch.cat([u[:, :2], u[:, 17:]], dim=1).unflatten(1, (CROP_TRIES, 2))
    signed = 2 * u[:, 7:11] - 1
    return ViewParameters(
        boxes=resized_crop_boxes(tries, u[:, 2:4], height, width, scale=a.crop_scale, ratio=a.crop_ratio),
        flip=u[:, 4] < a.flip,
        jitter=u[:, 6] < a.jitter,
        brightness=1 + a.brightness * signed[:, 0],
        contrast=1 + a.contrast * signed[:, 1],
        saturation=1 + a.saturation * signed[:, 2],
        hue=a.hue * signed[:, 3],
        order=(u[:, 16] * len(ORDERS)).to(torch.int64),
        grey=u[:, 11] < a.grey,
        blur=u[:, 12] < a.blur,
        sigma=0.1 + 1.9 * u[:, 13],
    )


class TwoViews:
    """Two random views of each image of a batch, normalised for the encoder.

    Both modes draw the same parameters, and crop (boxes of whole pixels, antialiased bilinear) and blur as torchvision
    v2. They differ in colour:

    "exact": brightness, contrast, saturation and hue in a random order per image, each clamped, then grey: the pixels
    of v2 on float images with the same parameters, to 1/255.

    "fused": all of it and the normalisation as one 3 x 3 matrix per view (`colour.colour_matrix`), in a fixed order,
    hue as a rotation, clamped once. On a CPU large images are also cropped in 8 bits. Beside the exact mode and with
    the strengths of NATURAL, pixels differ by 2.3 / 255 in the mean and 19 / 255 in the 99 % quantile on cifar10-jpeg;
    on parts of two photographs, one of a glowing red flower, by 3.6 and 26 (224 pixels: 5.4 and 35). Most of it is hue:
    the HSV circle keeps the largest and the smallest channel, the rotation the mean; without hue it is 0.2 and 6 on
    cifar10-jpeg.

    Augmentations with rotation or translation resample once along a grid instead of cropping (`affine_resample`),
    equally in both modes.

    Args:
        augmentation: strengths and probabilities.
        mean, std: per channel, of images in [0, 1].
        seed: random seed of the run.
        crop: False when the loader has cropped already (large images of different sizes).
        mode: "fused" or "exact".

    Raises:
        ValueError: another mode.
    """

    def __init__(
        self,
        augmentation: Augmentation,
        mean: list[float],
        std: list[float],
        seed: int,
        crop: bool = True,
        mode: str = "fused",
    ):
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}.")
        self.augmentation = augmentation
        self.seed = seed
        self.crop = crop
        self.mode = mode
        self.mean = torch.tensor(mean)
        self.std = torch.tensor(std)

    def draws(self, sample_ids: Tensor, epoch: int, view: int) -> Tensor:
        """The uniform numbers (B, 35) that decide view 1 or 2 of these samples in this epoch."""
        return keyed_random.uniform(sample_ids, _DRAWS_PER_VIEW, seed=self.seed, stream=f"view {view}", epoch=epoch)

    def parameters(
        self, sample_ids: Tensor, epoch: int, view: int, height: int | Tensor, width: int | Tensor
    ) -> ViewParameters:
        """What is drawn for view 1 or 2 of these samples, of images of this size in pixels (a number, or (B,))."""
        return view_parameters(self.augmentation, self.draws(sample_ids, epoch, view), height, width)

    def __call__(self, images: Tensor, sample_ids: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Views of uint8 images (B, C, H, W), or (B, 2, C, H, W) when the loader cropped: two float (B, C, H, W).

        Raises:
            ValueError: images of another type or shape, or colour jitter or grey of images without three channels.
        """
        if images.dtype != torch.uint8 or images.ndim not in (4, 5):
            raise ValueError(
                "images must be uint8 of shape (B, C, H, W), or (B, 2, C, H, W) when the loader cropped, got "
                f"{images.dtype} of shape {tuple(images.shape)}."
            )
        a = self.augmentation
        if images.shape[-3] != 3 and max(a.jitter, a.grey) > 0:
            raise ValueError(
                f"colour jitter and grey need images of 3 channels, got {images.shape[-3]}: pass an Augmentation with "
                "jitter=0 and grey=0, or convert the images to RGB."
            )
        device = images.device.type
        available = torch.amp.is_autocast_available(device)
        with torch.autocast(device, enabled=False) if available else nullcontext():  # pixels are float32 in any case
            return self._views(images, sample_ids, epoch)

    def _views(self, images: Tensor, sample_ids: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        a = self.augmentation
        # Both views as one batch, all first views before all second ones: half as many calls.
        draws = torch.cat([self.draws(sample_ids, epoch, view) for view in (1, 2)])
        parameters = view_parameters(a, draws, *images.shape[-2:])
        count = len(images)
        shape = images.shape[-3:]
        views = torch.empty(2 * count, *shape, device=images.device)
        for rows, order in self._parts(parameters, _at_a_time(images, _PIXELS_AT_A_TIME)):
            sources = rows % count if images.ndim == 4 else 2 * (rows % count) + rows // count
            part = images.reshape(-1, *shape).index_select(0, sources)
            part_parameters = parameters.take(rows)
            part = self._resampled(part, draws[rows], part_parameters)
            if self.mode == "fused":
                part = self._fused_colours(part, part_parameters)
            else:
                part = self._exact_colours(part, part_parameters, order)
            views.index_copy_(0, rows, part)
        # Blur comes last, which is the same as before normalisation.
        if a.blur > 0 and images.device.type != "cpu":
            views = _where_(parameters.blur, views, lambda some: gaussian_blur(some, parameters.sigma))
        elif a.blur > 0:
            blurred = parameters.blur.nonzero().squeeze(1)
            for rows in blurred.split(_at_a_time(images, _BLURRED_PIXELS_AT_A_TIME)) if len(blurred) else ():
                part = gaussian_blur(views.index_select(0, rows), parameters.sigma.index_select(0, rows))
                views.index_copy_(0, rows, part)
        return views.chunk(2)

    def _parts(self, p: ViewParameters, limit: int) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
        """Rows of views that are worked on together, and the order of their jitter (empty: none, or fused)."""
        if self.mode == "fused" or self.augmentation.jitter == 0:
            yield from ((rows, ()) for rows in torch.arange(len(p.flip), device=p.flip.device).split(limit))
            return
        order = torch.where(p.jitter, p.order, -1)
        numbers = torch.arange(-1, len(ORDERS), device=order.device)
        counts = (order[:, None] == numbers).sum(0).tolist()  # by bincount a GPU would be waited for twice
        for operations, rows in zip([(), *ORDERS], order.argsort(stable=True).split(counts), strict=True):
            yield from ((part, operations) for part in rows.split(limit) if len(part))

    def _resampled(self, images: Tensor, draws: Tensor, p: ViewParameters) -> Tensor:
        """Floats in [0, 255] of uint8 images: cropped, flipped, rotated."""
        a = self.augmentation
        if a.rotation > 0 or a.translation > 0:
            return affine_resample(
                images.to(torch.float32), a, torch.cat([draws[:, :6], draws[:, 14:16]], 1), self.crop
            )
        if self.crop:
            return resized_crop(images, p.boxes, p.flip, images.shape[-2:], may_round=self.mode == "fused")
        return _where_(p.flip, images.to(torch.float32), lambda some: some.flip(-1))

    def _exact_colours(self, images: Tensor, p: ViewParameters, order: tuple[int, ...]) -> Tensor:
        a = self.augmentation
        images.div_(255)
        used = [strength > 0 for strength in (a.brightness, a.contrast, a.saturation, a.hue)]
        jitter_(images, p.brightness, p.contrast, p.saturation, p.hue, [i for i in order if used[i]])
        if a.grey > 0:
            images = _where_(p.grey, images, to_grey)
        return normalize(images, self.mean, self.std)

    def _fused_colours(self, images: Tensor, p: ViewParameters) -> Tensor:
        a = self.augmentation
        if max(a.jitter, a.grey) == 0:
            return normalize(images.div_(255), self.mean, self.std)
        factors = (torch.where(p.jitter, factor, 1) for factor in (p.brightness, p.contrast, p.saturation))
        matrix, offset = colour_matrix(*factors, torch.where(p.jitter, p.hue, 0), images.mean((2, 3)) / 255)
        matrix = torch.where(p.grey[:, None, None], grey_matrix(images) @ matrix, matrix)
        mean = self.mean.to(images, non_blocking=True)
        std = self.std.to(images, non_blocking=True)
        images = apply_matrix(images, matrix / (255 * std[:, None]), (offset - mean) / std)
        for channel, (m, s) in enumerate(zip(self.mean.tolist(), self.std.tolist(), strict=True)):
            images[:, channel].clamp_(-m / s, (1 - m) / s)
        return images


def _where_(chosen: Tensor, images: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Images of which the chosen (B,) are changed, in place where that is faster: which they are, only a CPU knows."""
    if images.device.type != "cpu":
        return torch.where(chosen[:, None, None, None], change(images), images)
    rows = chosen.nonzero().squeeze(1)
    if len(rows):
        images[rows] = change(images[rows])
    return images


def _at_a_time(images: Tensor, pixels: int) -> int:
    """Images of so many pixels; on other devices than a CPU all views of the batch."""
    height, width = images.shape[-2:]
    return max(1, pixels // (height * width)) if images.device.type == "cpu" else 2 * len(images)


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(images - mean) / std for images (B, C, H, W) in [0, 1]; mean and std per channel."""
    mean, std = (values.to(images, non_blocking=True).view(-1, 1, 1) for values in (mean, std))
    return (images - mean) / std


def crop_boxes(augmentation: Augmentation, draws: Tensor) -> Tensor:
    """Crop boxes (B, 4) of any size, not whole pixels, for `affine_resample`, as shares of the image.

    They hold left, top, right and bottom.

    draws: (B, 4) uniform numbers: area, log-ratio, x, y. A crop wider or higher than the image is
    clipped to it (`resample.resized_crop_boxes` tries again instead, as torchvision).
    """
    low, high = augmentation.crop_scale
    area = low + (high - low) * draws[:, 0]
    log_low = math.log(augmentation.crop_ratio[0])
    log_high = math.log(augmentation.crop_ratio[1])
    ratio = torch.exp(log_low + (log_high - log_low) * draws[:, 1])
    width = (area * ratio).sqrt().clamp(max=1)
    height = (area / ratio).sqrt().clamp(max=1)
    left = draws[:, 2] * (1 - width)
    top = draws[:, 3] * (1 - height)
    return torch.stack([left, top, left + width, top + height], dim=1)


def affine_resample(images: Tensor, augmentation: Augmentation, draws: Tensor, crop: bool = True) -> Tensor:
    """Crop, flip, rotation and translation in one bilinear resampling.

    images: (B, C, H, W) float; draws: (B, 8) uniform: area, ratio, x, y, flip, angle, translation in x and y.
    """
    a = augmentation
    whole = F.pad(torch.zeros_like(draws[:, :2]), (0, 2), value=1.0)  # made where the images are: nothing is copied
    box = crop_boxes(a, draws[:, :4]) if crop else whole
    if not crop and a.flip == a.rotation == a.translation == 0:
        return images
    # In [-1, 1], as affine_grid has it.
    centre_x = box[:, 0] + box[:, 2] - 1 + 2 * a.translation * (2 * draws[:, 6] - 1)
    centre_y = box[:, 1] + box[:, 3] - 1 + 2 * a.translation * (2 * draws[:, 7] - 1)
    half_width = box[:, 2] - box[:, 0]
    half_height = box[:, 3] - box[:, 1]
    sign = torch.where(draws[:, 4] < a.flip, -1.0, 1.0)
    angle = (2 * draws[:, 5] - 1) * math.radians(a.rotation)
    cos = angle.cos()
    sin = angle.sin()
    row_x = torch.stack([half_width * cos * sign, -half_height * sin, centre_x], dim=1)
    row_y = torch.stack([half_width * sin * sign, half_height * cos, centre_y], dim=1)
    grid = F.affine_grid(torch.stack([row_x, row_y], dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode=a.padding, align_corners=False)


def to_model_range(images: Tensor, sample_ids: Tensor, epoch: int, *, seed: int, flip: float) -> Tensor:
    """uint8 images (B, C, H, W) to float in [-1, 1], mirrored with probability `flip`: input of the autoencoder."""
    images = images.to(torch.float32) / 127.5 - 1
    if flip == 0:
        return images
    draws = keyed_random.uniform(sample_ids, 1, seed=seed, stream="flip", epoch=epoch)
    return torch.where(_chosen(draws[:, 0], flip), images.flip(-1), images)


def _chosen(draws: Tensor, probability: float) -> Tensor:
    return (draws < probability).view(-1, 1, 1, 1)
