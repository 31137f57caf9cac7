"""What an autoencoder's latent is worth: the measures of evaluation/ on two sets of images, numbers and curves."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from .. import evaluation
from ..data.batches import evaluation_batches, unit_pixels
from ..data.image_data import ImageData, load_images
from ..data.image_table import ImageTable
from ..data.subsets import random_rows
from ..embedding.feature_extractors import FeatureExtractor, features_of
from ..evaluation.lipschitz_constants import summarise_lipschitz_pair
from ..models.gather import all_succeed, gather_shares, is_first, own_share
from ..models.modeling_vq import VQAutoencoder
from .choices import GENERATOR, PARTS
from .complexity_curve import generator_complexity
from .latent_neighbours import decoded_interpolations, decoded_perturbations

GENERATOR_WIDTHS = (4, 8, 16)
_GENERATED_SIDE = 16


@dataclass
class Pictures:
    """pixel_values: float32 (N, C, H, W) in [-1, 1]; labels: (N,) int64, -1 where there are none."""

    pixel_values: Tensor
    labels: Tensor

    @property
    def labelled(self) -> bool:
        """Whether every picture has a class, and there are two classes at least."""
        return len(self.labels) > 0 and int(self.labels.min()) >= 0 and len(self.labels.unique()) > 1

    def random_rows(self, number: int, seed: int) -> Sequence[int]:
        """At most `number` pictures, drawn at random, of each class its share."""
        return random_rows(len(self.labels), number, labels=self.labels, seed=seed)


def held_out_data(dataset: str, **columns) -> ImageData:
    """A data set that has held-out images; ValueError where there are none."""
    data = load_images(dataset, **columns)
    if data.evaluation is None:
        raise ValueError(f"{dataset!r} has no held-out images to measure on.")
    return data


def picture_batches(
    data: ImageData, name: str, image_size: int, limit: int | None, *, num_channels: int = 3, batch_size: int = 256,
    seed: int = 0, shared: bool = False,
) -> Iterator[Pictures]:  # fmt: skip
    """Pictures of a split ("train" or "evaluation"), a batch at a time.

    `limit`: so many of them, a random subset with its share of each class; None: all. `shared`: those of this process's
    share. BadImageError: an unreadable picture.
    """
    split = {"train": data.train, "evaluation": data.evaluation}[name]
    table = ImageTable(data, split, image_size)
    rows = data.random_rows(split, limit, seed=seed)
    for batch in evaluation_batches(table, batch_size, own_share(rows) if shared else rows):
        yield Pictures(unit_pixels(batch["images"], num_channels), batch["labels"])


def load_pictures(
    dataset: str, image_size: int, limit: int | None, *, num_channels: int = 3, seed: int = 0, **columns
) -> dict[str, Pictures]:
    """{"train", "evaluation"}: pictures of each split, all in memory; `limit` as in `picture_batches`.

    Raises:
        ValueError: a data set without held-out images, or an unreadable picture.
    """
    data = held_out_data(dataset, **columns)
    options = {"num_channels": num_channels, "seed": seed}
    return {
        name: _joined(picture_batches(data, name, image_size, limit, **options)) for name in ("train", "evaluation")
    }


def _joined(batches: Iterator[Pictures]) -> Pictures:
    parts = list(batches)
    return Pictures(torch.cat([part.pixel_values for part in parts]), torch.cat([part.labels for part in parts]))


def held_out_sources(
    dataset: str, image_size: int, limit: int | None, *, num_channels: int = 3, **columns
) -> dict[str, Tensor]:
    """{name of a part: its held-out images}: the parts of a union a+b, or the data set itself.

    Arguments as `load_pictures`; the name is the end of an id.
    """
    found = {}
    for name, data in _parts(dataset, columns):
        batches = picture_batches(data, "evaluation", image_size, limit, num_channels=num_channels)
        found[name] = _joined(batches).pixel_values
    return found


def _parts(dataset: str, columns: dict) -> Iterator[tuple[str, ImageData]]:
    """Names of a union's parts, the ends of their ids, and their images; errors as `held_out_data`."""
    for part in (name.strip() for name in dataset.split("+")):
        yield part.split("/")[-1], held_out_data(part, **columns)


def generation_quality(
    generated: Tensor | None,
    number: int,
    dataset: str,
    extractor: FeatureExtractor,
    *,
    image_size: int,
    num_channels: int,
    limit: int | None,
    seed: int,
    **columns,
) -> dict[str, float]:
    """Quality of generated images in [-1, 1] beside held-out ones of a data set, and of each source.

    All processes call this: they share the images, and the first one measures. Features are those of float32.

    Args:
        generated: this process's share of them, (n, num_channels, image_size, image_size), or None.
        number: of the images of all processes.
        dataset, limit, columns: as `load_pictures`.
        extractor: of the features that are compared.
        seed: of subsets.

    Returns:
        What `evaluation.image_quality` gives, with the prefix "g", and for a union a+b "gfid_<extractor>_<part>"; {} in
        all processes but the first.
    """
    parts = dict(_parts(dataset, columns))

    def own_features() -> list[Tensor | None]:
        found = [None if generated is None else features_of(extractor, generated)]
        for data in parts.values():
            batches = picture_batches(data, "evaluation", image_size, limit, num_channels=num_channels, shared=True)
            of_part = [features_of(extractor, batch.pixel_values) for batch in batches]
            found.append(torch.cat(of_part) if of_part else None)
        return found

    own, *of_parts = all_succeed(own_features)
    features = gather_shares(own, number)
    counts = [len(data.random_rows(data.evaluation, limit)) for data in parts.values()]
    real = {name: gather_shares(*given) for name, *given in zip(parts, of_parts, counts, strict=True)}
    if not is_first():
        return {}
    metrics = evaluation.image_quality(torch.cat(list(real.values())), features, extractor, prefix="g", seed=seed)
    for part, of_part in real.items() if len(real) > 1 else ():
        found = evaluation.image_quality(of_part, features, extractor, measures=("fid",), prefix="g", seed=seed)
        metrics |= {f"{name}_{part}": value for name, value in found.items()}
    return metrics


def measured(name: str, measure: Callable, *given, nothing: Any = None, **options) -> Any:
    """What `measure(*given, **options)` returns; `nothing` ({}) with a note where pictures are too few or coincide."""
    try:
        return measure(*given, **options)
    except ValueError as error:
        print(f"not measured: {name} ({error})", file=sys.stderr)  # stdout may be JSON
        return nothing or {}


@dataclass
class Encoded:
    """latents (N, C, h, w), codes (N, h, w) or None, reconstructions (N, C, H, W) of some pictures, on the CPU."""

    latents: Tensor
    codes: Tensor | None
    reconstructions: Tensor


@torch.no_grad()
def encode_and_decode(model: VQAutoencoder, pictures: Tensor, batch_size: int = 256) -> Encoded:
    """All that the measures need of an autoencoder in eval mode."""
    latents = []
    codes = []
    images = []
    for batch in pictures.split(batch_size):
        output = model(batch.to(model.device))
        latents.append(output.latents.float().cpu())
        images.append(output.pixel_values.float().clamp(-1, 1).cpu())
        codes += [] if output.codes is None else [output.codes.cpu()]
    return Encoded(torch.cat(latents), torch.cat(codes) if codes else None, torch.cat(images))


def code_histograms(codes: Tensor, num_codes: int) -> Tensor:
    """How often each code occurs in each image: (N, num_codes) float32, rows sum to 1."""
    flat = codes.flatten(1)
    return torch.zeros(len(flat), num_codes).scatter_add_(1, flat, torch.full(flat.shape, 1 / flat.shape[1]))


def measure_autoencoder(
    model: VQAutoencoder,
    train: Pictures,
    test: Pictures,
    *,
    extractor: FeatureExtractor | None = None,
    parts: tuple[str, ...] = PARTS,
    seed: int = 0,
    lipschitz_images: int = 128,
    distance_images: int = 200,
) -> tuple[dict[str, float], dict[str, list]]:
    """Every measure of the chosen parts; keys are those of evaluation/, lower-case with units in its docstrings.

    Args:
        model: in eval mode.
        train, test: the probes are trained on `train`; everything is measured on `test`.
        extractor: of the Frechet distances; None leaves them out, and the part neighbours.
        parts: of PARTS and GENERATOR; informativeness needs labels, the prior codes: left out without.
        seed: of subsets, starts and probes.
        lipschitz_images, distance_images: test pictures, drawn at random, used by these two (slow) parts.

    Returns:
        metrics {name: number} and curves {name: list of numbers} for plots.
    """
    unknown = sorted(set(parts) - {*PARTS, GENERATOR})
    if unknown:
        raise ValueError(f"parts must be among {(*PARTS, GENERATOR)}, got {unknown}.")
    encoded_train = encode_and_decode(model, train.pixel_values)
    encoded = encode_and_decode(model, test.pixel_values)
    metrics: dict[str, float] = {}
    curves: dict[str, list] = {}
    if "reconstruction" in parts:
        metrics |= reconstruction(test, encoded, extractor, seed)
    if "informativeness" in parts and train.labelled and test.labelled:
        metrics |= informativeness(model, train, test, encoded_train, encoded, seed)
    if "prior" in parts and encoded.codes is not None:
        codes = (encoded_train.codes, encoded.codes)
        found = measured("the prior", evaluation.code_prior, *codes, model.config.num_codes, seed=seed)
        metrics |= found | (description_length(test, encoded, found["prior_nats"]) if found else {})
    if "collapse" in parts:
        found, curves = collapse(model, test, encoded, seed)
        metrics |= found
    if "lipschitz" in parts:
        pictures = test.pixel_values[test.random_rows(lipschitz_images, seed)]
        found, more = measured("the Lipschitz constants", lipschitz, model, pictures, seed, nothing=({}, {}))
        metrics = metrics | found
        curves = curves | more
    if "distances" in parts:
        rows = test.random_rows(distance_images, seed)
        metrics |= measured("distances", distances, test.pixel_values[rows], encoded.latents[rows], seed)
    if "neighbours" in parts and extractor is not None:
        metrics |= neighbours(model, test, encoded_train, encoded, extractor, seed)
    if GENERATOR in parts:
        latents = (encoded_train.latents, encoded.latents)
        found, more = measured("D^G", generator_capacity, train, test, *latents, seed, nothing=({}, {}))
        metrics = metrics | found
        curves = curves | more
    return metrics, curves


def reconstruction(test: Pictures, encoded: Encoded, extractor: FeatureExtractor | None, seed: int) -> dict[str, float]:
    """PSNR, SSIM and, with an extractor, the Frechet and kernel distances of reconstructions (`rfid_...`)."""
    metrics = evaluation.psnr(test.pixel_values, encoded.reconstructions, value_range=2.0)
    metrics |= evaluation.ssim(test.pixel_values, encoded.reconstructions, value_range=2.0)
    if extractor is not None:
        features = [features_of(extractor, images) for images in (test.pixel_values, encoded.reconstructions)]
        quality = measured("image quality", evaluation.image_quality, *features, extractor, seed=seed)
        metrics |= {f"r{name}": value for name, value in quality.items()}
    return metrics


def informativeness(
    model: VQAutoencoder, train: Pictures, test: Pictures, encoded_train: Encoded, encoded: Encoded, seed: int
) -> dict[str, float]:
    """Accuracy of a linear probe and of 20 nearest neighbours on latents, and on histograms of codes, in percent."""
    pairs = {"latent": (encoded_train.latents.flatten(1), encoded.latents.flatten(1))}
    if encoded.codes is not None:
        histograms = (code_histograms(part.codes, model.config.num_codes) for part in (encoded_train, encoded))
        pairs["histogram"] = tuple(histograms)
    metrics = {}
    for name, (bank, queries) in pairs.items():
        given = (bank, train.labels, queries, test.labels)
        found = measured("the linear probe", evaluation.linear_probe, *given, seed=seed)
        found |= evaluation.knn(*given, k=min(20, len(bank)), metric="euclidean")
        metrics |= {f"{name}_{key}": found[key] for key in ("linear_top1", "knn_top1") if key in found}
    return metrics


def collapse(
    model: VQAutoencoder, test: Pictures, encoded: Encoded, seed: int
) -> tuple[dict[str, float], dict[str, list]]:
    """Effective rank and spectrum of the latents, use of the codebook, and how well neighbours are kept."""
    flat = encoded.latents.flatten(1)
    metrics = measured("effective rank", evaluation.effective_rank, flat, centre=True)
    curves = {"spectrum": evaluation.spectrum(flat).tolist()} if metrics else {}
    kept = test.random_rows(2000, seed)
    pictures = test.pixel_values[kept].flatten(1)
    latents = flat[kept]
    metrics |= measured("trustworthiness", evaluation.trustworthiness, pictures, latents, k=12)
    metrics |= measured("continuity", evaluation.continuity, pictures, latents, k=12)
    if encoded.codes is not None:
        metrics |= evaluation.codebook_usage(encoded.codes, model.config.num_codes)
        counts = torch.bincount(encoded.codes.flatten(), minlength=model.config.num_codes).double()
        curves["code_shares"] = (counts / counts.sum()).sort(descending=True).values.tolist()
    return metrics, curves


def lipschitz(model: VQAutoencoder, images: Tensor, seed: int) -> tuple[dict[str, float], dict[str, list]]:
    """How much encoder and decoder stretch, at a fixed scale of the latent; the decoder at what it is really given."""
    images = images.to(model.device)
    with torch.no_grad():
        latents = model.encode(images).latents
        inputs = latents if model.quantizer is None else model.quantize(latents).quantized
    values = evaluation.lipschitz_pair_values(
        lambda x: model.encode_latents(x),
        lambda z: model.decode(z).pixel_values,
        images,
        decoder_inputs=inputs,
        seed=seed,
    )
    curves = {name: value.flatten().sort().values.cpu().tolist() for name, value in values.items()}
    return summarise_lipschitz_pair(values), curves


def distances(images: Tensor, latents: Tensor, seed: int) -> dict[str, float]:
    """Gromov-Wasserstein and Cai-Lim distance of images and latents.

    Cai-Lim compares principal components, so that the points are many more than the dimensions: up to 16 of the
    images and 8 of the latents, both scaled to unit total variance.
    """
    x = images.flatten(1).cpu()
    z = latents.flatten(1).cpu()
    metrics = evaluation.gromov_wasserstein(x, z, seed=seed)
    size = min(16, x.shape[1], len(x) - 1)
    pictures = principal_components(x, size)
    codes = principal_components(z, min(8, size, z.shape[1]))
    return metrics | evaluation.cai_lim(pictures, codes, seed=seed)


def description_length(test: Pictures, encoded: Encoded, prior_nats: float) -> dict[str, float]:
    """nats_per_pixel: of an image by its codes and then its pixels, per pixel value; lower is better.

    Codes cost `prior_nats`; pixel values the differential entropy of normal residuals of the best common variance.
    """
    error = float((encoded.reconstructions - test.pixel_values).double().square().mean())
    pixels = test.pixel_values[0].numel()
    return {"nats_per_pixel": prior_nats / pixels + 0.5 * math.log(2 * math.pi * math.e * max(error, 1e-12))}


def neighbours(
    model: VQAutoencoder, test: Pictures, encoded_train: Encoded, encoded: Encoded, extractor: FeatureExtractor,
    seed: int,
) -> dict[str, float]:  # fmt: skip
    """FID of images decoded beside latents of images: between neighbours (`ifid_...`), of near codes (`pfid_...`)."""
    drawn = {"i": decoded_interpolations(model, encoded.latents, encoded_train.latents)}
    if encoded.codes is not None:
        drawn["p"] = decoded_perturbations(model, encoded.codes, seed)
    real = features_of(extractor, test.pixel_values)
    metrics = {}
    for name, images in drawn.items():
        options = {"measures": ("fid",), "prefix": name, "seed": seed}
        given = (real, features_of(extractor, images), extractor)
        metrics |= measured(f"{name}FID", evaluation.image_quality, *given, **options)
    return metrics


def principal_components(points: Tensor, number: int) -> Tensor:
    """The first coordinates (N, number) of points (N, D) along their principal axes, scaled to unit total variance."""
    centred = points.double() - points.double().mean(0)
    left, values, _ = torch.linalg.svd(centred, full_matrices=False)
    coordinates = left[:, :number] * values[:number]
    return (coordinates / coordinates.var(0, correction=0).sum().sqrt()).float()


def generator_capacity(
    train: Pictures, test: Pictures, train_latents: Tensor, test_latents: Tensor, seed: int, **options
) -> tuple[dict[str, float], dict[str, list]]:
    """D^G of the encoded latents and of as many independent Gaussians, against the width of the generator.

    Pictures are averaged down to 16 pixels a side, and each latent component has unit variance. `options` go to
    `generator_complexity`.
    """
    options = {"widths": GENERATOR_WIDTHS, "seed": seed} | options
    pictures = [_small(part.pixel_values) for part in (train, test)]
    flat = [part.flatten(1) for part in (train_latents, test_latents)]
    centre = flat[0].mean(0)
    scale = flat[0].std(0).clamp_min(1e-6)
    encoded = [(part - centre) / scale for part in flat]

    def gaussian(count: int, random: torch.Generator) -> Tensor:
        return torch.randn(count, flat[0].shape[1], generator=random)

    latents = {"encoded": (encoded[0], encoded[1]), "gaussian": (gaussian, None)}
    metrics = {}
    curves = {"generator_widths": list(options["widths"])}
    for name, (drawn, fresh) in latents.items():
        found = generator_complexity(drawn, *pictures, held_out_latents=fresh, **options)
        metrics |= {f"{key}_{name}": value for key, value in found.items()}
        curves[f"generator_{name}"] = [found[f"complexity_w{width}"] for width in options["widths"]]
    return metrics, curves


def _small(pictures: Tensor) -> Tensor:
    return pictures if pictures.shape[-1] <= _GENERATED_SIDE else adaptive_avg_pool2d(pictures, _GENERATED_SIDE)
