"""Folders of a machine, which mean nothing elsewhere and say who worked where, cut off from what is written down.

Whole values are cut, not joined text: in "--output_dir /home/me/My run, 2024 --seed 1" nobody can tell where the path
ends. A value that is a path becomes its last part; so does each part of a union a+b, the value of a flag `--x=...` or
of NAME=..., and the place of `local-dir:...` or `file:...`.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

_SEPARATORS = re.compile(r"[/\\]+")
_STARTS = r"(?:~[\w.-]*(?=[/\\]|\Z)|\.{1,2}(?=[/\\]|\Z)|[A-Za-z]:(?=[/\\])|(?=[/\\]))"
_PATH = re.compile(rf"{_STARTS}(?:[/\\].*)?", re.DOTALL)
_PREFIXED = re.compile(r"(--?[\w-]+=|(?:[\w-]+=|(?:local-dir|file):/{0,2})(?=[/~.]|[A-Za-z]:[/\\]))(.+)", re.DOTALL)
# In text that is one already, as of older results: a path ends at a blank or comma.
_IN_TEXT = re.compile(r"""(?<![^\s"'=(,\[+])(?:~|[A-Za-z]:|\.{1,2})?[/\\]+(?:[^\s"'/\\,+]+[/\\]+)*""")
# Names that data or a model gave, which may look like paths ("/m/04rky" is a class of Open Images).
_NAMES = ("id2label", "label2id", "class_names", "classes", "vocab", "merges", "added_tokens", "special_tokens")


def without_folders(value: str) -> str:
    """A value without the folders of a path: "/home/me/My data, 2024" is "My data, 2024"; others stay as they are."""
    if prefixed := _PREFIXED.fullmatch(value):
        return prefixed[1].rstrip("/") + without_folders(prefixed[2])
    parts = value.split("+")
    if len(parts) > 1 and all(parts) and not any(_SEPARATORS.match(part[-1]) for part in parts):
        return "+".join(map(_last_part, parts))
    return _last_part(value)


def _last_part(value: str) -> str:
    if not _PATH.fullmatch(value):
        return value
    if value.rstrip("/\\") == str(Path.home()):  # whose last part is the user's name
        return "~"
    names = [name for name in _SEPARATORS.split(value) if name]
    return names[-1] if names else value


def text_without_folders(text: str) -> str:
    """Running text with every absolute or dotted path in it cut down to its last part, as far as that can be told."""
    return _IN_TEXT.sub("", text)


def command_text(arguments: list[str]) -> str:
    """A command as text for a shell, without folders of the machine."""
    return shlex.join(map(redacted, arguments))


def command_without_folders(command: str) -> str:
    """A command as it was written down, without folders of the machine."""
    try:
        return command_text(shlex.split(command)) if "\\" not in command else text_without_folders(command)
    except ValueError:  # a quotation mark without its other
        return text_without_folders(command)


def redacted(content):
    """Plain values (of JSON or YAML) without folders of the machine; names of classes and tokens stay."""
    if isinstance(content, dict):
        return {key: value if key in _NAMES else _entry(key, value) for key, value in content.items()}
    if isinstance(content, list):
        return [redacted(value) for value in content]
    if not isinstance(content, str):
        return content
    short = without_folders(content)
    return text_without_folders(content) if short == content and re.search(r"\s", content) else short


def _entry(key, value):
    return command_without_folders(value) if key == "command" and isinstance(value, str) else redacted(value)
