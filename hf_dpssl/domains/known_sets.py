"""The usual data sets of domain generalisation: where they are, and what a whole one holds.

Published figures stand beside results on whole sets only. `verified` says whether the Hub id was loaded and counted by
us; none could be so far, so that ids are given where one is known to us, to be checked by whoever uses them.
"""

from __future__ import annotations

from dataclasses import dataclass

from .domain_data import DomainData


@dataclass(frozen=True)
class KnownSet:
    """A data set; `hub_id` and its `domain_column` are None where we know of none."""

    domains: int
    classes: int
    images: int
    hub_id: str | None = None
    domain_column: str | None = None
    verified: bool = False


# Counts: DomainBed's paper, table 1.
KNOWN_SETS = {
    "pacs": KnownSet(4, 7, 9_991, "flwrlabs/pacs", "domain"),
    "vlcs": KnownSet(4, 5, 10_729),
    "office_home": KnownSet(4, 65, 15_588, "flwrlabs/office-home", "domain"),
    "terra_incognita": KnownSet(4, 10, 24_788),
    "domain_net": KnownSet(6, 345, 586_575, "wltjr1007/DomainNet", "domain"),
}


def find_set(name: str) -> tuple[str, str | None]:
    """What to load for a name of the table, and its column of domains; other names are returned as they are.

    Raises:
        FileNotFoundError: one without Hub id; says what to download.
    """
    known = KNOWN_SETS.get(name)
    if known is None:
        return name, None
    if known.hub_id is None:
        raise FileNotFoundError(
            f"{name!r} has no Hub id that we know of: download it ({known.domains} domains, {known.classes} classes, "
            f"{known.images:,} images; domainbed/scripts/download.py of facebookresearch/DomainBed names the places) "
            "and give its folder, sorted as DOMAIN/CLASS/image."
        )
    return known.hub_id, known.domain_column


def account(name: str, given: DomainData) -> str | None:
    """Whether a set of the table is whole, in words; None for others."""
    known = KNOWN_SETS.get(name)
    if known is None:
        return None
    found = (len(given.domain_names), len(given.class_names or []), len(given.rows))
    wanted = (known.domains, known.classes, known.images)
    checked = "" if known.verified else f" The Hub id {known.hub_id} was not checked by us."
    if found == wanted:
        return f"{name}: the whole set, as published ({known.images:,} images).{checked}"
    return (
        f"{name}: not the whole set, so that published figures do not compare: {found[0]} domains, {found[1]} classes, "
        f"{found[2]:,} images of {wanted[0]}, {wanted[1]} and {wanted[2]:,}.{checked}"
    )
