"""The usual data sets of domain generalisation: where they are, and what a whole one holds.

Published figures stand beside results on whole sets only. `verified` says whether the Hub id was loaded and counted by
us; none could be so far, so that ids are given where one is known to us, to be checked by whoever uses them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .domain_data import DomainData, load_domains


@dataclass(frozen=True)
class KnownSet:
    """A data set; `hub_id` and its `domain_column` are None where we know of none.

    published: mean percent over targets of MoCo-v2 and t-MoCo-v2, pre-trained on ImageNet; None where there is none.
    """

    domains: int
    classes: int
    images: int
    hub_id: str | None = None
    domain_column: str | None = None
    verified: bool = False
    published: tuple[float, float] | None = None


# Counts: DomainBed's paper, table 1. Published: slides of Hu et al., which state no protocol.
KNOWN_SETS = {
    "pacs": KnownSet(4, 7, 9_991, "flwrlabs/pacs", "domain", published=(58.5, 61.3)),
    "vlcs": KnownSet(4, 5, 10_729, published=(70.4, 75.1)),
    "office_home": KnownSet(4, 65, 15_588, "flwrlabs/office-home", "domain", published=(36.6, 42.1)),
    "terra_incognita": KnownSet(4, 10, 24_788),
    "domain_net": KnownSet(6, 345, 586_575, "wltjr1007/DomainNet", "domain"),
}


def load_set(name: str, *, domain_column: str | None = None, clusters: int | None = None, **options) -> DomainData:
    """`load_domains` of a name of the table, with its Hub id and column, or of anything else as it is.

    Args:
        name: of the table; NAME=SOURCE, a name of the table and where it is read from instead; or as of `load_domains`.
        domain_column, clusters, options: as of `load_domains`.

    Raises:
        FileNotFoundError: a set of the table without Hub id, or that cannot be loaded; says what to download and how to
            sort it. ValueError: NAME=SOURCE with no such name; of others, what `load_domains` refuses.
    """
    named, source = _named(name)
    if source is not None:
        if named not in KNOWN_SETS or not source:
            raise ValueError(f"NAME=FOLDER takes a folder of {', '.join(KNOWN_SETS)}, got {name!r}.")
        return load_domains(source, domain_column=domain_column, clusters=clusters, **options)
    known = KNOWN_SETS.get(name)
    if known is None:
        return load_domains(name, domain_column=domain_column, clusters=clusters, **options)
    where = (
        f"download it ({known.domains} domains, {known.classes} classes, {known.images:,} images; "
        "domainbed/scripts/download.py of facebookresearch/DomainBed names the places) and give its folder as "
        f"{name}=FOLDER, sorted as DOMAIN/CLASS/image."
    )
    if known.hub_id is None:
        raise FileNotFoundError(f"{name!r} has no Hub id that we know of: {where}")
    column = domain_column or (known.domain_column if clusters is None else None)
    try:
        return load_domains(known.hub_id, domain_column=column, clusters=clusters, **options)
    except (ValueError, OSError) as error:
        checked = "" if known.verified else ", which was not checked by us"
        found = f"{name!r} is read from {known.hub_id} of the Hub{checked}: {error}"
        raise FileNotFoundError(f"{found} Or {where}") from error


def _named(name: str) -> tuple[str, str | None]:
    """The parts of NAME=SOURCE; of anything else, as a path with that sign in it, itself and None."""
    named, equals, source = name.partition("=")
    if equals and named.replace("_", "").isalnum() and not Path(name).exists():
        return named, source
    return name, None


def account(name: str, given: DomainData) -> str | None:
    """Whether a set of the table, under its name or as NAME=SOURCE, is whole, in words; None for others."""
    name, source = _named(name)
    known = KNOWN_SETS.get(name)
    if known is None:
        return None
    classes = known.classes if given.class_names is None else len(given.class_names)  # None: they are not looked at
    found = (len(given.domain_names), classes, len(given.rows))
    wanted = (known.domains, known.classes, known.images)
    checked = "" if known.verified or source is not None else f" The Hub id {known.hub_id} was not checked by us."
    if found == wanted:
        whole = f"{name}: the whole set, as published ({known.images:,} images).{checked}"
        if known.published is None:
            return whole
        figures = "MoCo-v2 {}, t-MoCo-v2 {}".format(*known.published)
        return f"{whole} Published means over targets, ImageNet, protocol not stated (frozen features?): {figures}."
    return (
        f"{name}: not the whole set, so that published figures do not compare: {found[0]} domains, {found[1]} classes, "
        f"{found[2]:,} images of {wanted[0]}, {wanted[1]} and {wanted[2]:,}.{checked}"
    )
