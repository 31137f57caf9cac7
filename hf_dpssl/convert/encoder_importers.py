"""Encoders that other codes trained, as our encoder folder: `hf-dpssl import CHECKPOINT --output_dir FOLDER`.

| code | file | backbone and head | momentum branch |
|---|---|---|---|
| facebookresearch/moco, t-MoCo-v2 | checkpoint_0199.pth.tar | encoder_q, encoder_q.fc | encoder_k, queue |
| wrhuang/t-SimCLR | last.pth | encoder, head | |
| lightly | *.ckpt | backbone, projection_head | backbone_momentum, projection_head_momentum |
| solo-learn | *.ckpt | backbone, projector | momentum_backbone, momentum_projector |
| any other | a state_dict | `prefix` says where the backbone stands | |

Files with a decoder (taming-transformers, latent diffusion), folders and Hub ids become autoencoders: see
autoencoder_importers.py. Only tensors are taken, and of plain settings method, temperature, degrees of freedom and
data set of a t-SimCLR file; pickled_tensors.py says what is refused. What an import leaves out or assumes stands in
its report and in config.json.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import timm
from torch import Tensor, nn

from ..contrastive.modeling_pretraining import MoCoForPreTraining, SimCLRForPreTraining
from ..models.modeling_contrastive import ContrastiveConfig, ContrastiveEncoder
from ..runs.atomic_files import atomic_folder
from .foreign_layouts import (
    Origin,
    count_by_part,
    find_method,
    find_origin,
    find_statistics,
    find_stem,
    head_settings,
    numbered,
    resnet_architecture,
    split,
    to_timm,
)
from .pickled_tensors import Settings, read_pickled_tensors


@dataclass
class Imported:
    """What an import did: folder, origin, what was taken, what of the file was left out, and what was assumed."""

    folder: Path
    code: str
    method: str
    architecture: str
    stem: str
    taken: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def import_checkpoint(
    path: str | os.PathLike,
    output: str | os.PathLike,
    *,
    architecture: str | None = None,
    stem: str | None = None,
    prefix: str | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    image_size: int | None = None,
    inert: Iterable[str] = (),
    overwrite: bool = False,
) -> Imported:
    """Write the encoder of a foreign checkpoint as our folder; its head goes to `pretraining/` where it fits ours.

    Args:
        path: the checkpoint.
        output: folder to write; it appears whole or not at all.
        architecture: timm name; read off the shapes of a ResNet when not given.
        stem: of `ContrastiveConfig`; told by the first convolution and the code when not given.
        prefix: of the backbone's keys, for a code that is not in the table above; nothing else is then taken.
        mean, std, image_size: of the preprocessing; those of the code when not given.
        inert: full names of unknown pickled classes to leave unread, see `read_pickled_tensors`.
        overwrite: replace `output` if it exists.

    Raises:
        FileExistsError: `output` exists and `overwrite` is not set.
        UnknownPickledClassError: the file asks for classes that are not known to be harmless.
        ValueError: unknown layout or ResNet, missing or unexpected keys, not finite; the message names them.
    """
    path, output = Path(path), Path(output)
    check_output(output, overwrite)
    if (mean is None) != (std is None):
        raise ValueError("mean and std belong together: give both or neither.")
    content = read_pickled_tensors(path, inert=inert)
    tensors, settings, unread = _read(content)
    origin = find_origin(tensors, prefix)
    parts, rest = split(tensors, origin)
    backbone, classifier = to_timm(parts["backbone"])
    if not backbone:
        raise ValueError(f"no tensor stands under {origin.backbone!r}, only {', '.join(count_by_part(tensors))}.")
    name, model_args = _named(architecture, image_size) if architecture else resnet_architecture(backbone)
    stem = stem or find_stem(origin, parts["backbone"], backbone)
    method, fields, notes = find_method(origin, parts, rest, settings)
    if mean is None:
        mean, std = find_statistics(origin, tensors, settings, small=stem != "timm")
    size = image_size or (model_args or {}).get("img_size") or settings.get("size") or (224 if stem == "timm" else 32)
    preprocessing = _preprocessing(mean, std, int(size))
    config = ContrastiveConfig(name, model_args, preprocessing, stem, **fields, **(head_settings(parts["head"]) or {}))
    encoder = ContrastiveEncoder(config)
    _load(encoder.timm_model, backbone, f"{name} with stem {stem!r}")
    report = Imported(output, origin.code, method or "unknown", name, stem, notes=notes)
    report.taken.append(f"backbone ({origin.backbone or 'all'})")
    model = _pretraining_model(origin, parts, rest, encoder, report, ours=method is not None)
    report.left_out = count_by_part(rest | classifier) + unread
    config.dpssl = {"method_name": report.method, "imported": _record(report, path)}
    with atomic_folder(output) as folder:
        encoder.save_pretrained(folder)
        if model is not None:
            model.save_pretrained(folder / "pretraining")
    return report


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse what exists; `overwrite` replaces an encoder folder or an empty one, nothing else."""
    if not output.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{output} exists: choose another folder, or pass overwrite=True (--overwrite).")
    if not output.is_dir() or (any(output.iterdir()) and not (output / "config.json").exists()):
        raise FileExistsError(f"{output} is no encoder folder and is not replaced: choose another folder.")


def _read(content: object) -> tuple[dict[str, Tensor], dict, list[str]]:
    """Tensors by clean name in fp32, plain settings, and names of the entries that are not read."""
    if not isinstance(content, Mapping):
        raise ValueError(f"the file holds a {type(content).__name__}, not a dictionary of tensors: save a state_dict.")
    found = next((name for name in ("state_dict", "model") if isinstance(content.get(name), Mapping)), None)
    states = content[found] if found else content
    tensors = {}
    for name, value in states.items():
        if isinstance(value, Tensor):  # without what DataParallel, DDP and torch.compile put before the names
            clean = re.sub(r"(?:^|(?<=\.))(?:module|_orig_mod)\.", "", str(name))
            tensors[clean] = value.detach().float() if value.is_floating_point() else value.detach()
    if not tensors:
        raise ValueError(f"no tensors under 'state_dict', 'model' or at the top of the file: it holds {list(content)}.")
    settings = vars(content["opt"]) if isinstance(content.get("opt"), Settings) else {}
    return tensors, settings, [str(name) for name in content if name != found] if found else []


def _named(architecture: str, image_size: int | None) -> tuple[str, dict | None]:
    """timm's name and `model_args`: an architecture for one image size must be made for it, or timm resamples it."""
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), 3)
        raise ValueError(
            f"timm has no architecture {architecture!r}." + f" Did you mean {' or '.join(close)}?" * bool(close)
        )
    entry = timm.get_pretrained_cfg(architecture)
    if entry is None or not entry.fixed_input_size:
        return architecture, None
    return architecture, {"img_size": image_size or entry.input_size[-1]}


def _preprocessing(mean: Iterable[float], std: Iterable[float], size: int) -> dict:
    """timm's entry; images of 224 px are cut out of 256 px, as in the codes' own evaluation."""
    return {
        "input_size": [3, size, size],
        "mean": list(mean),
        "std": list(std),
        "interpolation": "bilinear",
        "crop_pct": 0.875 if size >= 224 else 1.0,
        "crop_mode": "center",
    }


def _load(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Load exactly; batch norm's step counters may lack, older files do not have them."""
    wanted = {name: value.shape for name, value in module.state_dict().items()}
    problems = {
        "missing": [name for name in wanted if name not in tensors and not name.endswith("num_batches_tracked")],
        "unexpected": [name for name in tensors if name not in wanted],
        "of another shape": [
            f"{name} {list(value.shape)} instead of {list(wanted[name])}"
            for name, value in tensors.items()
            if name in wanted and value.shape != wanted[name]
        ],
        "not finite": [name for name, value in tensors.items() if not value.isfinite().all()],
    }
    listed = [f"{kind}: {', '.join(n[:4])}{', ...' * (len(n) > 4)} ({len(n)})" for kind, n in problems.items() if n]
    if listed:
        raise ValueError(f"the tensors do not fit {what}; {'; '.join(listed)}.")
    module.load_state_dict(tensors, strict=False)


def _pretraining_model(
    origin: Origin, parts: dict, rest: dict, encoder: ContrastiveEncoder, report: Imported, ours: bool
) -> SimCLRForPreTraining | MoCoForPreTraining | None:
    """The pretraining model when the head is one of ours; what it takes leaves `rest`, what it does not goes there."""
    head, key_backbone, key_head = parts["head"], parts["key_backbone"], parts["key_head"]
    fits, momentum = ours and head_settings(head) is not None, bool(key_backbone and key_head)
    for part in ("head", "key_backbone", "key_head"):
        if not (fits and (momentum or part == "head")):
            rest.update({f"{getattr(origin, part)}{name}": value for name, value in parts[part].items()})
    if not fits:
        if head and ours:
            report.notes.append("the head is none of ours (Linear, batch norm or none, ReLU, Linear): no pretraining/")
        return None
    model = (MoCoForPreTraining if momentum else SimCLRForPreTraining)(encoder.config)
    model.encoder.load_state_dict(encoder.state_dict())
    # t-MoCo-v2 has one batch norm of embeddings for both branches.
    norm = {name: rest.pop(name) for name in list(rest) if name.startswith("bn.")}
    norm = {name.replace("bn", str(len(model.head) - 1), 1): value for name, value in norm.items()}
    _load(model.head, numbered(head) | norm, "the head")
    report.taken.append(f"head ({origin.head})")
    if momentum:
        _load(model.key_encoder.timm_model, to_timm(key_backbone)[0], "the momentum backbone")
        _load(model.key_head, numbered(key_head) | norm, "the momentum head")
        report.taken.append(f"momentum branch ({origin.key_backbone}, {origin.key_head})")
        if origin.code == "facebookresearch/moco" and {"queue", "queue_ptr"} <= rest.keys():
            model.queue.copy_(rest.pop("queue").T)
            model.queue_cursor.copy_(rest.pop("queue_ptr").squeeze())
            model.queue_filled.fill_(len(model.queue))  # what has not been written yet is noise there, and counts
            report.taken.append(f"queue of {len(model.queue)} keys")
        else:
            report.notes.append("the queue starts empty: the file holds none that is ours (one, shared by both views)")
    return model


def _record(report: Imported, path: Path) -> dict:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    lists = {name: getattr(report, name) for name in ("taken", "left_out", "notes")}
    return {"code": report.code, "file": path.name, "sha256": digest} | lists
