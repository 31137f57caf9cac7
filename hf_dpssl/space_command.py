"""The subcommand `hf-dpssl space`: start one of the packaged Gradio Spaces on this machine."""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from .demo_outputs import MODELS


def spaces_folder() -> Path:
    """The folder of Spaces: in the wheel, or beside the package in a checkout."""
    package = Path(__file__).parent
    packed = package / "_spaces"
    return packed if packed.exists() else package.parent / "spaces"


def space_names() -> list[str]:
    """Names of the Spaces."""
    return sorted(path.parent.name for path in spaces_folder().glob("*/app.py"))


def space(argv: list[str]) -> int:
    """`hf-dpssl space`: returns the exit status."""
    options = _parser().parse_args(argv)
    variables = {"GRADIO_SERVER_NAME": options.host, "GRADIO_ANALYTICS_ENABLED": "False"}
    if options.port is not None:
        variables["GRADIO_SERVER_PORT"] = str(options.port)
    if options.demo is not None:
        if not Path(options.demo).is_dir():
            return _refuse(f"no folder {options.demo!r}: give the --output_dir of `hf-dpssl demo`.")
        variables["DPSSL_DEMO"] = options.demo
    for given in options.model:
        name, sign, source = given.partition("=")
        if name not in MODELS or not source:
            return _refuse(f"--model is NAME=FOLDER_OR_ID with a name of {sorted(MODELS)}, got {given!r}.")
        variables[MODELS[name][0]] = source
    if importlib.util.find_spec("gradio") is None:
        return _refuse("gradio is not installed: pip install 'hf_dpssl[demo]'.")
    try:
        return subprocess.call(
            [sys.executable, str(spaces_folder() / options.name / "app.py")], env=os.environ | variables
        )
    except KeyboardInterrupt:
        return 130


def _refuse(message: str) -> int:
    print(f"hf-dpssl space: {message}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-dpssl space",
        description="Start a Gradio page on this machine, on the models that `hf-dpssl demo` wrote or on others.",
        allow_abbrev=False,
    )
    parser.add_argument("name", choices=space_names(), help="which page")
    parser.add_argument("--port", type=_port, help="default: the first free one from 7860 on")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all (default: this machine)"
    )
    parser.add_argument("--demo", metavar="FOLDER", help="outputs of `hf-dpssl demo` (default: outputs/demo)")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FOLDER_OR_ID",
                        help=f"use this one; names: {', '.join(MODELS)}")  # fmt: skip
    return parser


def _port(text: str) -> int:
    port = int(text)
    if not 1 <= port <= 65535:
        raise ValueError(text)
    return port


_port.__name__ = "port (1 to 65535)"  # as argparse's message calls it
