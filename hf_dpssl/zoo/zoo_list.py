"""A zoo as a file: which encoders, and what is known of their training.

encoders:
  - outputs/demo/encoder                       # a folder, a Hub id (id@revision), or untrained:NAME of timm
  - encoder: timm/resnet18.a1_in1k
    name: resnet18                             # in tables; by default the encoder's own
    data: imagenet-1k                          # it was trained on; by default what its card says
    trained: true                              # false: random weights; agreement is also stated without these
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from ..embedding.embedder import UNTRAINED
from ..runs.console import one_line
from ..runs.redaction import without_folders

DEFAULT = (  # of the Hub: small to medium, of different data and tasks
    "timm/resnet18.a1_in1k",
    "timm/resnet50.a1_in1k",
    "timm/convnext_tiny.fb_in1k",
    "timm/vit_small_patch16_224.augreg_in21k_ft_in1k",
    "facebook/dinov2-small",
    "openai/clip-vit-base-patch32",
)


_YAML = (".yaml", ".yml")


class ZooEntry(NamedTuple):
    """One encoder; `data`: what it was trained on, None: its card says; `trained`: its weights are not random."""

    encoder: str
    name: str
    data: str | None = None
    trained: bool = True


def read_zoo(source: str | os.PathLike | Sequence[str]) -> list[ZooEntry]:
    """The encoders of a YAML file as at the top of this module, of a list of names, or of "default".

    Raises:
        FileNotFoundError: no such file. ValueError: no encoders, the same one twice, or what is not understood.
    """
    given = [source] if isinstance(source, str | os.PathLike) else list(source)
    files = [item for item in given if Path(item).suffix in _YAML]
    if files and len(given) > 1:
        raise ValueError(
            f"a YAML file is a zoo by itself, got {files[0]} beside {len(given) - 1} more: write these into its list."
        )
    if files:
        path = Path(given[0])
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: give a YAML file with a list of encoders.")
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no YAML: {one_line(error)}") from None
        given = content.get("encoders") if isinstance(content, dict) and set(content) == {"encoders"} else content
        if not isinstance(given, list):
            raise ValueError(f"{path} must hold a list of encoders under the one key 'encoders'.")
    given = [name for item in given for name in (DEFAULT if item == "default" else [item])]
    entries = [_entry(item) for item in given]
    if not entries:
        raise ValueError("the zoo is empty: name encoders.")
    for part in ("encoder", "name"):
        values = [getattr(entry, part) for entry in entries]
        if double := sorted({value for value in values if values.count(value) > 1}):
            what = "the same encoder is given twice" if part == "encoder" else "two encoders have the same name"
            raise ValueError(f"{what}: {double}.")
    # In tables and results a folder is its last part, where that tells all of them apart.
    short = [entry._replace(name=without_folders(entry.name)) for entry in entries]
    return short if len({entry.name for entry in short}) == len(short) else entries


def _entry(item: object) -> ZooEntry:
    if isinstance(item, str) and item:
        return ZooEntry(item, item, trained=not item.startswith(UNTRAINED))
    kinds = {"encoder": str, "name": str, "data": str, "trained": bool}
    if not isinstance(item, dict) or not item.get("encoder") or not set(item) <= set(kinds):
        raise ValueError(f"an encoder of a zoo is its name, or a mapping with {', '.join(kinds)}; got {item!r}.")
    for key, value in item.items():
        if not isinstance(value, kinds[key]):
            raise ValueError(f"{key!r} of {item['encoder']!r} must be a {kinds[key].__name__}, got {value!r}.")
    encoder = item["encoder"]
    trained = item.get("trained", not encoder.startswith(UNTRAINED))
    return ZooEntry(encoder, item.get("name", encoder), item.get("data"), trained)
