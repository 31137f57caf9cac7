"""Noise of images from their own generators, so that an image does not depend on the batch it is made in."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..models.call_arguments import Generators, read_generator


@dataclass
class PerImageInputs:
    """What belongs to the images of a call, one row each; pictures and masks are None without `image`."""

    noise: Tensor  # (N, C, h, w)
    labels: Tensor  # (N,)
    others: Tensor | None  # (N,), classes blended in
    weights: Tensor | None  # (N,), their shares
    generators: list
    pictures: Tensor | None = None  # (N, channels, H, W) in [0, 1]
    mask: Tensor | None = None  # (N, 1, H, W), 1 = paint anew
    cells: Tensor | None = None  # (N, 1, h, w), likewise
    known: Tensor | None = None  # (N, C, h, w), latents of the pictures

    def rows(self, start: int, stop: int) -> PerImageInputs:
        """Some of the images."""
        kept = {field.name: getattr(self, field.name) for field in fields(self)}
        return PerImageInputs(**{name: value if value is None else value[start:stop] for name, value in kept.items()})


def step_generators(generator: torch.Generator | list | None, count: int) -> list[torch.Generator]:
    """One generator per image for the noise of stochastic schedulers; from a single one, seeds are drawn."""
    if isinstance(generator, list):
        return generator
    if count == 1 and generator is not None:
        return [generator]
    device = "cpu" if generator is None else generator.device
    seeds = torch.randint(2**63 - 1, (count,), generator=generator, device=device).tolist()
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def initial_noise(shape: tuple[int, ...], generator, latents: Tensor | None, device: torch.device) -> Tensor:
    """Standard normal noise (N, C, h, w), float32, or the given `latents`, checked."""
    if latents is None:
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
    if tuple(latents.shape) != shape:
        raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}.")
    return latents.to(device, torch.promote_types(latents.dtype, torch.float32))


def noise_path(
    shape: tuple[int, ...], count: int, generator: Generators, latents: tuple[Tensor, ...] | None, device: torch.device
) -> Tensor:
    """`count` noises (count, C, h, w) from that of the first of two generators to that of the second; of one: its own.

    Args:
        shape: (C, h, w).
        count: at least 2.
        generator: one or a list of one or two; seeds are fine.
        latents: the two noises (C, h, w) themselves, instead of drawing them.
        device: of the result.

    Raises:
        ValueError: fewer than two images, more than two generators, or noises of another shape.
    """
    if count < 2:
        raise ValueError(f"an interpolation has at least 2 images, got num_images={count}.")
    if latents is None:
        both = generator if isinstance(generator, list | tuple) else [generator]
        both = [read_generator(one, 1) for one in read_generator(both, len(both))]
        if len(both) > 2:
            raise ValueError(f"an interpolation has one generator or two (start, end), got {len(both)}.")
        latents = [initial_noise((1, *shape), one, None, device)[0] for one in both]
    ends = [initial_noise(shape, None, one, device) for one in (latents[0], latents[-1])]
    return spherical_path(*ends, count)


def spherical_path(start: Tensor, end: Tensor, count: int) -> Tensor:
    """`count` noises (count, C, h, w) on the great circle from `start` to `end` (C, h, w), both included.

    Unlike a straight line it keeps the norm of noise (Shoemake 1985).
    """
    cosine = torch.nn.functional.cosine_similarity(start.flatten().double(), end.flatten().double(), dim=0)
    angle = torch.arccos(cosine.clamp(-1, 1))
    share = torch.linspace(0, 1, count, dtype=torch.float64, device=start.device).view(-1, 1, 1, 1)
    if torch.sin(angle) < 1e-6:
        mixed = torch.lerp(start.double(), end.double(), share)
    else:
        mixed = (torch.sin((1 - share) * angle) * start + torch.sin(share * angle) * end) / torch.sin(angle)
    return mixed.to(start.dtype)
