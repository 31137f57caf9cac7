"""The subcommand `hf-dpssl demo`."""

from __future__ import annotations

import argparse

from ..runs.recipe import demo_parser, parse_demo
from .commands import COMMANDS
from .train import run_script, script_description


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    example = f"example:\n  hf-dpssl demo {COMMANDS['demo'].example}"
    return demo_parser(script_description("demo"), prog="hf-dpssl demo", epilog=example)


def main(argv: list[str]) -> int:
    """`hf-dpssl demo`: returns the exit status."""
    parse_demo(parser(), argv)
    return run_script("demo", argv)
