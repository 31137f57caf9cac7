"""What a results file says of a checkpoint's making: licence of the data, time and processes, and its ancestors.

An ancestor is named by its Hub id, or by the name of its folder and its fingerprint: a machine's folders mean nothing
elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError

from ..models.configuration_vq import VQConfig
from ..models.modeling_vq import latent_fingerprint
from .console import one_line
from .redaction import without_folders

_MALFORMED = (ArithmeticError, AssertionError, AttributeError, LookupError, RecursionError, TypeError)
_MALFORMED += (StrictDataclassError, SafetensorError)

if TYPE_CHECKING:  # not needed to read a card's files
    from accelerate import Accelerator

    from ..data.image_data import ImageData


def lineage_of_run(
    accelerator: Accelerator,
    data: ImageData,
    seconds: Iterable[float | None],
    ancestors: Mapping[str, str | os.PathLike | None],
) -> dict:
    """For `write_results`: {"licence_of_data", "hub_datasets", "images", "splits", "training", "lineage"}.

    Args:
        accelerator: of the run.
        data: of the run.
        seconds: `TrainingLoop.seconds` of each loop; None in it: the time is not known.
        ancestors: folder or Hub id of each checkpoint that this one was made with, by the part it plays; None: none.
    """
    seconds = list(seconds)
    training = {
        "seconds": None if None in seconds else round(sum(seconds), 3),
        "processes": accelerator.num_processes,
        "device": accelerator.device.type,
        "precision": accelerator.mixed_precision,
    }
    lineage = [{"part": part, **describe_ancestor(source)} for part, source in ancestors.items() if source is not None]
    of_union = "+" in data.name  # whose entry is that of its first part
    hub_ids = [data.entry.hub_id] if data.entry.hub_id and not of_union else []
    about = {"licence_of_data": data.entry.licence, "hub_datasets": hub_ids, "images": data.account()}
    about["splits"] = data.splits
    return about | {"training": training, "lineage": lineage}


def describe_ancestor(source: str | os.PathLike) -> dict:
    """What can be said of a checkpoint in a folder or on the Hub without loading its weights.

    Returns:
        {"name", and where they are known "revision" (commit), "fingerprint", "dataset", "licence_of_data", "lineage"}.
    """
    folder = Path(source)
    about = {"name": folder.resolve().name} if folder.exists() else {"name": str(source)}
    if not folder.exists():
        folder = small_files(str(source))
        about |= {"revision": folder.name} if folder else {}
    if folder is None or not folder.is_dir():
        return about
    config = read_json(folder / "config.json") or {}
    results = read_json(folder / "results.json") or {}
    notes = config.get("dpssl") or {}
    about["fingerprint"] = fingerprint_of(folder)
    for name in ("dataset", "licence_of_data", "lineage"):
        about[name] = results.get(name) or notes.get(name)
    if about["dataset"]:
        about["dataset"] = without_folders(about["dataset"])
    return {name: value for name, value in about.items() if value}


def small_files(source: str) -> Path | None:
    """The snapshot folder of a Hub id, with config.json or a pipeline's model_index.json, and results.json.

    None where it cannot be had.
    """
    repo_id, _, revision = source.partition("@")
    if repo_id.count("/") != 1:
        return None
    folder = None
    for name in ("config.json", "model_index.json", "results.json"):
        try:
            folder = Path(hf_hub_download(repo_id, name, revision=folder.name if folder else revision or None)).parent
        except EntryNotFoundError:
            continue
        except Exception:  # no network: what the model was loaded from is enough
            break
    return folder


def fingerprint_of(folder: Path) -> str | None:
    """One hash: of a VQAutoencoder its `fingerprint()`, of a pipeline that of its autoencoder, else the SHA-256 of the
    weights' file; None where there is none."""
    index = read_json(folder / "model_index.json") or {}
    config = read_json(folder / "config.json") or {}
    if index.get("vae_fingerprint"):
        return index["vae_fingerprint"]
    if config.get("model_type") == VQConfig.model_type and config.get("encoder_sha256"):
        return latent_fingerprint(VQConfig.from_dict(config), config["encoder_sha256"])
    weights = folder / "model.safetensors"
    if not weights.is_file():
        return None
    with open(weights, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict | None:
    """The object in a JSON file; None where there is no file. ValueError, naming it, for anything else."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}): it is damaged, write it again.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(content).__name__}: it is damaged.")
    return content


@contextmanager
def well_formed(source: str | os.PathLike) -> Iterator[None]:
    """ValueError for whatever goes wrong in the block because files of a folder or Hub id hold wrong types."""
    try:
        yield
    except _MALFORMED as error:
        what = one_line(error)[:200]
        raise ValueError(
            f"{source} holds files that cannot be read ({type(error).__name__}: {what}): write or copy them again."
        ) from error
