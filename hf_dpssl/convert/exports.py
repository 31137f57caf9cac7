"""A checkpoint as what other libraries load with their own classes, or as ONNX files, compared before it is kept.

| format | of | what is written | loads with |
|---|---|---|---|
| timm | encoder | config.json and model.safetensors without code of ours | timm, stock AutoModel |
| vqmodel | VQAutoencoder | diffusers' VQModel; of a KL autoencoder its AutoencoderKL | diffusers |
| dit-pipeline | VQDiTPipeline | diffusers' DiTPipeline, class table of 1001 rows | diffusers |
| onnx | encoder, VQAutoencoder | encoder.onnx, decoder.onnx, export.json (see onnx_exports.py) | onnxruntime |
| onnx | VQDriftPipeline | generator.onnx: noise and classes in, images out; export.json | onnxruntime |

What the other classes cannot express is refused with every reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from diffusers import ModelMixin
from safetensors import safe_open
from transformers import AutoModel

from ..generation import stock_dit
from ..generation.bulk_sampling import replace_scheduler
from ..generation.pipeline_vq_dit import VQDiTPipeline
from ..generation.pipeline_vq_drift import VQDriftPipeline
from ..hub.pulling import download
from ..hub.replay import TOLERANCE, checkpoint_kind
from ..models.modeling_contrastive import ContrastiveEncoder, input_settings
from ..models.modeling_vq import VQAutoencoder
from ..runs.atomic_files import atomic_folder, write_json
from ..runs.lineage import read_json, well_formed
from ..runs.results import environment
from ..runs.written_folders import check_target, record_files
from . import onnx_exports
from .choices import FORMATS
from .onnx_exports import relative_difference

Written = tuple[str, dict[str, float]]  # what was written, and differences from our model by output


@dataclass
class ExportReport:
    """What `export` did.

    Args:
        source, format, output_dir: as given.
        written: class, or files, of the result.
        files: bytes of every file by path.
        differences: from our model by output, as a share of the largest value (at least 1).
        tolerance: largest difference that is allowed.
    """

    source: str
    format: str
    output_dir: str
    written: str
    files: dict[str, int]
    differences: dict[str, float]
    tolerance: float = TOLERANCE


_KIND_NAMES = {
    "dit": "latent DiT",
    "drift": "one-step generator",
    "token": "token model",
    "gan": "GAN",
    "other": "checkpoint of another library",
}


def described_kind(folder: Path) -> tuple[str, str]:
    """The kind of a checkpoint, and it with its article, as "a latent DiT"; raises as `checkpoint_kind`."""
    kind = checkpoint_kind(folder)
    return kind, f"{'an' if kind in ('encoder', 'autoencoder') else 'a'} {_KIND_NAMES.get(kind, kind)}"


def export(
    source: str | os.PathLike,
    output_dir: str | os.PathLike,
    format: str,
    *,
    overwrite: bool = False,
    scheduler: str | None = None,
    scheduler_config: dict | None = None,
) -> ExportReport:
    """Write a checkpoint in another layout, whole or not at all.

    Args:
        source: folder or Hub id (`id@revision`) of a finished checkpoint.
        output_dir: folder of the result; with `overwrite` it may hold an earlier one.
        format: one of FORMATS.
        scheduler, scheduler_config: of a dit-pipeline, see `replace_scheduler`: the trained noise schedule for another
            solver. A flow needs one, such as DPMSolverMultistep with {"use_flow_sigmas": true, "prediction_type":
            "flow_prediction"}.

    Raises:
        FileExistsError, FileNotFoundError: a folder that is in the way, or none.
        ValueError: a format for another kind of checkpoint, or a model that the other class cannot express; all
            reasons are named.
        ImportError: ONNX libraries are missing. OSError: the Hub cannot be read.
        RuntimeError: what was written computes something else; nothing is left behind.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {list(FORMATS)}, got {format!r}.")
    kinds, write = FORMATS[format], _WRITERS[format]
    options = {"scheduler": scheduler, "changes": scheduler_config or {}} if scheduler or scheduler_config else {}
    if options and format != "dit-pipeline":
        raise ValueError(f"a scheduler is part of format dit-pipeline, not of {format}: leave it out.")
    if format == "onnx":
        onnx_exports.check_libraries()
    target = Path(output_dir)
    check_target(target, overwrite, "exported model", _WRITERS)
    folder = find_checkpoint(source)
    kind, described = described_kind(folder)
    if kind not in kinds:
        fitting = [name for name, allowed in FORMATS.items() if kind in allowed]
        instead = f"can be exported as {' or '.join(fitting)}" if fitting else "cannot be exported"
        raise ValueError(
            f"{source} is {described}, which {instead}; {format} is of "
            f"{' or '.join(_KIND_NAMES.get(name, name) for name in kinds)}."
        )
    with atomic_folder(target) as temporary:
        written, differences = write(folder, temporary, **options)
        files = record_files(temporary, format)
    return ExportReport(str(source), format, str(target), written, files, differences)


def find_checkpoint(source: str | os.PathLike) -> Path:
    """The folder itself, or that of a Hub id (`id@revision`) in the cache, fetched if need be.

    Raises:
        FileNotFoundError: neither a folder nor an id. OSError: the Hub cannot be read.
    """
    if Path(source).is_dir():
        return Path(source)
    name, _, revision = str(source).partition("@")
    if Path(source).exists() or name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{source} is no folder, and no id of the Hub (ORG/NAME, ORG/NAME@REVISION).")
    return download(name, revision or None, allow_patterns=["*.json", "*.safetensors"])


class _EncoderWithoutCode(ContrastiveEncoder):
    """Writes no code of ours beside its weights."""

    _auto_class = None


@torch.no_grad()
def _write_timm(folder: Path, target: Path) -> Written:
    encoder = _EncoderWithoutCode.from_pretrained(folder).eval()
    config = encoder.config
    if config.stem != "timm":
        raise ValueError(
            f"timm cannot express this encoder: its stem is {config.stem!r}, a 3x3 convolution of stride 1 in a "
            "ResNet. Train with --stem timm, or export it as onnx."
        )
    config._auto_class = config.auto_map = None
    encoder.save_pretrained(target)
    size = input_settings(encoder)["input_size"]
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0)).to(encoder.dtype)
    expected = encoder(images).pooler_output
    stock = timm.create_model(f"local-dir:{target}", pretrained=True).eval().to(encoder.dtype)
    model = AutoModel.from_pretrained(target, dtype=encoder.dtype).eval()
    differences = {
        "timm: features": relative_difference(stock(images), expected, "features in timm"),
        "transformers: features": relative_difference(
            model(images).pooler_output, expected, "features in transformers"
        ),
    }
    return f"{config.architecture} of timm", differences


@torch.no_grad()
def _write_vqmodel(folder: Path, target: Path) -> Written:
    vae = _load_autoencoder(folder, "It loads with diffusers as it is.")
    reasons = stock_dit.reasons_against_autoencoder(vae)
    if reasons:
        raise ValueError("diffusers' VQModel and AutoencoderKL cannot express this model: " + "; ".join(reasons) + ".")
    stock = stock_dit.stored_autoencoder(vae)
    stock.save_pretrained(target)
    return f"{type(stock).__name__} of diffusers", _compare_autoencoders(vae, type(stock).from_pretrained(target))


def _stored_dtype(folder: Path) -> torch.dtype:
    """Precision of a component's weights, which diffusers loads as float32; that of a .bin file is taken for it."""
    file = min(folder.glob("*.safetensors"), default=None)
    if file is None:
        return torch.float32
    with safe_open(file, "pt") as tensors:
        return tensors.get_tensor(next(iter(tensors.keys()))).dtype


def _compare_autoencoders(vae: VQAutoencoder, stock) -> dict[str, float]:
    """Latents of random images, and images of random codes (of latents where there is no codebook), in float32."""
    vae, stock = vae.float(), stock.float()
    config, generator = vae.config, torch.Generator().manual_seed(0)
    images = torch.rand(2, config.num_channels, config.image_size, config.image_size, generator=generator) * 2 - 1
    mean = images.new_tensor(config.latent_mean).view(1, -1, 1, 1)
    latents = vae.encode_latents(images)
    encoded = stock.encode(images)
    shifted = encoded.latents if config.quantizer == "vq" else encoded.latent_dist.mode()
    given = latents
    if config.quantizer == "vq":
        codes = torch.randint(config.num_codes, (2, config.latent_size, config.latent_size), generator=generator)
        given = vae.quantizer.lookup(codes)
    decoded = stock.decode(given - mean).sample
    return {
        "latents": relative_difference(shifted, latents - mean, "latents in diffusers"),
        "images": relative_difference(decoded, vae.decode(given).pixel_values, "images in diffusers"),
    }


@torch.no_grad()
def _write_dit(folder: Path, target: Path, scheduler: str | None = None, changes: dict | None = None) -> Written:
    if (read_json(folder / "model_index.json") or {}).get("_class_name") != VQDiTPipeline.__name__:
        raise ValueError(f"{folder} is a DiTPipeline of diffusers already: it loads as it is.")
    pipeline = VQDiTPipeline.from_pretrained(folder)
    if scheduler or changes:
        replace_scheduler(pipeline, scheduler, changes)
    for name in ("transformer", "vae"):
        if isinstance(part := getattr(pipeline, name), ModelMixin):
            part.to(_stored_dtype(folder / name))
    pipeline.export_stock(target)
    stock = stock_dit.DiTPipeline.from_pretrained(target)
    # Not by `float()`: the table of positions, which is in no file, has been rounded too.
    pipeline.transformer = type(pipeline.transformer).from_pretrained(folder / "transformer")
    config, generator = pipeline.transformer.config, torch.Generator().manual_seed(0)
    count = len(pipeline.class_names)
    labels = torch.tensor([0, count // 2, max(count - 1, 0)]) if count else torch.empty(0, dtype=torch.int64)
    ours, theirs = (torch.cat([labels, torch.tensor([null])]) for null in (pipeline.null_class, 1000))
    size = (len(ours), config.in_channels, config.sample_size, config.sample_size)
    noise = torch.randn(size, generator=generator)
    steps = torch.linspace(0, 999, len(ours)).long()
    found = stock.transformer(noise, timestep=steps, class_labels=theirs).sample
    expected = pipeline.transformer(noise, timestep=steps, class_labels=ours).sample
    differences = {"prediction": relative_difference(found, expected, "the transformer's prediction in diffusers")}
    if isinstance(pipeline.vae, VQAutoencoder):
        differences |= _compare_autoencoders(pipeline.vae, stock.vae)
    return f"DiTPipeline of diffusers with {type(stock.vae).__name__}", differences


def _write_onnx(folder: Path, target: Path) -> Written:
    kind = checkpoint_kind(folder)
    if kind == "encoder":
        with well_formed(folder):
            model = ContrastiveEncoder.from_pretrained(folder).eval().float()
        differences, about = onnx_exports.write_encoder(model, target)
    elif kind == "drift":
        with well_formed(folder):
            pipeline = VQDriftPipeline.from_pretrained(folder, dtype=torch.float32)
        differences, about = onnx_exports.write_generator(pipeline, target)
    else:
        model = _load_autoencoder(folder, "`hf-dpssl import` makes a VQAutoencoder of it.").float()
        differences, about = onnx_exports.write_autoencoder(model, target)
    more = {"differences_from_torch": differences, "tolerance": TOLERANCE, "environment": environment()}
    write_json(target / "export.json", about | more)
    return " and ".join(path.name for path in sorted(target.glob("*.onnx"), reverse=True)), differences


def _load_autoencoder(folder: Path, way_out: str) -> VQAutoencoder:
    name = (read_json(folder / "config.json") or {}).get("_class_name")
    if name is not None:
        raise ValueError(f"{folder} is diffusers' {name} already. {way_out}")
    with well_formed(folder):
        return VQAutoencoder.from_pretrained(folder).eval()


_WRITERS: dict[str, Callable[..., Written]] = {
    "timm": _write_timm,
    "vqmodel": _write_vqmodel,
    "dit-pipeline": _write_dit,
    "onnx": _write_onnx,
}
