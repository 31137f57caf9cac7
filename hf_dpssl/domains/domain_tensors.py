"""Pictures or features of several domains in memory, checked and split as DomainBed does."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .domain_checks import check_domains, missing_classes

_FEWEST = 5  # samples of a domain, so that a fifth of them is one


@dataclass(frozen=True)
class DomainTensors:
    """What runs learn from.

    Args:
        names: of M domains.
        inputs: of each domain uint8 pictures (n, C, H, W), or features (n, D).
        labels: of each domain class ids (n,).
        class_names: by id.

    Raises:
        ValueError: one domain, features that are not finite, fewer samples in a domain than classes, or than 5 of which
            a fifth is held out, or a class that only one domain has.
    """

    names: list[str]
    inputs: list[Tensor]
    labels: list[Tensor]
    class_names: list[str]

    def __post_init__(self):
        for name, inputs, labels in zip(self.names, self.inputs, self.labels, strict=True):
            if len(inputs) != len(labels):
                raise ValueError(f"domain {name!r} has {len(inputs)} samples and {len(labels)} labels.")
            if inputs.is_floating_point() and (bad := int((~torch.isfinite(inputs)).flatten(1).any(1).sum())):
                raise ValueError(f"{bad} of {len(inputs)} samples of domain {name!r} hold numbers that are not finite.")
            if len(inputs) < (fewest := max(_FEWEST, len(self.class_names))):
                raise ValueError(
                    f"domain {name!r} has {len(inputs)} samples for {len(self.class_names)} classes: give at least "
                    f"{fewest}, of which a fifth is held out, or leave the domain out."
                )
        check_domains(*self._ids(), self.class_names, self.names)

    @property
    def missing_classes(self) -> dict[str, list[str]]:
        """Of each domain that lacks classes, their names."""
        return missing_classes(*self._ids(), self.class_names, self.names)

    def _ids(self) -> tuple[Tensor, Tensor]:
        """(N,) label and domain of each sample."""
        domains = [torch.full_like(labels, number) for number, labels in enumerate(self.labels)]
        return torch.cat(self.labels), torch.cat(domains)

    def digest(self) -> str:
        """Hash of all of it."""
        content = hashlib.sha256("\0".join([*self.names, *self.class_names]).encode())
        for inputs, labels in zip(self.inputs, self.labels, strict=True):
            content.update(inputs.contiguous().numpy().tobytes() + labels.numpy().tobytes())
        return content.hexdigest()


def split(count: int, domain: int, seed: int, held_out: float = 0.2) -> tuple[Tensor, Tensor]:
    """Rows to learn from (or, of the target, to measure on), and a fifth that is held out: those of DomainBed.

    Args:
        count: samples of the domain. domain: its number. seed: of the trial. held_out: share of the second part.
    """
    order = np.arange(count)
    np.random.RandomState(seed_hash(seed, domain)).shuffle(order)
    held = int(count * held_out)
    return torch.from_numpy(order[held:]), torch.from_numpy(order[:held])


def seed_hash(*parts: int) -> int:
    """DomainBed's seed from several numbers."""
    return int(hashlib.md5(str(parts).encode()).hexdigest(), 16) % 2**31
