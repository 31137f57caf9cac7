"""`hf-dpssl evaluate ID --suite dg`: an encoder's frozen features under every algorithm of domain generalisation."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..domains.choices import ALGORITHMS, DIGITS
from .train import run_script

_SEEDS = 5
# Flags of `evaluate` that the suite heeds, and what training/domains.py calls them.
_HEEDED = {
    "dataset": "dataset",
    "dataset_revision": "dataset_revision",
    "domain_column": "domain_column",
    "image_column": "image_column",
    "label_column": "label_column",
    "on_bad_image": "on_bad_image",
    "evaluation_images": "images",
    "steps": "steps",
    "batch_size": "batch_size",
    "seed": "seed",
    "output_dir": "output_dir",
}


def add_dg_flags(parser: argparse.ArgumentParser) -> None:
    """The flag that `--suite dg` needs beside those of `evaluate` and of `--suite transfer`."""
    group = parser.add_argument_group("only with --suite dg")
    group.add_argument(
        "--domain_column", default=argparse.SUPPRESS, help="column of domains, where these are no folders"
    )


def refuse_dg_flags(given: dict) -> None:
    """ValueError for a flag of the suite where none is given."""
    if "domain_column" in given:
        raise ValueError("--domain_column is for --suite dg: give both, or leave it out.")


def main_of_dg(given: dict, defaults: dict) -> int:
    """Run training/domains.py on frozen features, each domain held out once, all algorithms, five seeds.

    Args:
        given: flags of `evaluate`, with `domain_column`, `steps` and `output_dir` of this suite.
        defaults: values of flags that were not given.

    Returns:
        The exit status of the script.

    Raises:
        ValueError: a flag that has no meaning here, or no pictures of several domains.
    """
    for name, value in given.items():
        if name not in (*_HEEDED, "checkpoint", "json") and value != defaults.get(name):
            raise ValueError(f"--{name} is not for --suite dg: leave it out.")
    if given["dataset"] in (defaults["dataset"], *DIGITS):
        raise ValueError(
            "--suite dg measures an encoder on pictures of several domains: give --dataset FOLDER, sorted as "
            f"DOMAIN/CLASS/image, or another set of pictures; {given['dataset']} is none."
        )
    folder = Path(given.get("output_dir", "outputs/dg"))
    values = {name: given.get(name) for name in _HEEDED} | {"output_dir": folder}
    flags = [f"--encoder={given['checkpoint']}", "--frozen", "--algorithms", *ALGORITHMS, "--seeds", str(_SEEDS)]
    flags += [f"--{_HEEDED[name]}={value}" for name, value in values.items() if value is not None]
    status = run_script("domains", [*flags, "--quiet"] if given["json"] else flags)
    if given["json"] and not status:
        sys.stdout.write((folder / "results.json").read_text(encoding="utf-8"))
    return status
