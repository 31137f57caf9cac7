"""SWAD (Cha et al. 2021): the mean of the weights of every step in a flat valley of the loss.

Steps are averaged in segments, which end at an evaluation; each has the loss of then on held-out pictures of the
training domains. The valley begins with the first segment whose loss the next `patience - 1` do not get below. It ends
where the smallest loss of `tolerance` segments in a row exceeds a limit: `1 + ratio` times the mean loss of the
`patience` segments at the beginning. Up to `tolerance - patience` segments before the beginning, below the limit and
in one piece with it, count too.

This is the rule of khanrc/swad at commit 252190e, the code of the published numbers, in all its details: of a piece
before the beginning the first segment is left out, and segments near the beginning may count twice. Where no valley
begins, the mean is that of the last segment.
"""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

from torch import Tensor

from .soups import RunningMean


class _Segment(NamedTuple):
    number: int
    loss: float
    state: dict[str, Tensor]


class SWAD:
    """Averages the weights of a run while it goes on; keeps `tolerance` segments and the mean.

    Args:
        patience: n_converge of the published code.
        tolerance: n_tolerance, at least `patience`.
        ratio: tolerance_ratio; 0.2 for VLCS, 0.3 elsewhere.

    Attributes:
        ended: whether the valley has ended: nothing further will count.
    """

    def __init__(self, *, patience: int = 3, tolerance: int = 6, ratio: float = 0.3):
        if not 1 <= patience <= tolerance or ratio < 0:
            raise ValueError(
                f"1 <= patience <= tolerance and ratio >= 0 are needed, got {patience}, {tolerance} and {ratio}."
            )
        self.patience, self.ratio = patience, ratio
        self.recent: deque[_Segment] = deque(maxlen=tolerance)
        self.mean = RunningMean()
        self.segment, self.segments = RunningMean(), 0
        self.first: _Segment | None = None
        self.limit = math.inf
        self.ended = False

    def step(self, state: dict[str, Tensor]) -> None:
        """Count the weights after a step in."""
        if not self.ended:
            self.segment.add(state)

    def evaluate(self, loss: float) -> None:
        """End the segment, with the loss on held-out pictures of the training domains.

        Raises:
            ValueError: no step since the last one, or a loss that is not finite.
        """
        if self.ended:
            return
        if not self.segment.count or not math.isfinite(loss):
            raise ValueError(f"a segment needs steps and a finite loss, got {self.segment.count} steps, loss {loss}.")
        self.recent.append(_Segment(self.segments, loss, self.segment.state))
        self.segment, self.segments = RunningMean(), self.segments + 1
        if self.first is None:
            self._begin()
        elif self.recent[0].number >= self.first.number:
            self.ended = min(part.loss for part in self.recent) > self.limit
            if not self.ended:
                self.mean.add(self.recent[0].state)

    def _begin(self) -> None:
        newest = list(self.recent)[-self.patience :]
        if len(newest) < self.patience or newest[0].loss > min(part.loss for part in newest):
            return
        self.first = newest[0]
        self.limit = (1 + self.ratio) * sum(part.loss for part in newest) / len(newest)
        before = list(self.recent)[: self.recent.maxlen - self.patience + 1]
        above = [place for place, part in enumerate(before) if part.loss > self.limit]
        for part in before[above[-1] + 2 if above else 1 :]:
            self.mean.add(part.state)

    def weights(self) -> dict[str, Tensor]:
        """The mean as it is if the run ends here.

        Raises:
            ValueError: before the first evaluation.
        """
        if not self.recent:
            raise ValueError("there are no weights before the first evaluation.")
        if self.first is None:
            return self.recent[-1].state
        mean, rest = self.mean.copy(), list(self.recent)[1:]
        while rest and not self.ended and min(part.loss for part in rest) <= self.limit:
            mean.add(rest.pop(0).state)
        return mean.state if mean.count else self.first.state
