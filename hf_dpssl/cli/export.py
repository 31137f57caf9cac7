"""The subcommand `hf-dpssl export`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from ..convert.choices import FORMATS
from ..runs.console import say
from .parsing import command_parser, json_object, parse_command


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = command_parser(
        "export",
        "Write a checkpoint for other libraries' own classes (timm and stock transformers, diffusers) or "
        "for onnxruntime. What was written is compared with our model on random inputs, and kept only if it agrees.",
    )
    parser.add_argument("source", metavar="FOLDER_OR_ID", help="finished checkpoint, or Hub id (id@revision)")
    parser.add_argument(
        "--format",
        required=True,
        choices=FORMATS,
        help="timm: of an encoder; vqmodel: of an autoencoder; dit-pipeline: of a latent DiT; onnx: of an encoder, of "
        "an autoencoder's two halves, or of a one-step generator (needs hf_dpssl[onnx])",
    )
    parser.add_argument("--output_dir", required=True, help="folder of the result")
    parser.add_argument(
        "--scheduler", help="dit-pipeline: diffusers scheduler in place of the model's, with its config"
    )
    parser.add_argument(
        "--scheduler_config", type=json_object, help="dit-pipeline: what to change in the scheduler's config, as JSON"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def main(argv: list[str]) -> int:
    """`hf-dpssl export`: returns the exit status; raises as `export`."""
    options = vars(parse_command(parser(), argv))
    from ..convert.exports import export

    as_json = options.pop("json")
    report = export(**options)
    if as_json:
        print(json.dumps(asdict(report), indent=2))
        return 0
    size = sum(report.files.values())
    say(f"{report.output_dir}: {report.written}, {size:,} bytes in {len(report.files)} files")
    for name, value in report.differences.items():
        say(f"  {name} differs by {value:.2g} (at most {report.tolerance:g})")
    return 0
