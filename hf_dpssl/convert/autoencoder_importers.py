"""Autoencoders that other codes trained, and encoders of ours, as a `VQAutoencoder`, so that a decoder can be learned
for them: `training/dae_vq.py --init_from SOURCE`, or `hf-dpssl import SOURCE --output_dir FOLDER` for the folder alone.

| source | becomes |
|---|---|
| diffusers VQModel (folder or Hub id) | encoder, codebook and decoder; codes by distance; scaling, unless the default |
| diffusers AutoencoderKL | quantizer "kl"; scaling and shift as latent_mean and latent_std |
| taming-transformers, latent diffusion (.ckpt, .safetensors) | VQ or KL by what the file holds; see taming_layout.py |
| VQAutoencoder of ours | as it is |
| contrastive encoder of ours, or timm's layout | its spatial features, frozen, as latents; a fresh decoder |

Latents, codes and images equal the source's. diffusers' VQModel quantises inside `decode`; here `decode` takes what it
is given. Both codes train with the weights 1 on the commitment term and 0.25 on the codebook's (the order of a bug that
they keep as `legacy`); ours has the paper's order, and a conversion takes no loss over.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import yaml
from diffusers import AutoencoderKL, VQModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import PretrainedConfig

from ..models.backbone_encoder import complete_backbone
from ..models.modeling_contrastive import ContrastiveConfig, ContrastiveEncoder, check_sees_pictures
from ..models.modeling_vq import VQAutoencoder, VQConfig
from ..runs.atomic_files import atomic_folder
from . import taming_layout
from .foreign_layouts import count_by_part
from .pickled_tensors import read_pickled_tensors

# What a VQModel says where nobody has measured its latents: the default, of Stable Diffusion's AutoencoderKL.
_UNMEASURED_SCALE = inspect.signature(VQModel.__init__).parameters["scaling_factor"].default
_DIFFUSERS = {"VQModel": VQModel, "AutoencoderKL": AutoencoderKL}
_SUPPORTED = (
    "supported are diffusers' VQModel and AutoencoderKL, .ckpt or .safetensors files of taming-transformers and latent "
    "diffusion, VQAutoencoder folders, and encoder folders of this package or in timm's layout"
)
# Callbacks whose classes Lightning writes as keys into its checkpoints; they hold settings.
_LIGHTNING = tuple(
    f"{package}.callbacks.{name}"
    for package in ("pytorch_lightning", "lightning.pytorch")
    for name in ("model_checkpoint.ModelCheckpoint", "early_stopping.EarlyStopping", "base.Callback")
)
_DEFAULT_SIZE = 256  # of all published taming and latent-diffusion first stages


def convert_autoencoder(
    source: str | os.PathLike,
    *,
    image_size: int | None = None,
    num_channels: int | None = None,
    config_file: str | os.PathLike | None = None,
    subfolder: str | None = None,
    level: int = -1,
    inert: Iterable[str] = (),
    **fields,
) -> VQAutoencoder:
    """The autoencoder of a source in the table above, float32; what was taken stands in `config.dpssl["imported"]`.

    Args:
        source: folder, Hub id, or file.
        image_size: height and width in pixels; default: the source's, and 256 for a file without `config_file`.
        num_channels: of the images; must be the source's (an encoder of colour images takes 1 too, and repeats grey).
        config_file: YAML of a taming or latent-diffusion file; it is compared with the shapes, and gives the size.
        subfolder: of the source, such as "vae" of a pipeline.
        level: of an encoder's features, see `complete_backbone`; -1 is the last, that of `last_hidden_state`.
        inert: further pickled classes to leave unread, see `read_pickled_tensors`.
        fields: other fields of `VQConfig`, that the source does not determine: `commitment_weight=0.5`; for an encoder
            also the decoder's widths, and `quantizer="vq"` with `num_codes`.

    Raises:
        ValueError: a source of another kind, an unsupported architecture, missing, surplus or not finite tensors,
            an image size or number of channels that does not fit; the message names what was found.
        OSError: no such folder, file or repository.
        UnknownPickledClassError: a file that asks for classes that are not known to be harmless.
    """
    unknown = sorted(set(fields) - set(inspect.signature(VQConfig.__init__).parameters))
    if unknown:
        raise ValueError(f"{', '.join(unknown)} is no field of VQConfig.")
    if Path(source).is_file():
        if subfolder is not None or level != -1:
            raise ValueError("subfolder and level are read for folders and Hub ids; the source is a file.")
        model = _from_taming(Path(source), image_size, config_file, tuple(inert), fields)
    else:
        if config_file is not None:
            raise ValueError(f"config_file is read for a file of taming or latent diffusion; {source} is none.")
        model = _from_folder(os.fspath(source), subfolder, image_size, num_channels, level, fields)
    if num_channels not in (None, model.config.num_channels):
        raise ValueError(
            f"{source} is an autoencoder of {model.config.num_channels}-channel images, not of {num_channels}: load "
            f"the images with {model.config.num_channels} channels."
        )
    return model.eval()


def import_autoencoder(
    source: str | os.PathLike, output: str | os.PathLike, **options
) -> dict[str, str | list[str] | None]:
    """Write `convert_autoencoder(source, **options)` as a folder, whole or not at all; returns what was taken."""
    model = convert_autoencoder(source, **options)
    with atomic_folder(output) as folder:
        model.save_pretrained(folder)
    return model.config.dpssl["imported"]


def is_autoencoder_source(source: str | os.PathLike) -> bool:
    """Whether it is one for `convert_autoencoder`: a folder, a Hub id, or a file with the keys of a decoder."""
    path = Path(source)
    if not path.is_file():
        return path.is_dir() or path.suffix not in (".ckpt", ".pth", ".pt", ".tar", ".bin", ".safetensors")
    key, tail = b"decoder.conv_in.weight", b""  # keys stand in both formats as they are
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            if key in tail + block:
                return True
            tail = block[-len(key) :]
    return False


def _from_folder(
    source: str, subfolder: str | None, image_size: int | None, num_channels: int | None, level: int, fields: dict
) -> VQAutoencoder:
    config = _read_config(source, subfolder)
    name, kind = config.get("_class_name"), config.get("model_type")
    if name in _DIFFUSERS:
        return _from_diffusers(_DIFFUSERS[name], source, subfolder, image_size, fields)
    if kind == VQConfig.model_type:
        return _from_ours(source, subfolder, image_size, fields)
    if kind in (ContrastiveConfig.model_type, "timm_wrapper") or "architecture" in config:
        return _from_encoder(source, subfolder, image_size, num_channels, level, fields)
    found = name or kind or (config.get("architectures") or ["a config.json without class"])[0]
    raise ValueError(f"{source} holds {found}; {_SUPPORTED}.")


def _read_config(source: str, subfolder: str | None) -> dict:
    where = {"subfolder": subfolder} if subfolder else {}
    if (Path(source) / "model_index.json").is_file() and not subfolder:
        parts = sorted(path.parent.name for path in Path(source).glob("*/config.json"))
        raise ValueError(f"{source} is a pipeline: give the autoencoder's subfolder, one of {parts}.")
    if Path(source).is_dir() and not (Path(source) / (subfolder or "") / "config.json").is_file():
        held = sorted(path.name for path in Path(source, subfolder or "").iterdir())[:8]
        raise ValueError(f"{Path(source, subfolder or '')} has no config.json, only {held}; {_SUPPORTED}.")
    try:
        return PretrainedConfig.get_config_dict(source, **where)[0]
    except OSError as error:
        raise OSError(
            f"{source} is no file, no folder, and no config.json was got from the Hub ({error}); for a pipeline's "
            "repository give the autoencoder's subfolder, such as 'vae'."
        ) from error


def _from_diffusers(
    cls: type, source: str, subfolder: str | None, image_size: int | None, fields: dict
) -> VQAutoencoder:
    where = {"subfolder": subfolder} if subfolder else {}
    other, info = cls.from_pretrained(source, output_loading_info=True, torch_dtype=torch.float32, **where)
    if lacking := sorted(info["missing_keys"]):
        raise ValueError(f"{source} lacks {len(lacking)} tensors of {cls.__name__}, such as {lacking[0]}: incomplete.")
    theirs, notes = dict(other.config), []
    settings = {
        "num_channels": theirs["in_channels"],
        "encoder_block_out_channels": list(theirs["block_out_channels"]),
        "decoder_block_out_channels": list(theirs["block_out_channels"]),
        "encoder_layers_per_block": theirs["layers_per_block"],
        "decoder_layers_per_block": theirs["layers_per_block"],
        "norm_num_groups": theirs["norm_num_groups"],
        "mid_block_attention": theirs["mid_block_add_attention"],
        "attention_levels": _diffusers_attention(theirs),
        "encoder_out_channels": theirs["latent_channels"],
        "latent_channels": theirs.get("vq_embed_dim") or theirs["latent_channels"],
        "quantizer": "vq" if cls is VQModel else "kl",
    }
    if cls is VQModel:
        settings["num_codes"] = theirs["num_vq_embeddings"]
        notes.append("losses are not taken over: commitment_weight is this package's, on the commitment term")
    if cls is AutoencoderKL or theirs["scaling_factor"] != _UNMEASURED_SCALE:
        fields = _statistics(theirs, settings["latent_channels"]) | fields
    size = theirs["sample_size"]
    size = image_size or (size[0] if isinstance(size, list | tuple) else size)
    tensors = {
        name.replace("quantize.embedding.weight", "quantizer.codebook"): t for name, t in other.state_dict().items()
    }
    report = {"kind": f"diffusers {cls.__name__}", "source": _name(source), "taken": count_by_part(tensors)}
    return _build(settings | {"image_size": size}, tensors, fields, report | {"left_out": [], "notes": notes})


def _diffusers_attention(theirs: Mapping) -> list[int]:
    """Levels with attention; ValueError for what our blocks do not have."""
    down, up = list(theirs["down_block_types"]), list(theirs["up_block_types"])[::-1]
    allowed = {"DownEncoderBlock2D", "AttnDownEncoderBlock2D", "UpDecoderBlock2D", "AttnUpDecoderBlock2D"}
    if unknown := sorted({*down, *up} - allowed):
        raise ValueError(f"block types {unknown} are not supported, only {sorted(allowed)}.")
    for name, wanted in (("norm_type", "group"), ("act_fn", "silu"), ("out_channels", theirs["in_channels"])):
        if theirs.get(name, wanted) != wanted:
            raise ValueError(f"{name}={theirs[name]!r} is not supported, only {wanted!r}.")
    levels = [[index for index, kind in enumerate(kinds) if kind.startswith("Attn")] for kinds in (down, up)]
    if levels[0] != levels[1]:
        raise ValueError(
            f"encoder and decoder must hold attention at the same levels, got {levels[0]} and {levels[1]}."
        )
    return levels[0]


def _statistics(theirs: Mapping, channels: int) -> dict:
    """latent_mean and latent_std of diffusers' z' = (z - mean) * scaling / std."""
    mean = theirs.get("latents_mean") or [theirs.get("shift_factor") or 0.0] * channels
    std = theirs.get("latents_std") or [1.0] * channels
    return {"latent_mean": [float(m) for m in mean], "latent_std": [float(s) / theirs["scaling_factor"] for s in std]}


def _from_taming(
    path: Path, image_size: int | None, config_file: str | os.PathLike | None, inert: tuple, fields: dict
) -> VQAutoencoder:
    content = load_file(path) if path.suffix == ".safetensors" else read_pickled_tensors(path, inert=inert + _LIGHTNING)
    states = content.get("state_dict", content) if isinstance(content, Mapping) else {}
    tensors = {str(name): value for name, value in states.items() if isinstance(value, Tensor)}
    prefix = taming_layout.find_prefix(tensors)
    if prefix is None:
        found = ", ".join(count_by_part(tensors)[:8]) or f"no tensors in a {type(content).__name__}"
        raise ValueError(f"{path} has no keys of an autoencoder (encoder.down, decoder.up) but {found}; {_SUPPORTED}.")
    own, rest = taming_layout.split_autoencoder(tensors, prefix)
    settings = taming_layout.read_settings(own)
    notes, size = [], image_size
    if config_file is not None:
        content_of = yaml.safe_load(Path(config_file).read_text(encoding="utf-8"))
        size = image_size or taming_layout.resolution_of(content_of, settings, os.fspath(config_file))
    elif size is None:
        size = _DEFAULT_SIZE
        notes.append(f"image_size {size} is assumed: the file holds none (image_size, or config_file)")
    if settings["quantizer"] == "vq":
        notes.append("losses are not taken over: commitment_weight is this package's, on the commitment term")
    if f"{prefix}quantize.used" in tensors:
        notes.append("ids are those of the whole codebook: the remapping quantize.used is left out")
    renamed = taming_layout.rename(own, len(settings["encoder_block_out_channels"]))
    report = {"kind": "taming or latent diffusion", "source": path.name, "taken": count_by_part(renamed)}
    report |= {"left_out": count_by_part(rest) + [str(name) for name in content if name != "state_dict"][:20]}
    return _build(settings | {"image_size": size}, renamed, fields, report | {"notes": notes})


def _from_ours(source: str, subfolder: str | None, image_size: int | None, fields: dict) -> VQAutoencoder:
    where = {"subfolder": subfolder} if subfolder else {}
    _check_given(fields, VQConfig.from_pretrained(source, **where).to_dict(), _name(source))
    model = VQAutoencoder.from_pretrained(source, **where).float()
    if image_size not in (None, model.config.image_size):
        before, model.config.image_size = model.config.image_size, image_size
        model.config._check()
        notes = [f"image_size {image_size} instead of {before}"]
    else:
        notes = []
    report = {"kind": "VQAutoencoder", "source": _name(source), "taken": count_by_part(model.state_dict())}
    model.config.dpssl = model.config.dpssl | {"imported": report | {"left_out": [], "notes": notes}}
    return model


def _from_encoder(
    source: str, subfolder: str | None, image_size: int | None, num_channels: int | None, level: int, fields: dict
) -> VQAutoencoder:
    encoder = ContrastiveEncoder.from_pretrained(source, **({"subfolder": subfolder} if subfolder else {})).float()
    theirs = encoder.config
    check_sees_pictures(theirs, source)
    preprocessing = theirs.pretrained_cfg
    size = image_size or (preprocessing.get("input_size") or (None,))[-1]
    channels = num_channels or (theirs.model_args or {}).get("in_chans", 3)
    if size is None:
        raise ValueError(f"{source} does not say the size of its images: give image_size.")
    entry = {"architecture": theirs.architecture, "model_args": theirs.model_args, "stem": theirs.stem, "level": level}
    entry |= {name: list(preprocessing[name]) for name in ("mean", "std") if preprocessing.get(name)}
    backbone = complete_backbone(entry, size, channels)
    settings = {"image_size": size, "num_channels": channels, "backbone": backbone}
    settings["latent_channels"] = backbone["channels"]
    levels = backbone["reduction"].bit_length()
    defaults = {"quantizer": "none", "decoder_block_out_channels": [32, 64, *[128] * (levels - 2)][:levels]}
    fields = defaults | fields
    if fields["quantizer"] == "vq":
        fields = {"codebook_frozen": False} | fields  # nothing has trained it yet
    notes = ["the decoder is fresh"]
    if not set(entry) & {"mean"}:
        notes.append("the source names no mean and std of images: 0.5 and 0.5 are assumed")
    report = {"kind": "encoder", "source": _name(source), "notes": notes}
    model = _build(settings, None, fields, report)
    held = dict(encoder.timm_model.named_parameters()) | dict(encoder.timm_model.named_buffers())
    wanted = model.encoder.timm_model.state_dict()
    _load(model.encoder.timm_model, {name: value for name, value in held.items() if name in wanted}, source)
    left = [name for name in held if name not in wanted]
    report |= {"taken": count_by_part(wanted), "left_out": count_by_part(left)}
    model.config.dpssl = {"imported": report}
    model.freeze_encoder()
    return model


def _name(source: str) -> str:
    return Path(source).name if Path(source).is_dir() else source  # a Hub id stays whole, a machine's path does not


def _build(settings: dict, tensors: Mapping[str, Tensor] | None, fields: dict, report: dict) -> VQAutoencoder:
    _check_given(fields, settings, report["source"])
    config = VQConfig(**fields | settings, dpssl={"imported": report})
    model = VQAutoencoder(config)
    if tensors is not None:
        _load(model, _with_defaults(model, tensors), report["source"])
    return model


def _check_given(fields: dict, settings: Mapping, source: str) -> None:
    """ValueError where fields that were given say something else than the settings of the source."""
    fixed = sorted(name for name in set(settings) & set(fields) if settings[name] != fields[name])
    if fixed:
        held, given = (", ".join(f"{name}={of[name]}" for name in fixed) for of in (settings, fields))
        raise ValueError(f"{held} follows from {source}, got {given}: leave it out.")


def _with_defaults(model: VQAutoencoder, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with identity maps where the source has no 1x1 convolutions, and the quantiser's statistics."""
    tensors = dict(tensors)
    for name in ("quant_conv", "post_quant_conv"):
        if f"{name}.weight" not in tensors and f"{name}.bias" not in tensors:
            convolution = getattr(model, name)
            tensors[f"{name}.weight"] = torch.eye(*convolution.weight.shape[:2])[:, :, None, None]
            tensors[f"{name}.bias"] = torch.zeros_like(convolution.bias)
    if "quantizer.codebook" in tensors:
        codebook = tensors["quantizer.codebook"].float()
        tensors.setdefault("quantizer.counts", torch.ones(len(codebook)))
        tensors.setdefault("quantizer.sums", codebook * tensors["quantizer.counts"][:, None])
        tensors["quantizer.is_initialized"] = torch.ones((), dtype=torch.int64)
    return tensors


def _load(module: torch.nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load exactly; ValueError naming missing, surplus, misshapen and not finite tensors."""
    wanted = {name: value.shape for name, value in module.state_dict().items()}
    shared = [name for name in tensors if name in wanted]
    problems = {
        "missing": [name for name in wanted if name not in tensors],
        "unexpected": [name for name in tensors if name not in wanted],
        "of another shape": [
            f"{name} {list(tensors[name].shape)} instead of {list(wanted[name])}"
            for name in shared
            if tensors[name].shape != wanted[name]
        ],
        "not finite": [name for name in shared if not tensors[name].isfinite().all()],
    }
    listed = [f"{kind}: {', '.join(n[:4])}{', ...' * (len(n) > 4)} ({len(n)})" for kind, n in problems.items() if n]
    if listed:
        raise ValueError(f"the tensors of {source} do not fit the architecture that was found; {'; '.join(listed)}.")
    module.load_state_dict(tensors)
