"""What training/dae_gan.py consists of besides its loop: the latents of its variants, and how its images are judged."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence

import torch
from accelerate import Accelerator
from diffusers import ImagePipelineOutput
from PIL import Image
from torch import Tensor, nn

from .. import evaluation
from ..data import keyed_random
from ..data.batches import evaluation_batches
from ..data.image_table import BadImageError, ImageTable, decode_row, decode_rows
from ..data.subsets import random_rows
from ..embedding.embedder import ImageEmbedder
from ..embedding.feature_extractors import features_of
from ..evaluation.image_measures import Extractor
from ..models.gather import all_succeed, broadcast_, gather_objects, gather_rows, gather_shares, is_first, own_share
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
    """Features of all rows of a table; the processes share them."""
    mine = own_share(range(len(table)))
    parts = []
    decoded = decode_rows(table.data, ((table.split[row], f"row {row}") for row in mine))
    for first in range(0, len(mine), _EMBEDDED_AT_ONCE):
        pictures = []
        for row, found in zip(mine[first : first + _EMBEDDED_AT_ONCE], decoded, strict=False):
            pictures.append(_picture(table, row) if isinstance(found, BadImageError) else found[0])
        parts.append(embedder.embed_pictures(pictures))
    return gather_rows(torch.cat(parts) if parts else None, mine)


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
    """Latents (N, latent_dim) drawn for images of a table, one each; the processes share them, and all get all."""
    latents = []
    numbers = []
    for batch in evaluation_batches(table, _EMBEDDED_AT_ONCE, own_share(rows)):
        mean, log_variance = model.encode(batch["images"].to(model.device, torch.float32) / 127.5 - 1)
        noise = keyed_random.normal(batch["sample_ids"], (mean.shape[1],), seed=seed, stream="posterior")
        latents.append((mean + (log_variance / 2).exp() * noise.to(mean.device)).float().cpu())
        numbers += batch["sample_ids"].tolist()
    return gather_rows(torch.cat(latents) if latents else None, numbers)


def fit_density_(
    density: LatentDensity,
    model: VAEGAN,
    args: GANArguments,
    bank: FeatureBank | None,
    training: ImageTable,
    held_out: ImageTable | None,
) -> LatentDensity:
    """Fit a density to the model's latents of training images, or keep those of held-out ones; all processes do it."""
    if density.kind == "prior":
        return density
    table = held_out if density.kind == "held_out" else training
    rows = table.random_rows(args.evaluation_images)
    if bank is None:
        density.fit_(posterior_samples(model, table, rows, args.seed), seed=args.seed)
    else:
        features = bank.held_out if density.kind == "held_out" else bank.training
        density.fit_(features[list(rows)], seed=args.seed)
    for buffer in density.buffers():
        broadcast_(buffer)  # those of another machine may be rounded in another way
    return density


def density_settings(kind: str, args: GANArguments, held_out: ImageTable | None) -> dict:
    """components and bank_size of a `LatentDensity`; ValueError for "held_out" of a data set without such images."""
    if kind == "held_out" and held_out is None:
        raise ValueError(f"{args.dataset!r} has no held-out images: choose another --sample_from.")
    rows = held_out.random_rows(args.evaluation_images) if kind == "held_out" else ()
    return {"components": args.components if kind == "mixture" else 1, "bank_size": len(rows)}


def pictures(table: ImageTable, limit: int) -> Tensor:
    """At most `limit` images of a table, uint8 (N, C, S, S), drawn at random; the processes read a share each."""
    batches = list(evaluation_batches(table, _EMBEDDED_AT_ONCE, own_share(table.random_rows(limit))))
    numbers = [number for batch in batches for number in batch["sample_ids"].tolist()]
    return gather_rows(torch.cat([batch["images"] for batch in batches]) if batches else None, numbers)


@torch.no_grad()
def drawn_share(model: VAEGAN, density: LatentDensity, args: GANArguments, accelerator: Accelerator) -> Tensor | None:
    """This process's share of `num_generated` images (N, C, S, S) in [-1, 1], None where it is empty.

    Their latents are drawn from the density with the seed of the run; they are decoded in the precision of the run.
    """
    latents = density.sample(args.num_generated, torch.Generator().manual_seed(args.seed))
    mine = own_share(latents)
    with accelerator.autocast():
        return model.generate(latents=mine).float().cpu() if len(mine) else None


class GANPipeline:
    """A GAN as `GenerationMonitor` calls the pipelines of other generators: without classes, and without bars.

    Attributes:
        class_names: none. transformer: the network whose averaged weights draw, which here is the generator.
    """

    class_names: tuple[str, ...] = ()

    def __init__(self, model: VAEGAN):
        self.model = model

    @property
    def transformer(self) -> nn.Module:
        """The generator that the model has now: stage 2 begins with another one."""
        return self.model.generator

    def __call__(
        self, class_labels: None, *, num_images: int, generator: list[torch.Generator], output_type: str
    ) -> ImagePipelineOutput:
        """Images (N, C, S, S) in [0, 1] of latents from the model's density, each by a generator of its own."""
        return ImagePipelineOutput(images=self.model.generate(num_images, generator).float() / 2 + 0.5)

    def set_progress_bar_config(self, **settings) -> None:
        """Nothing: there are none."""

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write the model."""
        self.model.save_pretrained(folder)


class Judge:
    """Quality of images against held-out ones, whose features are taken once.

    All processes make one and call its methods: they share the images, and the first one measures. Features are those
    of float32, whatever the precision of the run, as the distances are defined and as published figures were taken.

    Args:
        training, held_out: uint8 images (N, C, S, S), (M, C, S, S), the same in all processes.
        extractors: of the features that are compared.
        seed: of subsets and splits.
    """

    def __init__(self, training: Tensor, held_out: Tensor, extractors: list[Extractor], seed: int):
        self.training = training
        self.held_out = held_out
        self.seed = seed
        self.extractors = extractors
        self._real = self._features(_in_model_range(own_share(held_out)), len(held_out))

    def _features(self, own: Tensor | None, number: int) -> list[Tensor]:
        """By extractor: features of `number` images in [-1, 1], of which this process has its own."""
        has_some = own is not None and len(own) > 0
        parts = all_succeed(lambda: [features_of(each, own) if has_some else None for each in self.extractors])
        return [gather_shares(part, number) for part in parts]

    def _quality(self, features: list[Tensor], prefix: str = "") -> dict[str, float]:
        metrics = {}
        for extractor, real, found in zip(self.extractors, self._real, features, strict=True):
            metrics |= evaluation.image_quality(real, found, extractor, prefix=prefix, seed=self.seed)
        return metrics

    def __call__(self, own: Tensor | None, number: int) -> dict[str, float]:
        """Copies of training images among `number` generated ones in [-1, 1], and their quality in each extractor.

        Args:
            own: this process's share of the images.
            number: of the images of all processes.

        Returns:
            Metrics in the first process, {} in the others.
        """
        copied = all_succeed(lambda: None if own is None else self._copies(own))
        copied = [found for found in gather_objects(copied) if found is not None]
        features = self._features(own, number)
        if not is_first():
            return {}
        metrics = {key: sum(count * found[key] for count, found in copied) / number for key in copied[0][1]}
        return metrics | self._quality(features)

    def _copies(self, own: Tensor) -> tuple[int, dict[str, float]]:
        """How many images these are, and what is measured of them."""
        training, held_out = map(_in_model_range, (self.training, self.held_out))
        return len(own), evaluation.copies(own, training, held_out)

    def ceiling(self, number: int) -> dict[str, float]:
        """The quality of so many real training images, drawn at random, as if they were generated: "ceiling_...".

        {} but in the first process.
        """
        rows = random_rows(len(self.training), number, seed=self.seed)
        images = _in_model_range(self.training[list(own_share(rows))])
        features = self._features(images, len(rows))
        return self._quality(features, "ceiling_") if is_first() else {}

    def fingerprints(self, number: int) -> dict[str, dict]:
        """What each extractor is and what was compared, by its name."""
        counts = {"num_real": len(self.held_out), "num_generated": number, "seed": self.seed}
        return {
            extractor.name: evaluation.quality_fingerprint(extractor, reference="held-out images", **counts)
            for extractor in self.extractors
        }


def _in_model_range(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1
