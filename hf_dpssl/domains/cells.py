"""One run of domain generalisation: an algorithm that learns from all domains but those held out, measured on the way.

A run depends on its arguments alone. Its record is plain values, from which selection.py makes the table.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor

from .algorithms import ERM
from .domain_tensors import DomainTensors, split
from .hyperparameters import Hyperparameters, hyperparameters
from .networks import TunedEncoder, build
from .soups import State, greedy_soup, uniform_soup
from .swad import SWAD

_TEST_BATCH = 64  # DomainBed's: what ARM adapts to


class Encoder(Protocol):
    """A pre-trained encoder that is fine-tuned."""

    def tuned(self, extra_channels: int) -> tuple[TunedEncoder, int]:
        """A copy that learns, and the width of its features."""

    def normalized(self, images: Tensor) -> Tensor:
        """pixel_values of uint8 pictures (n, 3, H, W)."""

    def augmented(self, images: Tensor, rows: Tensor, step: int, *, seed: int, domain: int) -> Tensor:
        """pixel_values of random views of uint8 pictures (n, 3, H, W), a function of all that is given."""


@dataclass(frozen=True)
class Cell:
    """A run of the plan.

    Args:
        algorithm: of `choices.ALGORITHMS`, or one of `choices.SOUPS`, which is made of erm's runs.
        targets: domains held out, by number: one, or two for leave-one-domain-out selection.
        draw: of hyper-parameters. seed: of split, weights, order and views.
    """

    algorithm: str
    targets: tuple[int, ...]
    draw: int
    seed: int

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.algorithm}-{'+'.join(map(str, self.targets))}-draw{self.draw}-seed{self.seed}"


@dataclass
class Trainer:
    """Runs cells on one data set.

    Args:
        tensors: all domains.
        protocol: "network", "frozen" or "fine_tune".
        steps: updates of a run. every: steps from one evaluation to the next; the first is after the first step.
        every_target: measure the target at every evaluation, which leave-one-domain-out selection needs, and not only
            at those that selection by training domains or the last step can choose.
        device: where it runs. encoder: for fine_tune.
        tolerance_ratio: of swad.
        mixed_precision: "bf16" runs featurizer and context in bfloat16 (weights, classifier and losses stay float32),
            "no" all in float32.
    """

    tensors: DomainTensors
    protocol: str
    steps: int
    every: int
    every_target: bool = False
    device: torch.device | str = "cpu"
    encoder: Encoder | None = None
    tolerance_ratio: float = 0.3
    mixed_precision: str = "no"

    def run(self, cell: Cell) -> tuple[dict, State]:
        """The record of a cell, plain values, and the weights at its end."""
        start = time.perf_counter()
        given = hyperparameters(cell.algorithm, self.protocol, cell.draw, cell.seed)
        algorithm, prepare, splits = self._begin(cell, given)
        sources = [domain for domain in range(len(splits)) if domain not in cell.targets]
        swad = SWAD(ratio=self.tolerance_ratio) if cell.algorithm == "swad" else None
        records: list[dict] = []
        losses: list[Tensor] = []
        best, diverged = -math.inf, False
        for step in range(self.steps):
            losses.append(algorithm.update(self._minibatches(cell, given, prepare, splits, sources, step)))
            if swad is not None:
                swad.step(algorithm.state_dict())
            last = step == self.steps - 1
            if step % self.every and not last:
                continue
            loss = float(torch.stack(losses).double().mean())
            losses.clear()
            held_out = {domain: self._measure(algorithm, prepare, domain, splits[domain][1]) for domain in sources}
            mean_loss = sum(value[1] for value in held_out.values()) / len(sources)
            diverged = not math.isfinite(loss + mean_loss)
            record = {"step": step, "loss": None if diverged else loss}
            record["held_out"] = {self.tensors.names[domain]: value[0] for domain, value in held_out.items()}
            validation = sum(record["held_out"].values()) / len(sources)
            if swad is not None and not diverged:
                swad.evaluate(mean_loss)
            elif swad is None and (validation > best or last or diverged or self.every_target):
                record["targets"] = self._of_targets(algorithm, prepare, cell, splits)
            best = max(best, validation)
            records.append(record)
            if diverged or (swad is not None and swad.ended):
                break
        if swad is not None:
            if swad.recent:
                algorithm.load_state_dict(swad.weights())
            records.append({"step": self.steps - 1} | self._summary(algorithm, prepare, cell, splits, sources))
        seconds = time.perf_counter() - start
        content = self._described(cell, algorithm) | {"hyperparameters": asdict(given), "diverged": diverged}
        return content | {"records": records, "seconds": seconds}, algorithm.state_dict()

    def average(self, cell: Cell, states: list[State]) -> tuple[dict, State]:
        """The record of a soup of weights, those of erm's runs with the cell's targets and seed, and its weights."""
        start = time.perf_counter()
        given = hyperparameters("erm", self.protocol, 0, cell.seed)
        algorithm, prepare, splits = self._begin(Cell("erm", cell.targets, 0, cell.seed), given)
        sources = [domain for domain in range(len(splits)) if domain not in cell.targets]
        if cell.algorithm == "uniform_soup":
            mean, taken = uniform_soup(states), list(range(len(states)))
        else:

            def accuracy(state: State) -> float:
                algorithm.load_state_dict(state)
                found = [self._measure(algorithm, prepare, domain, splits[domain][1])[0] for domain in sources]
                return sum(found) / len(found)

            mean, taken = greedy_soup(states, accuracy)
        algorithm.load_state_dict(mean)
        record = {"step": self.steps - 1} | self._summary(algorithm, prepare, cell, splits, sources)
        content = self._described(cell, algorithm) | {"runs": taken, "of": len(states), "diverged": False}
        return content | {"records": [record], "seconds": time.perf_counter() - start}, mean

    def _described(self, cell: Cell, algorithm: ERM) -> dict:
        names = [self.tensors.names[domain] for domain in cell.targets]
        return {"algorithm": cell.algorithm, "targets": names, "draw": cell.draw, "seed": cell.seed} | {
            "adapts": algorithm.adapts
        }

    def _begin(self, cell: Cell, given: Hyperparameters):
        """The algorithm on its device, how inputs are read, and the rows of each domain's two parts."""
        tensors = self.tensors
        splits = [split(len(labels), domain, cell.seed) for domain, labels in enumerate(tensors.labels)]
        shape = tuple(tensors.inputs[0].shape[1:])
        about = {"shape": shape, "classes": len(tensors.class_names), "seed": cell.seed}
        order = 1000 * cell.seed + cell.draw
        encoder = self.encoder.tuned if self.encoder is not None else None
        algorithm = build(cell.algorithm, self.protocol, given, **about, order=order, encoder=encoder)
        sources = [domain for domain in range(len(splits)) if domain not in cell.targets]
        if self.mixed_precision == "bf16":
            for part in (algorithm.featurizer, getattr(algorithm, "context", None)):
                if part is not None:
                    autocast = torch.autocast(torch.device(self.device).type, torch.bfloat16)
                    part.forward = convert_outputs_to_fp32(autocast(part.forward))
        return algorithm.to(self.device).train(), self._reader(splits, sources), splits

    def _reader(self, splits, sources) -> Callable[[Tensor], Tensor]:
        if self.protocol == "network":
            return lambda images: self._sent(images).float() / 255
        if self.protocol == "fine_tune":
            return lambda images: self.encoder.normalized(self._sent(images))
        seen = torch.cat([self.tensors.inputs[domain][splits[domain][0]] for domain in sources]).double()
        mean, deviation = seen.mean(0), seen.std(0, correction=0)
        scale = torch.where(deviation > 1e-12, deviation, 1.0)  # what is constant in training says nothing
        mean, scale = mean.float().to(self.device), scale.float().to(self.device)
        return lambda features: (self._sent(features) - mean) / scale

    def _sent(self, values: Tensor) -> Tensor:
        """On the device, without waiting for what it is doing."""
        return values.to(self.device, non_blocking=True)

    def _minibatches(self, cell: Cell, given: Hyperparameters, prepare, splits, sources, step: int):
        random = np.random.default_rng([cell.seed, cell.draw, step])
        found = []
        for domain in sources:
            rows = splits[domain][0][torch.from_numpy(random.integers(0, len(splits[domain][0]), given.batch_size))]
            inputs, labels = self.tensors.inputs[domain][rows], self.tensors.labels[domain][rows]
            if self.protocol == "fine_tune":
                inputs = self.encoder.augmented(self._sent(inputs), rows, step, seed=cell.seed, domain=domain)
            else:
                inputs = prepare(inputs)
            found.append((inputs, self._sent(labels)))
        return found

    @torch.no_grad()
    def _measure(self, algorithm: ERM, prepare, domain: int, rows: Tensor) -> tuple[float, float]:
        """Accuracy in percent and mean cross-entropy on rows of a domain, in batches of 64."""
        algorithm.eval()
        right = loss = 0.0
        for part in rows.split(_TEST_BATCH):
            logits = algorithm.predict(prepare(self.tensors.inputs[domain][part]))
            labels = self.tensors.labels[domain][part].to(self.device)
            right += float((logits.argmax(1) == labels).sum())
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        algorithm.train()
        return 100 * right / len(rows), loss / len(rows)

    def _of_targets(self, algorithm: ERM, prepare, cell: Cell, splits) -> dict:
        """Of each target the accuracy on its larger part, which is reported, and on the fifth that oracles see."""
        parts = {
            self.tensors.names[domain]: [self._measure(algorithm, prepare, domain, rows)[0] for rows in splits[domain]]
            for domain in cell.targets
        }
        return {name: {"accuracy": larger, "fifth": fifth} for name, (larger, fifth) in parts.items()}

    def _summary(self, algorithm: ERM, prepare, cell: Cell, splits, sources) -> dict:
        names = self.tensors.names
        held_out = {
            names[domain]: self._measure(algorithm, prepare, domain, splits[domain][1])[0] for domain in sources
        }
        return {"held_out": held_out, "targets": self._of_targets(algorithm, prepare, cell, splits)}
