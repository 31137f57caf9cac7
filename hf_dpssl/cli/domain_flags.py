"""Flags of the commands that measure a zoo on pictures of several domains."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..embedding.choices import BAD_IMAGES, KINDS

if TYPE_CHECKING:
    from ..domains.domain_data import DomainData

_COLUMNS = ("domain_column", "label_column", "image_column")
READING = ("features", "batch_size", "on_bad_image", "seed")


def add_domain_flags(parser: argparse.ArgumentParser, output: str) -> None:
    """Which pictures, how they are read, and `output`, the default folder of results."""
    add = parser.add_argument
    add("--domain_column", help="column of domains; without it the folders of the first level are")
    add("--label_column", help="column of classes; found by its type when not given")
    add("--image_column", help="column of pictures; found by its type when not given")
    add("--dataset_revision", help="branch, tag or commit of a Hub data set")
    add("--features", default="features", choices=KINDS, help="of the backbone, or after the head")
    add("--images", type=int, help="at most so many pictures, drawn at random; default: all")
    add("--batch_size", type=int, default=64, help="pictures embedded at once")
    add("--on_bad_image", default="error", choices=BAD_IMAGES, help="unreadable pictures")
    add("--seed", type=int, default=0, help="of all draws")
    add("--output_dir", default=output, help="folder of the results and of the features, which are kept")
    add("--json", action="store_true", help="print the results as JSON")


def load_given(args: argparse.Namespace, *, labelled: bool, clusters: int | None = None) -> DomainData:
    """The pictures that the flags name; errors of `load_set`."""
    from ..domains.known_sets import load_set

    columns = {name: getattr(args, name) for name in _COLUMNS}
    how = {"labelled": labelled, "limit": args.images, "seed": args.seed, "clusters": clusters}
    return load_set(args.dataset, **columns, revision=args.dataset_revision, **how)


def options_of(args: argparse.Namespace, *more: str) -> dict:
    """What decides the numbers, for the results file."""
    return {name: getattr(args, name) for name in (*_COLUMNS, "features", "images", "on_bad_image", *more)}


def counts_of(given: DomainData) -> dict[str, int]:
    """Pictures of each domain."""
    domains = given.domains[list(given.rows)]
    return {name: int((domains == number).sum()) for number, name in enumerate(given.domain_names)}


def notes_of(args: argparse.Namespace, given: DomainData, *, clusters: int | None = None) -> list[str]:
    """Whether a set of the table is whole, and which classes a domain lacks."""
    from ..domains.domain_checks import missing_classes, notes_of_missing
    from ..domains.known_sets import account

    whole = account(args.dataset, given) if clusters is None else None
    notes = [] if whole is None else [whole]
    if given.labels is None:
        return notes
    rows = list(given.rows)
    found = missing_classes(given.labels[rows], given.domains[rows], given.class_names, given.domain_names)
    return notes + notes_of_missing(found)


def precision_lines(measured: list[dict]) -> list[str]:
    """What stands below a table where a GPU computed features in bfloat16."""
    if all(entry.get("precision") != "bfloat16" for entry in measured):
        return []
    return ["features were computed in bfloat16 (autocast): their third digit is not that of other machines"]
