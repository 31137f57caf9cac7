"""What an encoder's own files say of it: the licence, and whether it was trained on pictures like the given ones."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from huggingface_hub import hf_hub_download, metadata_load
from timm.data import ImageNetInfo

from ..embedding.embedder import UNTRAINED
from ..runs.lineage import describe_ancestor
from ..runs.redaction import without_folders
from .zoo_list import ZooEntry

_IMAGENET = re.compile(r"imagenet|ilsvrc|[_-]in(1k|12k|21k|22k)\b", re.IGNORECASE)
_WEB = re.compile(
    r"laion|datacomp|webli|openai|\bclip\b|lvd|instagram|\bjft|yfcc|cc12m|\bdfn|common.?crawl|\bweb", re.I
)


def encoder_facts(entry: ZooEntry, dataset: str, class_names: Sequence[str] | None) -> dict:
    """{"licence": of the encoder, "trained_on", "contaminated": "yes", "no" or "not known", "contaminated_because"}.

    Args:
        entry: the encoder; its `data`, where given, stands in place of what its files say.
        dataset, class_names: of the pictures it is measured on.
    """
    card = {} if entry.encoder.startswith(UNTRAINED) else _card(entry.encoder)
    licence = card.get("license_name") or card.get("license") or "not known"
    names = [] if not entry.trained else [entry.data] if entry.data else _training_data(entry.encoder, card)
    answer, why = contamination(names if entry.trained else [], dataset, class_names, trained=entry.trained)
    return {"licence": licence, "trained_on": names, "contaminated": answer, "contaminated_because": why}


def contamination(
    trained_on: Sequence[str], dataset: str, class_names: Sequence[str] | None, *, trained: bool = True
) -> tuple[str, str]:
    """Whether an encoder has seen pictures like the given ones: ("yes", "no" or "not known", why).

    "yes": a data set of the same name, up to parts of it (cifar10-jpeg and cifar10-jpeg-small), or ImageNet where it
    has half of the classes or more. "not known": nothing is said, pictures of the web, or more of ImageNet than its
    1,000 classes. "no": other data sets.
    """
    if not trained:
        return "no", "its weights are random"
    if not trained_on:
        return "not known", "its files do not say what it was trained on"
    parts = [part for name in trained_on for part in name.split("+")]
    for part in parts:
        if any(_same(part, other) for other in dataset.split("+")):
            return "yes", f"trained on {without_folders(part)}"
    if any(_IMAGENET.search(part) for part in parts):
        if not class_names:
            return "not known", "trained on ImageNet, and the pictures have no class names"
        shared = [name for name in class_names if _in_imagenet(name)]
        what = f"ImageNet has {len(shared)} of the {len(class_names)} classes"
        if 2 * len(shared) >= len(class_names):
            return "yes", what
    if web := [part for part in parts if _WEB.search(part)]:
        return "not known", f"trained on pictures of the web ({web[0]})"
    if any(_IMAGENET.search(part) for part in parts):
        if any(re.search(r"(12|21|22)k", part) for part in parts):
            return "not known", "trained on more of ImageNet than its 1,000 classes"
        return "no", what
    return "no", f"trained on {', '.join(map(without_folders, parts))}"


def _same(first: str, second: str) -> bool:
    """Whether two names are of one data set, or of parts of it."""
    names = [without_folders(name.rstrip("/")).split("@")[0].split("/")[-1].lower() for name in (first, second)]
    parts = [re.split(r"[-_]", name.removesuffix(".parquet")) for name in names]
    shorter = min(map(len, parts))
    return parts[0][:shorter] == parts[1][:shorter]


def _in_imagenet(class_name: str) -> bool:
    words = re.sub(r"[^a-z0-9]+", " ", class_name.lower()).strip()
    return bool(words) and any(f" {words} " in text for text in _imagenet_texts())


@cache
def _imagenet_texts() -> list[str]:
    return [f" {re.sub(r'[^a-z0-9]+', ' ', text.lower())} " for text in ImageNetInfo().label_descriptions()]


def _training_data(encoder: str, card: dict) -> list[str]:
    """Names of data sets, of the encoder and of those it started from; empty where nothing is said."""
    found = list(_of_lineage(describe_ancestor(encoder)))
    if not found:
        datasets = card.get("datasets") or []
        found = [datasets] if isinstance(datasets, str) else [str(name) for name in datasets]
    # timm's names end with the data of the weights; CLIP's are of the web.
    return found or [text for text in [encoder.split("/")[-1]] if _IMAGENET.search(text) or _WEB.search(text)]


def _of_lineage(about: dict) -> Iterable[str]:
    if isinstance(about.get("dataset"), str):
        yield about["dataset"]
    for ancestor in about.get("lineage") or []:
        yield from _of_lineage(ancestor)


def _card(encoder: str) -> dict:
    """Front matter of the encoder's README.md; empty where there is none or it cannot be had."""
    try:
        path = Path(encoder) / "README.md"
        if not Path(encoder).exists():
            repo_id, _, revision = encoder.partition("@")
            path = hf_hub_download(repo_id, "README.md", revision=revision or None)
        content = metadata_load(path)
    except Exception:  # no card, no network, or a damaged one: nothing is known
        return {}
    return content if isinstance(content, dict) else {}
