"""A one-step generator for small latents: residual layers over the whole latent, with the call of diffusers' DiT.

For 4 x 8 x 8 numbers a transformer spends its time on 16 tokens; a few dense layers learn as much in a fifth of it.
"""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import LabelEmbedding
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn


class _Block(nn.Module):
    """x + MLP(norm(x) * scale + shift), scale and shift by class."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.layers = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, hidden: Tensor, condition: Tensor) -> Tensor:
        """(N, width) of hidden and condition (N, width)."""
        shift, scale = self.modulation(condition).chunk(2, dim=-1)
        return hidden + self.layers(torch.addcmul(shift, self.norm(hidden), 1 + scale))


class LatentMLP(ModelMixin, ConfigMixin):
    """Dense residual layers from noise (N, C, h, w) and class to noise - sample, what a DiT of a flow predicts.

    At first samples have unit deviation and are driven by the noise, hardly by the class. Unlike a DiT's they are
    not the noise plus something: dense layers would have to learn to take it away.

    Args:
        in_channels, sample_size: of the latents.
        num_layers, width: residual blocks, and their width.
        num_embeds_ada_norm: classes; the table has one row more, for no class.
    """

    @register_to_config
    def __init__(self, in_channels: int, sample_size: int, num_layers: int, width: int, num_embeds_ada_norm: int):
        super().__init__()
        numbers = in_channels * sample_size**2
        self.proj_in = nn.Linear(numbers, width)
        self.class_embedder = LabelEmbedding(num_embeds_ada_norm, width, dropout_prob=0.1)  # above 0: with a null row
        self.class_embedder.dropout_prob = 0.0  # the trainer drops classes
        self.blocks = nn.ModuleList(_Block(width) for _ in range(num_layers))
        self.norm_out = nn.LayerNorm(width)
        self.proj_out = nn.Linear(width, numbers)
        nn.init.normal_(self.class_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.proj_out.weight, std=width**-0.5)
        nn.init.zeros_(self.proj_out.bias)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Noise - sample (N, C, h, w) of noise (N, C, h, w) and class_labels (N,); there is one timestep, unread."""
        hidden = self.proj_in(hidden_states.flatten(1))
        condition = self.class_embedder(class_labels)
        for block in self.blocks:
            hidden = block(hidden, condition)
        output = hidden_states - self.proj_out(self.norm_out(hidden)).view_as(hidden_states)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)
