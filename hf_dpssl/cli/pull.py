"""The subcommand `hf-dpssl pull`."""

from __future__ import annotations

import argparse
import json

from ..runs.console import say
from .parsing import command_parser, parse_command


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = command_parser(
        "pull", "Download a repository of the Hub into a folder, and replay its stored input and output."
    )
    parser.add_argument("repo_id", metavar="ID", help="repository on the Hub, ORG/NAME")
    parser.add_argument("--revision", help="branch, tag, commit or refs/pr/NUMBER (default: main)")
    parser.add_argument("--output_dir", required=True, help="folder of the result; it must not hold anything yet")
    parser.add_argument("--json", action="store_true", help="print what was pulled as JSON")
    return parser


def main(argv: list[str]) -> int:
    """`hf-dpssl pull`: returns the exit status; raises as `pull`."""
    args = parse_command(parser(), argv)
    from ..hub import replay
    from ..hub.pulling import pull

    difference = pull(args.repo_id, args.output_dir, revision=args.revision)
    if args.json:
        about = {"repo_id": args.repo_id, "revision": args.revision or "main", "output_dir": args.output_dir}
        print(json.dumps(about | {"difference": difference}, indent=2))
        return 0
    say(f"{args.output_dir}: {args.repo_id} at {args.revision or 'main'}")
    if difference is not None:
        say(f"the stored pair is reproduced up to {difference:.2g} (at most {replay.TOLERANCE:g})")
    return 0
