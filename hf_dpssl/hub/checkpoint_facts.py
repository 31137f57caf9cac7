"""What a finished checkpoint is, read from its config files and the headers of its weights: for cards and `info`."""

from __future__ import annotations

import math
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..models.configuration_vq import VQConfig
from ..runs.lineage import fingerprint_of, read_json, well_formed
from ..runs.redaction import command_without_folders, without_folders
from .replay import FILE_NAME, checkpoint_kind

KINDS = ("encoder", "autoencoder", "dit", "drift", "token", "gan")
PARTS = ("", "pretraining", "vae", "transformer", "language_model")  # folders of a checkpoint that hold weights
CONFIG_FILES = (
    "model_index.json", "config.json", "pretraining/config.json", "vae/config.json", "transformer/config.json",
    "language_model/config.json", "scheduler/scheduler_config.json", "results.json", "recipe.yaml",
)  # fmt: skip
_DIFFUSERS_AUTOENCODERS = ("VQModel", "AutoencoderKL")


def facts_of(folder: Path) -> dict:
    """Facts by name; what the files do not say is None, or an empty list or dict.

    Returns:
        {"kind" (see `checkpoint_kind`), "class", "method", "size" (of the network), "image_size", "num_channels",
        "latents", "vae_fingerprint" (of an encoder of latents), "classes" (names), "parameters" ({part: number of
        stored values}), "fingerprint", "dataset", "licence_of_data", "hub_datasets", "seed", "samples", "splits",
        "metrics", "evaluations" (later ones: see `evaluation_entry`), "lineage", "training", "environment", "command"}.

    Raises:
        FileNotFoundError: no checkpoint. ValueError: a file that is damaged, named.
    """
    for name in CONFIG_FILES:
        if name.endswith(".json"):
            read_json(folder / name)  # all of them are read before anything is said
    with well_formed(folder):
        return _facts(folder)


def _facts(folder: Path) -> dict:
    kind = checkpoint_kind(folder)
    index = read_json(folder / "model_index.json") or {}
    config = read_json(folder / "config.json") or {}
    results = read_json(folder / "results.json") or {}
    parts = {part: read_json(folder / part / "config.json") or {} for part in PARTS if part}
    notes = config.get("dpssl") or {}
    vae = config if kind == "autoencoder" else parts["vae"]
    dataset = results.get("dataset") or notes.get("dataset")
    facts = {
        "kind": kind,
        "class": _class_name(index, config),
        "method": notes.get("method_name"),
        "size": _size(kind, config, parts),
        "image_size": None,
        "num_channels": None,
        "latents": None,
        "vae_fingerprint": (notes.get("method") or {}).get("vae_fingerprint") or config.get("vae_fingerprint"),
        "classes": _class_names(index, notes),
        "parameters": count_parameters(folder),
        "fingerprint": fingerprint_of(folder),
        "dataset": None if dataset is None else without_folders(dataset),
        "licence_of_data": _licence(results, notes, parts["vae"]),
        "hub_datasets": results.get("hub_datasets") or [],
        "evaluations": results.get("evaluations") or [],
        "lineage": results.get("lineage") or [],
        "command": command_without_folders(results["command"]) if results.get("command") else None,
    }
    facts |= {name: results.get(name) for name in ("seed", "training", "environment")}
    facts |= {name: results.get(name) or {} for name in ("metrics", "samples", "splits")}
    facts |= _images(kind, config, vae)
    return facts


def _class_names(index: dict, notes: dict) -> list[str]:
    """Names of classes in the order of their ids: in the file these are texts, "10" before "2"."""
    names = index.get("id2label") or {}
    return [names[class_id] for class_id in sorted(names, key=int)] or list(notes.get("class_names") or [])


def _class_name(index: dict, config: dict) -> str | None:
    remote = (config.get("auto_map") or {}).get("AutoModel")  # an encoder in timm's layout names its class there only
    found = index.get("_class_name") or config.get("_class_name") or (config.get("architectures") or [None])[0]
    return found or (remote and remote.split(".")[-1])


def _size(kind: str, config: dict, parts: dict[str, dict]) -> dict:
    """What decides the size of the network that the training has learned."""
    chosen = {
        "encoder": (config, "architecture model_args num_features"),
        "autoencoder": (config, "encoder_block_out_channels decoder_block_out_channels encoder_layers_per_block"),
        "dit": (parts["transformer"], "num_layers num_attention_heads attention_head_dim patch_size"),
        "drift": (parts["transformer"], "num_layers num_attention_heads attention_head_dim patch_size"),
        "token": (
            parts["language_model"],
            "model_type n_layer n_embd n_head num_hidden_layers hidden_size num_attention_heads",
        ),
        "gan": (config, "width latent_dim"),
    }
    content, names = chosen.get(kind, ({}, ""))
    return {name: content[name] for name in names.split() if content.get(name) is not None}


def _images(kind: str, config: dict, vae: dict) -> dict:
    """image_size, num_channels and latents."""
    if kind == "encoder":
        channels, size = (config.get("pretrained_cfg") or {}).get("input_size", (None, None))[:2]
        return {"image_size": size, "num_channels": channels}
    if kind == "gan":
        latents = {"dimension": config["latent_dim"], "origin": config["latent"], "density": config["density"]}
        return {"image_size": config["image_size"], "num_channels": config["num_channels"], "latents": latents}
    if not vae:
        return {}
    if vae.get("_class_name") in _DIFFUSERS_AUTOENCODERS:
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        channels, codes = vae.get("vq_embed_dim") or vae["latent_channels"], vae.get("num_vq_embeddings")
        latents = {"quantizer": "vq" if codes else "kl", "codes": codes, "channels": channels}
        latents |= {"side": vae["sample_size"] // factor, "pixels_per_side": factor}
        return {"image_size": vae["sample_size"], "num_channels": vae["in_channels"], "latents": latents}
    read = VQConfig.from_dict(vae)
    latents = {
        "quantizer": read.quantizer,
        "codes": read.num_codes if read.quantizer == "vq" else None,
        "channels": read.latent_channels,
        "side": read.latent_size,
        "pixels_per_side": read.downsampling_factor,
        "mean": read.latent_mean,
        "std": read.latent_std,
        "statistics": (read.dpssl or {}).get("metrics") or {},
    }
    return {"image_size": read.image_size, "num_channels": read.num_channels, "latents": latents}


def _licence(results: dict, notes: dict, vae: dict) -> str | None:
    """Licence of the training images, where one of the files says it of the same data set."""
    found = results.get("licence_of_data") or notes.get("licence_of_data")
    autoencoder = vae.get("dpssl") or {}
    if found is None and autoencoder.get("dataset") == results.get("dataset"):
        found = autoencoder.get("licence_of_data")
    return found


def count_parameters(folder: Path) -> dict[str, int]:
    """Numbers in the safetensors files by part ("model" for the folder itself), buffers among them; none is read."""
    counts = {}
    for part in PARTS:
        files = [file for file in sorted((folder / part).glob("*.safetensors")) if file.name != FILE_NAME]
        if files:
            counts[part or "model"] = sum(map(_count, files))
    return counts


def _count(file: Path) -> int:
    try:
        with safe_open(file, "pt") as tensors:
            return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}): copy or download it again.") from None
