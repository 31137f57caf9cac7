"""Classifier-free guidance: its scale, the part of the noise levels where it acts, and its rescaling.

Source: Ho and Salimans 2022; Kynkäänniemi et al. 2024 (interval); Lin et al. 2023, equations 15 and 16 (rescale).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Guidance:
    """without + scale * (with class - without), at noise levels inside an interval.

    Args:
        scale: at least 1; 1 is no guidance.
        interval: (low, high) as shares of the timesteps, 0 = image, 1 = noise; None is everywhere.
        rescale: in [0, 1], share of the guided prediction whose standard deviation is set to that of the prediction
            with class, per image.

    Raises:
        ValueError: a value out of range.
    """

    scale: float = 1.0
    interval: tuple[float, float] | None = None
    rescale: float = 0.0

    def __post_init__(self):
        if not 1 <= self.scale < math.inf:
            raise ValueError(f"guidance_scale must be at least 1 (1 = no guidance), got {self.scale}.")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance_rescale must lie in [0, 1] (0 = none), got {self.rescale}.")
        if self.interval is not None:
            if len(self.interval) != 2 or not 0 <= self.interval[0] < self.interval[1] <= 1:
                raise ValueError(
                    f"guidance_interval must be (low, high) with 0 <= low < high <= 1, shares of the noise levels "
                    f"(0 = image, 1 = noise), or None for all of them; got {self.interval}."
                )

    def acts_at(self, share: float) -> bool:
        """Whether a step at this share of the timesteps is guided; both ends of the interval are."""
        low, high = self.interval or (-math.inf, math.inf)
        return self.scale > 1 and low <= share <= high

    def combine(self, with_class: Tensor, without: Tensor, channels: int) -> Tensor:
        """The guided prediction (B, C, h, w); channels after the first `channels`, a variance, stay the class's."""
        mean = with_class[:, :channels]
        rest = with_class[:, channels:]
        guided = without[:, :channels] + self.scale * (mean - without[:, :channels])
        if self.rescale:
            wanted = mean.std(dim=(1, 2, 3), keepdim=True)
            found = guided.std(dim=(1, 2, 3), keepdim=True)
            guided = torch.lerp(guided, guided * (wanted / found), self.rescale)
        return torch.cat([guided, rest], dim=1) if rest.shape[1] else guided
