"""A DiT of mean flow is shown how far its step goes: in one input channel more than latents have, everywhere t - r.

diffusers' DiT takes one timestep, t. The mean velocity between r and t (Geng et al. 2025) needs both; with the interval
in a channel of its own the network stays the library's, and at interval 0 it predicts the velocity itself. Its timestep
is t in [0, 1], not 1000 t: training differentiates by it, and a thousandfold slope would drown the rest (as Lu and Song
2024 found for consistency models, section 4.1).
"""

from __future__ import annotations

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor


def takes_interval(transformer: DiTTransformer2DModel) -> bool:
    """Whether a transformer is one of mean flow: it takes one channel more than it gives."""
    return transformer.config.get("out_channels") == transformer.config.in_channels - 1


def latent_channels(transformer: DiTTransformer2DModel) -> int:
    """C of the latents that it denoises."""
    return transformer.config.in_channels - takes_interval(transformer)


def with_interval(latents: Tensor, interval: Tensor | float) -> Tensor:
    """(B, C + 1, h, w) of latents (B, C, h, w) and intervals (B,) in [0, 1], or one for all."""
    interval = torch.as_tensor(interval, dtype=latents.dtype, device=latents.device)
    plane = interval.view(-1, 1, 1, 1).expand(len(latents), 1, *latents.shape[2:])
    return torch.cat([latents, plane], dim=1)
