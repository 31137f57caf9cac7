"""Adversarial losses on logits, gradient penalty and the adaptive weight of VQGAN.

Source: Goodfellow et al. 2014 (non-saturating), Lim and Ye 2017 (hinge), Mescheder et al. 2018 (R1), Esser et al. 2021
(adaptive weight, equation 7). Logits may have any shape; every loss is a mean over them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..models.gather import is_distributed


def hinge_discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """(mean max(0, 1 - real) + mean max(0, 1 + fake)) / 2."""
    return (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()) / 2


def hinge_generator(fake_logits: Tensor) -> Tensor:
    """-mean fake; not bounded from below."""
    return -fake_logits.mean()


def non_saturating_discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """(mean softplus(-real) + mean softplus(fake)) / 2: cross-entropy of real against fake; log 2 for logits of 0."""
    return (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()) / 2


def non_saturating_generator(fake_logits: Tensor) -> Tensor:
    """mean softplus(-fake): -log of the probability that the discriminator takes fakes for real."""
    return F.softplus(-fake_logits).mean()


# name: losses of discriminator (real, fake) and generator (fake).
ADVERSARIAL_LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "hinge": (hinge_discriminator, hinge_generator),
    "non_saturating": (non_saturating_discriminator, non_saturating_generator),
}


def r1_penalty(discriminator: Callable[[Tensor], Tensor], real: Tensor) -> Tensor:
    """Half the mean squared gradient norm of the discriminator's output at real images: 1/2 E |d D(x) / d x|^2.

    Args:
        discriminator: images (B, ...) -> logits (B, ...); an image's logits are averaged to one output.
        real: (B, C, H, W).

    Returns:
        A scalar with a gradient for the discriminator's weights.
    """
    real = real.detach().requires_grad_(True)
    return r1_penalty_of_logits(discriminator(real), real)


def r1_penalty_of_logits(logits: Tensor, real: Tensor) -> Tensor:
    """`r1_penalty` from logits (B, ...) that the discriminator has given already for `real`, which requires a gradient.

    Raises:
        ValueError: images without a gradient.
    """
    if not real.requires_grad:
        raise ValueError("the images of the R1 penalty must require a gradient before they pass the discriminator.")
    (gradient,) = torch.autograd.grad(logits.flatten(1).mean(1).sum(), real, create_graph=True)
    return gradient.flatten(1).pow(2).sum(1).mean() / 2


def adaptive_weight(
    reconstruction_loss: Tensor, adversarial_loss: Tensor, last_layer: Tensor, *, cap: float = 1e4
) -> Tensor:
    """|grad of the reconstruction loss| / (|grad of the adversarial loss| + 1e-6) at the last layer's weight.

    Gradients are averaged over processes first, so that several weigh as one with all their images would.

    Args:
        reconstruction_loss, adversarial_loss: scalars whose graphs hold `last_layer`; the graphs are kept.
        last_layer: the decoder's last weight.
        cap: largest value, > 0.

    Returns:
        A scalar in [0, cap] without gradient.

    Raises:
        ValueError: cap <= 0.
    """
    if cap <= 0:
        raise ValueError(f"cap must be positive, got {cap}.")
    ours = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)[0]
    theirs = torch.autograd.grad(adversarial_loss, last_layer, retain_graph=True)[0]
    if is_distributed():
        both = torch.stack([ours, theirs])
        dist.all_reduce(both)
        ours, theirs = both / dist.get_world_size()
    return (ours.norm() / (theirs.norm() + 1e-6)).clamp(0, cap).detach()
