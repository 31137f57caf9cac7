"""Perceptual distance of images: LPIPS, or features of any frozen encoder, ours included, which works offline.

Source: Zhang et al. 2018, equation 1, for an encoder with unit weights: at every stage the channels of each position
are divided by their norm, squared differences are summed over channels, averaged over positions, and added over stages.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..embedding.embedder import ImageEmbedder, timm_model
from ..models.modeling_contrastive import input_settings


class PerceptualDistance(nn.Module):
    """Mean distance of image pairs in the stages of a frozen timm model; gradients pass to the images.

    Args:
        timm_model: has `forward_intermediates`.
        mean, std: by which its images in [0, 1] were normalised, one number per channel.
        size: side to which images of another size are resized (antialiased bilinear), for a model that takes one size
            only, as most vision transformers; None: images pass as they are.
    """

    def __init__(self, timm_model: nn.Module, mean: list[float], std: list[float], size: int | None = None):
        super().__init__()
        if not hasattr(timm_model, "forward_intermediates"):
            raise ValueError(
                f"{type(timm_model).__name__} has no intermediate features (timm's forward_intermediates)."
            )
        self.timm_model, self.size = timm_model, size
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))
        self.train(False)

    def train(self, mode: bool = True) -> PerceptualDistance:
        """Stays in evaluation mode and frozen, whatever the mode."""
        super().train(False)
        return self.requires_grad_(False)

    def features(self, images: Tensor) -> list[Tensor]:
        """Unit-normalised features of each stage of images (B, 1 or C, H, W) in [-1, 1]; grey is repeated."""
        channels = self.mean.shape[1]
        if images.ndim != 4 or images.shape[1] not in (1, channels):
            raise ValueError(f"images must be (B, 1 or {channels}, H, W), got {tuple(images.shape)}.")
        images = (images.float().expand(-1, channels, -1, -1) + 1) / 2
        if self.size is not None and tuple(images.shape[2:]) != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
        stages = self.timm_model.forward_intermediates((images - self.mean) / self.std, intermediates_only=True)
        return [stage / (stage.pow(2).sum(1, keepdim=True) + 1e-10).sqrt() for stage in stages]

    def forward(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        """Mean distance, a scalar >= 0, of images and reconstructions (B, C, H, W) in [-1, 1]."""
        with torch.autocast(images.device.type, enabled=False):
            with torch.no_grad():
                wanted = self.features(images)
            pairs = zip(wanted, self.features(reconstructions), strict=True)
            return sum((x - y).pow(2).sum(1).mean() for x, y in pairs)


class LpipsDistance(nn.Module):
    """LPIPS (Zhang et al. 2018) through torchmetrics, whose VGG-16 is downloaded at the first use."""

    def __init__(self):
        super().__init__()
        from torchmetrics.image import LearnedPerceptualImagePatchSimilarity

        try:
            self.network = LearnedPerceptualImagePatchSimilarity(net_type="vgg").net
        except OSError as error:
            raise OSError(
                f"the VGG-16 of LPIPS cannot be downloaded ({error}): connect to the network, put it into its cache or "
                "name a frozen encoder instead, e.g. one of your own trained by training/contrastive.py."
            ) from error
        self.train(False)

    def train(self, mode: bool = True) -> LpipsDistance:
        """Stays in evaluation mode and frozen, whatever the mode."""
        super().train(False)
        return self.requires_grad_(False)

    def forward(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        """Mean LPIPS, a scalar >= 0, of images and reconstructions (B, 1 or 3, H, W) in [-1, 1]."""
        pair = (x.float().expand(-1, 3, -1, -1) for x in (images, reconstructions))
        with torch.autocast(images.device.type, enabled=False):
            return self.network(*pair, normalize=False).mean()


def load_perceptual(name: str) -> nn.Module:
    """A frozen perceptual distance.

    Args:
        name: "lpips", "timm:<model>" with its pretrained weights, or the folder or Hub id of an encoder of this package
            or of timm.

    Raises:
        OSError: LPIPS without its weights. ValueError: weights that cannot be had,
            or an encoder that has no intermediate features.
    """
    if name == "lpips":
        return LpipsDistance()
    if name.startswith("timm:"):
        model = timm_model(name)
        return PerceptualDistance(*_arguments(model, model.pretrained_cfg))
    encoder = ImageEmbedder(name).model
    if not hasattr(encoder, "timm_model"):
        raise ValueError(
            f"{type(encoder).__name__} is no timm model: take an encoder of this package or of timm on the Hub."
        )
    return PerceptualDistance(*_arguments(encoder.timm_model, input_settings(encoder)))


def _arguments(model: nn.Module, settings: dict) -> tuple[nn.Module, list[float], list[float], int | None]:
    """What `PerceptualDistance` takes, for a timm model whose input is as its settings say."""
    size = None
    if settings.get("fixed_input_size"):
        sides = getattr(getattr(model, "patch_embed", None), "img_size", None) or settings["input_size"][1:]
        size = int(sides[-1])
    return model, list(settings["mean"]), list(settings["std"]), size
