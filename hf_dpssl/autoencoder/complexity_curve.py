"""How small a generator may be to turn a latent into the data: the distance D^G(P_z, P_x) as a curve over capacity.

    D^G(P_z, P_x) = inf over g in G of D(P_g(z), P_x)

For each width of G: train a small generator adversarially, freeze it, train FRESH critics of one fixed size and budget
on training data, and read their gap on held-out real data and fresh samples. The critic that trained the generator
would see nothing, and one that is read on its training data sees too much.

Direction: a gap is a lower bound of the Jensen-Shannon divergence of that one generator, while the trained
generator is an upper bound of the infimum: an estimate of D^G, neither bound. Only values of equal data, widths and
`Budget` compare, and no single width ranks two latents: show the curve.

Source: Hu et al. 2023 (DAE), definition of D^G; Goodfellow et al. 2014 (the gap as Jensen-Shannon divergence).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data.keyed_random import derive_seed
from .adversarial_losses import non_saturating_discriminator, non_saturating_generator, r1_penalty

_LAZY = 4  # steps from one gradient penalty to the next
Sampler = Callable[[int, torch.Generator], Tensor]


@dataclass(frozen=True)
class Budget:
    """What is the same for every latent and width.

    generator_steps, critic_steps: of the adversarial training, and of each fresh critic.
    batch_size, learning_rate, generator_learning_rate: of Adam; the rate falls to 0 linearly.
    critic_width: units or channels of all critics.
    r1: weight of the gradient penalty, which makes adversarial training converge.
    averaging: of the generator's weights over steps; the average is what is measured.
    samples: fresh samples that a gap is read on.
    """

    generator_steps: int = 1000
    critic_steps: int = 400
    batch_size: int = 256
    learning_rate: float = 2e-3
    generator_learning_rate: float = 4e-3
    critic_width: int = 64
    r1: float = 0.02
    averaging: float = 0.99
    samples: int = 8192


def rows_of(latents: Tensor) -> Sampler:
    """A sampler that draws rows of these latents (N, ...), with replacement: P_z is the set itself."""
    if not len(latents):
        raise ValueError("there are no latents to draw from.")

    def sample(count: int, generator: torch.Generator) -> Tensor:
        return latents[torch.randint(len(latents), (count,), generator=generator)].flatten(1).float()

    return sample


def generator_complexity(
    latents: Tensor | Sampler,
    train: Tensor,
    test: Tensor,
    *,
    widths: tuple[int, ...] = (4, 8, 16, 32),
    held_out_latents: Tensor | Sampler | None = None,
    critics: int = 3,
    seed: int = 0,
    budget: Budget | None = None,
) -> dict[str, float]:
    """D^G(P_z, P_x) against the capacity of G, in nats between 0 (equal) and log 2 (told apart without error).

    Args:
        latents: P_z: a tensor (N, ...) whose rows are drawn, or a function (count, generator) -> (count, d).
        train, test: P_x: (N, D) vectors, or (N, C, H, W) images with sides divisible by 4. Generators and critics
            learn from `train`; `test` is only read.
        widths: units (vectors) or channels (images) of the generators, any order.
        held_out_latents: what the fresh samples of the gap are made from. Needed for encoded latents: those of
            training images would reward a generator that has learned them by heart.
        critics: fresh critics of each generator.
        seed: decides everything; the same seed gives the same numbers on one machine.
        budget: the default is for small vectors, seconds per width.

    Returns:
        For each width w: complexity_w{w}, mean gap of the critics (slightly negative where they find nothing);
        complexity_sd_w{w}, over critics. complexity: mean over the widths, one figure for a table.

    Raises:
        ValueError: data of another form, no width or critic, or a sampler with another kind of output.
    """
    budget = budget or Budget()
    _check(train, test, widths, critics)
    drawn = latents if callable(latents) else rows_of(latents)
    fresh = drawn if held_out_latents is None else held_out_latents
    fresh = fresh if callable(fresh) else rows_of(fresh)
    found = {}
    means = []
    for width in widths:
        generator = train_generator(drawn, train, width, seed=seed, budget=budget)
        gaps = generator_gaps(generator, drawn, fresh, train, test, critics=critics, seed=seed, budget=budget)
        means.append(float(gaps.mean()))
        found |= {f"complexity_w{width}": means[-1], f"complexity_sd_w{width}": float(gaps.std(correction=0))}
    return {"complexity": sum(means) / len(means)} | found


def train_generator(
    latents: Sampler, data: Tensor, width: int, *, seed: int = 0, budget: Budget | None = None
) -> nn.Module:
    """A generator of this width, trained adversarially (non-saturating, R1): latents (B, d) -> data (B, ...).

    Arguments as `generator_complexity`. In eval mode and without gradients; output is in the units of the data.
    """
    budget = budget or Budget()
    random = torch.Generator().manual_seed(derive_seed(seed, "generator", width))
    z = latents(2, random)
    if z.ndim != 2 or len(z) != 2 or not z.is_floating_point():
        raise ValueError(f"a sampler must return floating point (count, d) latents, got {z.dtype} {tuple(z.shape)}.")
    centre, scale = _units(data)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "weights", width))
        generator = _generator(z.shape[1], data.shape[1:], width)
        critic = _critic(data.shape[1:], budget.critic_width)
    average = copy.deepcopy(generator).requires_grad_(False)
    options = {"betas": (0.0, 0.99), "fused": True}
    optimizer_g = torch.optim.Adam(generator.parameters(), budget.generator_learning_rate, **options)
    optimizer_d = torch.optim.Adam(critic.parameters(), budget.learning_rate, **options)
    for step in range(budget.generator_steps):
        for optimizer, rate in ((optimizer_g, budget.generator_learning_rate), (optimizer_d, budget.learning_rate)):
            optimizer.param_groups[0]["lr"] = rate * (1 - step / budget.generator_steps)
        real = (_rows(data, budget.batch_size, random) - centre) / scale
        fake = generator(latents(budget.batch_size, random))
        loss = non_saturating_discriminator(critic(real), critic(fake.detach()))
        if step % _LAZY == 0:
            loss = loss + _LAZY * budget.r1 * r1_penalty(critic, real)
        _descend(optimizer_d, loss)
        _descend(optimizer_g, non_saturating_generator(critic(fake)))
        keep = min(budget.averaging, step / (step + 10))
        torch._foreach_lerp_(list(average.parameters()), [p.detach() for p in generator.parameters()], 1 - keep)
    return nn.Sequential(average, _Affine(centre, scale)).eval().requires_grad_(False)


def generator_gaps(
    generator: nn.Module,
    latents: Sampler,
    held_out_latents: Sampler,
    train: Tensor,
    test: Tensor,
    *,
    critics: int = 3,
    seed: int = 0,
    budget: Budget | None = None,
) -> Tensor:
    """(critics,) gaps of fresh critics of a frozen generator; arguments as `generator_complexity`."""

    def samples(source: Sampler) -> Sampler:
        return lambda count, random: _generate(generator, source, count, random)

    given = dict(held_out=samples(held_out_latents), budget=budget)
    seeds = [derive_seed(seed, "critic", number) for number in range(critics)]
    return torch.tensor([critic_gap(samples(latents), train, test, seed=s, **given) for s in seeds])


def critic_gap(
    generate: Sampler,
    train: Tensor,
    test: Tensor,
    *,
    held_out: Sampler | None = None,
    seed: int = 0,
    budget: Budget | None = None,
) -> float:
    """What one fresh critic tells apart: a LOWER bound, up to sampling, of the Jensen-Shannon divergence, in nats.

    log 2 - (mean softplus(-c(x)) + mean softplus(c(g(z)))) / 2 over test data x and fresh samples g(z)

    Args:
        generate: (count, generator) -> samples (count, ...) in the units of the data; the critic learns from them.
        train, test: real data that the critic learns from, and is read on.
        held_out: the samples that it is read on; `generate` when None.
        seed, budget: as in `generator_complexity`.
    """
    budget = budget or Budget()
    random = torch.Generator().manual_seed(derive_seed(seed, "gap"))
    centre, scale = _units(train)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "critic weights"))
        critic = _critic(train.shape[1:], budget.critic_width)
    optimizer = torch.optim.Adam(critic.parameters(), budget.learning_rate, betas=(0.5, 0.99), fused=True)
    for step in range(budget.critic_steps):
        optimizer.param_groups[0]["lr"] = budget.learning_rate * (1 - step / budget.critic_steps)
        real = _rows(train, budget.batch_size, random)
        fake = generate(budget.batch_size, random)
        _descend(
            optimizer, non_saturating_discriminator(critic((real - centre) / scale), critic((fake - centre) / scale))
        )
    with torch.no_grad():
        fake = (held_out or generate)(budget.samples, random)
        logits = [torch.cat([critic((b - centre) / scale) for b in part.split(1024)]) for part in (test, fake)]
        return math.log(2) - float(non_saturating_discriminator(*logits))


class _Affine(nn.Module):
    """x * scale + centre."""

    def __init__(self, centre: Tensor, scale: Tensor):
        super().__init__()
        self.register_buffer("centre", centre)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.centre


def _generator(latent_dim: int, shape: torch.Size, width: int) -> nn.Module:
    """Three layers for vectors; for images one linear and two convolutions at rising resolution."""
    if len(shape) == 1:
        hidden = (nn.Linear(latent_dim, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2))
        return nn.Sequential(*hidden, nn.Linear(width, shape[0]))
    channels, height, side = shape
    start = (2 * width, height // 4, side // 4)
    return nn.Sequential(
        nn.Linear(latent_dim, math.prod(start)), nn.Unflatten(1, start), nn.LeakyReLU(0.2),
        nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2),
        nn.ConvTranspose2d(width, channels, 4, stride=2, padding=1),
    )  # fmt: skip


def _critic(shape: torch.Size, width: int) -> nn.Module:
    """(B, ...) -> (B, 1) logits."""
    if len(shape) == 1:
        hidden = (nn.Linear(shape[0], width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2))
        return nn.Sequential(*hidden, nn.Linear(width, 1))
    return nn.Sequential(
        nn.Conv2d(shape[0], width, 4, stride=2, padding=1), nn.LeakyReLU(0.2),
        nn.Conv2d(width, 2 * width, 4, stride=2, padding=1), nn.LeakyReLU(0.2),
        nn.Flatten(), nn.Linear(2 * width * (shape[1] // 4) * (shape[2] // 4), 1),
    )  # fmt: skip


def _check(train: Tensor, test: Tensor, widths: tuple[int, ...], critics: int) -> None:
    if train.ndim not in (2, 4) or train.shape[1:] != test.shape[1:] or not len(train) or not len(test):
        raise ValueError(
            f"train and test must both be (N, D) or (N, C, H, W), got {tuple(train.shape)} and {tuple(test.shape)}."
        )
    if train.ndim == 4 and (train.shape[2] % 4 or train.shape[3] % 4):
        raise ValueError(f"images must have sides divisible by 4, got {tuple(train.shape[2:])}: resize them.")
    if not widths or min(widths) < 1 or critics < 1:
        raise ValueError(f"widths and critics must be positive, got {tuple(widths)} and {critics}.")
    if not bool(train.isfinite().all()) or not bool(test.isfinite().all()):
        raise ValueError("data hold NaN or infinite numbers.")


def _units(data: Tensor) -> tuple[Tensor, Tensor]:
    """Mean, and one deviation over all entries; images (in [-1, 1]) are left as they are."""
    if data.ndim == 4:
        return torch.zeros(()), torch.ones(())
    centre = data.float().mean(0)
    return centre, (data - centre).pow(2).mean().sqrt().clamp_min(1e-12)


def _rows(data: Tensor, count: int, random: torch.Generator) -> Tensor:
    return data[torch.randint(len(data), (count,), generator=random)].float()


@torch.no_grad()
def _generate(model: nn.Module, latents: Sampler, count: int, random: torch.Generator) -> Tensor:
    return torch.cat([model(latents(min(1024, count - n), random)) for n in range(0, count, 1024)])


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
