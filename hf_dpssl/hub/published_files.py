"""Which files of a finished checkpoint folder are published."""

from __future__ import annotations

import json
import re
from pathlib import Path

from . import replay

_PUBLISHED = ".safetensors .json .yaml .md .txt .py .onnx .png .jpg .jpeg .gif .webp .svg".split()
_PRIVATE_FOLDER = re.compile(r"\..*|__pycache__|checkpoints|logs|runs|wandb|cache|latents|(step|checkpoint)-\d+")
_PRIVATE_FILES = ("trainer_state.json", "skipped_images.json")


def publishable_files(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """(files to publish by path in the repository, paths left out) of a finished checkpoint folder.

    Published are weights (safetensors), configuration, code, recipe, results, card and pictures, in subfolders too;
    never hidden files, resume state, caches or logs.

    Raises:
        FileNotFoundError: no checkpoint, no weights, or a shard of them is missing.
    """
    replay.checkpoint_kind(folder)
    files, left_out = {}, []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        relative = path.relative_to(folder)
        private = any(_PRIVATE_FOLDER.fullmatch(part) for part in relative.parts[:-1])
        private |= path.name.startswith(".") or path.name in _PRIVATE_FILES or path.suffix.lower() not in _PUBLISHED
        if private:
            left_out.append(relative.as_posix())
        else:
            files[relative.as_posix()] = path
    weights = [name for name in files if name.endswith(".safetensors") and name != replay.FILE_NAME]
    if not weights:
        raise FileNotFoundError(
            f"{folder} holds no weights in safetensors format: save the model with save_pretrained."
        )
    for name in (name for name in files if name.endswith(".safetensors.index.json")):
        shards = set(json.loads(files[name].read_text(encoding="utf-8"))["weight_map"].values())
        if missing := sorted(shard for shard in shards if not (files[name].parent / shard).is_file()):
            raise FileNotFoundError(f"{folder} is incomplete: {name} names {missing[0]}, which is not there.")
    return files, left_out
