"""The subcommand `hf-dpssl import`."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from ..models.choices import STEMS
from ..runs.console import say
from .parsing import command_parser, parse_command


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = command_parser(
        "import",
        "Write an encoder or autoencoder of another code as a folder of ours, and say what was taken over.",
    )
    parser.add_argument(
        "checkpoint",
        help="encoder: file of facebookresearch/moco, t-SimCLR, lightly, solo-learn, a state_dict; autoencoder: file "
        "of taming-transformers or latent diffusion, folder or Hub id of diffusers' VQModel or AutoencoderKL, or of an "
        "encoder whose features are to be decoded",
    )
    parser.add_argument("--output_dir", required=True, help="folder to write")
    parser.add_argument("--architecture", help="timm name; default: read off the shapes of a ResNet")
    parser.add_argument("--stem", choices=STEMS, help="default: told by the first convolution and the code")
    parser.add_argument("--prefix", help="where the backbone's keys stand in a file of another code")
    parser.add_argument("--mean", type=float, nargs=3, help="of images in [0, 1]; default: the code's")
    parser.add_argument("--std", type=float, nargs=3, help="of images in [0, 1]; default: the code's")
    parser.add_argument("--image_size", type=int, help="side in pixels; default: the code's")
    parser.add_argument("--config", help="autoencoder: YAML of a taming or latent-diffusion file")
    parser.add_argument("--subfolder", help="autoencoder: of the folder or Hub id, such as vae")
    parser.add_argument("--level", type=int, help="autoencoder of an encoder's features: which (default: the last)")
    parser.add_argument(
        "--inert", nargs="*", default=[], metavar="CLASS", help="unknown pickled classes to leave unread"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    return parser


def main(argv: list[str]) -> int:
    """`hf-dpssl import`: prints the report; raises OSError or ValueError with the reason of a refusal."""
    arguments = parse_command(parser(), argv)
    from ..convert.autoencoder_importers import is_autoencoder_source
    from ..convert.encoder_importers import import_checkpoint

    try:
        if is_autoencoder_source(arguments.checkpoint):
            report = _import_autoencoder(arguments)
            what = f"autoencoder from {report['kind']} ({report['source']})"
        else:
            names = ["architecture", "stem", "prefix", "mean", "std", "image_size", "inert", "overwrite"]
            _refuse_flags(arguments, ("config", "subfolder", "level"), "autoencoders", "a file without decoder")
            options = {name: getattr(arguments, name) for name in names}
            imported = import_checkpoint(arguments.checkpoint, arguments.output_dir, **options)
            what = f"{imported.architecture}, stem {imported.stem}, {imported.method} from {imported.code}"
            report = vars(imported)
    except (OSError, ValueError) as error:
        if arguments.checkpoint in str(error):
            raise
        raise ValueError(f"{arguments.checkpoint}: {error}") from error
    say(f"{arguments.output_dir}: {what}")
    for title, lines in (("taken", report["taken"]), ("left out", report["left_out"]), ("note", report["notes"])):
        for line in lines:
            say(f"  {title}: {line}")
    return 0


def _import_autoencoder(arguments: argparse.Namespace) -> dict:
    from ..convert.autoencoder_importers import import_autoencoder
    from ..convert.encoder_importers import check_output

    check_output(Path(arguments.output_dir), arguments.overwrite)
    _refuse_flags(arguments, ("architecture", "stem", "prefix", "mean", "std"), "encoder files", "an autoencoder")
    options = {"image_size": arguments.image_size, "config_file": arguments.config, "subfolder": arguments.subfolder}
    level = -1 if arguments.level is None else arguments.level
    return import_autoencoder(arguments.checkpoint, arguments.output_dir, level=level, inert=arguments.inert, **options)


def _refuse_flags(arguments: argparse.Namespace, names: Iterable[str], read_for: str, found: str) -> None:
    given = [f"--{name}" for name in names if getattr(arguments, name) is not None]
    if given:
        raise ValueError(f"{', '.join(given)} is read for {read_for}, and this is {found}.")
