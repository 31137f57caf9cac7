"""What a training loop does around its loss, written out once more for comparison: batches, schedule, clip, average."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from hf_dpssl.data.batches import ImageSource
from hf_dpssl.data.image_data import load_images

SIDE = 16  # of the digits


def digits(batch_size: int, steps: int) -> Iterator[dict]:
    """The first training batches of the digits with seed 0; "pixels" (B, 3, 16, 16) in [-1, 1]."""
    source = ImageSource(load_images("digits"), image_size=SIDE, batch_size=batch_size, seed=0)
    batches = iter(source.loader())
    for _ in range(steps):
        batch = next(batches)
        yield batch | {"pixels": batch["images"].float() / 255 * 2 - 1}


def all_digits() -> tuple[Tensor, Tensor]:
    """All training images (N, 3, 16, 16) in [-1, 1], in order, and their labels."""
    source = ImageSource(load_images("digits"), image_size=SIDE, batch_size=1, seed=0)
    batch = source.training_table().readable_batch(range(source.num_images))
    return batch["images"].float() / 255 * 2 - 1, batch["labels"]


def cosine(rate: float, step: int, steps: int) -> float:
    """Learning rate of a step, counted from 0, without warm-up."""
    return rate * (1 + math.cos(math.pi * step / steps)) / 2


def descend(loss: Tensor, optimizer: torch.optim.Optimizer, rate: float, clip: float = 1.0) -> None:
    """One step at a learning rate, of gradients whose joint norm is at most `clip`."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    loss.backward()
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    for gradient in gradients:
        gradient.mul_(min(1.0, clip / (float(norm) + 1e-6)))
    optimizer.step()


class Average:
    """Exponential average of weights, started as diffusers does: (1 + t) / (10 + t) is kept, at most `decay`."""

    def __init__(self, parameters: Iterable[Tensor], decay: float):
        self.decay, self.steps = decay, 0
        self.values = [p.detach().clone() for p in parameters]

    def step(self, parameters: Iterable[Tensor]) -> None:
        keep = min(self.decay, (1 + self.steps) / (10 + self.steps)) if self.steps else 0.0
        self.values = [keep * old + (1 - keep) * p.detach() for old, p in zip(self.values, parameters, strict=True)]
        self.steps += 1


def assert_same(found: Iterable[Tensor], expected: Iterable[Tensor], tolerance: float = 1e-5) -> None:
    """All but 1 % of the numbers agree: Adam takes the sign of a gradient that is 0 but for rounding."""
    found, expected = (torch.cat([t.detach().flatten().double() for t in tensors]) for tensors in (found, expected))
    assert found.shape == expected.shape
    apart = (found - expected).abs() > tolerance + 1e-4 * expected.abs()
    assert float(apart.double().mean()) < 0.01, f"{int(apart.sum())} of {len(found)} numbers differ"
