"""PatchGAN discriminator: one logit per patch of an image (Isola et al. 2017; Esser et al. 2021).

Differs from pix2pix: the convolutions that do not halve are 3 x 3 and keep the sides (4 x 4 there, each a pixel less),
so that images of 16 px leave some patches; group norm in place of batch norm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .choices import DISCRIMINATOR_NORMS
from .complete_weights import draw_after_meta_, load_complete


class PatchDiscriminatorConfig(PretrainedConfig):
    """Architecture of a `PatchDiscriminator`.

    Args:
        num_channels: image channels.
        width: channels of the first layer; doubled by each of the next three.
        num_layers: halvings of the sides (3 for 256 px in pix2pix). None: as many as leave 4 cells, at most 3.
        image_size: for `num_layers` None.
        norm: after every inner convolution: "group" (does not depend on the batch or on the number of processes),
            "batch" (as pix2pix) or "none".
        spectral_norm: spectral normalisation of every convolution (Miyato et al. 2018).
    """

    model_type = "dpssl_patch_discriminator"

    def __init__(
        self,
        num_channels: int = 3,
        width: int = 64,
        num_layers: int | None = None,
        image_size: int = 64,
        norm: str = "group",
        spectral_norm: bool = False,
        **kwargs,
    ):
        if norm not in DISCRIMINATOR_NORMS:
            raise ValueError(f"norm must be one of {DISCRIMINATOR_NORMS}, got {norm!r}.")
        self.num_channels = num_channels
        self.width = width
        self.image_size = image_size
        automatic = max(1, min(3, int(math.log2(max(2, image_size))) - 2))
        self.num_layers = automatic if num_layers is None else num_layers
        self.norm = norm
        self.spectral_norm = spectral_norm
        if min(num_channels, width, self.num_layers) < 1 or width % 4:
            raise ValueError(
                "num_channels and num_layers must be at least 1, width a multiple of 4; "
                f"got {num_channels}, {self.num_layers}, {width}."
            )
        super().__init__(**kwargs)


@dataclass
class PatchDiscriminatorOutput(ModelOutput):
    """logits: (B, 1, h, w), high for real; hidden: (B, D, h, w), the features of which the last layer takes them."""

    logits: Tensor | None = None
    hidden: Tensor | None = None


class PatchDiscriminator(PreTrainedModel):
    """Images (B, C, H, W) in [-1, 1] -> logits (B, 1, h, w), high for real; sides of at least 2^(num_layers + 1).

    Attentions and hidden states are not given out, and checkpoints that lack weights are refused.
    """

    config_class = PatchDiscriminatorConfig
    base_model_prefix = "patch_discriminator"
    main_input_name = "pixel_values"

    def __init__(self, config: PatchDiscriminatorConfig):
        super().__init__(config)
        layers: list[nn.Module] = []
        channels = config.num_channels
        for level in range(config.num_layers + 1):
            width = config.width * 2 ** min(level, 3)
            stride = 2 if level < config.num_layers else 1
            normalized = level > 0 and config.norm != "none"
            conv = nn.Conv2d(channels, width, 4 if stride == 2 else 3, stride, 1, bias=not normalized)
            layers.append(self._spectral(conv))
            if normalized:
                layers.append(nn.GroupNorm(4, width) if config.norm == "group" else nn.BatchNorm2d(width))
            layers.append(nn.LeakyReLU(0.2))
            channels = width
        layers.append(self._spectral(nn.Conv2d(channels, 1, 3, 1, 1)))
        self.layers = nn.Sequential(*layers)
        self.post_init()

    def _spectral(self, conv: nn.Conv2d) -> nn.Module:
        nn.init.normal_(conv.weight, 0.0, 0.02)  # of DCGAN and pix2pix
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
        return nn.utils.parametrizations.spectral_norm(conv) if self.config.spectral_norm else conv

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the constructor has drawn the weights."""

    def get_input_embeddings(self) -> None:
        """None: images have no embeddings. By this quantisers and adapters know that there is nothing to leave out."""

    def init_weights(self) -> None:
        """As `PreTrainedModel.init_weights`; a model built on the meta device gets what the constructor draws."""
        draw_after_meta_(self)
        super().init_weights()

    @classmethod
    def from_pretrained(cls, *args, **kwargs) -> PatchDiscriminator:
        """As `PreTrainedModel.from_pretrained`; ValueError when the checkpoint lacks weights of the model."""
        return load_complete(super().from_pretrained, *args, **kwargs)

    @can_return_tuple
    def forward(self, pixel_values: Tensor) -> PatchDiscriminatorOutput:
        """Logits and features; ValueError for images of other channels or too small for a patch.

        return_dict=False gives a tuple.
        """
        smallest = 2 ** (self.config.num_layers + 1)
        shape = tuple(pixel_values.shape)
        if len(shape) != 4 or shape[1] != self.config.num_channels or min(shape[2:]) < smallest:
            raise ValueError(
                f"images must be (B, {self.config.num_channels}, H, W) with sides of at least {smallest}, got {shape}: "
                "use fewer layers (num_layers) for small images."
            )
        hidden = self.layers[:-1](pixel_values)
        logits = self.layers[-1](hidden)
        return PatchDiscriminatorOutput(logits, hidden)


if __name__.startswith("hf_dpssl."):  # not in the copy beside published weights
    from .registration import register

    register(PatchDiscriminatorConfig, PatchDiscriminator)
