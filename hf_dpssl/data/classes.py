"""From a column of labels to classes 0 .. n - 1 with names, the same in both splits, by stated rules.

| what the column holds | what becomes of it |
|---|---|
| a ClassLabel | its names in their order, less those without a training image |
| integers, booleans, strings | names in the order of the values, integers by their number |
| None, or -1 in a ClassLabel or among integers | an image without class, -1 |
| a held-out split without the column | images without class |
| floats, lists, dates, ...; -1 and 1 alone; a held-out class that no training image has | no classes: `NoClasses` |
| a held-out class that no training image has, where all splits count together | a class like the others |

Labels are looked for by type, else by the names of `LABEL_NAMES` (cls, and json.label, as WebDataset has them).
Splits are aligned by name: the same text in Unicode form NFC is the same class; case counts. Of a stream only a
ClassLabel has classes: all of its names, since its rows are not known.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import datasets
from datasets import ClassLabel, Dataset, Image, IterableDataset, Value

LABEL_NAMES = ("label", "labels", "target", "targets", "class", "category", "cls")
_SHOWN = 5


class NoClasses(ValueError):
    """A column that cannot serve as classes; the message says why."""


def columns_of(split: Dataset | IterableDataset) -> datasets.Features:
    """Columns and their types."""
    return split.features if split.features is not None else split._resolve_features().features


def label_candidates(features: datasets.Features, others: Sequence[str | None]) -> list[str]:
    """Columns that may hold the classes: those of type ClassLabel, else those whose name says so; none of `others`."""
    features = {column: feature for column, feature in features.items() if column not in others}
    typed = [column for column, feature in features.items() if isinstance(feature, ClassLabel)]
    named = [
        column
        for column, feature in features.items()
        if column.lower().removeprefix("json.") in LABEL_NAMES and not isinstance(feature, Image)
    ]
    return typed or named


def with_classes(train, evaluation, column: str, *, together: bool = False) -> tuple:
    """Both splits with class ids in `column` (-1: without class), and the names.

    together: both count as one set, so that a class may be in either (of a stream: in the first).

    Raises:
        NoClasses: by the rules at the top of this file.
    """
    if evaluation is not None and column not in columns_of(evaluation):
        evaluation = _without_labels(evaluation, column, columns_of(train)[column])
    if isinstance(train, IterableDataset):
        return _of_stream(train, evaluation, column)
    names_of = [{} if split is None else _names_of_values(split, column) for split in (train, evaluation)]
    counted = [(columns_of(train)[column], names_of[0])]
    if together and evaluation is not None:
        theirs = columns_of(evaluation)[column]
        alike = theirs == counted[0][0]
        counted = [(theirs, names_of[0] | names_of[1])] if alike else [*counted, (theirs, names_of[1])]
    names = list(dict.fromkeys(name for feature, values in counted for name in _in_order(feature, values)))
    if not names:
        raise NoClasses(f"no {'' if together else 'training '}image has a class in it")
    _check_held_out(set(names_of[1].values()) - {None}, names)
    ids = {name: i for i, name in enumerate(names)} | {None: -1}
    splits = [
        _relabelled(split, column, {value: ids[name] for value, name in values.items()}, names)
        for split, values in zip((train, evaluation), names_of, strict=True)
    ]
    return *splits, names


def _in_order(feature, values: dict) -> list[str]:
    """Class names that occur: of a ClassLabel in its order, else in that of the values."""
    present = set(values.values()) - {None}
    if isinstance(feature, ClassLabel):
        names = [name for name in map(_same_form, feature.names) if name in present]
    else:
        ordered = sorted(value for value, name in values.items() if name is not None)
        names = list(dict.fromkeys(values[value] for value in ordered))
    if len(set(names)) < len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise NoClasses(f"two of its classes are called {double!r}, in two Unicode forms: rename one")
    return names


def _same_form(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _names_of_values(split: Dataset, column: str) -> dict:
    """{value: class name, or None for an image without class} of the values that occur in a column."""
    feature = columns_of(split)[column]
    integers = isinstance(feature, Value) and "int" in feature.dtype
    if isinstance(feature, ClassLabel):
        if outside := sorted(v for v in split.unique(column) if v is not None and not -1 <= v < len(feature.names)):
            raise NoClasses(f"it holds {outside[:_SHOWN]}, and there are {len(feature.names)} names")
    elif not (integers or isinstance(feature, Value) and feature.dtype in ("bool", "string", "large_string")):
        raise NoClasses(f"it holds {feature}; classes are integers, strings or a ClassLabel")
    values = split.unique(column)
    if integers and set(values) - {None} == {-1, 1}:
        raise NoClasses("it holds -1 and 1, of which -1 stands for no class: number the classes from 0, or name them")

    def name(value) -> str | None:
        if value is None or (value == -1 and not isinstance(value, str)):
            return None
        return _same_form(feature.names[value] if isinstance(feature, ClassLabel) else str(value))

    return {value: name(value) for value in values}


def _check_held_out(held_out: set[str], names: list[str]) -> None:
    if more := sorted(held_out - set(names)):
        raise NoClasses(
            f"the held-out images have the classes {more[:_SHOWN]}, which no training image has (those have "
            f"{names[:_SHOWN]}{', ...' if len(names) > _SHOWN else ''}; case counts): rename or remove them"
        )


def _relabelled(split: Dataset | None, column: str, ids: dict, names: list[str]) -> Dataset | None:
    if split is None:
        return None
    feature = ClassLabel(names=names)
    if columns_of(split)[column] == feature and all(value == i for value, i in ids.items()):
        return split
    values = [ids[value] for value in split[column][:]]
    return split.remove_columns(column).add_column(column, values).cast_column(column, feature)


def _without_labels(split, column: str, feature):
    feature = feature if isinstance(feature, ClassLabel) else Value("int64")
    features = datasets.Features(columns_of(split) | {column: feature})
    if isinstance(split, IterableDataset):
        return split.map(_mapped, fn_kwargs={"column": column, "lookup": []}, features=features)
    return split.add_column(column, [-1] * len(split)).cast(features)


def _of_stream(train: IterableDataset, evaluation: IterableDataset | None, column: str) -> tuple:
    feature = columns_of(train)[column]
    if not isinstance(feature, ClassLabel):
        raise NoClasses(
            f"it is {feature}, not a ClassLabel, so that its classes cannot be known while streaming: leave "
            "--streaming out"
        )
    names = list(map(_same_form, feature.names))
    if len(set(names)) < len(names):
        raise NoClasses("two of its classes have one name, in two Unicode forms: rename one")
    theirs = columns_of(evaluation)[column] if evaluation is not None else feature
    if theirs == feature:
        return train, evaluation, names
    if not isinstance(theirs, ClassLabel):
        raise NoClasses(f"it is {theirs} in the held-out split, not a ClassLabel")
    _check_held_out(set(map(_same_form, theirs.names)), names)
    features = datasets.Features(columns_of(evaluation) | {column: ClassLabel(names=names)})
    lookup = [names.index(_same_form(name)) for name in theirs.names]
    return train, evaluation.map(_mapped, fn_kwargs={"column": column, "lookup": lookup}, features=features), names


def _mapped(row: dict, column: str, lookup: list[int]) -> dict:
    """A row with the class ids of another numbering; one without class stays so."""
    value = row.get(column)
    return {column: -1 if value is None or value < 0 else lookup[value]}


def relabel_all(split, column: str, lookup: list[int], names: list[str]):
    """A split whose class i becomes class lookup[i] of `names`."""
    features = datasets.Features(columns_of(split) | {column: ClassLabel(names=names)})
    return split.map(_mapped, fn_kwargs={"column": column, "lookup": lookup}, features=features)
