"""A folder of images, scanned by stated rules: which splits, which classes, and an account of every file.

| what lies there | what it becomes |
|---|---|
| first-level folders train, val, test (or a synonym of `SPLITS`) that hold all images, or are of two splits | splits |
| folders below a split, or below the folder where there are none | classes, by the FIRST level; deeper ones are read |
| a single such folder, or none | images without classes |
| links | what they point to |
| hidden files, formats that Pillow cannot read, other files, names that are not UTF-8 | left out, counted and named |

Images beside class folders, and in other folders beside those of two splits, are left out and named where they are few
(at most one in ten). What could mean two things is refused with a way out: more of these, synonyms of one split side by
side, images beside split folders, folders called like splits (train_set, test_set) or splits in one folder of another
name, class names that differ by case or Unicode form only, classes of a held-out split that the training split lacks
(unless all splits are to count together), parquet files beside images or tar files.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

SPLITS = {
    "train": ["train", "training"],
    "validation": ["val", "valid", "validation", "dev"],
    "test": ["test", "testing"],
}
_SPLIT_OF_NAME = {name: split for split, names in SPLITS.items() for name in names}
_LARGEST_STRAY_SHARE = 0.1  # of images beside class folders, or in other folders beside splits
_SIGNATURES = [b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"RIFF", b"II*\0", b"MM\0*"]  # of files without a suffix
_NAMED = 3  # files named of each reason


def split_words(name: str) -> list[str]:
    """The first word of each split in a name: "test" of test-00000 and of Test Set, none of contest."""
    words = [word for word in re.split(r"[^a-z]+", name.lower()) if word in _SPLIT_OF_NAME]
    return list({_SPLIT_OF_NAME[word]: word for word in reversed(words)}.values())[::-1]


@dataclass
class FolderScan:
    """What a folder holds.

    Args:
        root: the folder.
        splits: {"train", "validation", "test"}: (path, class id or -1) of each image, sorted by path.
        class_names: by id, sorted; None without classes.
        left_out: {reason: paths relative to the root}, of files that are no image of the data set.
        parquet, tars: paths of parquet and tar files, of either of which the folder may consist instead of images.
    """

    root: Path
    splits: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    class_names: list[str] | None = None
    left_out: dict[str, list[str]] = field(default_factory=dict)
    parquet: list[str] = field(default_factory=list)
    tars: list[str] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """{reason: number of files left out}."""
        return {reason: len(paths) for reason, paths in self.left_out.items()}

    def examples(self) -> str:
        """A few of the files left out, of each reason."""
        return "; ".join(f"{reason}: {_shown(paths)}" for reason, paths in sorted(self.left_out.items()))


def scan_folder(root: str | os.PathLike, *, together: bool = False) -> FolderScan:
    """Scan a folder of images by the rules at the top of this file; no image is decoded.

    Args:
        root: the folder.
        together: all splits count together, so that a class may be in any of them.

    Returns:
        A scan; `splits` is empty where the folder holds parquet or tar files in place of images.

    Raises:
        ValueError: nothing to read, or something that could mean two things; the message says what to do.
    """
    scan = FolderScan(Path(root))
    images, empty = _find_files(scan)
    if scan.tars and (images or scan.parquet):
        if scan.parquet and not images:
            raise ValueError(
                f"the folder {root} holds {len(scan.parquet)} parquet files and {len(scan.tars)} tar files "
                f"({_shown(scan.tars)}): give the one or the other, or move one away."
            )
        scan.left_out[".tar files"], scan.tars = scan.tars, []
    if not images:
        if scan.parquet or scan.tars:
            return scan
        listed = {reason: len(paths) for reason, paths in scan.left_out.items()} or "no file at all"
        raise ValueError(
            f"the folder {root} holds no image that can be read ({listed}): put images (or parquet or tar files) "
            "into it, one folder per class."
        )
    if scan.parquet:
        raise ValueError(
            f"the folder {root} holds {len(images)} images and {len(scan.parquet)} parquet files "
            f"({_shown(scan.parquet)}): give the one or the other, or move one away."
        )
    by_split, level = _by_split(scan, images)
    labelled = {split: _by_class(scan, split, paths, level) for split, paths in by_split.items()}
    for path in empty:
        scan.left_out.setdefault("empty folders", []).append(path)
    _set_classes(scan, labelled, together)
    return scan


def _find_files(scan: FolderScan) -> tuple[list[tuple[str, ...]], list[str]]:
    """Images as tuples of path parts below the root, and folders without any file; the rest goes into the scan."""
    readable = {suffix for suffix, format_name in Image.registered_extensions().items() if format_name in Image.OPEN}
    images, folders, filled = [], set(), set()
    for parts, reason in _walk(scan.root, (), ()):
        shown = _text("/".join(parts))
        suffix = os.path.splitext(parts[-1])[1].lower()
        if reason == "folder":
            folders.add(parts)
            continue
        filled |= {parts[:depth] for depth in range(1, len(parts))}
        if reason is None and not _is_utf8(parts):
            reason = "whose name is not UTF-8: rename them"
        if reason is None and suffix in (".parquet", ".tar"):
            (scan.parquet if suffix == ".parquet" else scan.tars).append(shown)
            continue
        if reason is None and suffix not in readable and not (suffix == "" and _looks_like_an_image(scan.root, parts)):
            picture = suffix in (".heic", ".heif", ".avif", ".jxl", ".svg", ".raw", ".dng", ".cr2", ".nef")
            known = suffix if re.fullmatch(r"\.[a-z0-9]{1,8}", suffix) else "other"  # it goes into cards
            what = f"{known} files" if suffix else "files without suffix"
            reason = f"{what} (a picture format that Pillow cannot read here: convert them)" if picture else what
        if reason is None:
            images.append(parts)
        else:
            scan.left_out.setdefault(reason, []).append(shown)
    return images, [_text("/".join(parts)) for parts in sorted(folders - filled)]


def _walk(root: Path, parts: tuple[str, ...], above: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str | None]]:
    """(path parts, None or why the entry is left out) of every entry below a folder, in the order of names.

    Links are followed; a link to a folder above itself is left out.
    """
    here = os.path.join(root, *parts)
    above = (*above, os.path.realpath(here))
    try:
        names = sorted(os.listdir(here))
    except OSError as error:
        yield (*parts, ""), f"folders that cannot be listed ({error.strerror})"
        return
    for name in names:
        entry, path = (*parts, name), os.path.join(here, name)
        hidden = name.startswith(".") or name in ("__MACOSX", "Thumbs.db", "desktop.ini")
        if os.path.isdir(path):
            if hidden:
                yield entry, "hidden folders"
            elif os.path.realpath(path) in above:
                yield entry, "links to a folder above"
            else:
                yield entry, "folder"
                yield from _walk(root, entry, above)
        elif not os.path.exists(path):
            yield entry, "broken links"
        else:
            yield entry, "hidden files" if hidden else None


def _by_split(scan: FolderScan, images: list[tuple[str, ...]]) -> tuple[dict[str, list[tuple[str, ...]]], int]:
    """Images by split, and the level of class folders: 1 below split folders, 0 where all images are "train"."""
    first = Counter(parts[0] for parts in images if len(parts) > 1)
    beside = [parts for parts in images if len(parts) == 1]
    of_name = {name: _SPLIT_OF_NAME.get(name.lower()) for name in first}
    named = {name: split for name, split in of_name.items() if split is not None}
    others = sorted(first.keys() - named)
    if not named or (others and len(set(named.values())) < 2):
        _check_hidden_splits(scan, images, first)
        return {"train": images}, 0
    if beside:
        raise ValueError(
            f"{len(beside)} images ({_shown(['/'.join(parts) for parts in beside])}) lie beside the split folders "
            f"{sorted(named)} of {scan.root}: move them into one of these, or away."
        )
    stray = ["/".join(parts) for parts in images if parts[0] in others]
    if len(stray) > _LARGEST_STRAY_SHARE * len(images):
        raise ValueError(
            f"{len(stray)} of {len(images)} images of {scan.root} lie in the folders {_shown(others)} beside the split "
            f"folders {sorted(named)}: move them into one of these, or away; where all of these folders are classes, "
            "move them into one folder train."
        )
    if stray:
        scan.left_out["images in folders beside split folders"] = list(map(_text, stray))
    double = [names for split in SPLITS if len(names := [n for n, of in named.items() if of == split]) > 1]
    if double:
        raise ValueError(f"{scan.root} has the folders {sorted(double[0])} for one split: keep one of them.")
    if "train" not in named.values():
        raise ValueError(
            f"{scan.root} has the split folders {sorted(named)} and no training images: add a folder train, or give "
            f"one of these folders itself."
        )
    ordered = sorted(named, key=lambda name: list(SPLITS).index(named[name]))
    return {named[name]: [parts for parts in images if parts[0] == name] for name in ordered}, 1


def _check_hidden_splits(scan: FolderScan, images: list[tuple[str, ...]], first: Counter[str]) -> None:
    """ValueError where folders that would be classes are called like two splits, or hold them all."""
    common = os.path.commonprefix([parts[:-1] for parts in images if len(parts) > 1])
    depth = len(common)
    inside = Counter(parts[depth] for parts in images if parts[:depth] == common and len(parts) > depth + 1)
    inner = sorted(name for name in inside if split_words(name))
    exact = {_SPLIT_OF_NAME[name.lower()] for name in inner if name.lower() in _SPLIT_OF_NAME}
    few_others = len(images) - sum(inside[name] for name in inner) <= _LARGEST_STRAY_SHARE * len(images)
    if common and (len(exact) > 1 or few_others and len(_splits_of(inner)) > 1):
        raise ValueError(
            f"the split folders {_shown(inner)} of {scan.root} lie in the folder {_text('/'.join(common))}: give "
            f"{_text(os.path.join(scan.root, *common))} itself."
        )
    alike = sorted(name for name in first if split_words(name))
    rest = sum(count for name, count in first.items() if name not in alike)
    if len(_splits_of(alike)) > 1 and rest <= _LARGEST_STRAY_SHARE * len(images):
        raise ValueError(
            f"the folders {_shown(alike)} of {scan.root} are called like splits: rename them to "
            f"{' and '.join(_splits_of(alike))}, or, where they are classes, move them into one folder train."
        )


def _splits_of(names: list[str]) -> list[str]:
    """The splits that some of these names speak of, in the order of `SPLITS`."""
    found = {_SPLIT_OF_NAME[word] for name in names for word in split_words(name)}
    return [split for split in SPLITS if split in found]


def _by_class(
    scan: FolderScan, split: str, images: list[tuple[str, ...]], level: int
) -> dict[tuple[str, ...], str | None]:
    """The name, in NFC, of the class folder of each image of a split; None where there are no class folders."""
    folders = {parts[level] for parts in images if len(parts) > level + 1}
    beside = [parts for parts in images if len(parts) == level + 1]
    if not folders:
        return dict.fromkeys(images)
    if beside and len(beside) > _LARGEST_STRAY_SHARE * len(images):
        raise ValueError(
            f"{len(beside)} of {len(images)} images ({split}) of {scan.root} lie beside the class folders "
            f"{_shown(sorted(folders))}: move them into a class folder, or away."
        )
    if beside:
        shown = [_text("/".join(parts)) for parts in beside]
        scan.left_out.setdefault("images beside class folders", []).extend(shown)
    named = {name: unicodedata.normalize("NFC", name) for name in folders}
    if len(set(named.values())) < len(named):
        double = next(name for name, count in Counter(named.values()).items() if count > 1)
        raise ValueError(f"{scan.root} has two class folders {double} in two Unicode forms ({split}): join them.")
    return {parts: named[parts[level]] for parts in images if len(parts) > level + 1}


def differing_by_spelling(names: Iterable[str]) -> list[str] | None:
    """The first of those that are one name but for case and Unicode form (NFKC), sorted; None where there are none."""
    spellings: dict[str, set[str]] = {}
    for name in names:
        spellings.setdefault(unicodedata.normalize("NFKC", name).casefold(), set()).add(name)
    return next((sorted(group) for group in spellings.values() if len(group) > 1), None)


def _set_classes(scan: FolderScan, labelled: dict[str, dict[tuple[str, ...], str | None]], together: bool) -> None:
    names = {split: sorted({name for name in rows.values() if name is not None}) for split, rows in labelled.items()}
    if sum(bool(found) for found in names.values()) not in (0, len(names)):
        said = {split: f"{len(found)} class folders" for split, found in names.items()}
        raise ValueError(
            f"some splits of {scan.root} have class folders and some have none ({said}): sort all or none."
        )
    every = sorted({name for found in names.values() for name in found})
    if alike := differing_by_spelling(every):
        raise ValueError(f"the class folders {alike} of {scan.root} differ by spelling only: rename them to one name.")
    known = every if together else names["train"]
    for split, found in names.items():
        if more := sorted(set(found) - set(known)):
            raise ValueError(
                f"the split {split} of {scan.root} has the classes {_shown(more)}, which the training split lacks; it "
                f"has {_shown(names['train'])}: move or rename these folders."
            )
    if len(known) > 1:
        scan.class_names = known
    ids = {name: i for i, name in enumerate(scan.class_names or [])}
    for split, rows in labelled.items():
        scan.splits[split] = sorted(
            (os.path.join(scan.root, *parts), ids.get(name, -1)) for parts, name in rows.items()
        )


def _looks_like_an_image(root: Path, parts: tuple[str, ...]) -> bool:
    try:
        with open(os.path.join(root, *parts), "rb") as file:
            start = file.read(8)
    except OSError:
        return False
    return any(start.startswith(signature) for signature in _SIGNATURES)


def _is_utf8(parts: tuple[str, ...]) -> bool:
    return not any("\udc80" <= character <= "\udcff" for part in parts for character in part)


def _text(path: str) -> str:
    """A path as text that can be printed and stored, whatever its bytes."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _shown(names: list[str]) -> str:
    return ", ".join(map(_text, names[:_NAMED])) + (f", ... ({len(names)})" if len(names) > _NAMED else "")
