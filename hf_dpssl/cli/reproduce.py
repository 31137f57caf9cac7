"""The subcommand `hf-dpssl reproduce`: decides claims of the papers, by training/evidence/reproduce.py."""

from __future__ import annotations

import argparse

from .parsing import command_parser, parse_command
from .train import run_script

SCALES = ("quick", "cpu", "gpu", "paper")


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = command_parser(
        "reproduce",
        "Decide claims of the papers at a scale that one has: supported, contradicted or undecided, by paired seeds, "
        "Student's t and Holm's correction. What is compared, by which margin and with how many seeds is stated in "
        "files before the run, which goes on cell by cell when it was killed.",
    )
    parser.add_argument("claims", nargs="*", metavar="CLAIM", help="names or numbers, or all; --list shows them")
    parser.add_argument("--list", action="store_true", help="print the claims, and end")
    parser.add_argument(
        "--scale",
        default="quick",
        choices=SCALES,
        help="from minutes to sizes like the papers'; --list says how long",
    )
    parser.add_argument("--seeds", type=int, help="more seeds than the claims state, fixed before the run")
    parser.add_argument("--output_dir", default="outputs/claims", help="folder of the cells, values and the page")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--dry_run", action="store_true", help="print what would be run, and end")
    only.add_argument(
        "--rehearse",
        action="store_true",
        help="take two steps of each training run at full size on tensors without values, print the memory, and end",
    )
    parser.add_argument("--claims_dir", help="folder of other claims and studies, in the form of the shipped ones")
    return parser


def main(argv: list[str]) -> int:
    """`hf-dpssl reproduce`: returns the exit status."""
    parse_command(parser(), argv)
    return run_script("evidence/reproduce", argv)
