"""Flags of training/demo.py, which is no training script: its recipe holds numbers of steps."""

from __future__ import annotations

import argparse

from .console import be_quiet
from .flags import FlagParser


def demo_parser(description: str, **settings) -> FlagParser:
    """The demo's parser."""
    parser = FlagParser(description=description, **settings)
    parser.add_argument("--output_dir", default="outputs/demo", help="folder of the results; an older demo is replaced")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument(
        "--recipe", default="demo", help="YAML file, or name of a shipped recipe, with numbers of steps"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars and no lines of progress")
    return parser


def parse_demo(parser: FlagParser, argv: list[str] | None = None) -> argparse.Namespace:
    """output_dir, seed and recipe; `--quiet` takes effect at once."""
    args = parser.parse_args(argv)
    if args.quiet:
        be_quiet()
    return args
