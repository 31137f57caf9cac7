"""Means of the weights of several runs that began from the same weights: model soups and DiWA.

| mean | of which runs | source |
|---|---|---|
| uniform soup | all | Wortsman et al. 2022 |
| greedy soup | from the best run on, each that does not lower the mean's held-out accuracy | Wortsman et al. 2022 |
| DiWA | those two, of runs that also differ in the order of their data | Rame et al. 2022 |

Weights that began apart have no useful mean. swad.py averages within a run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

State = dict[str, Tensor]


class RunningMean:
    """Mean of state dicts, one after the other; what is not floating point is that of the last one."""

    def __init__(self):
        self.count = 0
        self.state: State = {}

    @torch.no_grad()
    def add(self, state: State) -> None:
        """Count a state dict in.

        Raises:
            ValueError: other names or shapes than those before.
        """
        if self.count and {name: x.shape for name, x in state.items()} != {n: x.shape for n, x in self.state.items()}:
            raise ValueError("weights of other names or shapes have no mean: average runs of one network.")
        self.count += 1
        for name, value in state.items():
            if self.count == 1 or not value.is_floating_point():
                self.state[name] = value.detach().clone()
            else:
                self.state[name].lerp_(value.detach(), 1 / self.count)

    def copy(self) -> RunningMean:
        """Another one that goes on from here."""
        other = RunningMean()
        other.count, other.state = self.count, {name: value.clone() for name, value in self.state.items()}
        return other


def uniform_soup(states: Sequence[State]) -> State:
    """Mean of all.

    Raises:
        ValueError: none, or weights of different networks.
    """
    mean = RunningMean()
    for state in states:
        mean.add(state)
    if not mean.count:
        raise ValueError("there are no weights to average.")
    return mean.state


def greedy_soup(states: Sequence[State], accuracy: Callable[[State], float]) -> tuple[State, list[int]]:
    """Mean of the best run and of those that do not make it worse, tried from the best down.

    Args:
        states: weights of the runs.
        accuracy: of weights, on held-out pictures of the training domains.

    Returns:
        The mean, and the places of the runs in it in the order in which they were taken.

    Raises:
        ValueError: as `uniform_soup`.
    """
    if not len(states):
        raise ValueError("there are no weights to average.")
    alone = [accuracy(state) for state in states]
    order = sorted(range(len(states)), key=lambda place: -alone[place])
    mean, taken, best = RunningMean(), [order[0]], alone[order[0]]
    mean.add(states[order[0]])
    for place in order[1:]:
        tried = mean.copy()
        tried.add(states[place])
        if (found := accuracy(tried.state)) >= best:
            mean, best = tried, found
            taken.append(place)
    return mean.state, taken
