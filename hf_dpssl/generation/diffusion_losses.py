"""Losses of a diffusion model: squared error, min-SNR weights, and the bound that teaches a learned variance.

Source: Ho et al. 2020 (L_simple); Nichol and Dhariwal 2021 (learned variance, L_hybrid); Hang et al. 2023 (min-SNR).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin
from torch import Tensor


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
        target, timesteps: as `diffusion.training_example` gives them: (B, C, h, w), (B,) in [0, 1000).
        objective: "flow", "epsilon" or "v_prediction".
        scheduler: from `diffusion.make_scheduler`.
        min_snr_gamma: weight each image as `min_snr_weights` says; None: all alike.

    Returns:
        {"loss": scalar} and, with learned variance, "simple" and "vlb" (bits per dimension), whose sum it is.

    Raises:
        ValueError: a prediction that fits neither, or learned variance of another objective than epsilon.
    """
    prediction, channels = prediction.float(), target.shape[1]
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
    low, high, factor = (
        values.to(noise.device, noise.dtype)[timesteps].view(-1, 1, 1, 1) for values in (low, high, factor)
    )
    share = (variance + 1) / 2
    predicted = share * high + (1 - share) * low
    error = (factor * (predicted_noise - noise)).square()
    divergence = 0.5 * (predicted - low - 1 + (low - predicted).exp() + error * (-predicted).exp())
    likelihood = 0.5 * (math.log(2 * math.pi) + predicted + error * (-predicted).exp())
    terms = torch.where((timesteps == 0).view(-1, 1, 1, 1), likelihood, divergence)
    return terms.flatten(1).mean(1) / math.log(2)
