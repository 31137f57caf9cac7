"""One face for the autoencoders a latent pipeline may hold: ours, and diffusers' for images.

Latents are normalised: ours by the statistics in the config, diffusers' by (latents - shift) * scaling_factor. Also
here: pictures and masks that a user gives, checked against the autoencoder.
"""

from __future__ import annotations

import json

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ModelMixin, VQModel
from PIL import Image
from torch import Tensor, nn

from ..models.call_arguments import check_pixel_values
from ..models.modeling_vq import VQAutoencoder
from ..models.weight_hashes import combined_sha256, rounded_sha256, value_sha256

Autoencoder = VQAutoencoder | ModelMixin  # with encode and decode of images: AutoencoderKL, VQModel, AutoencoderTiny
Pictures = Image.Image | np.ndarray | Tensor | list


def fingerprint(vae: Autoencoder) -> str:
    """One hash of all that decides the latents; of diffusers' also the beginnings of those of its roundings."""
    if isinstance(vae, VQAutoencoder):
        return vae.fingerprint()
    parts = ("encoder", "quant_conv", "quantize")
    tensors = {n: t for n, t in vae.state_dict().items() if n.split(".")[0] in parts}
    return "-".join([combined_sha256(value_sha256(tensors)), *(one[:16] for one in rounded_sha256(tensors))])


def has_fingerprint(vae: Autoencoder, expected: str) -> bool:
    """Whether the autoencoder is the one of a fingerprint, or a rounding of it in half precision."""
    found = fingerprint(vae)
    return found == expected or found[:16] in expected.split("-")[1:]


def statistics(vae: Autoencoder) -> dict[str, list[float] | float] | None:
    """By what its latents are normalised, which no fingerprint holds; None where ours has not measured it."""
    config = vae.config
    if not isinstance(vae, VQAutoencoder):
        return {"scaling_factor": float(config.scaling_factor), "shift_factor": float(_shift(vae))}
    if config.latent_mean is None or config.latent_std is None:
        return None
    return {name: [float(value) for value in getattr(config, name)] for name in ("latent_mean", "latent_std")}


def sources(vae: Autoencoder) -> dict[str, str]:
    """Fingerprints of what decides the normalised latents that a run learns from, by their part."""
    found = {"autoencoder": fingerprint(vae)}
    if (taken := statistics(vae)) is not None:
        found["latent normalization"] = combined_sha256({name: json.dumps(value) for name, value in taken.items()})
    return found


def other_statistics(vae: Autoencoder, expected: dict | None) -> str | None:
    """In words, what of `statistics` is not as expected; None where nothing is, or where nothing is expected."""
    found = statistics(vae) or {}
    other = [name for name in expected or {} if found.get(name) != expected[name]]
    return "; ".join(f"{name} is {_short(found.get(name))} and was {_short(expected[name])}" for name in other) or None


def _short(numbers: list[float] | float | None) -> str:
    """At most four of the numbers."""
    if not isinstance(numbers, list):
        return "not set" if numbers is None else f"{numbers:.6g}"
    return f"[{', '.join(f'{number:.6g}' for number in numbers[:4])}{', ...' if len(numbers) > 4 else ''}]"


def latent_channels(vae: Autoencoder) -> int:
    """Channels of the latents."""
    return getattr(vae.config, "vq_embed_dim", None) or vae.config.latent_channels


def downsampling_factor(vae: Autoencoder) -> int:
    """Pixels per latent cell and side."""
    if isinstance(vae, VQAutoencoder):
        return vae.config.downsampling_factor
    return 2 ** (len(vae.config.block_out_channels) - 1)


def awaken(module: nn.Module) -> None:
    """Bring an offloaded module to its device: accelerate's hook does so before `forward` alone."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(module)


def encode(vae: Autoencoder, pixel_values: Tensor) -> Tensor:
    """Normalised latents (B, C, h, w), float32, of images (B, C, H, W) in [-1, 1]; of a distribution the mode.

    Raises:
        ValueError: values that are not finite or outside [-1, 1].
    """
    check_pixel_values(pixel_values)
    awaken(vae)
    pixel_values = pixel_values.to(vae.dtype)
    if isinstance(vae, VQAutoencoder):
        return vae.normalize_latents(vae.encode_latents(pixel_values).float())
    encoded = vae.encode(pixel_values)
    latents = encoded.latents if "latents" in encoded else encoded.latent_dist.mode()
    return (latents.float() - _shift(vae)) * vae.config.scaling_factor


def decode(vae: Autoencoder, latents: Tensor, quantize: bool = True) -> Tensor:
    """Images (B, C, H, W) in about [-1, 1] of normalised latents (B, C, h, w).

    quantize: snap to the nearest codes first, where the autoencoder has any.
    """
    awaken(vae)
    if isinstance(vae, VQAutoencoder):
        latents = vae.denormalize_latents(latents)
        if quantize and vae.quantizer is not None:
            latents = vae.quantize(latents).quantized
        return vae.decode(latents).pixel_values
    latents = (latents / vae.config.scaling_factor + _shift(vae)).to(vae.dtype)
    options = {"force_not_quantize": not quantize} if isinstance(vae, VQModel) else {}
    return vae.decode(latents, **options).sample


def _shift(vae: ModelMixin) -> float:
    """What a diffusers autoencoder's latents are shifted by, which most of its classes do not have."""
    return getattr(vae.config, "shift_factor", None) or 0.0


def read_pictures(pictures: Pictures, channels: int, side: int, name: str = "image") -> Tensor:
    """Pictures given by a user as (N, channels, side, side) float32 in [0, 1].

    Args:
        pictures: a PIL image or a list of them, an array ([N,] H, W, C) or a tensor ([N,] C, H, W), values in [0, 1].
        channels: 1 or 3.
        side: height and width.
        name: of the argument, for the messages.

    Raises:
        ValueError: another kind, mode, size or range.
    """
    if isinstance(pictures, Image.Image):
        pictures = [pictures]
    if isinstance(pictures, list | tuple) and pictures:
        if all(isinstance(picture, Image.Image) for picture in pictures):
            pictures = np.stack([_from_pil(picture, channels, side, name) for picture in pictures])
        elif all(isinstance(picture, Tensor) for picture in pictures):
            pictures = torch.stack(tuple(pictures))
        elif all(isinstance(picture, np.ndarray) for picture in pictures):
            pictures = np.stack(pictures)
    if isinstance(pictures, np.ndarray):
        if np.issubdtype(pictures.dtype, np.integer):
            raise ValueError(f"{name} is an array of {pictures.dtype}: give floats in [0, 1], or PIL images.")
        pictures = pictures[None] if pictures.ndim == 3 else pictures
        pictures = torch.from_numpy(np.ascontiguousarray(np.moveaxis(pictures, -1, 1), dtype=np.float32))
    if not isinstance(pictures, Tensor):
        raise ValueError(f"{name} must be PIL images, an array or a tensor, got {type(pictures).__name__}.")
    pictures = pictures[None] if pictures.ndim == 3 else pictures
    if tuple(pictures.shape[1:]) != (channels, side, side):
        raise ValueError(
            f"{name} must have {channels} channels and {side} x {side} pixels, got shape {tuple(pictures.shape)}: "
            "resize and convert it first."
        )
    pictures = pictures.float()
    if not (pictures.min() >= 0 and pictures.max() <= 1):
        raise ValueError(f"{name} must lie in [0, 1], got [{pictures.min():.3g}, {pictures.max():.3g}].")
    return pictures


def _from_pil(picture: Image.Image, channels: int, side: int, name: str) -> np.ndarray:
    mode = {1: "L", 3: "RGB"}.get(channels)
    if picture.mode != mode or picture.size != (side, side):
        raise ValueError(
            f"{name} must be of mode {mode} and {side} x {side} pixels, got mode {picture.mode} and "
            f"{picture.width} x {picture.height}: `image.convert({mode!r}).resize(({side}, {side}))`."
        )
    return np.asarray(picture, dtype=np.float32).reshape(side, side, channels) / 255


def read_mask(mask: Pictures, side: int, factor: int) -> tuple[Tensor, Tensor]:
    """A mask given by a user (white or 1 = paint anew) as (N, 1, side, side) pixels and (N, 1, h, w) latent cells.

    A cell is painted anew when any of its pixels is. Raises ValueError as `read_pictures`, and for an empty mask.
    """
    if isinstance(mask, Image.Image) and mask.mode == "1":
        mask = mask.convert("L")
    if isinstance(mask, np.ndarray | Tensor) and mask.ndim == 2:
        mask = mask[..., None] if isinstance(mask, np.ndarray) else mask[None]
    if isinstance(mask, np.ndarray | Tensor) and mask.dtype in (np.bool_, torch.bool):
        mask = mask.astype(np.float32) if isinstance(mask, np.ndarray) else mask.float()
    pixels = (read_pictures(mask, 1, side, "mask_image") >= 0.5).float()
    if not pixels.flatten(1).any(dim=1).all():
        raise ValueError("mask_image is black (nothing would be painted anew): white pixels are painted anew.")
    return pixels, F.max_pool2d(pixels, factor)
