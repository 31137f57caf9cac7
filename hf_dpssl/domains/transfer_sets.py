"""The nine sets of the transfer suite: where they come from, how they are split, and whether they are whole.

A set is read from what the user names (a folder, a parquet file, a Hub id, a name of the table of data sets), else from
the Hub. Its splits are train, validation where there is one, and test; without a validation split a fifth of each class
of train is held out, drawn with seed 0. Caltech101 has no split of its own: 30 pictures of each class, drawn with seed
0, are train, and all others test.

What has not the counts of the set, or CIFAR as JPEG, is measured all the same, under its own name and as a part.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import datasets
import numpy as np
from PIL import Image

from ..data.image_data import ImageData, load_images
from ..data.subsets import random_rows
from ..runs.redaction import without_folders

_VALIDATION_SHARE = 0.2


@dataclass(frozen=True)
class TransferSet:
    """One of the nine. `hub_id`@`revision` with `image_column` and `label_column`; `verified`: really loaded by us.

    train counts validation too; per_class: (fewest, most) test images of a class, where the split is balanced;
    drawn: training images of each class, of a set without splits. metric: "top1", or "per_class", the mean over
    classes of percent right. published: percent of MoCo-v2 and t-MoCo-v2, pre-trained on ImageNet, fine-tuned.
    """

    title: str
    classes: int
    train: int
    test: int
    metric: str
    hub_id: str
    label_column: str
    published: tuple[float, float]
    home: str
    image_column: str = "image"
    revision: str = "main"
    verified: bool = False
    per_class: tuple[int, int] | None = None
    drawn: int | None = None
    lossless: bool = False


TRANSFER_SETS = {
    "aircraft": TransferSet(
        "FGVC Aircraft", 100, 6667, 3333, "per_class", "HuggingFaceM4/FGVC-Aircraft", "variant", (82.75, 82.78),
        "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft", per_class=(33, 34),
    ),
    "birdsnap": TransferSet(
        "Birdsnap", 500, 47386, 2443, "top1", "sasha/birdsnap", "label", (44.53, 53.46),
        "https://thomasberg.org",
    ),
    "caltech101": TransferSet(
        "Caltech101", 102, 3060, 6084, "per_class", "flwrlabs/caltech101", "label", (83.31, 86.81),
        "https://data.caltech.edu/records/mzrjq-6wc02", drawn=30,
    ),
    "cars": TransferSet(
        "Stanford Cars", 196, 8144, 8041, "top1", "tanganke/stanford_cars", "label", (85.24, 86.17),
        "https://huggingface.co/datasets/tanganke/stanford_cars",
        revision="9abf6cf7d6dfa7b95152a0d6e791ea9435b47a40",
    ),
    "cifar10": TransferSet(
        "CIFAR-10", 10, 50000, 10000, "top1", "uoft-cs/cifar10", "label", (95.81, 96.04),
        "https://www.cs.toronto.edu/~kriz/cifar.html", "img", per_class=(1000, 1000), lossless=True,
    ),
    "cifar100": TransferSet(
        "CIFAR-100", 100, 50000, 10000, "top1", "uoft-cs/cifar100", "fine_label", (72.75, 78.32),
        "https://www.cs.toronto.edu/~kriz/cifar.html", "img", per_class=(100, 100), lossless=True,
    ),
    "dtd": TransferSet(
        "DTD", 47, 3760, 1880, "top1", "tanganke/dtd", "label", (71.22, 69.20),
        "https://www.robots.ox.ac.uk/~vgg/data/dtd", per_class=(40, 40),
    ),
    "pets": TransferSet(
        "Oxford-IIIT Pets", 37, 3680, 3669, "per_class", "timm/oxford-iiit-pet", "label", (86.70, 87.95),
        "https://www.robots.ox.ac.uk/~vgg/data/pets", per_class=(88, 100),
    ),
    "sun397": TransferSet(
        "SUN397", 397, 19850, 19850, "top1", "tanganke/sun397", "label", (56.05, 59.30),
        "https://vision.princeton.edu/projects/2010/SUN", per_class=(50, 50),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Split:
    """Rows of a split of loaded pictures, with the class of each."""

    images: datasets.Dataset
    rows: Sequence[int]
    labels: np.ndarray


@dataclass(frozen=True)
class TransferData:
    """A set as it was found.

    Attributes:
        key: in TRANSFER_SETS.
        source: what it was read from.
        title: what it may be called: the set's own title only where it is whole.
        whole: whether figures compare with published ones; difference: why not, or None.
        data: how pictures are read; class_names: by id.
        train, validation, test: disjoint.
    """

    key: str
    source: str
    title: str
    whole: bool
    difference: str | None
    data: ImageData
    class_names: list[str]
    train: Split
    validation: Split
    test: Split


def load_transfer_set(key: str, source: str | None = None) -> TransferData:
    """One set, from `source` or, where that is None, from the Hub.

    Raises:
        ValueError: no such set, pictures without classes, no test split, or a source that cannot be read: the message
            says what to download and where to put it.
    """
    if key not in TRANSFER_SETS:
        raise ValueError(f"{key!r} is no set of the transfer suite: {', '.join(TRANSFER_SETS)}.")
    spec = TRANSFER_SETS[key]
    of_hub = source is None
    source = source or f"{spec.hub_id}@{spec.revision}"
    columns = {"image_column": spec.image_column, "label_column": spec.label_column} if of_hub else {}
    try:
        data = load_images(source, **columns, hold_out=False, evaluation_split="test")
        data.require_classes("the transfer suite needs: mend the labels")
    except (ValueError, OSError) as error:
        raise ValueError(f"{spec.title} cannot be read: {error} {_how_to_get(key)}") from error
    every = _split(data.train, data)
    if data.evaluation is not None:
        test = _split(data.evaluation, data)
        with_validation = load_images(source, **columns, hold_out=False, evaluation_split="validation")
        held_out = with_validation.evaluation
        if held_out is None:
            train, validation = _held_out(every)
        else:
            if with_validation.class_names != data.class_names:
                raise ValueError(f"the validation split of {source!r} has other classes than its test split.")
            train, validation = every, _split(held_out, data)
    elif spec.drawn:
        train, test = _drawn(every, spec.drawn, source)
        train, validation = _held_out(train)
    else:
        raise ValueError(f"{source!r} has no test split. {_how_to_get(key)}")
    difference = _difference(spec, data, train, validation, test)
    title = spec.title if difference is None else f"{without_folders(data.name)} ({difference}; not {spec.title})"
    names = data.class_names
    return TransferData(key, source, title, difference is None, difference, data, names, train, validation, test)


def _how_to_get(key: str) -> str:
    spec = TRANSFER_SETS[key]
    layout = "CLASS/image" if spec.drawn else "train/CLASS/image and test/CLASS/image (val/ where there is one)"
    return (
        f"Download {spec.title} ({spec.classes} classes, {spec.train} + {spec.test} images) from {spec.home}, sort it "
        f"into a folder as {layout}, or write parquet files of these splits, and pass --data {key}=FOLDER; or name a "
        f"copy on the Hub, --data {key}=ORG/NAME@REVISION. The default {spec.hub_id} was "
        f"{'' if spec.verified else 'not '}loaded by us."
    )


def _split(images: datasets.Dataset, data: ImageData) -> Split:
    return Split(images, range(len(images)), np.asarray(images[data.label_column][:]))


def _held_out(split: Split) -> tuple[Split, Split]:
    """Without a fifth of each class, and that fifth."""
    count = max(1, round(_VALIDATION_SHARE * len(split.rows)))
    chosen = set(random_rows(len(split.rows), count, labels=split.labels))
    places = [[place for place in range(len(split.rows)) if (place in chosen) == wanted] for wanted in (False, True)]
    return tuple(Split(split.images, [split.rows[p] for p in part], split.labels[part]) for part in places)


def _drawn(split: Split, count: int, source: str) -> tuple[Split, Split]:
    """So many of each class, drawn at random, and all others."""
    sizes = np.bincount(split.labels)
    if sizes[sizes > 0].min() <= count:
        raise ValueError(f"{source!r} has a class of {sizes[sizes > 0].min()} images: more than {count} are needed.")
    order = np.random.default_rng(0).permutation(len(split.labels))
    order = order[np.argsort(split.labels[order], kind="stable")]
    starts = np.r_[0, np.cumsum(sizes)[:-1]]
    chosen = set(np.concatenate([order[start : start + count] for start in starts[sizes > 0]]).tolist())
    places = [[place for place in range(len(split.rows)) if (place in chosen) == wanted] for wanted in (True, False)]
    return tuple(Split(split.images, part, split.labels[part]) for part in places)


def _difference(spec: TransferSet, data: ImageData, train: Split, validation: Split, test: Split) -> str | None:
    """Why this is not the whole set, or None."""
    counts = (len(data.class_names), len(train.rows) + len(validation.rows), len(test.rows))
    if counts != (spec.classes, spec.train, spec.test):
        return (
            f"{counts[0]} of {spec.classes} classes, {counts[1]} of {spec.train} training and {counts[2]} of "
            f"{spec.test} test images"
        )
    sizes = np.bincount(test.labels, minlength=spec.classes)
    if spec.per_class and not spec.per_class[0] <= sizes.min() <= sizes.max() <= spec.per_class[1]:
        return f"{sizes.min()} to {sizes.max()} test images a class, not {spec.per_class[0]} to {spec.per_class[1]}"
    if spec.lossless and _format(test.images[int(test.rows[0])][data.image_column]) == "JPEG":
        return "JPEG, which loses what the original pixels hold"
    return None


def _format(value: object) -> str | None:
    if isinstance(value, dict):
        value = io.BytesIO(value["bytes"]) if value.get("bytes") is not None else value.get("path")
    try:
        with Image.open(value) as picture:
            return picture.format
    except (OSError, ValueError, AttributeError):
        return None
