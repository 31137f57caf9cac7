"""WebDataset: tar files of which the members of one name are a sample, such as 0001.jpg, 0001.cls and 0001.json.

`datasets` reads them, from a path or the Hub, with a column for each suffix. Here they are checked before that, and
what a json member says of the class becomes a column. A class is in `cls`, or in json.label, json.class, ...
"""

from __future__ import annotations

import itertools
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import pyarrow.compute as pc
from datasets import IterableDataset
from datasets.packaged_modules.webdataset.webdataset import IMAGE_EXTENSIONS, base_plus_ext

from .classes import LABEL_NAMES, columns_of

_BLOCK = 512  # bytes of which a tar file is a multiple
_FIRST = 64  # members of each file that are looked at where all would be read only to be checked


def check_tars(paths: Sequence[str | os.PathLike], *, whole: bool = True) -> None:
    """The heads of tar files, without their pictures: whether `datasets` can make samples of them.

    Args:
        paths: of the files.
        whole: look at all members; else at the first 64 of each file.

    Raises:
        ValueError: a file is truncated, no tar or without samples, no sample has a picture, or their pictures have not
            all the same suffixes, which would become columns with gaps.
    """
    kinds: Counter[tuple[str, ...]] = Counter()  # suffixes of a sample's pictures
    for path in paths:
        samples: dict[str, set[str]] = {}
        for name in itertools.islice(_names(path), None if whole else _FIRST):
            key, suffix = base_plus_ext(name)
            if key is not None:
                samples.setdefault(key, set()).add(suffix)
        if not samples:
            raise ValueError(f"the tar file {path} holds no sample: none of its members is called as 0001.jpg is.")
        if not whole and len(samples) > 1:
            samples.popitem()  # it may go on
        kinds.update(tuple(sorted(filter(_is_picture, suffixes))) for suffixes in samples.values())
    del kinds[()]  # a sample without picture is one that cannot be read
    where = paths[0] if len(paths) == 1 else f"{len(paths)} tar files in {Path(paths[0]).parent}"
    if not kinds:
        raise ValueError(f"{where}: no sample has a picture, by the suffix of its members (as 0001.jpg, 0001.cls).")
    if len(kinds) > 1:
        found = ", ".join(f"{count} have {' and '.join(kind)}" for kind, count in kinds.most_common(3))
        raise ValueError(
            f"{where}: the pictures of its samples have several suffixes ({found}), of which each is a column with "
            "gaps: give all the same one (pictures are known by what they hold)."
        )


def _is_picture(suffix: str) -> bool:
    return suffix.rsplit(".")[-1].lower() in IMAGE_EXTENSIONS


def _names(path: str | os.PathLike) -> Iterator[str]:
    """Names of the files in a tar file."""
    size = os.path.getsize(path)
    try:
        if size % _BLOCK:
            raise tarfile.ReadError(f"{size} bytes are no multiple of {_BLOCK}")
        with tarfile.open(path, "r:") as tar:
            yield from (member.name for member in tar if member.isfile())
    except tarfile.TarError as error:
        raise ValueError(f"{path} is truncated or no tar file ({error}): copy it or write it again.") from error


def with_json_labels(split, wanted: str | None = None):
    """A split with a column json.FIELD of each FIELD of its json members that is called as a label is, or wanted.

    Where there is a column `cls` only the wanted one, `json.FIELD`, is made.
    """
    features = columns_of(split)
    inner = features.get("json")
    if not isinstance(inner, dict):
        return split
    fields = [] if "cls" in features else [field for field in inner if field.lower() in LABEL_NAMES]
    fields += [field for field in inner if f"json.{field}" == wanted and field not in fields]
    for field in fields:
        column = f"json.{field}"
        if isinstance(split, IterableDataset):
            every = datasets.Features(columns_of(split) | {column: inner[field]})
            split = split.map(_lifted, fn_kwargs={"field": field}, features=every)
        else:
            members = split.select_columns("json").with_format("arrow")[:].column("json")
            values = pc.struct_field(members, field).to_pylist()
            split = split.add_column(column, values, feature=inner[field])
    return split


def _lifted(row: dict, field: str) -> dict:
    return {f"json.{field}": (row["json"] or {}).get(field)}
