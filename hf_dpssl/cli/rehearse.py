"""The subcommand `hf-dpssl rehearse`: what a training script would need of a GPU, by training/evidence/rehearse.py."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from ..runs.flags import FlagParser
from ..runs.recipe import RunArguments, make_parser, parse
from .errors import BAD_INPUT
from .parsing import command_parser
from .train import SCRIPTS, add_launcher, find_accelerate_config, run_script, script_description

REHEARSED = ("contrastive", "dae_ar", "dae_dit", "dae_drift", "dae_gan", "dae_vq")
_DESCRIPTION = (
    "Would this run start on my GPU? Its models, optimisers and averages at full size, and a step of its batch, on a "
    "GPU that is not there: bytes of each, whether they fit, and how often the host would wait for the GPU. Takes the "
    "flags of the script; nothing is read of the images but their classes, and nothing is written."
)


@dataclass
class Asked:
    """A script with its arguments; memory of a GPU in GiB; accelerate's configuration, or None."""

    script: str
    args: RunArguments
    recipe: str | None
    memory: float
    as_json: bool
    launcher: Path | None


def parser() -> argparse.ArgumentParser:
    """Of the command line, with a subcommand for each script."""
    whole = command_parser("rehearse", _DESCRIPTION)
    scripts = whole.add_subparsers(dest="script", metavar="SCRIPT", parser_class=FlagParser)
    for name in REHEARSED:
        flags = make_parser(SCRIPTS[name], "", add_help=False)
        scripts.add_parser(name, parents=[flags, _own_parser()], add_help=False)
    return whole


def main(argv: list[str]) -> int:
    """`hf-dpssl rehearse`: returns the exit status."""
    if not argv:
        _whole_parser().print_help(sys.stderr)
        return BAD_INPUT
    parsed(argv)  # help and wrong flags end here
    return run_script("evidence/rehearse", argv)


def parsed(argv: list[str]) -> Asked:
    """What a command line asks for.

    Raises:
        SystemExit: as argparse, on a wrong flag or script. ValueError: a script that is not rehearsed, or no memory.
        FileNotFoundError: an unknown configuration of accelerate.
    """
    own, rest = _own_parser().parse_known_args(argv)
    if not rest or rest[0] not in SCRIPTS:
        _whole_parser().parse_args(rest)
    script, flags = rest[0], rest[1:]
    if script not in REHEARSED:
        raise ValueError(f"{script} is not rehearsed; these are: {', '.join(REHEARSED)}.")
    if not own.memory > 0:
        raise ValueError(f"--memory must be positive, got {own.memory}.")
    hint = "Flags of hf-dpssl rehearse: --memory GIB (default 80), --json, --accelerate_config FILE."
    settings = {"prog": f"hf-dpssl rehearse {script}", "epilog": hint}
    args = parse(SCRIPTS[script], flags, script_description(script), **settings)
    launcher = find_accelerate_config(own.accelerate_config) if own.accelerate_config else None
    recipes = FlagParser(add_help=False)
    recipes.add_argument("--recipe")
    return Asked(script, args, recipes.parse_known_args(flags)[0].recipe, own.memory, own.json, launcher)


def _whole_parser() -> argparse.ArgumentParser:
    whole = command_parser("rehearse", _DESCRIPTION, usage="%(prog)s SCRIPT [--FLAG VALUE ...]")
    whole.add_argument("script", metavar="SCRIPT", choices=SCRIPTS, help=f"one of: {', '.join(REHEARSED)}")
    _add_own(whole)
    return whole


def _add_own(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--memory", type=float, default=80.0, help="memory of a GPU in GiB")
    parser.add_argument("--json", action="store_true", help="as JSON, sizes in bytes")
    add_launcher(parser)


def _own_parser() -> argparse.ArgumentParser:
    parser = FlagParser(add_help=False)
    _add_own(parser)
    return parser
