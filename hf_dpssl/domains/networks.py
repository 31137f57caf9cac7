"""Featurizers and the algorithms on them: DomainBed's network for small pictures, a linear head, a pre-trained encoder.

| protocol | inputs | featurizer | context of ARM |
|---|---|---|---|
| network | uint8 (n, C, H, W), small | four convolutions, from scratch | three convolutions, one channel |
| frozen | features (n, D), standardised | linear, to 128 numbers: with the classifier a linear head | linear |
| fine_tune | uint8 (n, 3, H, W) | an encoder, batch norm frozen | as network; a 1 x 1 convolution takes it in |
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .algorithms import ALGORITHMS, ERM
from .hyperparameters import Hyperparameters

_WIDTH = 128


class SmallNetwork(nn.Module):
    """DomainBed's network for digits (7df6f06): pictures (n, C, H, W) in [0, 1] to (n, 128)."""

    def __init__(self, channels: int):
        super().__init__()
        widths = [channels, 64, _WIDTH, _WIDTH, _WIDTH]
        strides = [1, 2, 1, 1]
        pairs = zip(widths[:-1], widths[1:], strides, strict=True)
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, stride, padding=1) for a, b, stride in pairs)
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in widths[1:])

    def forward(self, images: Tensor) -> Tensor:
        """(n, 128)."""
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            images = norm(F.relu(convolution(images)))
        return images.mean((2, 3))


class PictureContext(nn.Sequential):
    """DomainBed's context network of ARM: (n, C, H, W) to (n, 1, H, W)."""

    def __init__(self, channels: int):
        super().__init__(
            nn.Conv2d(channels, 64, 5, padding=2),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Conv2d(64, 64, 5, padding=2),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Conv2d(64, 1, 5, padding=2),
        )


class TunedEncoder(nn.Module):
    """A copy of a pre-trained encoder that learns: normalised pictures (n, 3, H, W) to (n, D).

    Batch norm stays as it was pre-trained, as in DomainBed. Further channels, which ARM adds, enter through a 1 x 1
    convolution that begins by leaving them out, so that the first step is the encoder's own.

    Args:
        embed: pixel_values to features (n, D), with gradient.
        model: what learns in it.
        extra_channels: beside the three.
    """

    def __init__(self, embed, model: nn.Module, extra_channels: int = 0):
        super().__init__()
        self.embed, self.model = embed, model.requires_grad_(True)
        self.mix = nn.Conv2d(3 + extra_channels, 3, 1, bias=False) if extra_channels else None
        if extra_channels:
            nn.init.zeros_(self.mix.weight)
            self.mix.weight.data[:, :3, 0, 0] = torch.eye(3)

    def train(self, mode: bool = True) -> TunedEncoder:
        """As a module's, but for batch norm."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """(n, D)."""
        return self.embed(images if self.mix is None else self.mix(images))


def build(
    algorithm: str,
    protocol: str,
    given: Hyperparameters,
    *,
    shape: tuple[int, ...],
    classes: int,
    seed: int,
    order: int,
    encoder=None,
) -> ERM:
    """An algorithm on new weights.

    Args:
        algorithm, protocol, given: as of `hyperparameters`.
        shape: of one input, (C, H, W) or (D,).
        classes: number of them.
        seed: of the weights: runs that share it begin alike, whatever their draw, so that they can be averaged.
        order: of what the steps draw.
        encoder: for fine_tune, a function of extra channels to a `TunedEncoder` and the width of its features.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        settings: dict = dict(given.settings)
        context = algorithm == "arm"
        if protocol == "frozen":
            width = min(shape[0], max(_WIDTH, classes))
            featurizer = nn.Linear(shape[0] + width * context, width)
            if context:
                settings |= {"context": nn.Linear(shape[0], width), "support": given.batch_size}
        else:
            if protocol == "network":
                featurizer, width = SmallNetwork(shape[0] + context), _WIDTH
            else:
                featurizer, width = encoder(int(context))
            if context:
                settings |= {"context": PictureContext(shape[0]), "support": given.batch_size}
        rates = {"learning_rate": given.learning_rate, "weight_decay": given.weight_decay}
        return ALGORITHMS[algorithm](featurizer, nn.Linear(width, classes), **rates, **settings, seed=order)
