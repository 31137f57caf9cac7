"""Tensors and plain settings out of a pickled checkpoint that somebody else wrote, without running anything in it.

A pickle is a program: it may import any module and call any function. So the classes and functions that a
file asks for are listed first, without executing it, and a file that asks for an unknown one is refused by
name. What remains is read by torch's own restricted reader (`weights_only=True`), where a few classes that
only hold settings (argparse.Namespace, omegaconf's, paths, numpy scalars) are replaced by `Settings`; the
real class is never imported.
"""

from __future__ import annotations

import os
import pickle
import pickletools
import re
import struct
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint

# What torch's restricted reader judges itself in old files; it refuses most of torch.*, and says which.
_LEFT_TO_TORCH = re.compile(
    r"torch\..+|collections\.(OrderedDict|Counter)|_codecs\.encode|builtins\.(set|bytearray|complex)"
)
# Classes that only hold settings. Types stand in omegaconf's metadata as values.
_SETTINGS = re.compile(
    r"argparse\.Namespace|omegaconf\..+|typing\.\w+|pathlib\.\w*Path|"
    r"builtins\.(dict|list|tuple|frozenset|str|bytes|int|float|bool|object)|"
    r"numpy\.(_?core\.multiarray\.scalar|dtype|dtypes\.\w+DType|bool_?|u?int\d+|float\d+)"
)
_ZIP = b"PK\3\4"
_LARGEST_SHARE = 8  # bytes of tensors for each of the file, of which several may be the same
_LEGACY_PICKLES = 4  # magic number, protocol, system, and then the checkpoint itself


class Settings:
    """Stands where a file holds a class of settings: its attributes in `vars(...)`, none of its methods."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.__dict__.update({key: value for key, value in state.items() if isinstance(key, str)})


def _empty_dictionary(*args) -> dict:
    return {}


class UnknownPickledClassError(ValueError):
    """A checkpoint asks for classes or functions that are not known to be harmless; nothing was executed."""


def read_pickled_tensors(path: str | os.PathLike, *, inert: Iterable[str] = ()) -> object:
    """What a `torch.save` file holds (zip or the format before torch 1.6): tensors, containers, plain values.

    Args:
        path: the file; only its bytes are read.
        inert: full names of further classes that may stand in the file, e.g. "solo.utils.x.Y". They are
            not imported either: a `Settings` takes their place.

    Raises:
        FileNotFoundError: no such file.
        UnknownPickledClassError: the file asks for other classes or functions; the message lists them all.
        ValueError: not a `torch.save` file, or damaged.
    """
    path, inert = Path(path), set(inert)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file: give a checkpoint such as checkpoint_0199.pth.tar or last.ckpt.")
    _check_unpacked_size(path)
    asked_for = pickled_globals(path)
    settings = {name for name in asked_for if _SETTINGS.fullmatch(name)} | inert
    stand_ins = {name: Settings for name in settings} | {"collections.defaultdict": _empty_dictionary}
    if unknown := sorted(asked_for - stand_ins.keys()):
        raise UnknownPickledClassError(_refusal(path, ", ".join(unknown)))
    try:
        with torch.serialization.safe_globals([(value, name) for name, value in stand_ins.items()]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"(?:GLOBAL|global) ([\w.]+)", str(error))
        if named:
            raise UnknownPickledClassError(_refusal(path, named[1])) from error
        reason = str(error).partition("WeightsUnpickler error:")[2].strip().partition("\n")[0] or error
        raise ValueError(f"{path} was not read, torch's restricted reader refuses it: {reason}") from error
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        EOFError,
        LookupError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
        struct.error,
    ) as error:
        raise ValueError(f"{path} is damaged or no checkpoint of torch.save: {error}") from error
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(content))
    if claimed > _LARGEST_SHARE * path.stat().st_size:
        raise ValueError(
            f"{path} has {path.stat().st_size:,} bytes, and its tensors claim {claimed:,}, more than it can hold: it "
            "is not read."
        )
    return content


def _check_unpacked_size(path: Path) -> None:
    """ValueError for a zip file that unpacks to more than itself: torch.save compresses nothing."""
    if not zipfile.is_zipfile(path):
        return
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise ValueError(f"{path} is damaged or no checkpoint of torch.save: {error}") from error
    if unpacked > size:
        raise ValueError(
            f"{path} has {size:,} bytes and would unpack to {unpacked:,}: torch.save compresses nothing, so it is not "
            "read. Unpack a file that was compressed later, and save it again with torch.save."
        )


def _tensors(content: object) -> Iterator[torch.Tensor]:
    """Tensors of nested dictionaries, lists and tuples."""
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, dict):
        for value in content.values():
            yield from _tensors(value)
    elif isinstance(content, list | tuple):
        for value in content:
            yield from _tensors(value)


def _refusal(path: Path, names: str) -> str:
    return (
        f"{path} asks for {names}, which is not known to be harmless; nothing of the file was executed. Save it "
        "again with its tensors only (the state_dict), or name classes to leave unread with `inert` (--inert)."
    )


def pickled_globals(path: str | os.PathLike) -> set[str]:
    """Full names of the classes and functions of a `torch.save` file that torch's restricted reader does not know.

    Nothing is executed.

    Raises:
        ValueError: not a `torch.save` file, or one of another pickle protocol than 2, torch's own.
    """
    with open(path, "rb") as file:
        is_zip = file.read(len(_ZIP)) == _ZIP
    try:
        return set(get_unsafe_globals_in_checkpoint(os.fspath(path))) if is_zip else _globals_before_zip(path)
    except (ValueError, EOFError, IndexError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is damaged or no checkpoint that torch.save wrote: {error}") from error


def _globals_before_zip(path: str | os.PathLike) -> set[str]:
    """As `pickled_globals`, of a file in the format before torch 1.6, which torch's own function does not read."""
    found = set()
    with open(path, "rb") as file:
        for _ in range(_LEGACY_PICKLES):
            for code, argument, _ in pickletools.genops(file):
                if code.name == "GLOBAL":  # torch's reader refuses the other ways to name a class
                    module, name = argument.split(" ", 1)
                    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
                    found.add(f"{module}.{name}")
    return {name for name in found if not _LEFT_TO_TORCH.fullmatch(name)}
