"""How a latent DiT is trained: the transformer with the paper's initialisation, then, for each objective, its
scheduler, what a batch becomes (noise, timesteps, target, class dropout) and the loss of a prediction.

Source: Peebles and Xie 2023 (DiT, adaLN-Zero); Ho et al. 2020 (epsilon, L_simple); Nichol and Dhariwal 2021 (learned
variance, L_hybrid); Salimans and Ho 2022 (v); Liu et al. 2022 (rectified flow); Esser et al. 2024 (logit-normal
timesteps); Hang et al. 2023 (min-SNR).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
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
from ..generation.choices import OBJECTIVES
from ..generation.pipeline_vq_dit import switch_off_label_dropout_

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
    mean_flow: bool = False,
) -> DiTTransformer2DModel:
    """diffusers' DiT, initialised as in the paper (its output is exactly 0), labels dropped by the trainer only.

    Args:
        num_layers, width, num_heads, patch_size: size of the transformer.
        latent_channels, latent_size: of the autoencoder's latents.
        num_classes: 0 for unlabelled data. The null class is the last row of the label table.
        learned_variance: predict v beside the noise, with twice as many output channels.
        mean_flow: take the interval of a step in one input channel more (`generation.interval_channel`).

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
        in_channels=latent_channels + mean_flow,
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
    if objective in ("flow", "mean_flow"):
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


def objective_loss(
    prediction: Tensor,
    target: Tensor,
    timesteps: Tensor,
    *,
    objective: str,
    scheduler: SchedulerMixin,
    min_snr_gamma: float | None = None,
) -> dict[str, Tensor]:
    """Loss of a batch, and its parts.

    Without learned variance L_simple = mean of w(t) (prediction - target)^2. With twice as many channels in
    `prediction` as in `target`, the second half is v, and loss = L_simple + L_vlb (L_hybrid at 1000 steps: Nichol and
    Dhariwal's 0.001 times a sum over 1000 terms).

    Args:
        prediction: (B, C, h, w), or (B, 2 C, h, w) with learned variance.
        target, timesteps: as `training_example` gives them: (B, C, h, w), (B,) in [0, 1000).
        objective: "flow", "epsilon" or "v_prediction".
        scheduler: from `make_scheduler`.
        min_snr_gamma: weight each image as `min_snr_weights` says; None: all alike.

    Returns:
        {"loss": scalar} and, with learned variance, "simple" and "vlb" (bits per dimension), whose sum it is.

    Raises:
        ValueError: a prediction that fits neither, or learned variance of another objective than epsilon.
    """
    prediction = prediction.float()
    channels = target.shape[1]
    learned = prediction.shape[1] == 2 * channels
    if prediction.shape[1] != channels and not learned:
        raise ValueError(
            f"{prediction.shape[1]} channels predict neither the {channels} of the latents nor twice these."
        )
    if learned and objective != "epsilon":
        raise ValueError(f"a learned variance belongs to the objective 'epsilon', got {objective!r}.")
    mean = prediction[:, :channels]
    if min_snr_gamma is None:
        simple = F.mse_loss(mean, target)
    else:
        weights = min_snr_weights(timesteps, objective=objective, scheduler=scheduler, gamma=min_snr_gamma)
        simple = (weights * (mean - target).pow(2).flatten(1).mean(1)).mean()
    if not learned:
        return {"loss": simple}
    vlb = variational_bound(mean.detach(), prediction[:, channels:], target, timesteps.long(), scheduler).mean()
    return {"loss": simple + vlb, "simple": simple, "vlb": vlb}


def min_snr_weights(timesteps: Tensor, *, objective: str, scheduler: SchedulerMixin, gamma: float) -> Tensor:
    """Weights (B,) that turn squared errors of the prediction into min(SNR, gamma) times those of the clean latents.

    With SNR = signal^2 / noise^2 of the noised latents: min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for v, and for a
    flow, whose clean latents are x_t - t u, min(SNR, gamma) t^2 = min((1 - t)^2, gamma t^2).

    Args:
        timesteps: (B,) in [0, 1000); of a flow 1000 t.
        objective, scheduler: as of `objective_loss`.
        gamma: largest weight of an error of the clean latents, positive; 5 in the paper.

    Raises:
        ValueError: gamma that is not positive.

    Source: Hang et al. 2023, section 3.4.
    """
    if not gamma > 0:
        raise ValueError(f"gamma of min-SNR must be positive (5 in the paper), got {gamma}.")
    if objective == "flow":
        sigma = timesteps / scheduler.config.num_train_timesteps
        return torch.minimum((1 - sigma).square(), gamma * sigma.square())
    alphas = scheduler.alphas_cumprod.to(timesteps.device)[timesteps.long()]
    snr = alphas / (1 - alphas)
    return snr.clamp(max=gamma) / (snr if objective == "epsilon" else snr + 1)


def log_variance_range(scheduler: SchedulerMixin) -> tuple[Tensor, Tensor]:
    """Logarithms (1000,), float64, between which a learned variance lies: of the true posterior, and of beta.

    At step 0, where the posterior has no variance, that of step 1 stands for it, as in the paper's code.
    """
    betas = scheduler.betas.double()
    kept = (1 - betas).cumprod(0)
    before = torch.cat([kept.new_ones(1), kept[:-1]])
    posterior = betas * (1 - before) / (1 - kept)
    posterior[0] = posterior[1]
    return posterior.log(), betas.log()


def variational_bound(
    predicted_noise: Tensor, variance: Tensor, noise: Tensor, timesteps: Tensor, scheduler: SchedulerMixin
) -> Tensor:
    """One term of the variational bound per image, in bits per dimension: (B,).

    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) of two normal distributions for t > 0, and -log p(x_0 | x_1), a
    density, for t = 0. (The paper's code takes a probability of pixels of 8 bits there, which latents do not have.) The
    variance is exp(s log beta + (1 - s) log posterior) with s = (v + 1) / 2. The means differ by
    beta / (sqrt(alpha) sqrt(1 - alpha_bar)) times the error of the noise.

    Args:
        predicted_noise: (B, C, h, w), detached, so that the bound teaches the variance alone.
        variance: v (B, C, h, w), meant for [-1, 1].
        noise: (B, C, h, w) that was drawn.
        timesteps: (B,) int64 in [0, 1000).
        scheduler: with `betas`.

    Source: Nichol and Dhariwal 2021, section 3.1; Ho et al. 2020, equations 6 and 7.
    """
    low, high = log_variance_range(scheduler)
    betas = scheduler.betas.double()
    factor = betas / ((1 - betas) * (1 - (1 - betas).cumprod(0))).sqrt()
    tables = torch.stack([low, high, factor]).to(noise.device, noise.dtype, non_blocking=True)
    low, high, factor = tables[:, timesteps].view(3, -1, 1, 1, 1)
    share = (variance + 1) / 2
    predicted = share * high + (1 - share) * low
    error = (factor * (predicted_noise - noise)).square()
    divergence = 0.5 * (predicted - low - 1 + (low - predicted).exp() + error * (-predicted).exp())
    likelihood = 0.5 * (math.log(2 * math.pi) + predicted + error * (-predicted).exp())
    terms = torch.where((timesteps == 0).view(-1, 1, 1, 1), likelihood, divergence)
    return terms.flatten(1).mean(1) / math.log(2)
