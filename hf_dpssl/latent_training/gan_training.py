"""What training/dae_gan.py consists of besides its loop: the latents of its variants, and how its images are judged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch
from PIL import Image
from torch import Tensor

from .. import evaluation
from ..data import keyed_random
from ..data.batches import evaluation_batches
from ..data.image_table import BadImageError, ImageTable, decode_row, decode_rows
from ..data.subsets import random_rows
from ..embedding.embedder import ImageEmbedder
from ..embedding.feature_extractors import features_of
from ..evaluation.image_measures import Extractor
from ..models.latent_density import LatentDensity
from ..models.modeling_vaegan import VAEGAN
from .gan_arguments import GANArguments

_EMBEDDED_AT_ONCE = 256


class FeatureBank:
    """Standardised features of all images of a table, by row: the fixed latents of --latent simclr.

    Args:
        embedder: the frozen encoder.
        tables: training images, whose mean and deviation standardise all, and held-out images.

    Attributes:
        training, held_out: (N, D) float32, (M, D) or None. mean, std: (D,). encoder: name and fingerprint.
    """

    def __init__(self, embedder: ImageEmbedder, training: ImageTable, held_out: ImageTable | None):
        features = _features(embedder, training)
        self.mean = features.mean(0)
        self.std = features.std(0).clamp_min(1e-6)
        self.training = (features - self.mean) / self.std
        self.held_out = None if held_out is None else (_features(embedder, held_out) - self.mean) / self.std
        self.encoder = {"features": embedder.kind, "fingerprint": embedder.fingerprint}

    def with_latents(self, batches: Iterable[dict]) -> Iterator[dict]:
        """Batches of training images, on the CPU, with their rows' latents (B, D) under "latents"."""
        for batch in batches:
            yield batch | {"latents": self.training[batch["sample_ids"]]}


def _features(embedder: ImageEmbedder, table: ImageTable) -> Tensor:
    parts = []
    decoded = decode_rows(table.data, ((table.split[row], f"row {row}") for row in range(len(table))))
    for first in range(0, len(table), _EMBEDDED_AT_ONCE):
        pictures = []
        for row, found in enumerate(islice(decoded, _EMBEDDED_AT_ONCE), first):
            pictures.append(_picture(table, row) if isinstance(found, BadImageError) else found[0])
        parts.append(embedder.embed_pictures(pictures))
    return torch.cat(parts)


def _picture(table: ImageTable, row: int) -> Image.Image:
    """The picture of a row, or the next readable one, which stands in for it in batches too."""
    for step in range(len(table)):
        try:
            return decode_row(table.data, table.split[(row + step) % len(table)], f"row {row}")[0]
        except BadImageError:
            if table.on_bad_image == "error":
                raise
    raise BadImageError(f"no image of {table.data.name!r} can be read.")


@torch.no_grad()
def posterior_samples(model: VAEGAN, table: ImageTable, rows: Sequence[int], seed: int) -> Tensor:
    """Latents (N, latent_dim) drawn for images of a table, one each."""
    latents = []
    for batch in evaluation_batches(table, _EMBEDDED_AT_ONCE, rows):
        mean, log_variance = model.encode(batch["images"].to(model.device, torch.float32) / 127.5 - 1)
        noise = keyed_random.normal(batch["sample_ids"], (mean.shape[1],), seed=seed, stream="posterior")
        latents.append((mean + (log_variance / 2).exp() * noise.to(mean.device)).float().cpu())
    return torch.cat(latents)


def fit_density_(
    density: LatentDensity,
    model: VAEGAN,
    args: GANArguments,
    bank: FeatureBank | None,
    training: ImageTable,
    held_out: ImageTable | None,
) -> LatentDensity:
    """Fit a density to the model's latents of training images, or keep those of held-out ones."""
    if density.kind == "prior":
        return density
    table = held_out if density.kind == "held_out" else training
    rows = table.random_rows(args.evaluation_images)
    if bank is None:
        return density.fit_(posterior_samples(model, table, rows, args.seed), seed=args.seed)
    features = bank.held_out if density.kind == "held_out" else bank.training
    return density.fit_(features[list(rows)], seed=args.seed)


def density_settings(kind: str, args: GANArguments, held_out: ImageTable | None) -> dict:
    """components and bank_size of a `LatentDensity`; ValueError for "held_out" of a data set without such images."""
    if kind == "held_out" and held_out is None:
        raise ValueError(f"{args.dataset!r} has no held-out images: choose another --sample_from.")
    rows = held_out.random_rows(args.evaluation_images) if kind == "held_out" else ()
    return {"components": args.components if kind == "mixture" else 1, "bank_size": len(rows)}


def pictures(table: ImageTable, limit: int) -> Tensor:
    """At most `limit` images of a table (N, C, S, S) in [-1, 1], drawn at random."""
    batches = evaluation_batches(table, _EMBEDDED_AT_ONCE, table.random_rows(limit))
    return torch.cat([batch["images"] for batch in batches]).float() / 127.5 - 1


class Judge:
    """Quality of images against held-out ones, whose features are taken once.

    Args:
        training, held_out: images (N, C, S, S), (M, C, S, S) in [-1, 1].
        extractors: of the features that are compared.
        seed: of subsets and splits.
    """

    def __init__(self, training: Tensor, held_out: Tensor, extractors: list[Extractor], seed: int):
        self.training = training
        self.held_out = held_out
        self.seed = seed
        self.extractors = extractors
        self._real = [features_of(extractor, held_out) for extractor in self.extractors]

    def __call__(self, generated: Tensor) -> dict[str, float]:
        """Copies of training images among generated ones, and their quality in each extractor."""
        metrics = evaluation.copies(generated, self.training, self.held_out)
        for extractor, real in zip(self.extractors, self._real, strict=True):
            metrics |= evaluation.image_quality(real, features_of(extractor, generated), extractor, seed=self.seed)
        return metrics

    def ceiling(self, number: int) -> dict[str, float]:
        """The quality of so many real training images, drawn at random, as if they were generated: "ceiling_..."."""
        rows = random_rows(len(self.training), number, seed=self.seed)
        metrics = {}
        for extractor, real in zip(self.extractors, self._real, strict=True):
            options = {"prefix": "ceiling_", "seed": self.seed}
            metrics |= evaluation.image_quality(
                real, features_of(extractor, self.training[list(rows)]), extractor, **options
            )
        return metrics

    def fingerprints(self, number: int) -> dict[str, dict]:
        """What each extractor is and what was compared, by its name."""
        counts = {"num_real": len(self.held_out), "num_generated": number, "seed": self.seed}
        return {
            extractor.name: evaluation.quality_fingerprint(extractor, reference="held-out images", **counts)
            for extractor in self.extractors
        }
