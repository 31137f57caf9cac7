"""Defaults and random draws of what a run is trained with: the same number of draws for every algorithm.

Draw 0 is the defaults. The others are those of DomainBed at commit 7df6f06, number by number, for its small pictures
(`network`) and its pre-trained networks (`fine_tune`); of them its dropout is not used. `frozen` is ours: a linear head
on cached features is cheap, and wants higher rates. Mixup's alpha is not searched there (always 0.1 but by default).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .domain_tensors import seed_hash

_RATES = {"network": (1e-3, -4.5, -2.5), "fine_tune": (5e-5, -5.0, -3.5), "frozen": (1e-3, -4.0, -2.0)}
_BATCHES = {"network": (64, 3, 9), "fine_tune": (32, 3, 5.5), "frozen": (32, 3, 5.5)}


@dataclass(frozen=True)
class Hyperparameters:
    """Of a run: learning rate, weight decay, pictures per domain and step, and keyword arguments of the algorithm."""

    learning_rate: float
    weight_decay: float
    batch_size: int
    settings: dict[str, float]


def hyperparameters(algorithm: str, protocol: str, draw: int, seed: int) -> Hyperparameters:
    """Those of a draw.

    Args:
        algorithm: of `algorithms.ALGORITHMS`; swad has those of erm.
        protocol: "network", "fine_tune" or "frozen".
        draw: 0 for the defaults. seed: of the trial, which has draws of its own.
    """
    random = np.random.RandomState(seed_hash(draw, seed))
    random.choice([0.0, 0.1, 0.5])  # DomainBed's dropout

    def of(default, drawn):
        return drawn if draw else default

    rate, low, high = _RATES[protocol]
    learning_rate = of(rate, 10 ** random.uniform(low, high))
    size, low, high = _BATCHES[protocol]
    batch_size = of(size, int(2 ** random.uniform(low, high)))
    if algorithm == "arm" and protocol == "fine_tune":
        batch_size = 8
    weight_decay = 0.0 if protocol == "network" else of(0.0, 10 ** random.uniform(-6, -2))
    settings: dict[str, float] = {}
    if algorithm == "rsc":
        settings["features"] = of(1 / 3, random.uniform(0, 0.5))
        settings["pictures"] = of(1 / 3, random.uniform(0, 0.5))
    elif algorithm == "sagnet":
        settings["adversary"] = of(0.1, 10 ** random.uniform(-2, 1))
    elif algorithm in ("irm", "vrex"):
        settings["penalty"] = of(100.0 if algorithm == "irm" else 10.0, 10 ** random.uniform(-1, 5))
        settings["anneal"] = of(500, int(10 ** random.uniform(0, 4)))
    elif algorithm == "mixup":
        settings["alpha"] = of(0.2, 10 ** random.uniform(-1, -1))
    elif algorithm == "group_dro":
        settings["eta"] = of(0.01, 10 ** random.uniform(-3, -1))
    elif algorithm == "mmd":
        settings["gamma"] = of(1.0, 10 ** random.uniform(-1, 1))
    return Hyperparameters(learning_rate, weight_decay, batch_size, settings)
