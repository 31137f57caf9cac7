"""The command line `hf-dpssl`: one table of commands; what a user can mend is one line on stderr (errors.py).

A command is a module of this folder with `parser()` and `main(argv)`. It parses from light modules, and imports its
libraries when that is done: help and wrong flags are answered at once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from types import ModuleType
from typing import NamedTuple

from .. import __version__
from ..runs.console import be_quiet
from ..runs.flags import FlagParser
from .errors import ended_by_sigterm, reader_has_gone, reported


class Command(NamedTuple):
    """A subcommand: what it does in a line, and the arguments of an example."""

    help: str
    example: str


COMMANDS = {
    "demo": Command("the whole chain on embedded digits, on a CPU, in minutes", "--output_dir outputs/demo"),
    "train": Command(
        "start a training script, through accelerate where asked",
        "contrastive --dataset path/to/images --image_size 64 --output_dir outputs/mine",
    ),
    "rehearse": Command(
        "whether a run fits on a GPU, without one",
        "dae_dit --recipe dit-b2-imagenet --memory 80",
    ),
    "evaluate": Command("measure an encoder, autoencoder or generator", "outputs/demo/encoder --dataset digits"),
    "report": Command(
        "what autoencoders' latents are worth, side by side",
        "outputs/demo/autoencoder --output_dir outputs/report",
    ),
    "sample": Command(
        "many images of a pipeline, for its Frechet distance",
        "outputs/demo/dit --num_images 1000 --output_dir outputs/samples",
    ),
    "map": Command(
        "2-D map of images: a figure and an interactive page",
        "path/to/images --image_size 32 --output_dir outputs/map",
    ),
    "embed": Command(
        "vectors of a folder or data set, as parquet", "outputs/demo/encoder digits --output_dir outputs/embeddings"
    ),
    "search": Command("nearest neighbours of pictures among embeddings", "outputs/embeddings picture.png --k 5"),
    "rank": Command(
        "which encoder to take for pictures of several domains",
        "path/to/domains --zoo outputs/demo/encoder timm/resnet18.a1_in1k --output_dir outputs/rank",
    ),
    "zood": Command(
        "what choosing and combining encoders is worth on new domains",
        "--zoo zoo.yaml --dataset path/to/domains --output_dir outputs/zood",
    ),
    "reproduce": Command("decide claims of the papers, each with one command", "reconstruction --scale quick"),
    "import": Command(
        "write another code's checkpoint as a folder of ours",
        "moco_v2_800ep_pretrain.pth.tar --output_dir outputs/moco-v2",
    ),
    "export": Command(
        "write a checkpoint for stock timm, diffusers or onnxruntime",
        "outputs/demo/encoder --format onnx --output_dir outputs/encoder-onnx",
    ),
    "push": Command("publish a finished checkpoint folder on the Hub", "outputs/mine/encoder org/t-simclr --private"),
    "pull": Command("download a repository of the Hub into a folder", "org/t-simclr --output_dir outputs/t-simclr"),
    "card": Command("write the model card of a finished checkpoint", "outputs/demo/encoder"),
    "info": Command("what a checkpoint is: sizes, data, results, lineage", "outputs/demo/encoder"),
    "space": Command("a page in the browser to try models on", "image_generator --demo outputs/demo"),
    "env": Command("machine and library versions, for a bug report", "--json"),
}


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; returns the exit status: 0, 1 for a failure, 2 for bad input, 130 when interrupted.

    `--debug` anywhere, or DPSSL_DEBUG=1, shows the traceback of every error; `--quiet` anywhere, or DPSSL_QUIET=1,
    leaves out progress bars and lines of progress.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if "_ARGCOMPLETE" in os.environ:
        _complete()
    if "--debug" in argv:
        argv.remove("--debug")
        os.environ["DPSSL_DEBUG"] = "1"  # for the processes of training scripts, too
    if "--quiet" in argv:
        argv.remove("--quiet")
        be_quiet()
    try:
        with ended_by_sigterm():
            status = _run(argv)
            sys.stdout.flush()  # a reader that has gone is noticed here
            return status
    except BrokenPipeError:
        return reader_has_gone()


def _run(argv: list[str]) -> int:
    try:
        name = _parser().parse_args(argv[:1]).command
        return reported(f"hf-dpssl {name}", lambda: command_module(name).main(argv[1:]))
    except SystemExit as ended:  # of an argparse that has printed its help
        if ended.code:
            raise
        return 0


def command_module(name: str) -> ModuleType:
    """The module of a command."""
    return importlib.import_module(f".{name}_" if name == "import" else f".{name}", __package__)


def _parser() -> argparse.ArgumentParser:
    parser = FlagParser(
        prog="hf-dpssl",
        description="Distance-preserving self-supervised learning.",
        epilog="hf-dpssl COMMAND --help lists the flags of a command, with an example. Exit codes: 0, 1 for a failure "
        "(network, a run that went wrong), 2 for bad input.\n\n"
        "Tab completion, in bash and zsh:\n"
        "  pip install argcomplete\n"
        '  eval "$(register-python-argcomplete hf-dpssl)"',
    )
    parser.add_argument("--version", action="version", version=f"hf-dpssl {__version__}")
    parser.add_argument("--quiet", action="store_true", help="no progress bars and no lines of progress")
    parser.add_argument("--debug", action="store_true", help="show the traceback of every error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=FlagParser)
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.help, add_help=False)
    return parser


def _complete() -> None:
    """Answer a shell that asks for what may follow, and end; needs argcomplete, which has set the variable."""
    import argcomplete

    parser = FlagParser(prog="hf-dpssl")
    commands = parser.add_subparsers(parser_class=FlagParser)
    for name in COMMANDS:
        commands.add_parser(name, parents=[command_module(name).parser()], add_help=False)
    argcomplete.autocomplete(parser)
