"""Command-line arguments and YAML recipes: the file gives defaults, flags override, unknown keys are errors.

Every script has its own dataclass that extends `RunArguments`; `parse` makes the parser from it. The demo is no
training script: its recipe holds numbers of steps, and it has a parser of its own.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TypeVar

from ..data.choices import STREAM_READINGS
from .atomic_files import atomic_file
from .console import be_quiet, say
from .flags import FlagParser, add_flags, groups_of, option
from .shipped_folders import shipped_folder

Arguments = TypeVar("Arguments", bound="RunArguments")

_FREE_TO_CHANGE = {
    "output_dir",
    "overwrite",
    "num_workers",
    "logging_steps",
    "log_with",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "resume_from_checkpoint",
    "num_processes",
    "preload_gb",
    "compile",
    "gradient_checkpointing",
}


@dataclass
class RunArguments:
    """What all training scripts share."""

    dataset: str = option(
        "digits", "digits, mnist, cifar10 ..., Hub id, folder, parquet or tar file, or a union a+b", group="data"
    )
    dataset_revision: str | None = option(None, "branch, tag or commit of a Hub data set")
    image_column: str | None = option(None, "column of pictures; found by its type when not given")
    label_column: str | None = option(None, "column of classes; found by its type when not given")
    streaming: bool = option(False, "read the data set as a stream instead of downloading it first")
    stream_reading: str = option(
        "shards", "of a stream each process and worker reads its own shards, or the whole", choices=STREAM_READINGS
    )
    on_bad_image: str = option("error", "what to do with an unreadable picture", choices=["error", "skip"])
    image_size: int | None = option(None, "side of the square images in pixels; default: the data set's")
    preload_gb: float = option(1.0, "decode the images into memory once when they fit into this many GiB")
    num_workers: int = option(
        0, "loader processes for images that are not preloaded; cached latents and codes need none"
    )

    batch_size: int = option(64, "images per process and step", group="optimiser")
    gradient_accumulation_steps: int = option(1, "batches per optimiser step")
    max_grad_norm: float = option(1.0, "gradient norm is clipped to this; 0 does not clip")
    warmup_steps: int = option(0, "steps of linear warm-up of the learning rate")
    lr_scheduler: str = option("cosine", "learning-rate schedule of diffusers.optimization.get_scheduler")

    evaluation_images: int | None = option(
        None, "so many images of each split, drawn at random, evaluate and measure; default: all", group="evaluation"
    )

    output_dir: str = option("outputs/run", "folder of the run; results go into subfolders", group="run")
    overwrite: bool = option(False, "discard checkpoints of an earlier run in output_dir")
    seed: int = option(0, "random seed")
    mixed_precision: str | None = option(
        None, "precision; default: what accelerate is configured for", choices=["no", "bf16", "fp16"]
    )
    num_processes: int | None = option(None, "processes this run expects; another number is an error")
    logging_steps: int = option(10, "steps between two log entries")
    log_with: list[str] = option([], "trackers: tensorboard, wandb, trackio, ...")
    checkpointing_steps: int = option(500, "optimiser steps between checkpoints")
    checkpoints_total_limit: int = option(2, "checkpoints kept")
    resume_from_checkpoint: str | None = option(
        None, "'latest' (starts afresh when there is none) or a checkpoint folder"
    )

    def free_to_change(self) -> set[str]:
        """Fields that a continued run may give another value, since they do not decide about its weights."""
        measured = {name for name, group in groups_of(type(self)).items() if group == "evaluation"}
        return _FREE_TO_CHANGE | measured

    def depends_on_length(self) -> bool:
        """Whether, besides the learning rate, something follows a schedule over the whole run."""
        return False

    def __post_init__(self):
        for name in (
            "batch_size",
            "gradient_accumulation_steps",
            "logging_steps",
            "checkpointing_steps",
            "evaluation_images",
        ):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")
        if self.checkpoints_total_limit < 1:
            raise ValueError(f"--checkpoints_total_limit must be at least 1, got {self.checkpoints_total_limit}.")
        for name in ("seed", "warmup_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} must not be negative, got {getattr(self, name)}.")


def make_parser(arguments_class: type, description: str, **settings) -> FlagParser:
    """The parser of a training script: a flag for every field, and those that are not part of a recipe."""
    usage = "%(prog)s [--FLAG VALUE ...]   (--help lists the flags)"
    parser = FlagParser(description=description, **{"usage": usage} | settings)
    parser.add_argument("--recipe", help="YAML file, or name of a shipped recipe, with defaults for all flags below")
    parser.add_argument("--quiet", action="store_true", help="no progress bars and no lines of progress")
    add_flags(parser, arguments_class)
    return parser


def parse(arguments_class: type[Arguments], argv: list[str] | None, description: str, **settings) -> Arguments:
    """Arguments from the command line; `--recipe FILE` (or the name of a shipped recipe) gives defaults.

    Args:
        arguments_class: a dataclass of `option`s.
        argv: None for those of this process.
        description: for the help.
        settings: of the parser, such as `prog`.

    Raises:
        SystemExit: like argparse, on an unknown flag or key, or a value that does not fit; the
            message names it and the closest known one.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--recipe")
    parser = make_parser(arguments_class, description, **settings)
    known, _ = early.parse_known_args(argv)
    if known.recipe is not None:
        defaults = _read_recipe(known.recipe, arguments_class, parser)
        # Through the parser, which converts: YAML reads 1e-4 as a string.
        argv = [item for key, value in defaults.items() for item in _as_flags(key, value)] + argv
    values = vars(parser.parse_args(argv))
    del values["recipe"]
    if values.pop("quiet"):
        be_quiet()
    try:
        return arguments_class(**values)
    except ValueError as error:
        parser.error(str(error))


def announce(arguments_class: type[Arguments], description: str) -> None:
    """What a script does first when it is started: help and wrong flags end here, before libraries are imported."""
    args = parse(arguments_class, None, description)
    say(f"{Path(sys.argv[0]).name}: {args.dataset}, seed {args.seed}, into {args.output_dir}")


def demo_parser(description: str, **settings) -> FlagParser:
    """The parser of training/demo.py."""
    parser = FlagParser(description=description, **settings)
    parser.add_argument("--output_dir", default="outputs/demo", help="folder of the results; an older demo is replaced")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument(
        "--recipe", default="demo", help="YAML file, or name of a shipped recipe, with numbers of steps"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars and no lines of progress")
    return parser


def parse_demo(parser: FlagParser, argv: list[str] | None = None) -> argparse.Namespace:
    """output_dir, seed and recipe of the demo; `--quiet` takes effect at once."""
    args = parser.parse_args(argv)
    if args.quiet:
        be_quiet()
    return args


def find_recipe(name: str) -> Path:
    """Path of a recipe file, or of a shipped one by name; FileNotFoundError lists what there is."""
    path = Path(name)
    if path.exists():
        return path
    folder = shipped_folder("training") / "recipes"
    shipped = folder / f"{path.name.removesuffix('.yaml')}.yaml"
    if shipped.exists():
        return shipped
    names = sorted(file.stem for file in folder.glob("*.yaml"))
    raise FileNotFoundError(f"no recipe {name!r}: give a YAML file or one of {names}.")


def save_recipe(arguments: RunArguments, path: str | os.PathLike) -> None:
    """Write the resolved arguments as YAML that `--recipe` reads again."""
    import yaml

    with atomic_file(path) as file:
        yaml.safe_dump(asdict(arguments), file, sort_keys=False)


def _read_recipe(name: str, arguments_class: type, parser: argparse.ArgumentParser) -> dict:
    import yaml

    try:
        content = yaml.safe_load(find_recipe(name).read_text(encoding="utf-8")) or {}
    except (FileNotFoundError, yaml.YAMLError) as error:
        parser.error(str(error))
    if not isinstance(content, dict):
        parser.error(f"recipe {name!r} must be a mapping of flags to values, not a {type(content).__name__}.")
    known = [f.name for f in fields(arguments_class)]
    for key in content:
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            parser.error(
                f"recipe {name!r} has the unknown key {key!r}." + (f" Did you mean {close[0]}?" if close else "")
            )
    return content


def _as_flags(key: str, value) -> list[str]:
    if value is None or value == []:
        return []
    if isinstance(value, bool):
        return [f"--{key}", str(value)]
    return [f"--{key}", *(str(item) for item in (value if isinstance(value, list) else [value]))]
