"""The modulations of a DiT for many denoising steps at once, and a forward pass that uses them.

diffusers' DiT runs a timestep embedder, a label embedder and a linear layer of width 6D in every block and step, for
one or two rows: it reads 7 D^2 weights for almost no arithmetic. They depend on (timestep, label) only, so that all
steps of a run fit into one product per block. The result equals the model's own forward pass up to rounding.

Source: Peebles and Xie 2023, section 3.2 (adaLN-Zero).
"""

from __future__ import annotations

from contextvars import ContextVar

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn

MEMORY_LIMIT = 128 * 2**20  # bytes of one table; more steps are computed in several rounds


_blending: ContextVar[Predictor | None] = ContextVar("_blending", default=None)  # whose model call this thread is in


def can_be_split(transformer: nn.Module) -> bool:
    """Whether calling the parts of the model is the same as calling it: no compilation, no hooks, no subclass."""
    compiled = getattr(transformer, "_compiled_call_impl", None) is not None
    return type(transformer) is DiTTransformer2DModel and not compiled and not _is_hooked(transformer)


def _is_hooked(transformer: nn.Module) -> bool:
    of_all = torch.nn.modules.module
    if any(getattr(of_all, f"_global_{name}_hooks") for name in ("forward", "forward_pre", "backward", "backward_pre")):
        return True
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in transformer.modules())
    return hooked or any("forward" in vars(module) for module in transformer.modules())  # as offloading replaces it


class Modulations:
    """Shifts, scales and gates of all blocks for the steps of a run.

    Args:
        transformer: in evaluation mode.
        timesteps: (S,) of all model calls to come.
        labels: (B,) int64, class of each row of the batch; the last row of the label table is no class.
        blend: labels (B,) and weights (B,) in [0, 1]: a row's label embedding is (1 - weight) * its own + weight * the
            other's. None: its own.
        memory_limit: bytes of modulations that are held at once.
    """

    def __init__(
        self,
        transformer: DiTTransformer2DModel,
        timesteps: Tensor,
        labels: Tensor,
        blend: tuple[Tensor, Tensor] | None = None,
        memory_limit: int = MEMORY_LIMIT,
    ):
        self.transformer = transformer
        self.timesteps = timesteps
        others, weights = blend or (labels, torch.zeros(len(labels), device=labels.device))
        rows = torch.stack([labels.double(), others.double(), weights.double()], dim=1).cpu()
        unique, index = torch.unique(rows, dim=0, return_inverse=True)  # (U, 3), (B,)
        self.rows = unique.to(labels.device, torch.float32)
        self.index = index.to(labels.device)
        bytes_of_step = len(unique) * (6 * len(transformer.transformer_blocks) + 2) * transformer.inner_dim * 4
        self.steps_at_once = max(1, memory_limit // bytes_of_step)
        self.first = 0
        self.table = []

    def at(self, step: int, rows: slice = slice(None)) -> list[Tensor]:
        """Per block (B, 6, 1, D), then of the output (B, 2, 1, D); B is 1 where all rows agree.

        The scales have 1 added: shift, scale and gate of attention, then of the feed-forward layers.
        """
        if not self.table or not self.first <= step < self.first + len(self.table[0]):
            self._fill(step)
        index = self.index[rows]
        if len(self.rows) == 1:
            index = index[:1]
        return [entry[step - self.first][index].unsqueeze(2) for entry in self.table]

    def _fill(self, step: int) -> None:
        timesteps = self.timesteps[step : step + self.steps_at_once]
        self.first = step
        self.table = []
        blocks = self.transformer.transformer_blocks
        for block in blocks:
            modulation = block.norm1.linear(F.silu(self._conditioning(block.norm1.emb, timesteps)))  # (S, U, 6D)
            modulation = modulation.unflatten(-1, (6, -1))
            modulation[:, :, 1::3] += 1  # both scales; a list of their places would be copied to the device
            self.table.append(modulation)
        modulation = self.transformer.proj_out_1(F.silu(self._conditioning(blocks[0].norm1.emb, timesteps)))
        modulation = modulation.unflatten(-1, (2, -1))
        modulation[:, :, 1] += 1
        self.table.append(modulation)  # (S, U, 2, D)

    def _conditioning(self, embedder: nn.Module, timesteps: Tensor) -> Tensor:
        """(S, U, D): the sum of the embeddings of timestep and label."""
        time = embedder.timestep_embedder(embedder.time_proj(timesteps).to(self.transformer.dtype))  # (S, D)
        table = embedder.class_embedder.embedding_table
        label = table(self.rows[:, 0].long())  # (U, D)
        other = table(self.rows[:, 1].long())
        label = torch.lerp(label, other, self.rows[:, 2:].to(label.dtype))
        return time[:, None] + label


def forward_with_modulations(transformer: DiTTransformer2DModel, latents: Tensor, modulations: list[Tensor]) -> Tensor:
    """The prediction (B, out_channels, h, w) of latents (B, C, h, w), with `Modulations.at` of its step."""
    hidden = transformer.pos_embed(latents)  # (B, T, D)
    *of_blocks, of_output = modulations
    for block, modulation in zip(transformer.transformer_blocks, of_blocks, strict=True):
        shift, scale, gate, shift_2, scale_2, gate_2 = modulation.unbind(1)  # (B, 1, D)
        attention = block.attn1(torch.addcmul(shift, block.norm1.norm(hidden), scale))
        hidden = torch.addcmul(hidden, gate, attention)
        hidden = torch.addcmul(hidden, gate_2, block.ff(torch.addcmul(shift_2, block.norm3(hidden), scale_2)))
    shift, scale = of_output.unbind(1)
    patches = transformer.proj_out_2(torch.addcmul(shift, transformer.norm_out(hidden), scale))
    side = transformer.config.sample_size // transformer.patch_size
    patch = transformer.patch_size
    patches = patches.unflatten(1, (side, side)).unflatten(-1, (patch, patch, transformer.out_channels))
    return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, c, h, p, w, q) -> (B, c, hp, wq)


class Predictor:
    """A transformer's predictions along a run, with and without class.

    Args:
        transformer: a DiTTransformer2DModel, compiled or offloaded or as it is.
        timesteps: (S,) of the steps.
        labels, others, weights: (B,) each, see `Modulations`; weights None: no blending.
        null_class: label of no class, or None when no step is guided.
        precompute: compute the modulations of all steps first, where the model can be split.

    A blend is computed from the model's parts too, uncompiled; a model with hooks (offloading, caches) or a subclass is
    called as a whole, with the other class's share added where it embeds labels.
    """

    def __init__(
        self,
        transformer: nn.Module,
        timesteps: Tensor,
        labels: Tensor,
        blend: tuple[Tensor, Tensor] | None,
        null_class: int | None,
        precompute: bool,
    ):
        self.transformer = transformer
        self.timesteps = timesteps
        self.count = len(labels)
        if null_class is not None:
            null = torch.full_like(labels, null_class)
            labels = torch.cat([labels, null])
            blend = blend and (torch.cat([blend[0], null]), torch.cat([blend[1], torch.zeros_like(blend[1])]))
        self.labels = labels
        self.modulations = None
        self.blend = blend
        if blend is not None:
            self.transformer = getattr(transformer, "_orig_mod", transformer)  # a compiled model's own
            split = type(self.transformer) is DiTTransformer2DModel and not _is_hooked(self.transformer)
        else:
            split = precompute and can_be_split(transformer)
        if split:
            self.modulations = Modulations(self.transformer, timesteps, labels, blend)

    def __call__(self, latents: Tensor, step: int, guided: bool) -> tuple[Tensor, Tensor | None]:
        """Predictions (B, c, h, w) for latents (B, C, h, w), and those without class if `guided`."""
        rows = slice(None) if guided else slice(self.count)
        inputs = (torch.cat([latents, latents]) if guided else latents).to(self.transformer.dtype)
        if self.modulations is not None:
            found = forward_with_modulations(self.transformer, inputs, self.modulations.at(step, rows))
        else:
            timesteps = self.timesteps[step].expand(len(inputs))
            options = {"timestep": timesteps, "class_labels": self.labels[rows]}
            found = (self.transformer if self.blend is None else self._call_blended)(inputs, **options).sample
        found = found.to(latents.dtype)
        return tuple(found.chunk(2)) if guided else (found, None)

    def _call_blended(self, inputs: Tensor, **options):
        """The model's own call, hooks and all, in which label embeddings are blended; other threads' calls are not."""

        def blend(module: LabelEmbedding, args: tuple, embeddings: Tensor) -> Tensor | None:
            if _blending.get() is not self:
                return None
            others, weights = (part[: len(embeddings)] for part in self.blend)
            return torch.lerp(embeddings, module.embedding_table(others), weights[:, None].to(embeddings.dtype))

        embedders = [module for module in self.transformer.modules() if isinstance(module, LabelEmbedding)]
        handles = [embedder.register_forward_hook(blend) for embedder in embedders]
        token = _blending.set(self)
        try:
            return self.transformer._call_impl(inputs, **options)  # uncompiled, which would not see the new hooks
        finally:
            _blending.reset(token)
            for handle in handles:
                handle.remove()
