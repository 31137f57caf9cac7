"""Digits in several domains: ColoredMNIST and RotatedMNIST as DomainBed makes them, and a small set that is embedded.

From a seed and the digits in torchvision's order, the two MNIST sets are DomainBed's (commit 7df6f06) bit by bit. There
all 70,000 digits are shuffled, and domain i of n takes every n-th one from i on.

| set | domains | pictures |
|---|---|---|
| colored_mnist | colour agrees with the label in 90, 80 and 10 % | (2, 28, 28), two classes, a quarter flipped |
| rotated_mnist | 0, 15, 30, 45, 60, 75 degrees | (1, 28, 28), ten classes |
| rotated_digits | 0, 30, 60 degrees | (1, 8, 8), ten classes, scikit-learn's 1,797 digits |
"""

from __future__ import annotations

import numpy as np
import torch
from datasets import concatenate_datasets
from PIL import Image
from torch import Tensor

from ..data.decoding import decode_image
from ..data.image_data import load_images
from .domain_tensors import DomainTensors

_COLOURED = {"+90%": 0.1, "+80%": 0.2, "-90%": 0.9}


def digit_domains(name: str, seed: int) -> DomainTensors:
    """One of the sets above.

    Args:
        name: of the table.
        seed: of order, colours and flips.

    Raises:
        ValueError: another name. FileNotFoundError or OSError: MNIST is neither in DPSSL_DATA nor on the Hub.
    """
    if name == "rotated_digits":
        return rotated(*_digits("digits"), seed=seed, angles=(0, 30, 60))
    if name == "rotated_mnist":
        return rotated(*_digits("mnist"), seed=seed)
    if name == "colored_mnist":
        return coloured(*_digits("mnist"), seed=seed)
    raise ValueError(f"there is no set of digits {name!r}.")


def coloured(images: Tensor, labels: Tensor, *, seed: int) -> DomainTensors:
    """Digits (N, H, W) uint8 below 5 or not, in one of two colours, which are channels."""
    generator = torch.Generator().manual_seed(seed)
    parts = _dealt(images, labels, len(_COLOURED), generator)
    made = []
    for (digits, classes), flips in zip(parts, _COLOURED.values(), strict=True):
        small = classes < 5
        noisy = small ^ (torch.rand(len(small), generator=generator) < 0.25)
        colour = noisy ^ (torch.rand(len(small), generator=generator) < flips)
        two = torch.stack([digits * ~colour[:, None, None], digits * colour[:, None, None]], 1)
        made.append((two, noisy.long()))
    inputs, targets = map(list, zip(*made, strict=True))
    return DomainTensors(list(_COLOURED), inputs, targets, ["5 to 9", "0 to 4"])


def rotated(images: Tensor, labels: Tensor, *, seed: int, angles=(0, 15, 30, 45, 60, 75)) -> DomainTensors:
    """Digits (N, H, W) uint8, turned counter-clockwise by these degrees, bicubic."""
    parts = _dealt(images, labels, len(angles), torch.Generator().manual_seed(seed))
    inputs = []
    for (digits, _), angle in zip(parts, angles, strict=True):
        turned = [Image.fromarray(digit.numpy()).rotate(angle, Image.Resampling.BICUBIC) for digit in digits]
        inputs.append(torch.from_numpy(np.stack([np.asarray(picture) for picture in turned]))[:, None])
    return DomainTensors(list(map(str, angles)), inputs, [part[1] for part in parts], list(map(str, range(10))))


def _dealt(images: Tensor, labels: Tensor, count: int, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(images), generator=generator)
    return [(images[order[i::count]], labels[order[i::count]]) for i in range(count)]


def _digits(name: str) -> tuple[Tensor, Tensor]:
    """uint8 (N, H, W) and labels (N,), train before test."""
    data = load_images(name)
    rows = concatenate_datasets([data.train, data.evaluation])
    pictures = [np.asarray(decode_image(value).convert("L")) for value in rows[data.image_column]]
    return torch.from_numpy(np.stack(pictures)), torch.tensor(rows[data.label_column][:])
