"""Arguments of training/dae_gan.py, the latents of its four variants, and how its images are judged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from .. import evaluation
from ..autoencoder.adversarial_losses import ADVERSARIAL_LOSSES
from ..autoencoder.adversarial_term import AdversarialTerm
from ..data import keyed_random
from ..data.batches import evaluation_batches, spread_rows
from ..data.image_table import BadImageError, ImageTable, decode_row
from ..embedding.embedder import KINDS, ImageEmbedder
from ..embedding.feature_extractors import FeatureExtractor, load_extractor
from ..models.latent_density import DENSITIES, LatentDensity
from ..models.modeling_discriminator import NORMS
from ..models.modeling_vaegan import LATENTS, VAEGAN
from ..runs.recipe import RunArguments, option

_EMBEDDED_AT_ONCE = 256


@dataclass
class GANArguments(RunArguments):
    """Latent, architecture and losses; the defaults are a DAE-VAEGAN of the embedded digits."""

    name: str = option("gan", "subfolder of output_dir for the finished model")
    latent: str = option(
        "dae",
        "what the generator starts from: noise (DCGAN), features of a frozen encoder (simclr), an encoder trained "
        "jointly (vae: VAEGAN), or one trained against a weak generator and frozen (dae: DAE-VAEGAN)",
        choices=list(LATENTS),
    )
    encoder: str | None = option(None, "of --latent simclr: folder or Hub id of an encoder")
    features: str = option("features", "of --latent simclr: after the backbone or after the head", choices=list(KINDS))
    sample_from: str | None = option(
        None,
        "density of the latents of samples; default: prior, and full with --latent simclr",
        choices=list(DENSITIES),
    )
    components: int = option(10, "of --sample_from mixture")
    width: int = option(16, "channels of the generator's last hidden layer")
    latent_dim: int = option(32, "dimension of the latents; with --latent simclr the features'")
    max_train_steps: int = option(500, "steps of the generator, in every variant")
    stage_1_steps: int = option(150, "of --latent dae: steps of the encoder against the weak generator, before")
    stage_1_dropout: float = option(0.1, "of --latent dae: channel dropout of the weak generator")
    adversarial: str = option("non_saturating", "losses of both sides", choices=list(ADVERSARIAL_LOSSES))
    reconstruction: str = option(
        "pixels",
        "what reconstructions are compared in (vae, dae): pixels, by the mean absolute error, or the discriminator's "
        "last features, by the mean squared one, as in the paper of the VAEGAN",
        choices=["pixels", "discriminator"],
    )
    reconstruction_weight: float = option(10.0, "of the reconstruction error (vae, dae)")
    kl_weight: float = option(1e-3, "of the KL of the latents, per image in nats (vae, dae)")
    r1_weight: float = option(10.0, "of the gradient penalty at real images; without it the discriminator wins")
    r1_interval: int = option(4, "steps from one gradient penalty to the next, weighted so many times more")
    discriminator_width: int = option(16, "channels of the discriminator's first layer")
    discriminator_norm: str = option("group", "after its inner convolutions", choices=list(NORMS))
    learning_rate: float = option(2e-3, "of both sides")
    lr_scheduler: str = option("constant", "learning-rate schedule of diffusers.optimization.get_scheduler")
    ema_decay: float = option(0.99, "share of the old averaged generator kept at each step")
    num_generated: int = option(500, "images that are judged")
    compare_densities: bool = option(False, "judge images of all other densities of the latents too")
    extractor: list[str] = option([], "of the judgement: resnet56-cifar10, inception, or an encoder's folder or id")

    def __post_init__(self):
        super().__post_init__()
        if self.latent == "simclr" and not self.encoder:
            raise ValueError("--latent simclr needs --encoder: the folder or Hub id of a trained encoder.")
        if self.latent == "simclr" and self.streaming:
            raise ValueError("--latent simclr looks features up by row, which a stream has not: leave out --streaming.")
        if self.latent == "noise" and self.sample_from not in (None, "prior"):
            raise ValueError(f"--latent noise is sampled from the prior, not from {self.sample_from!r}.")
        if self.latent == "simclr" and self.sample_from == "prior":
            raise ValueError("features of an encoder have no prior: --sample_from diagonal, full, mixture or held_out.")
        for name in ("max_train_steps", "stage_1_steps", "num_generated"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")

    @property
    def density(self) -> str:
        """What samples are drawn from."""
        return self.sample_from or ("full" if self.latent == "simclr" else "prior")

    @property
    def other_densities(self) -> list[str]:
        """The densities of --compare_densities."""
        if not self.compare_densities or self.latent == "noise":
            return []
        unfit = {self.density} | ({"prior"} if self.latent == "simclr" else set())
        return [kind for kind in DENSITIES if kind not in unfit]

    def term(self) -> AdversarialTerm:
        """The adversarial term; it is the generator's own loss, so it has weight 1 from the first step on."""
        return AdversarialTerm(self.adversarial, weight=1.0, r1_weight=self.r1_weight, r1_interval=self.r1_interval)


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
        self.mean, self.std = features.mean(0), features.std(0).clamp_min(1e-6)
        self.training = (features - self.mean) / self.std
        self.held_out = None if held_out is None else (_features(embedder, held_out) - self.mean) / self.std
        self.encoder = {"features": embedder.kind, "fingerprint": embedder.fingerprint}


def _features(embedder: ImageEmbedder, table: ImageTable) -> Tensor:
    parts = []
    for first in range(0, len(table), _EMBEDDED_AT_ONCE):
        rows = range(first, min(first + _EMBEDDED_AT_ONCE, len(table)))
        parts.append(embedder.embed_pictures([_picture(table, row) for row in rows]))
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
def posterior_samples(model: VAEGAN, table: ImageTable, rows: range, seed: int) -> Tensor:
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
    rows = spread_rows(len(table), args.evaluation_images)
    if bank is None:
        return density.fit_(posterior_samples(model, table, rows, args.seed), seed=args.seed)
    features = bank.held_out if density.kind == "held_out" else bank.training
    return density.fit_(features[list(rows)], seed=args.seed)


def density_settings(kind: str, args: GANArguments, held_out: ImageTable | None) -> dict:
    """components and bank_size of a `LatentDensity`; ValueError for "held_out" of a data set without such images."""
    if kind == "held_out" and held_out is None:
        raise ValueError(f"{args.dataset!r} has no held-out images: choose another --sample_from.")
    rows = spread_rows(len(held_out), args.evaluation_images) if kind == "held_out" else ()
    return {"components": args.components if kind == "mixture" else 1, "bank_size": len(rows)}


def pictures(table: ImageTable, limit: int) -> Tensor:
    """At most `limit` images of a table (N, C, S, S) in [-1, 1], evenly spread."""
    batches = evaluation_batches(table, _EMBEDDED_AT_ONCE, spread_rows(len(table), limit))
    return torch.cat([batch["images"] for batch in batches]).float() / 127.5 - 1


class Judge:
    """Quality of images against held-out ones, whose features are taken once.

    Args:
        training, held_out: images (N, C, S, S), (M, C, S, S) in [-1, 1].
        extractors: names for `load_extractor`.
        seed: of subsets and splits.
    """

    def __init__(self, training: Tensor, held_out: Tensor, extractors: list[str], seed: int):
        self.training, self.held_out, self.seed = training, held_out, seed
        self.extractors = [load_extractor(name) for name in extractors]
        self._real = [_of(extractor, held_out) for extractor in self.extractors]

    def __call__(self, generated: Tensor) -> dict[str, float]:
        """Copies of training images among generated ones, and their quality in each extractor."""
        metrics = evaluation.copies(generated, self.training, self.held_out)
        for extractor, real in zip(self.extractors, self._real, strict=True):
            metrics |= evaluation.image_quality(real, generated, extractor, seed=self.seed)
        return metrics

    def ceiling(self, number: int) -> dict[str, float]:
        """The quality of so many real training images, evenly spread, in the place of generated ones: "ceiling_..."."""
        rows, metrics = spread_rows(len(self.training), number), {}
        for extractor, real in zip(self.extractors, self._real, strict=True):
            options = {"prefix": "ceiling_", "seed": self.seed}
            metrics |= evaluation.image_quality(real, self.training[list(rows)], extractor, **options)
        return metrics

    def fingerprints(self, number: int) -> dict[str, dict]:
        """What each extractor is and what was compared, by its name."""
        counts = {"num_real": len(self.held_out), "num_generated": number, "seed": self.seed}
        return {
            extractor.name: evaluation.quality_fingerprint(extractor, reference="held-out images", **counts)
            for extractor in self.extractors
        }


def _of(extractor: FeatureExtractor, images: Tensor) -> Tensor:
    return torch.cat([extractor.features(part) for part in images.split(_EMBEDDED_AT_ONCE)])
