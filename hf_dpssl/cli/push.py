"""The subcommand `hf-dpssl push`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from ..runs.console import printable, say
from .parsing import command_parser, parse_command

if TYPE_CHECKING:
    from ..hub.publishing import PushReport


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = command_parser(
        "push",
        "Publish a finished checkpoint folder on the Hub as one commit, pull it back and replay its stored "
        "input and output. The token is that of `hf auth login` or HF_TOKEN. HF_HUB_DISABLE_XET=1 uploads through Git "
        "LFS instead of Xet storage.",
    )
    parser.add_argument("folder", help="as a training script writes it: encoder/, autoencoder/, dit/, ar/, gan/")
    parser.add_argument("repo_id", metavar="ORG/NAME", help="repository; made when missing")
    parser.add_argument("--private", action="store_true", help="a repository that is made is private")
    parser.add_argument("--revision", help="branch; made when missing (default: main)")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request instead of changing the branch")
    parser.add_argument("--dry_run", action="store_true", help="list what would be sent; no request is made")
    parser.add_argument("--message", help="of the commit")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def main(argv: list[str]) -> int:
    """`hf-dpssl push`: returns the exit status; raises as `push`."""
    options = vars(parse_command(parser(), argv))
    from ..hub.publishing import push

    as_json = options.pop("json")
    options["private"] = options["private"] or None
    report = push(**options)
    if as_json:
        print(json.dumps(asdict(report), indent=2))
    elif report.commit is None:  # what was asked for
        print(printable(_summary(report)))
    else:
        say(_summary(report))
    return 0


def _summary(report: PushReport) -> str:
    from ..hub import replay

    count, size = len(report.files), sum(report.files.values())
    left_out = f"left out: {', '.join(report.left_out)}" if report.left_out else "nothing is left out"
    if report.commit is None:
        listed = [f"{size:>12,}  {path}" for path, size in report.files.items()]
        return "\n".join([*listed, f"{size:>12,}  bytes in {count} files would go to {report.repo_id}; {left_out}"])
    replayed = "no stored pair to replay"
    if report.difference is not None:
        replayed = f"the stored pair differs by {report.difference:.2g} (at most {replay.TOLERANCE:g})"
    lines = [
        f"{report.repo_id}: {count} files, {size:,} bytes; {left_out}",
        *([f"removed: {', '.join(report.removed)}"] if report.removed else []),
        f"commit {report.commit} on {report.revision}, {report.pull_request or report.url}",
        f"pulled back after {report.seconds:.1f} s in all: every byte is equal, {replayed}",
    ]
    return "\n".join(lines)
