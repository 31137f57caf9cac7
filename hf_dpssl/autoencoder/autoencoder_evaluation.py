"""What `hf-dpssl evaluate` measures of an autoencoder, ours or diffusers': PSNR, SSIM, rFID with its interval.

`hf-dpssl report` measures more of our autoencoders: what their latents are worth.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor

from .. import evaluation
from ..embedding.embedder import best_device
from ..embedding.evaluation_entries import Measured
from ..embedding.feature_extractors import FeatureExtractor, load_extractor
from ..evaluation.feature_checks import accelerated
from ..evaluation.image_measures import metric_key, warn_about_few
from ..models.modeling_vq import VQAutoencoder
from ..models.weight_hashes import combined_sha256, tensor_sha256
from ..runs.lineage import read_json, well_formed
from . import latent_codec
from .measures import encode_and_decode, held_out_data, picture_batches

_RESAMPLES, _OPERATIONS = 100, 4e12  # of an interval: at most, and what they may cost
CROPPED = "shorter side to {} pixels (bicubic), centre crop"


def measure_autoencoder_files(folder: Path, args: argparse.Namespace) -> Measured:
    """Reconstructions of held-out images beside them.

    Args:
        folder: of a VQAutoencoder, or of diffusers' VQModel or AutoencoderKL.
        args: flags of `hf-dpssl evaluate`.

    Raises:
        ValueError: weights, data or an extractor that cannot be had.
    """
    extractor = load_extractor(args.extractor) if args.extractor else None
    class_name = str((read_json(folder / "config.json") or {}).get("_class_name"))
    model_class = {c.__name__: c for c in (VQModel, AutoencoderKL)}.get(class_name, VQAutoencoder)
    try:
        with well_formed(folder.name):
            model = model_class.from_pretrained(folder).eval().float()
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"cannot load the autoencoder {folder.name!r}: {error}") from error
    side = getattr(model.config, "image_size", None) or model.config.sample_size
    channels = getattr(model.config, "num_channels", None) or model.config.in_channels
    given = {"image_column": args.image_column, "label_column": args.label_column, "revision": args.dataset_revision}
    model = model.to(best_device())
    count, totals, clouds, digest = 0, Counter(), ([], []), hashlib.sha256()
    for images in real_images(args, "evaluation", side, channels, **given):
        decoded = reconstructions(model, images, args.batch_size)
        digest.update(images.numpy().tobytes())
        count += len(images)
        faithful = evaluation.psnr(images, decoded, value_range=2.0) | evaluation.ssim(images, decoded, value_range=2.0)
        for name, value in faithful.items():
            totals[name] += len(images) * value
        for cloud, part in zip(clouds, (images, decoded), strict=True):
            cloud += [extractor.features(part)] if extractor else []
    metrics, notes = {name: total / count for name, total in totals.items()}, []
    if extractor is None:
        notes.append("rFID was not measured: it needs --extractor.")
    else:
        metrics |= frechet(extractor, *map(torch.cat, clouds), "r", notes)
    return Measured(
        metrics, {"evaluation": count}, weights_sha256(model), digest.hexdigest(), CROPPED.format(side),
        {"extractor": extractor} if extractor else {}, notes,
    )  # fmt: skip


def real_images(
    args: argparse.Namespace, split: str, image_size: int, num_channels: int, **columns
) -> Iterator[Tensor]:
    """Batches (B, C, S, S) in [-1, 1] of the images that `args` names of a split; few are in memory at a time."""
    data = held_out_data(args.dataset, **columns)
    options = {"num_channels": num_channels, "batch_size": args.batch_size, "seed": args.seed}
    for batch in picture_batches(data, split, image_size, args.evaluation_images, **options):
        yield batch.pixel_values


@torch.no_grad()
def reconstructions(model: latent_codec.Autoencoder, images: Tensor, batch_size: int) -> Tensor:
    """(N, C, H, W) in [-1, 1] on the CPU, of images in [-1, 1]; of AutoencoderKL those of the latents' mode."""
    if isinstance(model, VQAutoencoder):
        return encode_and_decode(model, images, batch_size).reconstructions
    parts = (
        latent_codec.decode(model, latent_codec.encode(model, b.to(model.device))) for b in images.split(batch_size)
    )
    return torch.cat([part.float().clamp(-1, 1).cpu() for part in parts])


def frechet(
    extractor: FeatureExtractor, real: Tensor, generated: Tensor, prefix: str, notes: list[str]
) -> dict[str, float]:
    """The Frechet distance of features (M, D) and (N, D), how sure it is, and its value for infinitely many images.

    The interval takes 100 resamples, fewer (at least 10) where these would need more than 4e12 operations, about two
    minutes of one core; the extrapolation takes 15 sizes, or 5 there.

    Returns:
        {"<prefix>fid_<extractor>", the same with "_low" and "_high": `frechet_interval` of 95 %, and with "_infinity":
        `frechet_extrapolation`, where there are 4 D images of either kind}. Where there are too few for a figure,
        `notes` gets a sentence.
    """
    least, dimension = min(len(real), len(generated)), real.shape[1]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_about_few(least, dimension)
    notes += [str(warning.message) for warning in caught]
    name = metric_key(prefix, "fid", extractor.name)
    resamples = _resamples(len(real), len(generated), dimension)
    interval = evaluation.frechet_interval(real, generated, resamples=resamples)
    metrics = {
        name: evaluation.frechet_distance_of_features(*map(accelerated, (real, generated))),
        f"{name}_low": interval["fid_low"],
        f"{name}_high": interval["fid_high"],
    }
    if least >= 4 * dimension:
        points = 15 if resamples == _RESAMPLES else 5
        metrics[f"{name}_infinity"] = evaluation.frechet_extrapolation(real, generated, points=points)["fid_infinity"]
    else:
        notes.append(f"{name}_infinity was not measured: it needs 4 x {dimension} images of either kind.")
    return metrics


def _resamples(num_real: int, num_generated: int, dimension: int) -> int:
    """How many a budget of operations allows: covariances, or products of few rows, and a decomposition of each."""
    rows = num_real + num_generated
    size = min(dimension, rows)
    operations = 2 * rows * dimension * size + 10 * size**3
    return max(10, min(_RESAMPLES, int(_OPERATIONS / operations)))


def weights_sha256(model: torch.nn.Module) -> str:
    """One hash of a model's weights and config."""
    config = dict(model.config) if isinstance(model.config, dict) else model.config.to_dict()
    elsewhere = ("transformers_version", "architectures", "auto_map", "dtype", "torch_dtype", "dpssl")
    settings = {name: value for name, value in config.items() if name[0] != "_" and name not in elsewhere}
    text = json.dumps(settings, sort_keys=True, default=str)
    return combined_sha256(tensor_sha256(model.state_dict()) | {"config": text})
