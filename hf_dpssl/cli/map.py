"""The subcommand `hf-dpssl map`."""

from __future__ import annotations

import argparse

from ..runs.contrastive_arguments import MapArguments
from ..runs.recipe import make_parser, parse
from .commands import COMMANDS
from .train import run_script, script_description

_SETTINGS = {
    "prog": "hf-dpssl map",
    "usage": "%(prog)s [DATASET] [--FLAG VALUE ...]   (--help lists the flags)",
    "epilog": f"example:\n  hf-dpssl map {COMMANDS['map'].example}",
}


def parser() -> argparse.ArgumentParser:
    """Of the command line; the data set may stand first, without its flag."""
    return make_parser(MapArguments, script_description("map"), **_SETTINGS)


def main(argv: list[str]) -> int:
    """`hf-dpssl map`: returns the exit status."""
    # Not a positional argument of the parser, which would take the value of a flag it does not know for it.
    named = argv and not argv[0].startswith("-")
    argv = ["--dataset", *argv] if named else argv
    parse(MapArguments, argv, script_description("map"), **_SETTINGS)
    return run_script("map", argv)
