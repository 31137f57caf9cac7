"""Flags from a dataclass: `option` declares a field with its help and group, `add_flags` gives it to argparse.

No library is imported here: `--help` and a wrong flag are answered without waiting for one. That is why it is argparse
and not typer, which brings click and rich with it.
"""

from __future__ import annotations

import argparse
import difflib
from dataclasses import MISSING, Field, field, fields
from typing import Any, Union, get_args, get_origin, get_type_hints

GROUPS = ("data", "model", "optimiser", "evaluation", "run")  # as help lists them
_TRUE = ("true", "t", "yes", "y", "1")
_FALSE = ("false", "f", "no", "n", "0")


def option(default, text: str, *, group: str | None = None, choices=None):
    """A dataclass field with help text for the command line.

    Args:
        default: of the field; a list is copied for each instance.
        text: what it is, in a line.
        group: of GROUPS; the fields after it in its class belong there too, up to the next that names one.
        choices: what is allowed.
    """
    metadata = {"help": text, "choices": None if choices is None else list(choices)}
    if group is not None:
        metadata["group"] = group
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class HelpFormatter(argparse.HelpFormatter):
    """Help that states defaults, and keeps the lines of paragraphs that hold indented ones, such as commands."""

    def _fill_text(self, text, width, indent):
        paragraphs = []
        for paragraph in text.strip().split("\n\n"):
            indented = any(line.startswith(" ") for line in paragraph.splitlines())
            paragraphs.append(paragraph if indented else super()._fill_text(paragraph, width, indent))
        return "\n\n".join(paragraphs)

    def add_argument(self, action):
        """As argparse's, which forgets that names of subcommands are indented once more."""
        super().add_argument(action)
        if action.nargs == argparse.PARSER and action.help is not argparse.SUPPRESS:
            self._action_max_length += self._indent_increment

    def _get_default_metavar_for_optional(self, action):
        return {int: "N", float: "X", None: "TEXT", str: "TEXT"}.get(action.type, action.dest.upper())

    def _get_help_string(self, action):
        default = action.default
        unsaid = default is None or default is False or default in ("", [], {}, argparse.SUPPRESS)
        if unsaid or "default: " in action.help:
            return action.help
        if isinstance(default, list | tuple):
            default = " ".join(map(str, default))
        return f"{action.help} (default: {str(default).replace('%', '%%')})"


class FlagParser(argparse.ArgumentParser):
    """argparse's parser without abbreviations, which names the closest known flag for an unknown one."""

    def __init__(self, **settings):
        super().__init__(**{"allow_abbrev": False, "formatter_class": HelpFormatter} | settings)

    def parse_args(self, args=None, namespace=None):
        """As argparse's."""
        namespace, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = next((word.partition("=")[0] for word in unknown if word.startswith("-")), None)
            close = difflib.get_close_matches(flag, self._option_string_actions, 1) if flag else []
            hint = f". Did you mean {close[0]}?" if close else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return namespace


def add_flags(parser: argparse.ArgumentParser, arguments_class: type) -> None:
    """A flag for every field of a dataclass of `option`s, in the groups that they name."""
    types, groups = get_type_hints(arguments_class), groups_of(arguments_class)
    titled = {name: parser.add_argument_group(name) for name in GROUPS if name in groups.values()}
    for entry in fields(arguments_class):
        titled[groups[entry.name]].add_argument(f"--{entry.name}", **_argument(entry, types[entry.name]))


def groups_of(arguments_class: type) -> dict[str, str]:
    """{field: its group of flags}; a subclass that gives a field another default leaves it where it was."""
    groups: dict[str, str] = {}
    for base in reversed(arguments_class.__mro__):
        group = "run"
        for name in base.__dict__.get("__annotations__", ()):
            group = base.__dataclass_fields__[name].metadata.get("group", group)
            groups.setdefault(name, group)
    return groups


def _argument(entry: Field, kind: Any) -> dict:
    """Keyword arguments of `add_argument`: `list[X]` takes several values, `X | None` those of X."""
    default = entry.default if entry.default_factory is MISSING else entry.default_factory()
    how = {"default": default, "help": entry.metadata["help"].replace("%", "%%"), "choices": entry.metadata["choices"]}
    if get_origin(kind) is list:
        kind, how["nargs"] = get_args(kind)[0], "+"
    elif get_origin(kind) in (Union, type(int | None)):
        kind = next(inner for inner in get_args(kind) if inner is not type(None))
    if kind is bool:
        return how | {"type": _boolean, "nargs": "?", "const": True, "metavar": "true|false"}
    return how | {"type": kind}


def _boolean(text: str) -> bool:
    if text.lower() not in _TRUE + _FALSE:
        raise ValueError(text)
    return text.lower() in _TRUE


_boolean.__name__ = "boolean"  # as argparse's message calls it
