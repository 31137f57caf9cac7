"""What the parsers of all subcommands share: the name, the example, `--quiet`, `--debug`. Imports no library."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..runs.flags import FlagParser
from .commands import COMMANDS


def command_parser(name: str, description: str, **settings) -> FlagParser:
    """The parser of a subcommand, whose help ends with the example of the table of commands."""
    example = f"example:\n  hf-dpssl {name} {COMMANDS[name].example}"
    parser = FlagParser(prog=f"hf-dpssl {name}", description=description, epilog=example, **settings)
    common = parser.add_argument_group("of all commands")  # `commands.main` takes them out before parsing
    common.add_argument("--quiet", action="store_true", help="no progress bars and no lines of progress")
    common.add_argument("--debug", action="store_true", help="show the traceback of every error")
    return parser


def parse_command(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Arguments without those that all commands share."""
    args = parser.parse_args(argv)
    del args.quiet, args.debug
    return args


def json_object(text: str) -> dict:
    """An argument that is a JSON object."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(text)
    return value


json_object.__name__ = "JSON object"  # as argparse's message calls it


def local_folder(name: str) -> Path:
    """The path of an existing folder; FileNotFoundError where there is none."""
    folder = Path(name)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"{name} {what}: give the folder of a finished checkpoint.")
    return folder
