"""Which images: one table of data sets, and the way from `--dataset` to splits with known columns and classes.

`--dataset` takes a name of the table, a Hub id (`org/name`, `org/name@revision`), a folder of
images or of parquet or WebDataset tar files or one written by `save_to_disk`, a parquet or tar file, or a union `a+b`.
Parquet and tar files of a folder are of the split whose word (train, val, test, ... of `SPLITS`) stands in their name,
else in that of the nearest folder below the given one; all of them are "train" where no name has one.
A name of the table comes before a path of that name, which stderr says; any other path comes before the Hub.
Nothing is decoded here: the image column holds bytes and paths, and `batches.py` decodes them.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import datasets
from datasets import ClassLabel, Dataset, Image, IterableDataset
from datasets.arrow_writer import ArrowWriter
from datasets.fingerprint import get_temporary_cache_files_directory
from datasets.packaged_modules.cache.cache import Cache
from huggingface_hub import snapshot_download

from .classes import NoClasses, columns_of, label_candidates, relabel_all, with_classes
from .content import content_digest
from .digits import load_digits
from .folder_scan import SPLITS, FolderScan, scan_folder, split_words
from .keyed_random import permutation
from .subsets import random_rows
from .tars import check_tars, with_json_labels

_GREY = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
_CIFAR100 = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
_HELD_OUT_SHARE = 0.1  # of a data set that has one split only
_MOST_SHARDS = 64  # of a stream of rows that lie here: readers (processes x workers) that can have their own
_ROWS_OF_A_SHARD = 256  # at least
_EVALUATION_SPLITS = (*SPLITS["validation"], *SPLITS["test"])


@dataclass(frozen=True)
class DatasetEntry:
    """One line of the table. `local` is the stem of parquet files under DPSSL_DATA; `checked`: really loaded by us.

    `statistics` are mean and std of images in [0, 1]; `augmentation` names a preset of transforms.py.
    """

    hub_id: str | None = None
    revision: str = "main"
    config: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    train_split: str | None = None
    evaluation_split: str | None = None
    image_size: int = 32
    statistics: tuple = _IMAGENET
    augmentation: str = "natural"
    licence: str = "unknown"
    local: str | None = None
    checked: bool = False


def _cifar(hub_id: str, label_column: str, statistics: tuple) -> DatasetEntry:
    return DatasetEntry(hub_id, "main", None, "img", label_column, "train", "test", 32, statistics, licence="unknown")


def _local(stem: str, size: int, augmentation: str, licence: str, statistics: tuple = _IMAGENET) -> DatasetEntry:
    return DatasetEntry(
        None, image_column="image", label_column="label", image_size=size, statistics=statistics,
        augmentation=augmentation, licence=licence, local=stem, checked=True,
    )  # fmt: skip


_RESEARCH = "research use, cite Krizhevsky 2009"
TABLE = {
    "digits": DatasetEntry(
        image_column="image", label_column="label", image_size=16, statistics=_GREY,
        augmentation="digits", licence="CC BY 4.0 (UCI, through scikit-learn)", checked=True,
    ),
    "mnist": DatasetEntry(
        "ylecun/mnist", "main", None, "image", "label", "train", "test", 28, _GREY,
        "digits", "CC BY-SA 3.0", "mnist", True,
    ),
    "cifar10": _cifar("uoft-cs/cifar10", "label", _CIFAR),
    "cifar100": _cifar("uoft-cs/cifar100", "fine_label", _CIFAR100),
    "imagenet-1k": DatasetEntry(
        "ILSVRC/imagenet-1k", "main", None, "image", "label", "train", "validation", 224,
        augmentation="imagenet", licence="ImageNet terms, non-commercial research",
    ),
    "celeba-hq": DatasetEntry(
        "korexyz/celeba-hq-256x256", "main", None, "image", "label", "train", "validation", 256,
        augmentation="faces", licence="CelebA terms, non-commercial research",
    ),
    "ffhq": DatasetEntry(
        "merkol/ffhq-256", "main", None, "image", None, "train", None, 256,
        augmentation="faces", licence="CC BY-NC-SA 4.0",
    ),
    "cifar10-jpeg": _local("cifar10-jpeg", 32, "natural", _RESEARCH, _CIFAR),
    "cifar10-jpeg-small": _local("cifar10-jpeg-small", 32, "natural", _RESEARCH, _CIFAR),
    "mnist-m-small": _local("mnist-m-small", 32, "digits-on-photos", "non-commercial research"),
    "pacs-64px": _local("pacs-64px", 64, "natural", "research use, cite Li et al. 2017"),
    "tiny-imagenet-20c": _local("tiny-imagenet-20c", 64, "natural", "ImageNet terms, non-commercial research"),
    "caltech101-20c": _local("caltech101-20c", 128, "natural", "CC BY 4.0"),
    "dtd-10c-128px": _local("dtd-10c-128px", 128, "textures", "research"),
    "orl-faces": _local("orl-faces", 64, "faces", "free with credit to AT&T Cambridge"),
}  # fmt: skip


@dataclass
class ImageData:
    """Loaded splits. `image_column` holds bytes or paths; `class_names` is None for unlabelled data.

    `label_problem`: why there are no classes although columns may hold some, or None. `left_out`: how many files (or
    splits) of what are no part of it. `splits`: how the data set calls "train" and "evaluation".
    """

    name: str
    train: Dataset | IterableDataset
    evaluation: Dataset | IterableDataset | None
    image_column: str
    label_column: str | None
    class_names: list[str] | None
    entry: DatasetEntry
    fingerprint: str = field(default="")
    label_problem: str | None = None
    left_out: dict[str, int] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)

    @cached_property
    def content(self) -> str:
        """Digest of what the training split holds, wherever it lies; of a stream, which is not read, its name."""
        if isinstance(self.train, IterableDataset):
            return self.fingerprint
        return content_digest(self.train, self.image_column, self.label_column, self.class_names)

    def account(self) -> str:
        """One line without names of files or classes: images and classes of each split, and what was left out, why."""
        splits = {"train": self.train, "evaluation": self.evaluation}
        parts = [self._account_of(split, name) for name, split in splits.items() if split is not None]
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.left_out.items()))
        return f"{', '.join(parts)}; left out: {reasons or 'nothing'}"

    def _account_of(self, split, name: str) -> str:
        if isinstance(split, IterableDataset):
            classes = f"in {len(self.class_names)} classes" if self.class_names else "without classes"
            return f"a stream {classes} ({name})"
        if not self.class_names:
            return f"{len(split)} images without classes ({name})"
        counts = Counter(split[self.label_column][:])
        bare = counts.pop(-1, 0)
        more = f", {bare} of them without class" if bare else ""
        return f"{len(split)} images in {len(counts)} classes ({name}{more})"

    def random_rows(self, split: Dataset, limit: int | None, *, seed: int = 0) -> Sequence[int]:
        """Rows of a split in ascending order: a random subset of that size, of each class its share; None: all."""
        if limit is None or limit >= len(split):
            return range(len(split))
        labels = split[self.label_column][:] if self.label_column else None
        return random_rows(len(split), limit, labels=labels, seed=seed)

    def require_classes(self, purpose: str) -> None:
        """ValueError unless each image of both splits has a class; `purpose` is what needs it, and the way out."""
        if self.class_names is None:
            why = f" ({self.label_problem})" if self.label_problem else ""
            raise ValueError(f"{self.name!r} has no classes{why}, which {purpose}.")
        for name, split in (("training", self.train), ("held-out", self.evaluation)):
            labels = [] if split is None or isinstance(split, IterableDataset) else split[self.label_column][:]
            if bare := sum(label < 0 for label in labels):
                raise ValueError(
                    f"{bare} of {len(labels)} {name} images of {self.name!r} have no class, which {purpose}."
                )


def load_images(
    name: str,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    streaming: bool = False,
    revision: str | None = None,
    hold_out: bool = True,
    evaluation_split: str | None = None,
    domain_column: str | None = None,
) -> ImageData:
    """Load a data set by name of the table, Hub id, path or union; see the top of this file.

    Args:
        name: what `--dataset` says.
        image_column, label_column: override the table and the search by type.
        streaming: do not download first; splits are then `IterableDataset`s.
        revision: branch, tag or commit of a Hub data set; overrides the table and `@revision`.
        hold_out: a tenth of the images of a data set with one split becomes the evaluation split.
        evaluation_split: "validation" or "test": that one, under any of its usual names, and no other is evaluated on;
            default: the table's, or the first of them that there is. "every": validation, test and the table's in one,
            and with the training split they count as one set: a class may be in any of them.
        domain_column: one that is not searched for classes, and cannot be found to be theirs.

    Raises:
        ValueError: unknown name, missing column or empty split; says what was found and what to do.
        FileNotFoundError: a path, or a file under DPSSL_DATA, that is not there.
    """
    if "+" in name and not Path(name).exists():
        options = dict(image_column=image_column, label_column=label_column, streaming=streaming, revision=revision)
        options |= {"evaluation_split": evaluation_split, "domain_column": domain_column}
        return _union(name, [load_images(part.strip(), **options, hold_out=hold_out) for part in name.split("+")])
    together = evaluation_split == "every"
    entry, splits, scan = _open(name, streaming, revision, together)
    train, held_out, names, unused = _choose_splits(name, splits, entry, evaluation_split)
    image_column = _find_image_column(name, train, image_column or entry.image_column)
    wanted = label_column or (entry.label_column if entry.label_column != domain_column else None)
    train = with_json_labels(_undecoded(name, train, image_column), wanted)
    held_out = {s: with_json_labels(_undecoded(name, held_out[s], image_column), wanted) for s in held_out}
    candidates = [wanted] if wanted is not None else label_candidates(columns_of(train), (image_column, domain_column))
    evaluation = _together(name, held_out, [image_column, *(candidates if len(candidates) == 1 else [])])
    labels = _classes(name, train, evaluation, candidates, wanted, together)
    train, evaluation, label_column, class_names, problem = labels
    if evaluation is None and hold_out and not isinstance(train, IterableDataset):
        train, evaluation = _held_out(name, train, label_column)
        names["evaluation"] = f"a tenth of {names['train']}"
    columns = [image_column] + ([label_column] if label_column else [])
    splits = [None if s is None else s.select_columns(columns) for s in (train, evaluation)]
    data = ImageData(name, *splits, image_column, label_column, class_names, entry, label_problem=problem)
    data.fingerprint = f"{name} {revision}" if streaming else f"{name} {len(data.train)} {data.train._fingerprint}"
    data.left_out = (scan.counts() if scan else {}) | {f"unused split {split!r}": 1 for split in unused}
    data.splits = names
    _tell(data, scan)
    return data


def _tell(data: ImageData, scan: FolderScan | None) -> None:
    """What of a data set is not used, on stderr, by the first process."""
    if (data.left_out or data.label_problem) and int(os.environ.get("RANK", 0)) == 0:
        examples = f" ({scan.examples()})" if scan and scan.left_out else ""
        problem = f"; no classes: {data.label_problem}" if data.label_problem else ""
        print(f"{data.name}: {data.account()}{examples}{problem}", file=sys.stderr)


def _open(
    name: str, streaming: bool, revision: str | None, together: bool
) -> tuple[DatasetEntry, dict, FolderScan | None]:
    path = Path(name).expanduser()
    if name in TABLE and path.exists() and int(os.environ.get("RANK", 0)) == 0:
        note = f"note: {name} is the data set of the table; the path ./{name} is not read: give that if you mean it."
        print(note, file=sys.stderr)
    if name == "digits":
        splits = load_digits()
        return TABLE[name], {k: s.to_iterable_dataset(4) for k, s in splits.items()} if streaming else splits, None
    base, _, pinned = name.partition("@")
    entry = None if pinned and path.exists() else TABLE.get(base)
    if entry is not None and entry.local and not pinned and (files := _local_files(entry.local)):
        return entry, _load("parquet", data_files=files, streaming=streaming), None
    if entry is not None and entry.hub_id is None:
        raise FileNotFoundError(
            f"data set {name!r} is read from {entry.local}*.parquet in the folder that the environment variable "
            f"DPSSL_DATA names; it is {os.environ.get('DPSSL_DATA')!r}."
        )
    if entry is None and path.exists():
        licence = f"as the owner of {path.name} says"
        return DatasetEntry(image_size=64, licence=licence), *_load_path(path, streaming, together)
    if entry is None and (base.count("/") != 1 or name.startswith((".", "/", "~"))):
        close = difflib.get_close_matches(name, TABLE, 3)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise FileNotFoundError(
            f"{name!r} is no path, no Hub id of the form org/name and no name of the table: {', '.join(TABLE)}.{hint}"
        )
    entry = entry or DatasetEntry(base, image_size=64)
    revision = revision or pinned or entry.revision
    return entry, _load(entry.hub_id, entry.config, revision=revision, streaming=streaming), None


def _local_files(stem: str) -> dict[str, str]:
    folder = os.environ.get("DPSSL_DATA")
    if not folder:
        return {}
    candidates = {"train": f"{stem}-train", "test": f"{stem}-test", "validation": f"{stem}-val"}
    files = {split: Path(folder) / f"{file}.parquet" for split, file in candidates.items()}
    if not any(path.exists() for path in files.values()):
        files = {"train": Path(folder) / f"{stem}.parquet"}
    return {split: str(path) for split, path in files.items() if path.exists()}


def _load_path(path: Path, streaming: bool, together: bool) -> tuple[dict, FolderScan | None]:
    if path.is_file() and path.suffix not in (".parquet", ".tar"):
        raise ValueError(
            f"{path} is one {path.suffix or 'unnamed'} file: give a folder of images, or parquet or tar files."
        )
    if (path / "dataset_dict.json").is_file() or ((path / "state.json").is_file() and any(path.glob("*.arrow"))):
        return _saved_to_disk(path, streaming), None
    scan = scan_folder(path, together=together) if path.is_dir() else None
    if scan and scan.splits:
        return _scanned_splits(scan, streaming), scan
    found = [path] if scan is None else sorted(path / name for name in scan.parquet or scan.tars)
    tars = found[0].suffix.lower() == ".tar"
    if tars:
        check_tars(found, whole=not streaming)
    files = _files_by_split(path, found)
    return _load("webdataset" if tars else "parquet", data_files=files, streaming=streaming), scan


def _files_by_split(root: Path, found: list[Path]) -> dict[str, list[str]]:
    """Parquet or tar files by the word of a split that names them, as at the top of this file."""
    files: dict[str | None, list[str]] = {}
    for file in found:
        names = [file.stem, *reversed(file.relative_to(root).parts[:-1])]
        words = next((words for name in names if (words := split_words(name))), [None])
        if len(words) > 1 and len(found) > 1:
            raise ValueError(f"{file} speaks of the splits {' and '.join(words)}: rename it, for one of them.")
        word = "train" if words[0] in SPLITS["train"] else words[0]
        files.setdefault(word, []).append(str(file))
    bare = files.pop(None, [])
    if bare and files:
        named = {word: Path(paths[0]).name for word, paths in files.items()}
        raise ValueError(
            f"of the files of {root} some name a split ({named}) and {len(bare)} do not ({Path(bare[0]).name}"
            f"{', ...' if len(bare) > 1 else ''}): put train, val or test into each name, or move files away."
        )
    return {"train": bare} if bare else files


def _saved_to_disk(path: Path, streaming: bool) -> dict:
    """The splits of a folder that `save_to_disk` of `datasets` has written."""
    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path} looks like a folder of save_to_disk and cannot be read ({type(error).__name__}: {error}): copy "
            "or save it again."
        ) from error
    splits = dict(found) if isinstance(found, datasets.DatasetDict) else {"train": found}
    return {name: _shuffled_stream(split) for name, split in splits.items()} if streaming else splits


def _shuffled_stream(split: Dataset) -> IterableDataset:
    """The rows in one random order, and in shards: those of a folder lie by class, which no buffer would mix."""
    order = permutation(len(split), seed=0, epoch=0).numpy()
    rows = split.select(order, indices_cache_file_name=_temporary_file())
    return rows.to_iterable_dataset(max(1, min(_MOST_SHARDS, len(rows) // _ROWS_OF_A_SHARD)))


def _scanned_splits(scan: FolderScan, streaming: bool) -> dict:
    """The splits of a folder of images."""
    features = datasets.Features({"image": Image(decode=False)})
    if scan.class_names:
        features["label"] = ClassLabel(names=scan.class_names)
    splits = {}
    for name, rows in scan.splits.items():
        columns = {"image": [path for path, _ in rows], "label": [label for _, label in rows]}
        split = Dataset.from_dict({column: columns[column] for column in features}, features=features)
        splits[name] = _mapped(split)
        splits[name]._fingerprint = _fingerprint_of_files(split._fingerprint, columns["image"])
    return {name: _shuffled_stream(split) for name, split in splits.items()} if streaming else splits


def _mapped(split: Dataset) -> Dataset:
    """The same rows in a file: in memory all of them would be sent to every worker."""
    file = _temporary_file()
    with ArrowWriter(path=file, features=split.features) as writer:
        writer.write_table(split.data.table)
        writer.finalize()
    return Dataset.from_file(file)


def _temporary_file() -> str:
    """A new file's name; `datasets` deletes it when this process ends."""
    return str(Path(tempfile.mkdtemp(dir=get_temporary_cache_files_directory())) / "rows.arrow")


def _fingerprint_of_files(rows: str, paths: list[str]) -> str:
    """That of the rows, which know names only, with size and time of each file: another picture of the same name."""
    digest = hashlib.sha256(rows.encode())
    for path in paths:
        about = os.stat(path)
        digest.update(f"{about.st_size} {about.st_mtime_ns};".encode())
    return digest.hexdigest()[: len(rows)]


def _load(source: str, config: str | None = None, **options) -> dict:
    if "data_files" in options and "split" not in options:
        # One by one: together, the class names of the first split would silently become those of all.
        files = options.pop("data_files").items()
        return {split: _load(source, data_files={split: file}, split=split, **options) for split, file in files}
    try:
        if "revision" in options:
            builder = datasets.load_dataset_builder(source, config, revision=options["revision"])
            if isinstance(builder, Cache):  # no Hub, and this is the copy cached last, of whatever revision
                snapshot = snapshot_download(
                    source, repo_type="dataset", revision=options["revision"], local_files_only=True
                )
                return datasets.load_dataset(snapshot, config, **options | {"revision": None})
        return datasets.load_dataset(source, config, **options)
    except (datasets.exceptions.DatasetsError, ConnectionError, OSError, ValueError) as error:
        where = options.get("data_dir") or options.get("data_files", {}).get(options.get("split"))
        advice = "Check that the files can be read, and that each split holds at least one image."
        if where is None:
            where = f"{source} at revision {options['revision']!r} on {datasets.config.HF_ENDPOINT}"
            advice = "Check the name and the network, log in for a gated or private set, or unset HF_HUB_OFFLINE."
        raise ValueError(f"cannot load the data set {where}: {type(error).__name__}: {error}. {advice}") from error


def _choose_splits(name: str, splits: dict, entry: DatasetEntry, wanted: str | None) -> tuple:
    """The split to train on, those to evaluate on, their names by part, and the names of others."""
    names = list(splits)
    train_name = entry.train_split or next((s for s in SPLITS["train"] if s in splits), None)
    train_name = names[0] if len(names) == 1 and not entry.train_split else train_name
    if train_name not in splits:
        raise ValueError(f"data set {name!r} has the splits {names}, but no training split {train_name or 'train'!r}.")
    candidates = [entry.evaluation_split] if entry.evaluation_split else _EVALUATION_SPLITS
    if wanted == "every":
        candidates = dict.fromkeys([entry.evaluation_split, *_EVALUATION_SPLITS])
    elif wanted is not None:
        candidates = SPLITS[wanted]
    found = [split for split in candidates if split in splits and split != train_name]
    evaluation_names = found if wanted == "every" else found[:1]
    for split_name in (train_name, *evaluation_names):
        if not isinstance(splits[split_name], IterableDataset) and len(splits[split_name]) == 0:
            raise ValueError(f"split {split_name!r} of data set {name!r} is empty.")
    chosen = {"train": train_name} | ({"evaluation": " + ".join(evaluation_names)} if evaluation_names else {})
    unused = [split for split in names if split not in (train_name, *evaluation_names)]
    return splits[train_name], {split: splits[split] for split in evaluation_names}, chosen, unused


def _together(name: str, splits: dict, columns: list[str]):
    """These columns of all of them in one split; one alone as it is, and None of none.

    Rows of a split that lacks a column hold None there.
    """
    if len(splits) < 2:
        return next(iter(splits.values()), None)
    splits = {
        split: rows.select_columns([c for c in columns if c in columns_of(rows)]) for split, rows in splits.items()
    }
    known: dict[str, tuple] = {}
    for split, rows in splits.items():
        for column, feature in columns_of(rows).items():
            first, theirs = known.setdefault(column, (split, feature))
            if feature != theirs:
                raise ValueError(
                    f"the splits {first!r} and {split!r} of data set {name!r} differ in the column {column!r}, which "
                    "has another type or other names of classes there: give both the same ones."
                )
    return datasets.concatenate_datasets(list(splits.values()))


def _held_out(name: str, split: Dataset, label_column: str | None) -> tuple[Dataset, Dataset]:
    """A split without a fixed tenth of its images, of each class its share, and that tenth."""
    if len(split) == 1:
        raise ValueError(f"data set {name!r} holds a single image: nothing is left to train on.")
    labels = split[label_column][:] if label_column else None
    chosen = set(random_rows(len(split), max(1, int(len(split) * _HELD_OUT_SHARE)), labels=labels))
    parts = [row for row in range(len(split)) if row not in chosen], sorted(chosen)
    train, held_out = (split.select(rows, indices_cache_file_name=_temporary_file()) for rows in parts)
    return train, held_out


def _find_image_column(name: str, split, wanted: str | None) -> str:
    features = columns_of(split)
    if wanted is not None:
        if wanted not in features:
            raise ValueError(f"data set {name!r} has no column {wanted!r}, only {list(features)}: pass --image_column.")
        return wanted
    found = [column for column, feature in features.items() if isinstance(feature, Image)]
    if len(found) != 1:
        raise ValueError(
            f"data set {name!r} has {len(found)} image columns among {list(features)}: name one with --image_column."
        )
    return found[0]


def _classes(name: str, train, evaluation, found: list[str], wanted: str | None, together: bool) -> tuple:
    """Both splits with class ids, the column, the names, and why there are none although there might be (or None).

    found: columns that may hold them.
    """
    features = columns_of(train)
    if wanted is not None and wanted not in features:
        raise ValueError(f"data set {name!r} has no column {wanted!r}, only {list(features)}: pass --label_column.")
    if len(found) != 1:
        problem = f"the columns {found} may all hold them: name one with --label_column" if found else None
        return train, evaluation, None, None, problem
    try:
        *splits, names = with_classes(train, evaluation, found[0], together=together)
    except NoClasses as error:
        problem = f"column {found[0]!r} of {name!r} cannot be the classes: {error}"
        if wanted is not None:
            raise ValueError(f"{problem}, or choose another --label_column.") from error
        return train, evaluation, None, None, problem
    return *splits, found[0], names, None


def _undecoded(name: str, split, column: str):
    features = columns_of(split)
    if column not in features:
        raise ValueError(f"the held-out split of {name!r} has no column {column!r}, only {list(features)}.")
    if not isinstance(features[column], Image):
        return split
    if isinstance(split, IterableDataset) and split.features is not None:
        split = split.decode(False)  # a streamed folder of the Hub comes with a pool of threads that decode it
    return split.cast_column(column, Image(decode=False))


def _union(name: str, parts: list[ImageData]) -> ImageData:
    """Concatenate data sets; classes of equal name become one, and a part without labels makes all unlabelled."""
    labelled = all(part.class_names is not None for part in parts)
    names = sorted({n for part in parts for n in part.class_names}) if labelled else None
    if labelled and all(part.class_names == parts[0].class_names for part in parts):
        names = parts[0].class_names

    def unify(split, part: ImageData):
        columns = {part.image_column: "image_bytes"} | ({part.label_column: "class_id"} if labelled else {})
        split = split.rename_columns({old: new for old, new in columns.items() if old != new})
        if labelled and part.class_names != names:
            lookup = [names.index(n) for n in part.class_names]
            split = relabel_all(split, "class_id", lookup, names)
        return split.select_columns(list(columns.values()))

    train = datasets.concatenate_datasets([unify(part.train, part) for part in parts])
    evaluations = [unify(part.evaluation, part) for part in parts if part.evaluation is not None]
    evaluation = datasets.concatenate_datasets(evaluations) if evaluations else None
    entry = replace(parts[0].entry, licence="; ".join(sorted({part.entry.licence for part in parts})))
    label_column = "class_id" if labelled else None
    fingerprint = " + ".join(part.fingerprint for part in parts)
    bare = [part.name for part in parts if part.class_names is None]
    problem = None if labelled else "; ".join(part.label_problem or "" for part in parts).strip("; ")
    if bare and len(bare) < len(parts):
        problem = f"{', '.join(bare)} of the union has none" + (f" ({problem})" if problem else "")
    data = ImageData(name, train, evaluation, "image_bytes", label_column, names, entry, fingerprint, problem or None)
    data.left_out = dict(sum((Counter(part.left_out) for part in parts), Counter()))
    data.splits = {
        name: " + ".join(dict.fromkeys(part.splits.get(name, "none") for part in parts))
        for name in ("train", "evaluation")
    }
    return data
