"""Arguments of training/demo.py."""

from __future__ import annotations

from dataclasses import dataclass

from .flags import FlagParser, add_flags, option


@dataclass
class DemoArguments:
    """Where the demo writes, and how long it trains."""

    output_dir: str = option("outputs/demo", "folder of the results; an older demo is replaced")
    seed: int = option(0, "random seed")
    recipe: str = option("demo", "YAML file, or name of a shipped recipe, with the numbers of steps")


def demo_parser(description: str, **settings) -> FlagParser:
    """The demo's parser; its namespace holds the fields of `DemoArguments`."""
    parser = FlagParser(description=description, **settings)
    add_flags(parser, DemoArguments)
    return parser
