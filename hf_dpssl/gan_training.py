"""Arguments of training/dae_gan.py, the latents of its four variants, and how its images are judged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import evaluation, keyed_random
from .adversarial import ADVERSARIAL_LOSSES
from .batches import evaluation_batches, spread_rows
from .embedder import KINDS, ImageEmbedder
from .feature_extractors import load_extractor
from .image_table import ImageTable, decode_row
from .latent_density import DENSITIES
from .modeling_vaegan import LATENTS, VAEGAN
from .recipe import RunArguments, option

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
    max_train_steps: int = option(300, "steps of the generator, in every variant")
    stage_1_steps: int = option(150, "of --latent dae: steps of the encoder against the weak generator, before")
    stage_1_dropout: float = option(0.1, "of --latent dae: channel dropout of the weak generator")
    adversarial: str = option("non_saturating", "losses of both sides", choices=list(ADVERSARIAL_LOSSES))
    reconstruction_weight: float = option(1.0, "of the mean absolute error of reconstructions (vae, dae)")
    kl_weight: float = option(1e-3, "of the KL of the latents, per image in nats (vae, dae)")
    r1_weight: float = option(0.0, "of the gradient penalty at real images")
    discriminator_width: int = option(16, "channels of the discriminator's first layer")
    learning_rate: float = option(5e-4, "of both sides")
    lr_scheduler: str = option("constant", "learning-rate schedule of diffusers.optimization.get_scheduler")
    ema_decay: float = option(0.99, "share of the old averaged generator kept at each step")
    num_generated: int = option(500, "images that are judged")
    extractor: list[str] = option(
        [], "of the judgement: resnet56-cifar10, inception, or an encoder's folder or id"
    )

    def __post_init__(self):
        super().__post_init__()
        if self.latent == "simclr" and not self.encoder:
            raise ValueError("--latent simclr needs --encoder: the folder or Hub id of a trained encoder.")
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


class FeatureBank:
    """Standardised features of all images of a table, by row: the fixed latents of --latent simclr.

    Args:
        embedder: the frozen encoder.
        tables: training images, whose mean and deviation standardise all, and held-out images.
    """

    def __init__(self, embedder: ImageEmbedder, training: ImageTable, held_out: ImageTable | None):
        self.training = _features(embedder, training)
        mean, std = self.training.mean(0), self.training.std(0).clamp_min(1e-6)
        self.training = (self.training - mean) / std
        self.held_out = None if held_out is None else (_features(embedder, held_out) - mean) / std


def _features(embedder: ImageEmbedder, table: ImageTable) -> Tensor:
    parts = []
    for first in range(0, len(table), _EMBEDDED_AT_ONCE):
        rows = range(first, min(first + _EMBEDDED_AT_ONCE, len(table)))
        pictures = [decode_row(table.data, table.split[row], f"row {row}")[0] for row in rows]
        parts.append(embedder.embed_pictures(pictures))
    return torch.cat(parts)


@torch.no_grad()
def posterior_samples(model: VAEGAN, table: ImageTable, rows: range, seed: int) -> Tensor:
    """Latents (N, latent_dim) drawn for images of a table, one each."""
    latents = []
    for batch in evaluation_batches(table, _EMBEDDED_AT_ONCE, rows):
        mean, log_variance = model.encode(batch["images"].to(model.device, torch.float32) / 127.5 - 1)
        noise = keyed_random.normal(batch["sample_ids"], (mean.shape[1],), seed=seed, stream="posterior")
        latents.append((mean + (log_variance / 2).exp() * noise.to(mean.device)).float().cpu())
    return torch.cat(latents)


def fit_density(
    model: VAEGAN, args: GANArguments, bank: FeatureBank | None, training: ImageTable, held_out: ImageTable | None
) -> None:
    """Fit the density that `generate` samples to latents of training images, or keep those of held-out ones."""
    if args.density == "prior":
        return
    if args.density == "held_out" and held_out is None:
        raise ValueError(f"{args.dataset!r} has no held-out images: choose another --sample_from.")
    table = held_out if args.density == "held_out" else training
    if bank is not None:
        latents = bank.held_out if args.density == "held_out" else bank.training
    else:
        latents = posterior_samples(model, table, spread_rows(len(table), args.evaluation_images), args.seed)
    model.density.fit_(latents[: model.config.bank_size or None], seed=args.seed)


def pictures(table: ImageTable, limit: int) -> Tensor:
    """At most `limit` images of a table (N, C, S, S) in [-1, 1], evenly spread."""
    batches = evaluation_batches(table, _EMBEDDED_AT_ONCE, spread_rows(len(table), limit))
    return torch.cat([batch["images"] for batch in batches]).float() / 127.5 - 1


def judge(
    generated: Tensor, training: Tensor, held_out: Tensor, extractors: list[str], seed: int
) -> tuple[dict[str, float], dict]:
    """Quality of generated images against held-out ones, with copies of training images, and the ceiling.

    Keys with the prefix "ceiling_" are those of real training images, as many as were generated, in the place of the
    generated ones. The fingerprints say what each extractor is.
    """
    metrics, fingerprints = evaluation.copies(generated, training, held_out), {}
    for name in extractors:
        extractor = load_extractor(name)
        metrics |= evaluation.image_quality(held_out, generated, extractor, seed=seed)
        metrics |= evaluation.image_quality(
            held_out, training[: len(generated)], extractor, prefix="ceiling_", seed=seed
        )
        fingerprints[extractor.name] = evaluation.quality_fingerprint(
            extractor, reference="held-out images", num_real=len(held_out), num_generated=len(generated), seed=seed
        )
    return metrics, fingerprints
