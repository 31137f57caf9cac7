"""How a one-step generator is trained: sets of images, the generator, feature spaces, and measures of progress.

A step draws sets. A set is of one class: some noises, which the generator turns into images that repel each other, and
some real images, which attract them. All that is drawn is a function of (seed, epoch, set).
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..autoencoder import latent_codec
from ..contrastive.drifting import log_kernels_of
from ..data import keyed_random
from ..generation.latent_mlp import LatentMLP
from ..generation.pipeline_vq_dit import DiTTransformer2DModel, VQDiTPipeline
from ..generation.pipeline_vq_drift import NOISE_TIMESTEP
from ..models.modeling_contrastive import ContrastiveEncoder, check_sees_pictures, input_settings
from ..models.modeling_vq import VQAutoencoder
from .drift_arguments import DriftArguments
from .latent_cache import LatentTable
from .latent_run import new_transformer

logger = logging.getLogger(__name__)
_COLLAPSED = 0.5  # spread of samples within their class, relative to that of real images
_PERMUTATIONS = 32


class DriftSets(torch.utils.data.Dataset):
    """Sets of real latents for `ordered_batches`; set i is of class i % num_classes.

    Keys of a batch: latents float32 (B, K, C, h, w) of each set's class; labels (B,), the null class for a share of
    sets, whose latents are of all classes; sample_ids (B,), the sets' numbers; epoch; with guidance negatives
    (B, M, C, h, w) of all classes, and weights (B, K + M) of real latents and negatives.

    Args:
        table: latents of the training images.
        num_classes: 0 for data without; then all sets are of the null class 1, as the transformer counts it.
        args: of the run.
        least: sets that an epoch must hold, as many as there are in a step of all processes. It holds as many images
            as the table, about, and equally many sets of each class.

    Raises:
        ValueError: fewer images of a class than a set takes, or guidance without classes.
    """

    def __init__(self, table: LatentTable, num_classes: int, args: DriftArguments, least: int = 1):
        if args.guidance_scale > 1 and not num_classes:
            raise ValueError(
                f"--guidance_scale {args.guidance_scale} is between classes, and this data set has none: leave it out."
            )
        self.table = table
        self.args = args
        self.null_class = max(1, num_classes)
        self.dropout = args.class_dropout if num_classes else 1.0
        self.num_classes = num_classes
        few = {label: len(rows) for label, rows in enumerate(self.rows) if len(rows) < args.real_per_set}
        if few:
            label, count = min(few.items(), key=lambda item: item[1])
            what = f"class {label} has {count} training images" if num_classes else f"there are {count} training images"
            cure = f"lower --real_per_set to at most {count}" if count > 1 else "a set has at least two: add images"
            raise ValueError(
                f"{what}, fewer than the {args.real_per_set} of a set: {cure}"
                + (f" ({len(few)} classes have too few), or leave classes out." if len(few) > 1 else ".")
            )
        of_class = max(len(table) // args.real_per_set, least)
        self.length = len(self.rows) * -(-of_class // len(self.rows))

    @cached_property
    def everything(self) -> Tensor:
        """All rows of the table (N,)."""
        return torch.arange(len(self.table))

    @cached_property
    def rows(self) -> Sequence[Tensor]:
        """The rows of each class, ascending; all of them without classes."""
        if not self.num_classes:
            return [self.everything]
        labels = self.table.labels
        counts = (labels + 1).bincount(minlength=self.num_classes + 1)  # those without class are first
        return labels.argsort(stable=True).split(counts.tolist())[1 : self.num_classes + 1]

    def __getstate__(self) -> dict:
        # A loader worker finds the rows itself: sent, they take 16 bytes per image.
        return {name: value for name, value in self.__dict__.items() if name not in ("everything", "rows")}

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, items: list[tuple[int, int]]) -> dict:
        epoch = items[0][0]
        ids = torch.tensor([number for _, number in items])
        key = {"seed": self.args.seed, "epoch": epoch}
        dropped = keyed_random.uniform(ids, 1, stream="class dropout", **key)[:, 0] < self.dropout
        labels = ids % len(self.rows)
        drawn = [
            self._draw(self.everything if drop else self.rows[label], self.args.real_per_set, "real", epoch, number)
            for number, label, drop in zip(ids.tolist(), labels.tolist(), dropped.tolist(), strict=True)
        ]
        batch = {"labels": torch.where(dropped, self.null_class, labels), "sample_ids": ids, "epoch": epoch}
        batch["latents"] = self._latents(drawn, epoch)
        if self.args.guidance_scale > 1:
            count = min(self.args.negatives_per_set, len(self.everything))
            others = [self._draw(self.everything, count, "negatives", epoch, number) for number in ids.tolist()]
            batch["negatives"] = self._latents(others, epoch)
            weights = torch.ones(len(ids), self.args.real_per_set + count)
            weights[:, self.args.real_per_set :] = self.args.negative_weight(count) * ~dropped[:, None]
            batch["weights"] = weights
        return batch

    def _draw(self, rows: Tensor, count: int, stream: str, epoch: int, number: int) -> Tensor:
        """Distinct rows (count,)."""
        seed = keyed_random.derive_seed(self.args.seed, f"drift {stream}", epoch, number)
        return rows[random.Random(seed).sample(range(len(rows)), count)]

    def _latents(self, rows: list[Tensor], epoch: int) -> Tensor:
        flat = torch.cat(rows)
        mirrored = self.table.mirrored(flat, epoch) if self.table.flip_seed is not None else None
        return self.table.latents(flat, mirrored).unflatten(0, (len(rows), -1))


def initial_transformer(
    args: DriftArguments, autoencoder: VQAutoencoder, num_classes: int
) -> DiTTransformer2DModel | LatentMLP:
    """A new generator, whose samples are the noise itself, or that of `--init_from`.

    Raises:
        ValueError: `--init_from` is of another autoencoder, other classes, another objective or size.
    """
    if args.architecture == "mlp":
        config = autoencoder.config
        return LatentMLP(
            in_channels=config.latent_channels,
            sample_size=config.latent_size,
            num_layers=args.num_layers,
            width=args.width,
            num_embeds_ada_norm=max(1, num_classes),
        )
    if args.init_from is None:
        transformer = new_transformer(args, autoencoder, num_classes)
    else:
        transformer = _transformer_of(args, autoencoder, num_classes)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    return transformer


def _transformer_of(args: DriftArguments, autoencoder: VQAutoencoder, num_classes: int) -> DiTTransformer2DModel:
    pipeline = VQDiTPipeline.from_pretrained(args.init_from)
    transformer = pipeline.transformer.float()
    config = transformer.config
    if pipeline.config.prediction_type != "flow":
        raise ValueError(
            f"--init_from {args.init_from} predicts {pipeline.config.prediction_type!r}; one step from noise to image "
            "is made of a flow only (dae_dit.py --objective flow)."
        )
    if pipeline.config.vae_fingerprint != autoencoder.fingerprint():
        raise ValueError(
            f"--init_from {args.init_from} was trained on another autoencoder: pass --autoencoder {args.init_from}/vae."
        )
    if config.num_embeds_ada_norm != max(1, num_classes):
        raise ValueError(
            f"--init_from {args.init_from} has {config.num_embeds_ada_norm} classes, this run has {num_classes}."
        )
    found = {
        "num_layers": config.num_layers,
        "width": config.num_attention_heads * config.attention_head_dim,
        "num_heads": config.num_attention_heads,
        "patch_size": config.patch_size,
    }
    if found != {name: getattr(args, name) for name in found}:
        flags = " ".join(f"--{name} {value}" for name, value in found.items())
        raise ValueError(f"--init_from {args.init_from} is of another size: pass {flags}.")
    return transformer


def generate(model: nn.Module, noise: Tensor, labels: Tensor) -> Tensor:
    """Latents (N, C, h, w), float32, that the transformer in training makes of noise (N, C, h, w) and labels (N,)."""
    timesteps = noise.new_full((len(noise),), NOISE_TIMESTEP)
    return noise - model(noise, timestep=timesteps, class_labels=labels).sample.float()


class DecodedFeatures:
    """A feature space: what a frozen encoder sees in the pictures of latents, with the gradient by the latents.

    Args:
        encoder: is moved to the autoencoder's device, set to eval mode and frozen; pictures are resized to its size.
        autoencoder: its decoder makes the pictures, of latents that are not snapped to codes.

    Raises:
        ValueError: an encoder of latents, or for another number of channels; grey pictures only are repeated to three.
    """

    def __init__(self, encoder: ContrastiveEncoder, autoencoder: VQAutoencoder):
        check_sees_pictures(encoder.config, "the encoder")
        device = autoencoder.device
        self.autoencoder = autoencoder
        self.encoder = encoder.eval().requires_grad_(False).to(device)
        settings = input_settings(encoder)
        self.channels, *size = settings["input_size"]
        self.size = tuple(size)
        self.mean = torch.tensor(settings["mean"], device=device).view(1, -1, 1, 1)
        self.std = torch.tensor(settings["std"], device=device).view(1, -1, 1, 1)
        found = autoencoder.config.num_channels
        if found != self.channels and (found, self.channels) != (1, 3):
            raise ValueError(
                f"the encoder takes pictures of {self.channels} channels, the autoencoder makes {found}: choose "
                "another encoder for --features."
            )

    def __call__(self, latents: Tensor) -> Tensor:
        """(N, D) of normalised latents (N, C, h, w)."""
        pixels = latent_codec.decode(self.autoencoder, latents, quantize=False).float() / 2 + 0.5
        pixels = pixels.expand(-1, self.channels, -1, -1)
        if tuple(pixels.shape[2:]) != self.size:
            pixels = F.interpolate(pixels, self.size, mode="bicubic", antialias=True)
        return self.encoder((pixels - self.mean) / self.std).pooler_output.float()


class LatentFeatures:
    """A feature space: what a frozen encoder of latents sees at each of its stages and positions.

    Channels of each position are divided by their norm, and a stage's map by the root of its positions, so that squared
    distances are those of LPIPS with unit weights (Zhang et al. 2018, equation 1), here of latents: every stage weighs
    the same, and a generator is told where in the picture it is to change something. A ResNet's stem is no stage: one
    convolution of the latents, it would hold more numbers than all of them.

    Args:
        encoder: as contrastive.py trains it with `--autoencoder`; is moved to the autoencoder's device, set to eval
            mode and frozen.
        autoencoder: whose latents it takes.

    Raises:
        ValueError: the encoder is of the latents of another autoencoder, or of pictures.
    """

    def __init__(self, encoder: ContrastiveEncoder, autoencoder: VQAutoencoder):
        if encoder.config.vae_fingerprint != autoencoder.fingerprint():
            raise ValueError(
                "the encoder of --features was not trained on latents of this autoencoder: pass the --autoencoder that "
                "it was trained with, or train an encoder of this one by contrastive.py --autoencoder."
            )
        self.encoder = encoder.eval().requires_grad_(False).to(autoencoder.device)
        maps = encoder.timm_model.feature_info
        self.stages = [number for number, about in enumerate(maps) if about["module"] != "act1"]

    def __call__(self, latents: Tensor) -> Tensor:
        """(N, D) of normalised latents (N, C, h, w); D = positions x channels of all stages, norm^2 their number."""
        options = {"indices": self.stages, "intermediates_only": True}
        maps = self.encoder.timm_model.forward_intermediates(latents.to(self.encoder.dtype), **options)
        directions = [stage.float() / (stage.float().square().sum(1, keepdim=True) + 1e-10).sqrt() for stage in maps]
        return torch.cat([stage.flatten(1) / stage[0, 0].numel() ** 0.5 for stage in directions], 1)


def feature_spaces(args: DriftArguments, autoencoder: VQAutoencoder) -> list:
    """The spaces of `--features`, in their order; the autoencoder is frozen for them."""
    autoencoder.requires_grad_(False)
    return [nn.Identity() if name == "latent" else encoder_features(name, autoencoder) for name in args.features]


def encoder_features(name: str, autoencoder: VQAutoencoder) -> DecodedFeatures | LatentFeatures:
    """The space of an encoder, a folder or Hub id: of latents where it was trained on them, or of decoded pictures."""
    encoder = ContrastiveEncoder.from_pretrained(name)
    return (LatentFeatures if encoder.config.vae_fingerprint else DecodedFeatures)(encoder, autoencoder)


@torch.no_grad()
def progress(generated: Tensor, real: Tensor, *, kernel: str, dof: float, seed: int) -> dict[str, float]:
    """What falls or holds while the loss is flat, of sets of latents.

    Args:
        generated: (B, N, ...), N >= 2. real: (B, K, ...), K >= 2.
        kernel, dof: of the two-sample statistic; its scale is the mean distance.
        seed: of the permutations.

    Returns:
        spread: standard deviation of generated images within their set, over that of the real ones; 1 is right, below
            0.5 they have collapsed. two_sample: squared maximum mean discrepancy, unbiased, mean over sets.
        two_sample_noise: its standard deviation where both halves of a set are of one distribution, by permutations.

    Source: Gretton et al. 2012 (kernel two-sample test).
    """
    first, second = (part.flatten(2).double() for part in (generated, real))
    spread = (first.var(1).mean() / second.var(1).mean()).sqrt()
    (log_kernel,) = log_kernels_of(kernel, [1.0], dof)
    pooled = torch.cat([first, second], 1)
    distances = torch.cdist(pooled, pooled)
    count, size = len(pooled[0]), first.shape[1]
    mean = distances.sum((1, 2), keepdim=True) / (count * (count - 1))
    similarities = log_kernel(distances / mean).exp()
    similarities.diagonal(dim1=1, dim2=2).zero_()
    order = torch.Generator().manual_seed(seed)
    orders = [torch.arange(count), *(torch.randperm(count, generator=order) for _ in range(_PERMUTATIONS))]
    one = torch.stack([(places < size).double() for places in orders]).to(pooled)  # (P + 1, N + K)
    other = 1 - one
    within, across, beyond = (
        torch.einsum("pi,bij,pj->pb", left, similarities, right)
        for left, right in ((one, one), (one, other), (other, other))
    )
    rest = count - size
    values = within / (size * (size - 1)) + beyond / (rest * (rest - 1)) - 2 * across / (size * rest)
    values = values.mean(1)
    noise = values[1:].square().mean().sqrt()
    return {"spread": float(spread), "two_sample": float(values[0]), "two_sample_noise": float(noise)}


class Progress:
    """`progress` of a run at the steps that are logged, and one warning when its samples collapse."""

    def __init__(self, args: DriftArguments):
        self.args = args
        self.warned = False

    def __call__(self, step: int, generated: Tensor, real: Tensor) -> dict[str, float]:
        """Measures after `step` steps; {} between log entries."""
        args = self.args
        if step % args.logging_steps and step != args.max_train_steps:
            return {}
        measured = progress(generated, real, kernel=args.kernel, dof=args.dof, seed=step)
        if measured["spread"] < _COLLAPSED and not self.warned:
            self.warned = True
            logger.warning(
                "step %d: samples of a class are nearly alike, their spread is %.2g of the real images', which the "
                "loss does not show. Start anew with more --images_per_set (they repel each other), a larger scale in "
                "--scales, or a lower --guidance_scale or --learning_rate.",
                step,
                measured["spread"],
            )
        return measured
