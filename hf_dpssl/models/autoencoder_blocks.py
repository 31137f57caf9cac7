"""Encoder and decoder of the autoencoder from diffusers' blocks, and the ways to weaken a decoder.

Source: Esser et al. 2021 (the blocks); Hinton et al. 2012, Tompson et al. 2015 and Huang et al. 2016 (dropout of
elements, channels and residual branches); Yang et al. 2025, l-DeTok (noise and masks on the latents).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from .backbone_encoder import BackboneEncoder
from .configuration_vq import VQConfig


def build_encoder(config: VQConfig) -> nn.Module:
    """(B, num_channels, H, W) -> (B, encoder_out_channels, h, w)."""
    if config.backbone is not None:
        return BackboneEncoder(config.backbone, config.num_channels)
    levels = range(len(config.encoder_block_out_channels))
    kinds = ("AttnDownEncoderBlock2D" if i in config.attention_levels else "DownEncoderBlock2D" for i in levels)
    return Encoder(
        in_channels=config.num_channels,
        out_channels=config.encoder_out_channels,
        down_block_types=tuple(kinds),
        block_out_channels=tuple(config.encoder_block_out_channels),
        layers_per_block=config.encoder_layers_per_block,
        norm_num_groups=config.norm_num_groups,
        double_z=config.quantizer == "kl",
        mid_block_add_attention=config.mid_block_attention,
    )


def build_decoder(config: VQConfig) -> Decoder:
    """(B, encoder_out_channels, h, w) -> (B, num_channels, H, W), weakened as the config says."""
    levels = reversed(range(len(config.decoder_block_out_channels)))
    kinds = ("AttnUpDecoderBlock2D" if i in config.attention_levels else "UpDecoderBlock2D" for i in levels)
    decoder = Decoder(
        in_channels=config.encoder_out_channels,
        out_channels=config.num_channels,
        up_block_types=tuple(kinds),
        block_out_channels=tuple(config.decoder_block_out_channels),
        layers_per_block=config.decoder_layers_per_block,
        norm_num_groups=config.norm_num_groups,
        mid_block_add_attention=config.mid_block_attention,
    )
    weaken_(decoder, config.decoder_dropout, config.decoder_dropout_kind)
    return decoder


def weaken_(decoder: nn.Module, rate: float, kind: str = "element") -> None:
    """Put dropout into every residual block, or noise or a mask before the decoder's first layer.

    Dropout is of elements or channels before a block's second convolution, or of its branch. Training mode only; kept
    values are divided by 1 - rate, so that the expectation is that of eval mode.
    """
    if rate and kind in ("noise", "mask"):
        decoder.register_forward_pre_hook(WeakInput(rate, kind))
        return
    for block in decoder.modules():
        if isinstance(block, ResnetBlock2D) and rate:
            if kind == "depth":
                block.conv2.register_forward_hook(StochasticDepth(rate))
            else:
                block.dropout = nn.Dropout2d(rate) if kind == "channel" else nn.Dropout(rate)


class StochasticDepth:
    """Forward hook of a residual branch's last layer: drops its output for a random share of the images."""

    def __init__(self, rate: float):
        self.rate = rate

    def __call__(self, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        """`output` (B, ...) with whole images at 0 and the others divided by 1 - rate, in training mode."""
        if not module.training:
            return output
        kept = F.dropout(torch.ones(len(output), device=output.device, dtype=output.dtype), self.rate)
        return output * kept.view(-1, *[1] * (output.ndim - 1))


class WeakInput:
    """Forward hook before a decoder: of its input `rate` parts become noise, or `rate` of the positions are masked."""

    def __init__(self, rate: float, kind: str):
        self.rate = rate
        self.kind = kind

    def __call__(self, module: nn.Module, inputs: tuple) -> tuple:
        """In training mode, of input (B, C, h, w), divided by 1 - rate as dropout does:

        noise: (1 - rate) input + rate times normal noise of the spread of each image's input;
        mask: the input, with a random share of the positions at 0 in all channels.
        """
        if not module.training:
            return inputs
        latents, *others = inputs
        if self.kind == "mask":
            return latents * F.dropout(torch.ones_like(latents[:, :1]), self.rate), *others
        spread = latents.detach().std((1, 2, 3), keepdim=True)  # no gain from latents of a larger scale
        return latents + self.rate / (1 - self.rate) * spread * torch.randn_like(latents), *others
