"""The subcommand `hf-dpssl train`: the flags of a script are parsed here, then it starts in a process of its own."""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
from pathlib import Path

from ..autoencoder.arguments import VQArguments
from ..domains.domains_arguments import DomainsArguments
from ..latent_training.dit_arguments import DiTArguments
from ..latent_training.drift_arguments import DriftArguments
from ..latent_training.gan_arguments import GANArguments
from ..latent_training.token_arguments import ARArguments
from ..runs.contrastive_arguments import ContrastiveArguments, MapArguments
from ..runs.flags import FlagParser
from ..runs.recipe import make_parser, parse
from ..runs.shipped_folders import shipped_folder
from .errors import BAD_INPUT
from .parsing import command_parser

SCRIPTS = {
    "contrastive": ContrastiveArguments,
    "dae_ar": ARArguments,
    "dae_dit": DiTArguments,
    "dae_drift": DriftArguments,
    "dae_gan": GANArguments,
    "dae_vq": VQArguments,
    "domains": DomainsArguments,
    "map": MapArguments,
}
_DESCRIPTION = (
    "Start a training script, in one process or as a configuration of accelerate says. hf-dpssl train SCRIPT --help "
    "lists the flags of a script."
)


def script_description(name: str) -> str:
    """The docstring of a script of training/, which is not imported for it."""
    path = shipped_folder("training") / f"{name}.py"
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def run_script(name: str, arguments: list[str], launcher: list[str] | None = None) -> int:
    """Run a script of training/ in a process of its own; returns its exit status."""
    script = shipped_folder("training") / f"{name}.py"
    process = subprocess.Popen([*(launcher or [sys.executable]), str(script), *arguments])
    try:
        return process.wait()
    except SystemExit:  # SIGTERM: the script ends as if it had got the signal itself
        process.terminate()
        process.wait()
        raise


def parser() -> argparse.ArgumentParser:
    """Of the command line, with a subcommand for each script."""
    whole = command_parser("train", _DESCRIPTION)
    scripts = whole.add_subparsers(dest="script", metavar="SCRIPT", parser_class=FlagParser)
    for name, arguments_class in SCRIPTS.items():
        flags = make_parser(arguments_class, "", add_help=False)
        scripts.add_parser(name, parents=[flags, _launcher_parser()], add_help=False)
    return whole


def main(argv: list[str]) -> int:
    """`hf-dpssl train`: returns the exit status."""
    launcher, rest = _launcher_parser().parse_known_args(argv)
    if not rest or rest[0] not in SCRIPTS:
        whole = command_parser("train", _DESCRIPTION, usage="%(prog)s SCRIPT [--FLAG VALUE ...]")
        whole.add_argument("script", metavar="SCRIPT", choices=SCRIPTS, help=f"what to train: {', '.join(SCRIPTS)}")
        add_launcher(whole)
        if not rest:
            whole.print_help(sys.stderr)
            return BAD_INPUT
        whole.parse_args(rest)
    script, flags = rest[0], rest[1:]
    hint = "Flag of hf-dpssl train: --accelerate_config FILE starts the script through accelerate, once per process."
    settings = {"prog": f"hf-dpssl train {script}", "epilog": hint}
    parse(SCRIPTS[script], flags, script_description(script), **settings)
    if launcher.accelerate_config is None:
        return run_script(script, flags)
    config = find_accelerate_config(launcher.accelerate_config)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", str(config)]
    return run_script(script, flags, command)


def find_accelerate_config(name: str) -> Path:
    """A file, or a shipped configuration by its name; FileNotFoundError lists these."""
    config = _accelerate_configs().get(name, Path(name))
    if not config.is_file():
        raise FileNotFoundError(
            f"no accelerate config {name!r}: give a file or one of {sorted(_accelerate_configs())}."
        )
    return config


def _accelerate_configs() -> dict[str, Path]:
    return {path.stem: path for path in (shipped_folder("training") / "accelerate").glob("*.yaml")}


def add_launcher(parser: argparse.ArgumentParser) -> None:
    """The flag that names a configuration of accelerate."""
    known = ", ".join(sorted(_accelerate_configs()))
    parser.add_argument("--accelerate_config", help=f"YAML file of accelerate, or one of {known}")


def _launcher_parser() -> argparse.ArgumentParser:
    parser = FlagParser(add_help=False)
    add_launcher(parser)
    return parser
