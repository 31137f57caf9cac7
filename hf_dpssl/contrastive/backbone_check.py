"""A timm backbone as a user names it: fitted to the size of the pictures, and tried once before anything is read."""

from __future__ import annotations

import timm
import torch

from ..models.modeling_contrastive import ContrastiveConfig, ContrastiveEncoder


def fitting_model_args(architecture: str, model_args: dict | None, image_size: int | None) -> dict | None:
    """The model_args with `img_size` where a model of fixed input size (ViT, Swin) is given pictures of another one.

    Args:
        architecture: timm model name.
        model_args: keyword arguments of `timm.create_model`; one with `img_size` stays as it is.
        image_size: side of the pictures in pixels; None: the model's own.
    """
    settings = timm.get_pretrained_cfg(architecture) if timm.is_model(architecture) else None
    given = model_args or {}
    fixed = settings is not None and settings.fixed_input_size
    if not fixed or image_size in (None, settings.input_size[-1]) or "img_size" in given:
        return model_args
    return given | {"img_size": image_size}


@torch.no_grad()
def check_backbone(
    architecture: str, model_args: dict | None, stem: str, image_size: int | None, latent_channels: int | None = None
) -> None:
    """Build the backbone and embed one blank RGB picture, or latent; random numbers drawn for it are given back.

    Args:
        architecture, model_args, stem: as of `ContrastiveConfig`.
        image_size: side of the pictures in pixels; None: the size that the model was made for.
        latent_channels: of an encoder of latents, whose side is `image_size`; None: it takes RGB pictures.

    Raises:
        ValueError: the model cannot be built of these arguments or does not take such a picture, with timm's reason.
    """
    described = f"--architecture {architecture} with --model_args {model_args or {}}"
    fitted = fitting_model_args(architecture, model_args, image_size)
    if latent_channels is not None:
        fitted = (fitted or {}) | {"in_chans": latent_channels}
    with torch.random.fork_rng(devices=[]):
        try:
            encoder = ContrastiveEncoder(ContrastiveConfig(architecture, fitted, stem=stem)).eval()
        except Exception as error:  # whatever a model's constructor raises
            raise ValueError(f"{described} cannot be built: {type(error).__name__}: {error}") from error
        side = image_size or encoder.timm_model.pretrained_cfg.get("input_size", (3, 224, 224))[-1]
        try:
            features = encoder(torch.zeros(1, latent_channels or 3, side, side)).pooler_output
        except Exception as error:
            given, remedy = (
                f"RGB pictures of {side} x {side} pixels",
                "Give another --image_size, or model_args that fit ",
            )
            if latent_channels is not None:
                given, remedy = f"latents of {latent_channels} x {side} x {side}", "Give model_args that fit "
            raise ValueError(
                f"{described} does not take {given}: {type(error).__name__}: {error}. {remedy}it (img_size, "
                f"patch_size, in_chans {latent_channels or 3})."
            ) from error
    if features.ndim != 2:
        raise ValueError(f"{described} gives features of shape {tuple(features.shape)}, where (1, F) is wanted.")
