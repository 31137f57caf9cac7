"""The subcommand `hf-dpssl env`."""

from __future__ import annotations

import argparse
import json

from .parsing import command_parser, parse_command


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = command_parser("env", "Machine and library versions, as a bug report needs them.")
    parser.add_argument("--json", action="store_true", help="as JSON")
    return parser


def main(argv: list[str]) -> int:
    """`hf-dpssl env`: returns the exit status."""
    args = parse_command(parser(), argv)
    from ..runs.results import environment

    found = environment()
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    for name, value in [*found.items(), *found["libraries"].items()]:
        if name != "libraries":
            print(f"{name:<16}{value}")
    return 0
