"""Contrastive encoders of every kind of backbone, tiny and untrained, and folders of them."""

from __future__ import annotations

import timm
import torch
from timm.models import save_for_hf

from hf_dpssl import ContrastiveConfig, ContrastiveEncoder, SimCLRForPreTraining

BACKBONES = {
    "convnext": ("convnext_atto", dict(patch_size=1, depths=[1, 1, 1, 1], dims=[8, 8, 16, 16], ls_init_value=1.0)),
    "resnet": ("resnet18", dict(layers=[1, 1, 1, 1], channels=[8, 8, 16, 16])),
    "vit": ("vit_tiny_patch16_224", dict(img_size=16, patch_size=4, depth=2, embed_dim=24, num_heads=2)),
    # The last two have buffers that no checkpoint holds.
    "swin": ("swin_tiny_patch4_window7_224", dict(img_size=16, window_size=4, depths=[2], embed_dim=16, num_heads=[2])),
    "rope": ("vit_small_patch16_rope_224", dict(img_size=16, patch_size=4, depth=1, embed_dim=24, num_heads=2)),
}

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)

RESNET = {"layers": [1, 1, 1, 1], "channels": [16, 16, 24, 32]}

INPUT = {"input_size": [3, 16, 16], "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic"}
INPUT |= {"crop_pct": 1.0, "crop_mode": "center"}


def config(backbone: str = "convnext", **options) -> ContrastiveConfig:
    architecture, model_args = BACKBONES[backbone]
    return ContrastiveConfig(architecture=architecture, model_args=model_args, **({"projection_dim": 6} | options))


def images(seed: int, count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def encoder_folder(folder, architecture: str, model_args: dict | None, stem: str = "timm", size: int = 32):
    """A folder as training/contrastive.py writes it; batch norms have seen images, so that they are no identity."""
    torch.manual_seed(0)
    preprocessing = {
        "input_size": [3, size, size],
        "mean": MEAN,
        "std": STD,
        "interpolation": "bilinear",
        "crop_pct": 1,
    }
    encoder = ContrastiveEncoder(ContrastiveConfig(architecture, model_args, preprocessing, stem))
    encoder.train()(torch.randn(8, 3, size, size))
    encoder.eval().save_pretrained(folder)
    return encoder


def save_ours(folder, model_class=SimCLRForPreTraining, **changes):
    torch.manual_seed(0)
    options = {"architecture": "resnet10t", "model_args": {"channels": [8, 8, 16, 16]}, "projection_dim": 4}
    options |= {"normalization": "anchor", "queue_size": 8, "pretrained_cfg": INPUT}
    model = model_class(ContrastiveConfig(**options | changes)).eval()
    model.encoder.save_pretrained(folder)
    model.save_pretrained(folder / "pretraining")
    return model


def grey_encoder(folder) -> None:
    """A timm model of pictures of one channel."""
    options = {"in_chans": 1, "channels": [8, 8, 16, 16]}
    model = timm.create_model("resnet10t", num_classes=0, **options)
    model.pretrained_cfg |= INPUT | {"input_size": [1, 16, 16], "mean": [0.5], "std": [0.25]}
    save_for_hf(model, str(folder), model_args=options)
