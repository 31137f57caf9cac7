"""The command line `hf-dpssl`: train, evaluate, sample, map, embed, search, import, push, pull, demo, env."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from . import importers
from .recipe import training_folder


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; returns the exit status."""
    scripts, configs = _shipped("*.py"), _shipped("accelerate/*.yaml")
    parser = argparse.ArgumentParser(prog="hf-dpssl", description="Distance-preserving self-supervised learning.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="the whole chain on embedded digits, on a CPU, in minutes", add_help=False)
    demo.set_defaults(run=lambda known, rest: _run_script("demo", rest))

    train = commands.add_parser(
        "train", help="start a training script through accelerate", add_help=False, allow_abbrev=False
    )
    train.add_argument("script", nargs="?", choices=sorted(set(scripts) - {"demo"}), help="what to train")
    train.add_argument("--accelerate_config", help=f"YAML file of accelerate, or one of {sorted(configs)}")
    train.set_defaults(run=lambda known, rest: _train(known, rest, train))

    evaluate = commands.add_parser("evaluate", help="measure an encoder, autoencoder or generator", add_help=False)
    evaluate.set_defaults(run=_evaluate)

    report = commands.add_parser("report", help="what autoencoders' latents are worth, side by side", add_help=False)
    report.set_defaults(run=_report)

    sampler = commands.add_parser("sample", help="many images of a pipeline, for its Frechet distance", add_help=False)
    sampler.set_defaults(run=_sample)

    picture = commands.add_parser("map", help="2-D map of images: a figure and an interactive page", add_help=False)
    picture.set_defaults(run=_map)

    embed = commands.add_parser("embed", help="vectors of a folder or data set, as parquet", add_help=False)
    embed.set_defaults(run=_embed)

    search = commands.add_parser("search", help="nearest neighbours of pictures among embeddings", add_help=False)
    search.set_defaults(run=_search)

    importer = commands.add_parser("import", help="write another code's checkpoint as an encoder folder")
    importers.add_arguments(importer)
    importer.set_defaults(run=lambda known, rest: importers.run(known))

    pusher = commands.add_parser("push", help="publish a finished checkpoint folder on the Hub", add_help=False)
    pusher.set_defaults(run=_push)

    puller = commands.add_parser("pull", help="download a repository of the Hub into a folder", add_help=False)
    puller.set_defaults(run=_pull)

    page = commands.add_parser("space", help="a page in the browser to try models on", add_help=False)
    page.set_defaults(run=_space)

    environment = commands.add_parser("env", help="machine and library versions, for a bug report")
    environment.add_argument("--json", action="store_true", help="as JSON")
    environment.set_defaults(run=_print_environment)

    known, rest = parser.parse_known_args(argv)
    if rest and known.command in ("env", "import"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return known.run(known, rest)


def _evaluate(known: argparse.Namespace, rest: list[str]) -> int:
    from .evaluate_command import evaluate_command

    return evaluate_command(rest)


def _report(known: argparse.Namespace, rest: list[str]) -> int:
    from .report import report

    return report(rest)


def _sample(known: argparse.Namespace, rest: list[str]) -> int:
    from .sampling_command import sample

    return sample(rest)


def _map(known: argparse.Namespace, rest: list[str]) -> int:
    # Not a positional argument of the parser, which would take the value of a flag it does not know for it.
    named = rest and not rest[0].startswith("-")
    return _run_script("map", ["--dataset", *rest] if named else rest)


def _embed(known: argparse.Namespace, rest: list[str]) -> int:
    from .embedding_commands import embed

    return embed(rest)


def _search(known: argparse.Namespace, rest: list[str]) -> int:
    from .embedding_commands import search

    return search(rest)


def _push(known: argparse.Namespace, rest: list[str]) -> int:
    from .hub_commands import push_command

    return push_command(rest)


def _pull(known: argparse.Namespace, rest: list[str]) -> int:
    from .hub_commands import pull_command

    return pull_command(rest)


def _space(known: argparse.Namespace, rest: list[str]) -> int:
    from .space_command import space

    return space(rest)


def _shipped(pattern: str) -> dict[str, Path]:
    return {path.stem: path for path in training_folder().glob(pattern)}


def _run_script(name: str, arguments: list[str], launcher: list[str] | None = None) -> int:
    script = training_folder() / f"{name}.py"
    return subprocess.call([*(launcher or [sys.executable]), str(script), *arguments])


def _train(known: argparse.Namespace, rest: list[str], parser: argparse.ArgumentParser) -> int:
    if known.script is None:
        parser.print_help()
        print("\nhf-dpssl train SCRIPT --help lists the flags of a script.")
        return 0 if set(rest) & {"-h", "--help"} else 2
    if known.accelerate_config is None:
        return _run_script(known.script, rest)
    shipped = _shipped("accelerate/*.yaml")
    config = shipped.get(known.accelerate_config, Path(known.accelerate_config))
    if not config.exists():
        print(f"hf-dpssl: no accelerate config {known.accelerate_config!r}: give a file or one of {sorted(shipped)}.")
        return 2
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    return _run_script(known.script, rest, launcher)


def _print_environment(known: argparse.Namespace, rest: list[str]) -> int:
    from .results import environment

    found = environment()
    if known.json:
        print(json.dumps(found, indent=2))
        return 0
    for name, value in found.items():
        if name != "libraries":
            print(f"{name:<16}{value}")
    for name, version in found["libraries"].items():
        print(f"{name:<16}{version}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
