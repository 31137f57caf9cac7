"""Spatial features of a frozen timm encoder as the latents of an autoencoder (representation autoencoder).

Only a decoder is learned on top of them, so that what a self-supervised encoder keeps of an image can be seen and
measured as reconstruction, and a generator can work on its features (Zheng et al. 2025, representation autoencoders).
"""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn

from .blocks import use_small_image_stem_
from .choices import SMALL_IMAGE_STEMS

_NEEDED = ("architecture",)
_OPTIONAL = {"model_args": None, "stem": "timm", "level": -1, "mean": None, "std": None}
_DERIVED = ("channels", "reduction", "norm")


class BackboneEncoder(nn.Module):
    """Features (B, channels, H / reduction, W / reduction) of one level of a timm model, of images in [-1, 1].

    Always in evaluation mode and without gradient of its weights; gradients of the images pass. Layers above the
    level are left out. All buffers are in the state dict, those that timm would recompute included.

    Args:
        backbone: entry of `VQConfig`, as `complete_backbone` returns it.
        num_channels: of the images: the backbone's own, or 1, when grey is repeated.

    Raises:
        ValueError: incomplete entry, or images of other channels than the backbone's.
    """

    def __init__(self, backbone: dict, num_channels: int = 3):
        super().__init__()
        lacking = [name for name in (*_NEEDED, "level", *_DERIVED) if backbone.get(name) is None]
        if lacking:
            raise ValueError(f"backbone lacks {lacking}: `complete_backbone` fills in all but the architecture.")
        self.level = backbone["level"]
        self.channels = backbone["channels"]
        self.reduction = backbone["reduction"]
        self.norm = backbone["norm"]
        self.timm_model = build_timm(backbone)
        self.input_channels = _input_channels(backbone, num_channels)
        if hasattr(self.timm_model, "prune_intermediate_layers"):
            self.timm_model.prune_intermediate_layers([self.level], prune_norm=not self.norm, prune_head=True)
        for module in self.timm_model.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                module.register_buffer(name, buffer)  # persistent: transformers builds models without values
        for name, default in (("mean", 0.5), ("std", 0.5)):
            values = backbone.get(name) or [default] * self.input_channels
            if len(values) != self.input_channels:
                raise ValueError(f"backbone's {name} holds {len(values)} numbers for {self.input_channels} channels.")
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1))
        self.train(False)

    def train(self, mode: bool = True) -> BackboneEncoder:
        """Stays in evaluation mode and frozen, whatever the mode; also after loading."""
        super().train(False)
        return self.requires_grad_(False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Features of images (B, num_channels, H, W) in [-1, 1], which are normalised as the encoder was trained.

        Raises:
            ValueError: the backbone returns another shape than its entry in the config says.
        """
        images = ((pixel_values + 1) / 2).expand(-1, self.input_channels, -1, -1)
        images = ((images - self.mean) / self.std).to(pixel_values.dtype)
        options = {"norm": self.norm, "stop_early": True, "intermediates_only": True}
        features = self.timm_model.forward_intermediates(images, indices=[self.level], **options)[0]
        expected = (self.channels, *(side // self.reduction for side in pixel_values.shape[2:]))
        if tuple(features.shape[1:]) != expected:
            raise ValueError(
                f"level {self.level} of the backbone gives {tuple(features.shape[1:])} of images "
                f"{tuple(pixel_values.shape[1:])}, not {expected} as backbone={{'channels': {self.channels}, "
                f"'reduction': {self.reduction}}} says: use images of the size it was made for."
            )
        return features


def build_timm(backbone: dict) -> nn.Module:
    """The timm model of a backbone entry, without classifier; ValueError for unknown architecture or stem."""
    architecture = backbone["architecture"]
    stem = backbone.get("stem") or "timm"
    if stem not in ("timm", *SMALL_IMAGE_STEMS):
        raise ValueError(f"stem must be one of {('timm', *SMALL_IMAGE_STEMS)}, got {stem!r}.")
    if not timm.is_model(architecture):
        raise ValueError(f"timm has no architecture {architecture!r}; timm.list_models() names all.")
    model = timm.create_model(architecture, **(backbone.get("model_args") or {}) | {"num_classes": 0})
    if stem != "timm":
        use_small_image_stem_(model, stem)
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(
            f"{architecture} returns pooled features only (no forward_intermediates in timm), and latents must be "
            "spatial: take a ResNet, ConvNeXt, ViT or another architecture with intermediate features."
        )
    return model


@torch.no_grad()
def complete_backbone(backbone: dict, image_size: int, num_channels: int = 3) -> dict:
    """The entry with defaults, a level counted from 0, and what follows from them, found by running it on no data.

    `channels` and `reduction` are the shape of the features; `norm` is whether timm's final norm is applied: at the
    last level, as in `forward_features`, and not below.

    Args:
        backbone: {"architecture", "model_args", "stem", "level", "mean", "std"}; all but the first may lack. A level is
            an index of timm's `forward_intermediates`, -1 the last; mean and std are of images in [0, 1].
        image_size: height and width in pixels.
        num_channels: of the images.

    Raises:
        ValueError: unknown entries or architecture, no such level, a level that is not spatial at this size, or
            whose size no decoder of doublings gives back.
    """
    unknown = sorted(set(backbone) - {*_NEEDED, *_OPTIONAL, *_DERIVED})
    if unknown or not backbone.get("architecture"):
        raise ValueError(
            f"backbone takes {[*_NEEDED, *_OPTIONAL, *_DERIVED]}, and architecture is needed; got {sorted(backbone)}."
        )
    entry = _OPTIONAL | backbone
    channels = _input_channels(entry, num_channels)
    with torch.device("meta"):
        model = build_timm(entry).eval()
        images = torch.empty(1, channels, image_size, image_size)
        try:
            levels = [tuple(f.shape[1:]) for f in model.forward_intermediates(images, intermediates_only=True)]
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{entry['architecture']} does not take images of {image_size} px: {error}. Give the image_size it was "
                "made for, or model_args such as {'img_size': ...}."
            ) from error
    listed = ", ".join(f"{index}: {'x'.join(map(str, shape))}" for index, shape in enumerate(levels))
    if not isinstance(entry["level"], int) or not -len(levels) <= entry["level"] < len(levels):
        raise ValueError(f"level={entry['level']} does not exist; {entry['architecture']} has {listed}.")
    level = entry["level"] % len(levels)
    shape = levels[level]
    if len(shape) != 3 or shape[1] < 2 or shape[2] < 2:
        raise ValueError(
            f"level {level} of {entry['architecture']} is not spatial at {image_size} px: it has shape {shape}, one "
            f"cell is left. Choose a lower level ({listed}) or larger images."
        )
    reduction = image_size // shape[1]
    if shape[1] != shape[2] or reduction * shape[1] != image_size or reduction & (reduction - 1):
        raise ValueError(
            f"level {level} of {entry['architecture']} makes {shape[1]} x {shape[2]} cells of {image_size} px: a "
            f"decoder that doubles the sides cannot give them back. Choose another level ({listed}) or image_size."
        )
    return entry | {"level": level, "channels": shape[0], "reduction": reduction, "norm": level == len(levels) - 1}


def _input_channels(backbone: dict, num_channels: int) -> int:
    channels = (backbone.get("model_args") or {}).get("in_chans", 3)
    if num_channels not in (1, channels):
        raise ValueError(
            f"the backbone takes images of {channels} channels, not {num_channels}: give num_channels={channels}"
            + (", or 1, and grey is repeated." if channels != 1 else ".")
        )
    return channels
