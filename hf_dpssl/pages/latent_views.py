"""What an autoencoder makes of a picture, as pictures: reconstruction, errors, codes, and the way to another one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.decoding import to_square_tensor
from ..models.modeling_vq import VQAutoencoder
from .page_pictures import to_pictures

LARGEST_ERROR = 0.15  # mean absolute error of a pixel, of its range of 1, that has the end of the colour scale


@dataclass
class LatentView:
    """original, reconstruction, errors, codes: RGB pictures (codes None without a codebook).

    psnr: dB. different_codes: how many codes the picture uses. cells: latent cells of the picture.
    """

    original: Image.Image
    reconstruction: Image.Image
    errors: Image.Image
    codes: Image.Image | None
    psnr: float
    different_codes: int
    cells: int


def pixel_values(picture: Image.Image, autoencoder: VQAutoencoder) -> Tensor:
    """(1, C, S, S) in [-1, 1]: the centre square of an RGB picture at the autoencoder's size."""
    images = to_square_tensor(picture, autoencoder.config.image_size)[None].float() / 127.5 - 1
    if autoencoder.config.num_channels == 1:
        images = images.mean(1, keepdim=True)
    return images.to(autoencoder.device)


@torch.no_grad()
def view(picture: Image.Image, autoencoder: VQAutoencoder) -> LatentView:
    """Everything about one RGB picture; errors have the same colours for every autoencoder."""
    images = pixel_values(picture, autoencoder)
    encoded = autoencoder.encode(images)
    latents = encoded.latents if encoded.codes is None else autoencoder.quantize(encoded.latents).quantized
    decoded = autoencoder.decode(latents).pixel_values.float().clamp(-1, 1)
    errors = (decoded - images).abs().mean(1)[0] / 2  # of a range of 1
    mean_square = float((decoded - images).square().mean()) / 4
    codes = encoded.codes
    return LatentView(
        original=to_pictures(images)[0],
        reconstruction=to_pictures(decoded)[0],
        errors=_coloured(errors),
        codes=None if codes is None else code_picture(codes[0], autoencoder),
        psnr=math.inf if mean_square == 0 else -10 * math.log10(mean_square),
        different_codes=0 if codes is None else len(codes.unique()),
        cells=int(np.prod(latents.shape[2:])),
    )


def _coloured(errors: Tensor) -> Image.Image:
    colours = matplotlib.colormaps["inferno"]((errors.cpu() / LARGEST_ERROR).clamp(0, 1).numpy())
    return Image.fromarray((255 * colours[..., :3]).round().astype(np.uint8))


def code_colours(autoencoder: VQAutoencoder) -> Tensor:
    """(K, 3) in [0, 1]: first principal components of the code vectors, so that similar codes have similar colours."""
    codes = torch.arange(autoencoder.config.num_codes, device=autoencoder.device).view(1, 1, -1)
    vectors = autoencoder.quantizer.lookup(codes)[0, :, 0].T.float().cpu()  # (K, C)
    centred = vectors - vectors.mean(0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    places = centred @ directions[:3].T  # (K, up to 3)
    places = torch.nn.functional.pad(places, (0, 3 - places.shape[1]))
    low = places.quantile(0.02, dim=0)  # not the smallest and largest: one far code would grey out the others
    high = places.quantile(0.98, dim=0)
    return ((places - low) / (high - low).clamp_min(1e-9)).clamp(0, 1)


def code_picture(codes: Tensor, autoencoder: VQAutoencoder) -> Image.Image:
    """A picture (h, w) of codes (h, w), each in its own colour."""
    colours = code_colours(autoencoder)[codes.cpu()]
    return Image.fromarray((255 * colours).round().to(torch.uint8).numpy())


@torch.no_grad()
def morph(
    first: Image.Image, second: Image.Image, autoencoder: VQAutoencoder, count: int, *, quantize: bool = True
) -> list[Image.Image]:
    """`count` pictures along the straight line between the latents of two RGB pictures, both ends included.

    quantize: snap each point of the line to its nearest codes, where there is a codebook.

    Raises:
        ValueError: fewer than two pictures.
    """
    if count < 2:
        raise ValueError(f"a way between two pictures has at least 2, got {count}.")
    ends = [autoencoder.encode(pixel_values(picture, autoencoder)).latents for picture in (first, second)]
    shares = torch.linspace(0, 1, count, device=ends[0].device).view(-1, 1, 1, 1)
    latents = torch.lerp(*ends, shares)
    if quantize and autoencoder.quantizer is not None:
        latents = autoencoder.quantize(latents).quantized
    return to_pictures(autoencoder.decode(latents).pixel_values)


def cross_fade(first: Image.Image, second: Image.Image, autoencoder: VQAutoencoder, count: int) -> list[Image.Image]:
    """As `morph`, but of the pixels: what the latents have to beat."""
    ends = [pixel_values(picture, autoencoder) for picture in (first, second)]
    return to_pictures(torch.lerp(*ends, torch.linspace(0, 1, count, device=ends[0].device).view(-1, 1, 1, 1)))
