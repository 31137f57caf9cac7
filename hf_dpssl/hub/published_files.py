"""Which files of a finished checkpoint folder are published: named by pattern, all else stays on the machine."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path, PurePosixPath

import yaml

from ..runs.redaction import redacted
from . import replay

_INDEX = r"safetensors\.index(\.[\w-]+)?\.json"  # of sharded weights; of a variant model.safetensors.index.fp16.json
_WEIGHTS = rf"(model|diffusion_pytorch_model|adapter_model)([.-][\w.-]+)?\.(safetensors|{_INDEX})"
_CODE = "|".join(re.escape(path.name) for path in sorted(Path(__file__).parents[1].glob("models/*.py")))
_MODEL = rf"config\.json|generation_config\.json|preprocessor_config\.json|adapter_config\.json|{_WEIGHTS}|{_CODE}"
_STOCK = (  # of other libraries' models
    rf"{_MODEL}|(tokenizer|special_tokens_map|vocab|added_tokens|processor_config|tokenizer_config)\.json|merges\.txt|"
    r"spiece\.model|[\w.-]+\.onnx(\.data)?|export\.json"
)
_BESIDE = (  # what a run leaves beside every model
    rf"README\.md|LICEN[CS]E(\.(md|txt))?|recipe\.yaml|results\.json|{re.escape(replay.FILE_NAME)}|"
    r"(curves|samples|reconstructions|map)(-[\w-]+)?\.png|\.eval_results/[\w.-]+\.yaml"
)
_FOLDERS = {  # of each kind: folders that hold a part of the model, and files of the root that are none
    "encoder": (("", "pretraining"), ""),
    "autoencoder": (("",), ""),
    "gan": (("",), ""),
    "dit": (("transformer", "vae"), r"|model_index\.json|scheduler/scheduler_config\.json"),
    "drift": (("transformer", "vae"), r"|model_index\.json"),
    "token": (("language_model", "vae"), r"|model_index\.json"),
}
_PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg")
_LINK = re.compile(r"(?:\]\(|\bsrc=[\"']?)\s*<?((?!\w+:|/)[^)\s\"'>#]+)")
_NOT_REDACTED = re.compile(rf".*((tokenizer|vocab|added_tokens)\.json|{_INDEX})")
_IS_INDEX = re.compile(rf".*\.{_INDEX}")


def publishable_files(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """(files to publish by path in the repository, paths left out) of a finished checkpoint folder.

    Published are the files that a checkpoint of its kind consists of, what a run leaves beside it (recipe, results,
    card, licence, pictures), and pictures of the folder that README.md shows. All else stays, whatever its name.

    Raises:
        FileNotFoundError: no checkpoint, no weights, or a shard of them is missing.
        ValueError: a file to be published is a link that leads out of the folder, or a part of the model is one.
    """
    kind = replay.checkpoint_kind(folder)
    pattern, shown = _pattern(kind), _shown(folder / "README.md")
    files, left_out = {}, []
    for at, folders, names in os.walk(folder):
        folders.sort()
        for name in folders:
            if Path(at, name).is_symlink() and name in _FOLDERS.get(kind, ((), ""))[0]:
                raise ValueError(f"{Path(at, name)} is a link: copy the folder that it leads to, then push again.")
        for name in sorted(names):
            path = Path(at, name)
            relative = path.relative_to(folder).as_posix()
            if not (pattern.fullmatch(relative) or relative in shown):
                left_out.append(relative)
            elif not path.resolve().is_relative_to(folder.resolve()):
                raise ValueError(f"{path} is a link that leads out of the folder: copy the file, or remove the link.")
            elif path.is_file():
                files[relative] = path
    weights = [name for name in files if name.endswith(".safetensors") and name != replay.FILE_NAME]
    if not weights:
        raise FileNotFoundError(
            f"{folder} holds no weights in safetensors format: save the model with save_pretrained."
        )
    for name in filter(_IS_INDEX.fullmatch, files):
        shards = set(json.loads(files[name].read_text(encoding="utf-8"))["weight_map"].values())
        if missing := sorted(shard for shard in shards if not (files[name].parent / shard).is_file()):
            raise FileNotFoundError(f"{folder} is incomplete: {name} names {missing[0]}, which is not there.")
    return dict(sorted(files.items())), sorted(left_out)


def holds_weights(name: str) -> bool:
    """Whether a file of a repository is weights, whole or a shard, or the index of shards."""
    return name.endswith(".safetensors") or _IS_INDEX.fullmatch(name) is not None


def without_machine(name: str, path: Path) -> Path | bytes:
    """A file to publish as it is, or its content without folders of the machine where it is JSON or YAML with some."""
    if not name.endswith((".json", ".yaml")) or _NOT_REDACTED.fullmatch(name):
        return path
    text = path.read_text(encoding="utf-8")
    try:
        content = json.loads(text) if name.endswith(".json") else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read ({' '.join(str(error).split())}): it is damaged.") from None
    clean = redacted(content)
    if clean == content:
        return path
    if name.endswith(".json"):
        return (json.dumps(clean, indent=2) + "\n").encode()
    return yaml.safe_dump(clean, sort_keys=False, allow_unicode=True).encode()


def _pattern(kind: str) -> re.Pattern:
    if kind not in _FOLDERS:  # another library's model, or pipeline
        return re.compile(rf"{_BESIDE}|model_index\.json|([\w-]+/)?({_STOCK}|scheduler_config\.json)")
    folders, more = _FOLDERS[kind]
    parts = [f"{part}/({_MODEL})" if part else _STOCK for part in folders]
    return re.compile("|".join([_BESIDE + more, *parts]))


def _shown(card: Path) -> set[str]:
    """Pictures of the folder that a card links: relative paths without hidden parts."""
    if not card.is_file():
        return set()
    links = (PurePosixPath(link) for link in _LINK.findall(card.read_text(encoding="utf-8")))
    return {
        link.as_posix()
        for link in links
        if link.suffix.lower() in _PICTURES and not any(part.startswith(".") for part in link.parts)
    }
