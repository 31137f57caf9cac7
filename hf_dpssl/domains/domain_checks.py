"""What pictures of several domains must be, so that each domain can be left out."""

from __future__ import annotations

import torch
from torch import Tensor

_SHOWN = 10  # classes named in a note


def check_domains(
    labels: Tensor | None,
    domains: Tensor,
    class_names: list[str] | None = None,
    domain_names: list[str] | None = None,
) -> None:
    """ValueError unless each domain can be left out: at least two domains of two samples, each class in two of them.

    Args:
        labels: (N,) class ids from 0 on, or None where there are none.
        domains: (N,) ids from 0 on.
        class_names, domain_names: by id, for messages.
    """
    for name, ids in (("labels", domains if labels is None else labels), ("domains", domains)):
        if ids.ndim != 1 or not len(ids) or ids.is_floating_point() or int(ids.min()) < 0:
            raise ValueError(f"{name} must be (N,) whole numbers of at least 0, got {tuple(ids.shape)} {ids.dtype}.")

    def shown(names: list[str] | None, number: int) -> str:
        return f"{number}" if names is None else f"{names[number]!r}"

    sizes = torch.bincount(domains)
    if len(sizes) < 2:
        raise ValueError("all samples are of one domain: leaving domains out needs two or more.")
    if sizes.min() < 2:
        domain = int(sizes.argmin())
        raise ValueError(
            f"domain {shown(domain_names, domain)} has {int(sizes[domain])} samples: at least 2 are needed."
        )
    if labels is None:
        return
    if len(labels) != len(domains):
        raise ValueError(f"labels and domains must be equally many, got {len(labels)} and {len(domains)}.")
    shape = (len(sizes), int(labels.max()) + 1)
    if shape[1] < 2:
        raise ValueError("all samples are of one class: ranking needs two or more.")
    table = torch.bincount(domains * shape[1] + labels, minlength=shape[0] * shape[1]).reshape(shape)  # (M, C)
    for number in ((table > 0).sum(0) < 2).nonzero()[:, 0].tolist():
        where = ", ".join(shown(domain_names, domain) for domain in table[:, number].nonzero()[:, 0].tolist())
        where = f"in domain {where} only" if where else "in no domain"
        raise ValueError(
            f"class {shown(class_names, number)} is found {where}: with it left out nothing is known of the class. "
            "Each class must be found in two domains or more; leave that class out, or add images of it."
        )


def missing_classes(
    labels: Tensor, domains: Tensor, class_names: list[str], domain_names: list[str]
) -> dict[str, list[str]]:
    """Of each domain that lacks classes, their names; labels and domains (N,), names by id."""
    found = {}
    for number, name in enumerate(domain_names):
        there = set(labels[domains == number].unique().tolist())
        if lacking := [text for label, text in enumerate(class_names) if label not in there]:
            found[name] = lacking
    return found


def notes_of_missing(found: dict[str, list[str]]) -> list[str]:
    """What a reader of a table must know of `missing_classes`, a sentence for each domain."""
    notes = []
    for domain, names in found.items():
        more = f" and {len(names) - _SHOWN} more classes" if len(names) > _SHOWN else ""
        notes.append(f"{domain} has no {', '.join(names[:_SHOWN])}{more}.")
    return notes
