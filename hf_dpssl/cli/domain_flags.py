"""Flags of the commands that measure a zoo on pictures of several domains."""

from __future__ import annotations

import argparse
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..embedding.choices import BAD_IMAGES, KINDS
from ..runs.console import printable

if TYPE_CHECKING:
    from ..domains.domain_data import DomainData

_COLUMNS = ("domain_column", "label_column", "image_column")
_CLUSTERS = 3  # of a folder that names no domains: the fewest of which a target leaves two
READING = ("features", "batch_size", "on_bad_image", "seed")


def add_domain_flags(parser: argparse.ArgumentParser, output: str) -> None:
    """Which pictures, how they are read, and `output`, the default folder of results."""
    add = parser.add_argument
    add("--domain_column", help="column of domains; without it the folders of the first level are")
    add(
        "--cluster_domains",
        type=int,
        metavar="N",
        help="domains are N clusters of the pictures' colours and edges; 3 of a folder CLASS/image, which names none",
    )
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


def load_given(args: argparse.Namespace, *, labelled: bool) -> DomainData:
    """The pictures that the flags name; errors of `load_set`.

    A folder of classes alone, where no flag says what domains are, is made three clusters of, which is said.
    """
    from ..domains.known_sets import KNOWN_SETS, load_set

    clusters = args.cluster_domains
    because = ""
    named = args.domain_column is not None or clusters is not None or args.dataset in KNOWN_SETS
    if labelled and not named and _of_classes_only(args.dataset):
        clusters, because = _CLUSTERS, ", as the folders are classes only"
        print(
            printable(
                f"note: the folders of {args.dataset} are classes only, so that domains are {clusters} clusters of the "
                "pictures' colours and edges; --cluster_domains N makes another number, folders DOMAIN/CLASS name them."
            ),
            file=sys.stderr,
        )
    columns = {name: getattr(args, name) for name in _COLUMNS}
    how = {"labelled": labelled, "limit": args.images, "seed": args.seed, "clusters": clusters}
    given = load_set(args.dataset, **columns, revision=args.dataset_revision, **how)
    return replace(given, origin=given.origin + because)


def _of_classes_only(name: str) -> bool:
    """Whether it is a folder CLASS/image, or SPLIT/CLASS/image: no folder lies between picture and class."""
    from ..data.folder_scan import scan_folder

    root = Path(name).expanduser()
    try:
        scan = scan_folder(root, together=True) if root.is_dir() else None
    except ValueError:  # no folder of images, or one that is refused when it is loaded
        return False
    if scan is None or scan.class_names is None:
        return False
    for path, _ in (row for rows in scan.splits.values() for row in rows):
        first, *rest = (unicodedata.normalize("NFC", part) for part in Path(path).relative_to(root).parts)
        if len(rest) > (1 if first in scan.class_names else 2):  # a split stands above
            return False
    return True


def options_of(args: argparse.Namespace, *more: str) -> dict:
    """What decides the numbers, for the results file."""
    return {
        name: getattr(args, name)
        for name in (*_COLUMNS, "cluster_domains", "features", "images", "on_bad_image", *more)
    }


def counts_of(given: DomainData) -> dict[str, int]:
    """Pictures of each domain."""
    domains = given.domains[list(given.rows)]
    return {name: int((domains == number).sum()) for number, name in enumerate(given.domain_names)}


def notes_of(args: argparse.Namespace, given: DomainData) -> list[str]:
    """Whether a set of the table is whole, and which classes a domain lacks."""
    from ..domains.domain_checks import missing_classes, notes_of_missing
    from ..domains.known_sets import account

    whole = account(args.dataset, given) if args.cluster_domains is None else None
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
