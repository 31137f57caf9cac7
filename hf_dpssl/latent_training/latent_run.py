"""What the generators in a latent share: their autoencoder, the cache of its latents or codes."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DiTTransformer2DModel
from diffusers.training_utils import EMAModel
from torch import nn

from ..autoencoder import latent_codec
from ..data.batches import ImageSource
from ..data.image_data import ImageData
from ..data.image_table import ImageTable
from ..embedding.feature_extractors import load_extractor
from ..models.modeling_contrastive import ContrastiveEncoder
from ..models.modeling_vq import VQAutoencoder
from ..runs.console import say
from ..runs.training_loop import check_start
from .diffusion import make_transformer
from .latent_arguments import LatentRunArguments
from .latent_cache import CodeTable, LatentTable, build_latent_cache
from .transformer_arguments import TransformerRunArguments

# Flags that a run passes on to the training of its autoencoder.
_SHARED = (
    "dataset",
    "dataset_revision",
    "image_column",
    "label_column",
    "streaming",
    "stream_reading",
    "on_bad_image",
    "image_size",
    "output_dir",
    "seed",
    "mixed_precision",
    "num_processes",
    "num_workers",
    "preload_gb",
    "resume_from_checkpoint",
    "overwrite",
)


def autoencoder_of_run(args: LatentRunArguments, train: Callable[[list[str]], Path]) -> str | Path:
    """`--autoencoder`, or OUTPUT_DIR/autoencoder, which `train(argv)` makes with the run's data, seed and processes.

    What the run names is loaded once before that, so that a wrong name is refused before anything is trained.

    Raises:
        ValueError: an encoder is of the latents of an autoencoder, and a new one would be trained.
    """
    of_latents = [name for name in args.encoders if ContrastiveEncoder.from_pretrained(name).config.vae_fingerprint]
    for name in args.extractors:
        load_extractor(name)
    folder = Path(args.output_dir) / "autoencoder"
    if args.autoencoder:
        return args.autoencoder
    if (folder / "config.json").exists() and not args.overwrite and not _is_unfinished(args, folder):
        say(f"the autoencoder in {folder} is used; --overwrite trains a new one")
        return folder
    if of_latents:
        raise ValueError(
            f"{of_latents[0]} is an encoder of an autoencoder's latents, and this run would train another: pass the "
            "--autoencoder that it was trained with."
        )
    argv = ["--recipe", args.autoencoder_recipe] if args.autoencoder_recipe else []
    # The recipe knows how many workers decode its images; the run's own read a cache.
    for name in _SHARED:
        if getattr(args, name) is not None and not (name == "num_workers" and args.autoencoder_recipe):
            argv += [f"--{name}", str(getattr(args, name))]
    return train(argv + shlex.split(args.autoencoder_args))


def _is_unfinished(args: LatentRunArguments, folder: Path) -> bool:
    """Whether a run that goes on was ended after its autoencoder's weights were written, before their measures."""
    checkpoints = Path(args.output_dir) / "checkpoints" / "autoencoder"
    return bool(args.resume_from_checkpoint) and checkpoints.exists() and not (folder / "results.json").exists()


def new_transformer(
    args: TransformerRunArguments, autoencoder: VQAutoencoder, num_classes: int, **options: bool
) -> DiTTransformer2DModel:
    """A transformer of the run's size for the autoencoder's latents; options as of `make_transformer`."""
    return make_transformer(
        num_layers=args.num_layers,
        width=args.width,
        num_heads=args.num_heads,
        patch_size=args.patch_size,
        latent_channels=autoencoder.config.latent_channels,
        latent_size=autoencoder.config.latent_size,
        num_classes=num_classes,
        **options,
    )


def make_optimizer(args: TransformerRunArguments, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW over all that a generator by diffusion or in one step learns."""
    settings = {"betas": (0.9, args.adam_beta2), "weight_decay": args.weight_decay, "fused": True}
    return torch.optim.AdamW(model.parameters(), args.learning_rate, **settings)


def weight_averages(parameters: Iterable[nn.Parameter], decay: float) -> EMAModel:
    """Running means of a generator's weights, updated all at once: two kernels a step instead of three a tensor."""
    return EMAModel(parameters, decay=decay, foreach=True)


def classes_of_run(args: LatentRunArguments, data: ImageData) -> list[str]:
    """Names of the classes that are learned; [] for a data set without, or with --unconditional.

    Raises:
        ValueError: the data set has columns that may be its classes, and they cannot be.
    """
    if args.unconditional:
        return []
    if data.label_problem:
        raise ValueError(f"{data.label_problem}; or learn without classes by --unconditional.")
    return data.class_names or []


def cached_training_images(
    args: LatentRunArguments,
    autoencoder: VQAutoencoder,
    data: ImageData,
    accelerator: Accelerator,
    content: str,
    *,
    whole_batches: bool = True,
) -> tuple[LatentTable | CodeTable, LatentTable | CodeTable | None, dict[str, str]]:
    """Latents or codes under OUTPUT_DIR, which the processes encode together, each every n-th shard.

    Args:
        args, autoencoder, data, accelerator: of the run.
        content: "latents", or "codes", which are cached of the held-out images too.
        whole_batches: a step takes a batch of different images; False where it draws its own.

    Returns:
        The training images' table (with `--flip_cache` a random half of it mirrored in each epoch, with
        `--unconditional` without labels), that of the
        held-out images (None for latents, or where the data set has none), and {row: reason} of unreadable images.

    Raises:
        ValueError: fewer training images than one batch of all processes.
        FileExistsError, ValueError: the run may not start or go on, as `check_start`.
    """
    # A refused run leaves the cache of a good one as it is.
    sources = latent_codec.sources(autoencoder)
    if content == "codes":  # which are not normalised
        sources = {"autoencoder": sources["autoencoder"]}
    check_start(args, accelerator, args.name, data, sources)
    # Each image is decoded once: nothing is gained by decoding all of them into memory first.
    source = ImageSource.from_arguments(data, replace(args, preload_gb=0.0), accelerator, autoencoder.config.image_size)
    process = (accelerator.process_index, accelerator.num_processes)
    options = dict(content=content, process=process, wait=accelerator.wait_for_everyone)
    folder, held_out, skipped = Path(args.output_dir) / content, None, {}

    def build(images: ImageTable, folder: Path, split: str, flipped: bool = False) -> LatentTable | CodeTable:
        images.skipped = {}
        table = build_latent_cache(autoencoder, images, folder, flipped=flipped, **options)
        skipped.update({f"{split} {row}": reason for row, reason in images.skipped.items()})
        return table

    table = build(source.whole_training_table(), folder, "train", args.flip_cache)
    if args.flip_cache:
        table.flip_seed = args.seed
    if args.unconditional:
        table.forget_labels()
    if content == "codes" and (images := source.evaluation_table(together=True)) is not None:
        held_out = build(images, folder / "held-out", "evaluation")
    if whole_batches and len(table) < args.batch_size * accelerator.num_processes:
        raise ValueError(
            f"{len(table)} {content} are fewer than one batch of all processes "
            f"({args.batch_size} x {accelerator.num_processes}): lower --batch_size."
        )
    return table, held_out, skipped
