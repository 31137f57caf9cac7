"""Model cards rendered from what a run wrote: config.json, recipe.yaml and results.json; nothing is typed by hand."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from jinja2 import Environment, StrictUndefined

from .card_merge import merge_card  # noqa: F401  part of this module's interface
from .checkpoint import atomic_file

KINDS = ("encoder", "autoencoder", "dit", "token", "gan")


def write_card(folder: Path, kind: str, *, title: str | None = None, license_of_data: str | None = None) -> None:
    """Write README.md into a finished checkpoint folder.

    Args:
        folder: holds results.json and recipe.yaml; their content goes into the card.
        kind: one of KINDS; picks the template of model_cards/.
        title: first heading.
        license_of_data: of the training images; a restriction is repeated in the card.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}.")
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    title = title or f"{kind} of {results['dataset']}"
    license_of_data = license_of_data or results.get("licence_of_data", "unknown")
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    template = environment.from_string((templates_folder() / f"{kind}.md").read_text(encoding="utf-8"))
    restricted = any(word in license_of_data.lower() for word in ("research", "commercial", "unknown", "owner"))
    text = template.render(
        title=title,
        license="other" if restricted else "apache-2.0",
        license_of_data=license_of_data,
        restricted=restricted,
        results=results,
        recipe=yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8")),
        pictures=sorted(path.name for path in folder.glob("*.png")),
        number=_number,
    )
    with atomic_file(folder / "README.md") as file:
        file.write(text)


def templates_folder() -> Path:
    """The card templates: in the wheel, or beside the package in a checkout."""
    package = Path(__file__).parent
    packed = package / "_model_cards"
    return packed if packed.exists() else package.parent / "model_cards"


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"
