"""Pictures with a domain each, and a class where there are labels.

| what is given | domains | classes |
|---|---|---|
| a column of domains | its values | the label column |
| a folder of images | folders of the first level (below train, test ... where there are these) | of the second level |
| a number of clusters | k-means clusters of colours and edges of the pictures | the label column, or folders |

All splits count together, train, validation and test: a domain or a class may be in one of them only. Only for clusters
pictures are decoded here.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor

from ..data.folder_scan import differing_by_spelling
from ..data.image_data import ImageData, load_images
from ..data.subsets import random_rows
from ..embedding.embeddings_table import dataset_fingerprint
from .domain_checks import check_domains
from .domain_clusters import domain_clusters

_NUMBER = "row_number"
_OF_RANK = "--cluster_domains N of hf-dpssl rank and zood makes domains of the pictures"
_NO_CLASSES = "hf-dpssl rank --no_labels needs none."


@dataclass(frozen=True)
class DomainData:
    """Pictures of several domains.

    Attributes:
        data: how the pictures are read; its "label" is the row's number in `images`.
        images: all splits in one.
        domains: (N,) domain of each row; domain_names: by id.
        labels: (N,) class of each row, or None; class_names: by id, or None.
        rows: those that are used, ascending.
        origin: where the domains come from, in words.
        fingerprint: of images and rows.
    """

    data: ImageData
    images: Dataset
    domains: Tensor
    domain_names: list[str]
    labels: Tensor | None
    class_names: list[str] | None
    rows: Sequence[int]
    fingerprint: str
    origin: str


def load_domains(
    name: str,
    *,
    domain_column: str | None = None,
    label_column: str | None = None,
    image_column: str | None = None,
    revision: str | None = None,
    labelled: bool = True,
    limit: int | None = None,
    clusters: int | None = None,
    seed: int = 0,
) -> DomainData:
    """Load a data set by the rules at the top of this file, and check that each domain can be left out.

    Args:
        name, label_column, image_column, revision: as in `load_images`.
        domain_column: of domains; None: those are folders.
        labelled: whether classes are needed.
        limit: at most so many pictures, drawn at random, of each class of each domain its share.
        clusters: so many domains are made of the pictures, in place of a column or folders.
        seed: of that draw, and of the clusters' first centres.

    Raises:
        ValueError: what `load_images` and `check_domains` refuse, no domains or no classes; says what to do.
    """
    if limit is not None and limit < 4:
        raise ValueError(f"at least 4 images are needed, two of each of two domains, got a limit of {limit}.")
    if domain_column is not None and domain_column == label_column:
        raise ValueError(f"domains and classes cannot both be the column {domain_column!r}.")
    if domain_column is not None and clusters is not None:
        raise ValueError(f"domains are the column {domain_column!r} or clusters: give --domain_column or the latter.")
    options = {"image_column": image_column, "revision": revision, "hold_out": False, "evaluation_split": "every"}
    data = load_images(name, label_column=label_column if clusters else domain_column, **options)
    images = _in_one(data)
    domains = None
    names = data.class_names or []
    layout = "mend the labels"
    if clusters is not None:
        labels, class_names = _classes(name, None, label_column, options) if labelled else (None, None)
        names = [f"cluster {number}" for number in range(clusters)]
        origin = f"{clusters} clusters of the pictures' colours and edges"
    elif domain_column is None:
        inside = _folders(name, data, images)
        domains = torch.tensor(images[data.label_column][:])
        class_names = sorted({folder for folder in inside if folder is not None})
        if labelled and (alike := differing_by_spelling(class_names)):
            raise ValueError(f"the class folders {alike} of {name} differ by spelling only: rename them to one name.")
        ids = {folder: number for number, folder in enumerate(class_names)} | {None: -1}
        labels = torch.tensor([ids[folder] for folder in inside])
        layout = f"sort them as DOMAIN/CLASS/image ({_OF_RANK} where folders are classes only)"
        origin = "the folders of the first level"
    else:
        domains = torch.tensor(images[domain_column][:])
        if bare := int((domains < 0).sum()):
            raise ValueError(f"{bare} of {len(domains)} images of {name!r} have no domain in {domain_column!r}.")
        labels, class_names = _classes(name, domain_column, label_column, options) if labelled else (None, None)
        origin = f"the column {domain_column!r}"
    if not labelled:
        labels = class_names = None
    elif bare := int((labels < 0).sum()):
        raise ValueError(f"{bare} of {len(labels)} images of {name!r} have no class: {layout}. {_NO_CLASSES}")
    rows = range(len(images))
    if limit is not None and limit < len(images):
        parts = [ids for ids in (domains, labels) if ids is not None]
        groups = torch.stack(parts, 1).unique(dim=0, return_inverse=True)[1].tolist() if parts else None
        rows = random_rows(len(images), limit, labels=groups, seed=seed)
    chosen = torch.tensor(list(rows))
    if clusters is not None:
        domains = torch.full((len(images),), -1)
        domains[chosen] = domain_clusters(data, images, list(rows), clusters, seed=seed)
    if len(names) < 2:
        raise ValueError(
            f"all images of {name!r} are of one domain: ranking leaves domains out, and needs two or more."
        )
    try:
        check_domains(labels[chosen] if labelled else None, domains[chosen], class_names, names)
    except ValueError as error:
        if clusters is None:
            raise
        more = "Clusters depend on the pictures: try fewer clusters, or another --seed."
        raise ValueError(f"{error} {more}") from error
    splits = {"train": data.train} | ({} if data.evaluation is None else {"evaluation": data.evaluation})
    # Which rows are drawn depends on what has a share in them.
    drawn = hashlib.sha256(repr(list(rows)).encode()).hexdigest()[:16]
    fingerprint = f"{dataset_fingerprint(splits)}-{drawn}"
    images = images.select_columns([data.image_column]).add_column(_NUMBER, list(range(len(images))))
    reading = replace(data, label_column=_NUMBER)
    return DomainData(reading, images, domains, names, labels, class_names, rows, fingerprint, origin)


def _in_one(data: ImageData) -> Dataset:
    return data.train if data.evaluation is None else concatenate_datasets([data.train, data.evaluation])


def _classes(name: str, domain_column: str | None, label_column: str | None, options: dict) -> tuple[Tensor, list[str]]:
    data = load_images(name, label_column=label_column, domain_column=domain_column, **options)
    if data.class_names is None:
        why = f" ({data.label_problem})" if data.label_problem else ""
        raise ValueError(f"{name!r} has no classes{why}: name their column with --label_column. {_NO_CLASSES}")
    return torch.tensor(_in_one(data)[data.label_column][:]), data.class_names


def _folders(name: str, data: ImageData, images: Dataset) -> list[str | None]:
    """The folder below that of the domain, of each image; None where there is none."""
    root = Path(name).expanduser()
    paths = [value["path"] if isinstance(value, dict) else None for value in images[data.image_column][:]]
    if not root.is_dir() or not all(path and Path(path).is_relative_to(root) for path in paths):
        raise ValueError(
            f"{name!r} is no folder of images: name the column of the domains with --domain_column ({_OF_RANK})."
        )
    if data.class_names is None:
        raise ValueError(
            f"{name!r} has no folders of domains: sort the images as DOMAIN/CLASS/image, two domains or more "
            f"({_OF_RANK})."
        )
    found = []
    for path in paths:
        parts = [unicodedata.normalize("NFC", part) for part in Path(path).relative_to(root).parts]
        below = parts[1:] if parts[0] in data.class_names else parts[2:]  # a split stands above
        found.append(below[0] if len(below) > 1 else None)
    return found
