"""What a latent DiT is trained on: the transformer with the paper's initialisation, objectives, class dropout.

Source: Peebles and Xie 2023 (DiT, adaLN-Zero); Ho et al. 2020 (epsilon); Nichol and Dhariwal 2021 (learned variance);
Salimans and Ho 2022 (v); Liu et al. 2022 (rectified flow); Esser et al. 2024 (logit-normal timesteps).
"""

from __future__ import annotations

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
)
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn

from ..data import keyed_random
from .choices import OBJECTIVES
from .pipeline_vq_dit import switch_off_label_dropout_

NUM_TRAIN_TIMESTEPS = 1000


def make_transformer(
    *,
    num_layers: int,
    width: int,
    num_heads: int,
    patch_size: int,
    latent_channels: int,
    latent_size: int,
    num_classes: int,
    learned_variance: bool = False,
) -> DiTTransformer2DModel:
    """diffusers' DiT, initialised as in the paper (its output is exactly 0), labels dropped by the trainer only.

    Args:
        num_layers, width, num_heads, patch_size: size of the transformer.
        latent_channels, latent_size: of the autoencoder's latents.
        num_classes: 0 for unlabelled data. The null class is the last row of the label table.
        learned_variance: predict v beside the noise, with twice as many output channels.

    Raises:
        ValueError: a width that the heads, or a latent size that the patches, do not divide.
    """
    if width % num_heads:
        raise ValueError(f"width {width} must be a multiple of num_heads {num_heads}.")
    if latent_size % patch_size:
        raise ValueError(f"latents of side {latent_size} cannot be cut into patches of {patch_size}.")
    transformer = DiTTransformer2DModel(
        num_attention_heads=num_heads,
        attention_head_dim=width // num_heads,
        in_channels=latent_channels,
        out_channels=latent_channels * (2 if learned_variance else 1),
        num_layers=num_layers,
        sample_size=latent_size,
        patch_size=patch_size,
        num_embeds_ada_norm=max(1, num_classes),
    )
    initialize_as_in_paper_(transformer)
    switch_off_label_dropout_(transformer)
    return transformer


@torch.no_grad()
def initialize_as_in_paper_(transformer: DiTTransformer2DModel) -> None:
    """Xavier linear layers, small embedders, and zero adaLN and output layers (diffusers leaves these random)."""
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, LabelEmbedding):
            nn.init.normal_(module.embedding_table.weight, std=0.02)
    patches = transformer.pos_embed.proj
    nn.init.xavier_uniform_(patches.weight.flatten(1))
    nn.init.zeros_(patches.bias)
    for block in transformer.transformer_blocks:
        embedder = block.norm1.emb.timestep_embedder
        nn.init.normal_(embedder.linear_1.weight, std=0.02)
        nn.init.normal_(embedder.linear_2.weight, std=0.02)
        nn.init.zeros_(block.norm1.linear.weight)
    nn.init.zeros_(transformer.proj_out_1.weight)
    nn.init.zeros_(transformer.proj_out_2.weight)


def make_scheduler(objective: str, learned_variance: bool = False) -> SchedulerMixin:
    """The scheduler a pipeline starts with: Euler for flows, DDIM for epsilon and v, DDPM for a learned variance.

    Raises:
        ValueError: an unknown objective, or a learned variance of another one than epsilon.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {OBJECTIVES}, got {objective!r}.")
    if learned_variance and objective != "epsilon":
        raise ValueError(f"a learned variance belongs to the objective 'epsilon', got {objective!r}.")
    if objective == "flow":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=NUM_TRAIN_TIMESTEPS)
    options = dict(
        num_train_timesteps=NUM_TRAIN_TIMESTEPS,
        beta_schedule="linear",
        prediction_type=objective,
        clip_sample=False,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=False,
    )
    return DDPMScheduler(variance_type="learned_range", **options) if learned_variance else DDIMScheduler(**options)


def training_example(
    latents: Tensor,
    sample_ids: Tensor,
    epoch: int,
    *,
    seed: int,
    objective: str,
    scheduler: SchedulerMixin,
    logit_normal: tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Noised latents, timesteps and target of a batch, a function of (seed, epoch, sample).

    Args:
        latents: (B, C, h, w), normalised.
        sample_ids: (B,) int64.
        objective: "flow" (target noise - latents), "epsilon" (noise) or "v_prediction".
        scheduler: from `make_scheduler`.
        logit_normal: (mean, std) of a normal distribution whose sigmoid is a flow's noise level; None: uniform.

    Returns:
        noised (B, C, h, w), timesteps (B,) in [0, 1000), target (B, C, h, w).

    Raises:
        ValueError: logit-normal timesteps of another objective than flow.
    """
    noise = keyed_random.normal(sample_ids, tuple(latents.shape[1:]), seed=seed, stream="noise", epoch=epoch)
    if logit_normal is not None:
        if objective != "flow":
            raise ValueError(f"logit-normal timesteps are for the objective 'flow', got {objective!r}.")
        mean, std = logit_normal
        uniform = keyed_random.normal(sample_ids, (1,), seed=seed, stream="timestep", epoch=epoch)[:, 0]
        uniform = (mean + std * uniform).sigmoid()
    else:
        uniform = keyed_random.uniform(sample_ids, 1, seed=seed, stream="timestep", epoch=epoch)[:, 0]
    if objective == "flow":
        sigma = uniform.view(-1, 1, 1, 1)
        return (1 - sigma) * latents + sigma * noise, uniform * NUM_TRAIN_TIMESTEPS, noise - latents
    timesteps = (uniform * NUM_TRAIN_TIMESTEPS).long()
    noised = scheduler.add_noise(latents, noise, timesteps)
    target = noise if objective == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
    return noised, timesteps, target


def dropped_labels(
    labels: Tensor, sample_ids: Tensor, epoch: int, *, seed: int, probability: float, null_class: int
) -> Tensor:
    """Labels (B,) with a share replaced by the null class, once per image; -1 (unlabelled) always is."""
    drawn = keyed_random.uniform(sample_ids, 1, seed=seed, stream="class dropout", epoch=epoch)[:, 0]
    return torch.where((drawn < probability) | (labels < 0), null_class, labels)
