"""The subcommand `hf-dpssl card`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..runs.console import say
from .parsing import command_parser, local_folder, parse_command


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = command_parser(
        "card",
        "Write the model card of a finished checkpoint, or its generated part anew: what you wrote around "
        "that part, and what you changed in the front matter, is kept. README.md removed, all is written afresh.",
    )
    parser.add_argument("folder", help="as a training script writes it: encoder/, autoencoder/, dit/, ar/, gan/")
    parser.add_argument("--title", help="first heading (default: method and data set)")
    parser.add_argument(
        "--license",
        help="of the model, which is yours to choose: an SPDX identifier such as apache-2.0, or the name of another "
        "licence; the card states none by default",
    )
    parser.add_argument("--license_link", help="address or file of a licence that is no SPDX identifier")
    parser.add_argument("--dataset_license", help="licence of the training images, where the files do not say it")
    parser.add_argument("--output", help="file to write (default: README.md in the folder)")
    return parser


def main(argv: list[str]) -> int:
    """`hf-dpssl card`: returns the exit status; errors of `write_card`."""
    args = parse_command(parser(), argv)
    folder, output = local_folder(args.folder), args.output and Path(args.output)
    if output and output.is_dir():
        raise ValueError(f"--output {output} is a folder: give a file.")
    from ..hub.model_card import write_card

    licences = {"licence": args.license, "license_link": args.license_link, "license_of_data": args.dataset_license}
    written = write_card(folder, title=args.title, **licences, output=output)
    say(f"{written}: written")
    return 0
