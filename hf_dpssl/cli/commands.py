"""The command line `hf-dpssl`: one table of commands; what a user can mend is one line on stderr (command_errors)."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from ..runs.shipped_folders import shipped_folder
from .errors import BAD_INPUT, reported


class Command(NamedTuple):
    """A subcommand: what it does in a line, the arguments of an example, and MODULE:FUNCTION that takes arguments."""

    help: str
    example: str
    function: str


COMMANDS = {
    "demo": Command(
        "the whole chain on embedded digits, on a CPU, in minutes", "--output_dir outputs/demo", "cli:_demo"
    ),
    "train": Command(
        "start a training script, through accelerate where asked",
        "contrastive --dataset path/to/images --image_size 64 --output_dir outputs/mine",
        "cli:_train",
    ),
    "evaluate": Command(
        "measure an encoder, autoencoder or generator",
        "outputs/demo/encoder --dataset digits",
        "evaluate_command:evaluate_command",
    ),
    "report": Command(
        "what autoencoders' latents are worth, side by side",
        "outputs/demo/autoencoder --output outputs/report",
        "report:report",
    ),
    "sample": Command(
        "many images of a pipeline, for its Frechet distance",
        "outputs/demo/dit --num_images 1000 --output_dir outputs/samples",
        "sampling_command:sample",
    ),
    "map": Command(
        "2-D map of images: a figure and an interactive page",
        "path/to/images --image_size 32 --output_dir outputs/map",
        "cli:_map",
    ),
    "embed": Command(
        "vectors of a folder or data set, as parquet",
        "outputs/demo/encoder digits --output outputs/embeddings",
        "embedding_commands:embed",
    ),
    "search": Command(
        "nearest neighbours of pictures among embeddings",
        "outputs/embeddings picture.png --k 5",
        "embedding_commands:search",
    ),
    "import": Command(
        "write another code's checkpoint as a folder of ours",
        "moco_v2_800ep_pretrain.pth.tar outputs/moco-v2",
        "importers:import_command",
    ),
    "export": Command(
        "write a checkpoint for stock timm, diffusers or onnxruntime",
        "outputs/demo/encoder --format onnx --output_dir outputs/encoder-onnx",
        "export_command:export_command",
    ),
    "push": Command(
        "publish a finished checkpoint folder on the Hub",
        "outputs/mine/encoder org/t-simclr --private",
        "hub_commands:push_command",
    ),
    "pull": Command(
        "download a repository of the Hub into a folder",
        "org/t-simclr --output_dir outputs/t-simclr",
        "hub_commands:pull_command",
    ),
    "card": Command(
        "write the model card of a finished checkpoint", "outputs/demo/encoder", "card_commands:card_command"
    ),
    "info": Command(
        "what a checkpoint is: sizes, data, results, lineage", "outputs/demo/encoder", "card_commands:info_command"
    ),
    "space": Command(
        "a page in the browser to try models on", "image_generator --demo outputs/demo", "space_command:space"
    ),
    "env": Command("machine and library versions, for a bug report", "--json", "cli:_env"),
}


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; returns the exit status: 0, 1 for a failure, 2 for bad input, 130 when interrupted.

    `--debug` anywhere, or DPSSL_DEBUG=1, shows the traceback of every error.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--debug" in argv:
        argv.remove("--debug")
        os.environ["DPSSL_DEBUG"] = "1"  # for the processes of training scripts, too
    name = _parser().parse_args(argv[:1]).command
    rest, (module, _, function) = argv[1:], COMMANDS[name].function.partition(":")

    def run() -> int:  # only this command's libraries are imported
        return getattr(importlib.import_module(f"hf_dpssl.{module}"), function)(rest)

    try:
        status = reported(f"hf-dpssl {name}", run)
    except SystemExit as ended:  # of an argparse that has printed its help
        status = ended.code
        if status:
            raise
    if {"-h", "--help"} & set(rest) and status == 0:
        print(f"\nexample:\n  hf-dpssl {name} {COMMANDS[name].example}")
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-dpssl",
        description="Distance-preserving self-supervised learning.",
        epilog="hf-dpssl COMMAND --help lists the flags of a command, with an example. Exit codes: 0, 1 for a failure "
        "(network, a run that went wrong), 2 for bad input. --debug shows tracebacks.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.help, add_help=False)
    return parser


def _shipped(pattern: str) -> dict[str, Path]:
    return {path.stem: path for path in shipped_folder("training").glob(pattern)}


def _run_script(name: str, arguments: list[str], launcher: list[str] | None = None) -> int:
    script = shipped_folder("training") / f"{name}.py"
    return subprocess.call([*(launcher or [sys.executable]), str(script), *arguments])


def _demo(argv: list[str]) -> int:
    return _run_script("demo", argv)


def _map(argv: list[str]) -> int:
    # Not a positional argument of a parser, which would take the value of a flag it does not know for it.
    named = argv and not argv[0].startswith("-")
    return _run_script("map", ["--dataset", *argv] if named else argv)


def _train(argv: list[str]) -> int:
    scripts, configs = _shipped("*.py"), _shipped("accelerate/*.yaml")
    parser = argparse.ArgumentParser(
        prog="hf-dpssl train",
        description="Start a training script, in one process or as a configuration of accelerate says. "
        "hf-dpssl train SCRIPT --help lists the flags of a script.",
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("script", nargs="?", choices=sorted(set(scripts) - {"demo"}), help="what to train")
    parser.add_argument("--accelerate_config", help=f"YAML file of accelerate, or one of {sorted(configs)}")
    known, rest = parser.parse_known_args(argv)
    if known.script is None:
        asked = bool({"-h", "--help"} & set(rest))
        parser.print_help(sys.stdout if asked else sys.stderr)
        return 0 if asked else BAD_INPUT
    if known.accelerate_config is None:
        return _run_script(known.script, rest)
    config = configs.get(known.accelerate_config, Path(known.accelerate_config))
    if not config.is_file():
        raise FileNotFoundError(
            f"no accelerate config {known.accelerate_config!r}: give a file or one of {sorted(configs)}."
        )
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", str(config)]
    return _run_script(known.script, rest, launcher)


def _env(argv: list[str]) -> int:
    from ..runs.results import environment

    parser = argparse.ArgumentParser(
        prog="hf-dpssl env", description="Machine and library versions, as a bug report needs them."
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    as_json, found = parser.parse_args(argv).json, environment()
    if as_json:
        print(json.dumps(found, indent=2))
        return 0
    for name, value in [*found.items(), *found["libraries"].items()]:
        if name != "libraries":
            print(f"{name:<16}{value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
