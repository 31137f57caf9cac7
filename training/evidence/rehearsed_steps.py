"""The training steps of the scripts, to be rehearsed: their own models, losses and optimisers, without images.

Each function takes the arguments that a script has parsed and yields (name, `Step`) of each stage, one by one; only
dae_vq and dae_gan have stages. New models are made on `device`, "meta" where they are to have no values; others are
loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torchvision
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import contrastive  # noqa: E402
import dae_ar  # noqa: E402
import dae_dit  # noqa: E402
import dae_drift  # noqa: E402
import dae_gan  # noqa: E402
import dae_vq  # noqa: E402

from hf_dpssl.autoencoder.adversarial_term import Adversary, ReconstructionGuard  # noqa: E402
from hf_dpssl.autoencoder.arguments import VQArguments  # noqa: E402
from hf_dpssl.autoencoder.perceptual import load_perceptual  # noqa: E402
from hf_dpssl.contrastive.momentum import choose_queue_size  # noqa: E402
from hf_dpssl.data.batches import load_images_for  # noqa: E402
from hf_dpssl.data.image_data import TABLE, DatasetEntry  # noqa: E402
from hf_dpssl.data.views import PRESETS, TwoViews, to_model_range  # noqa: E402
from hf_dpssl.embedding.embedder import ImageEmbedder  # noqa: E402
from hf_dpssl.latent_training.diffusion import make_scheduler  # noqa: E402
from hf_dpssl.latent_training.dit_arguments import DiTArguments  # noqa: E402
from hf_dpssl.latent_training.drift_arguments import DriftArguments  # noqa: E402
from hf_dpssl.latent_training.drift_training import feature_spaces, initial_transformer  # noqa: E402
from hf_dpssl.latent_training.gan_arguments import GANArguments  # noqa: E402
from hf_dpssl.latent_training.latent_arguments import LatentRunArguments  # noqa: E402
from hf_dpssl.latent_training.latent_run import autoencoder_of_run, classes_of_run, weight_averages  # noqa: E402
from hf_dpssl.latent_training.token_arguments import ARArguments  # noqa: E402
from hf_dpssl.models.configuration_vq import VQConfig  # noqa: E402
from hf_dpssl.models.modeling_vaegan import VAEGAN  # noqa: E402
from hf_dpssl.models.modeling_vq import VQAutoencoder  # noqa: E402
from hf_dpssl.runs.contrastive_arguments import ContrastiveArguments  # noqa: E402
from hf_dpssl.runs.recipe import parse  # noqa: E402

_CLASSES = {"imagenet-1k": 1000, "cifar10": 10, "cifar100": 100, "mnist": 10}  # of others the images are loaded
_ONE_PROCESS = SimpleNamespace(backward=Tensor.backward, device="cpu")


@dataclass
class Started:
    """A step that can be run on batches, and what it keeps on the GPU."""

    run: Callable[[dict], None]
    optimizers: list[torch.optim.Optimizer]
    averages: EMAModel | None = None


@dataclass
class Step:
    """What a script has before its loop.

    learning: modules that `accelerator.prepare` gets, the trained model first. frozen: other modules on the GPU.
    features: objects that hold frozen modules and tensors, such as a feature space. batch: makes one, on the CPU.
    start: makes optimisers, when all modules are where they stay. read: {buffer of the model: value} that decides
    about sizes.
    """

    learning: list[nn.Module]
    batch: Callable[[], dict]
    start: Callable[[], Started]
    frozen: list[nn.Module] = field(default_factory=list)
    features: list[object] = field(default_factory=list)
    read: dict[str, int] = field(default_factory=dict)


def contrastive_steps(args: ContrastiveArguments, device: str) -> Iterator[tuple[str, Step]]:
    """Of contrastive.py; the queue is full and, where its size is not given, the largest; a GPU crops the views.

    With values, on "cpu", all views are made, which wait for what is drawn, and the model sees a few of them.
    """
    if args.autoencoder:
        raise ValueError("--autoencoder is not rehearsed: leave it out, and give the size of pictures.")
    args = replace(args, init_encoder=None, init_pretraining=None)  # of the same size
    entry = entry_of(args)
    side = args.image_size or entry.image_size
    if args.negatives == "queue" and args.queue_size is None:
        args.queue_size = choose_queue_size(None, args.batch_size)
    with torch.device(device):
        model = contrastive.make_model(args, side, *entry.statistics).train()
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    augmentation = PRESETS[args.augmentation or entry.augmentation]
    views = TwoViews(augmentation, *entry.statistics, args.seed, mode=args.augmentation_mode)
    few = args.batch_size if device == "meta" else 2 * args.batch_norm_splits
    if args.freeze == "all_but_last_layer":
        contrastive.freeze_all_but_last_layer_(model)

    def first_views(*batch) -> list[Tensor]:
        return [view[:few] for view in views(*batch)]

    def start() -> Started:
        optimizer = contrastive.make_optimizer(args, model)

        def run(batch: dict) -> None:
            output = contrastive.step_output(model, first_views, batch, args, 0, 1)
            output.loss.backward()
            finish_step(args, list(model.parameters()), optimizer)

        return Started(run, [optimizer])

    full = {"queue_filled": args.queue_size} if args.negatives == "queue" else {}
    yield "", Step([model], lambda: images_of(args.batch_size, side), start, read=full)


def autoencoder_steps(args: VQArguments, device: str) -> Iterator[tuple[str, Step]]:
    """Of dae_vq.py, each of its stages, with the adversarial term as when it has started."""
    entry = entry_of(args)
    side = args.image_size or entry.image_size
    with nullcontext() if args.init_from else torch.device(device):
        model, stages = dae_vq.make_model(args, SimpleNamespace(image_size=side))
    if model.quantizer is not None:
        model.quantizer.defer_update = True
    perceptual = perceptual_of(args, device)
    for stage in stages:
        if not stage.train_encoder:
            model.config.codebook_frozen = not args.train_codebook_in_stage_2
            model.config.encoder_frozen = True
        if stage.decoder == "fresh":
            with torch.device(device):
                model.replace_decoder(args.decoder_channels, args.layers_per_block)
        if args.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        adversarial = stage is stages[-1] and args.adversarial != "none"
        with torch.device(device):
            bare = dae_vq.make_discriminator(args, side) if adversarial else None

        def start(stage=stage, bare=bare) -> Started:
            learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
            optimizer, _ = dae_vq.make_optimizer(learned, args.learning_rate, stage.steps, args)
            adversary, begun = None, stage.steps
            if bare is not None:
                made = dae_vq.make_optimizer(list(bare.parameters()), args.learning_rate, stage.steps, args)
                adversary = Adversary(args.term(stage.steps), bare, bare, *made, ReconstructionGuard())
            moves_codebook = stage.train_encoder or not model.config.codebook_frozen

            def run(batch: dict) -> None:
                pixel_values = dae_vq.pixels(batch, args, PRESETS[entry.augmentation].flip)
                output = model(pixel_values)
                loss, _ = dae_vq.total_loss(args, model, output, pixel_values, perceptual, adversary, begun)
                loss.backward()
                finish_step(args, learned, optimizer)
                if adversary:
                    adversary.step(_ONE_PROCESS, pixel_values, output.pixel_values, begun)
                if model.quantizer is not None and moves_codebook:
                    model.quantizer.update_codebook_()

            return Started(run, [optimizer, *([adversary.optimizer] if adversary else [])])

        learning = [model, *([bare] if bare is not None else [])]
        frozen = [perceptual] if perceptual is not None else []
        yield stage.name, Step(learning, lambda: images_of(args.batch_size, side), start, frozen)


def transformer_steps(args: DiTArguments, device: str) -> Iterator[tuple[str, Step]]:
    """Of dae_dit.py."""
    num_classes = classes_of(args)
    autoencoder = autoencoder_of(args, device)
    with torch.device(device):
        transformer = dae_dit.transformer_of(args, autoencoder, num_classes)
    model, features = transformer, None
    if args.align_encoder:
        model, features = dae_dit.align(args, transformer, _ONE_PROCESS)
    model.train()
    null_class = transformer.config.num_embeds_ada_norm
    noise_scheduler = make_scheduler(args.objective, args.learned_variance)

    def start() -> Started:
        optimizer = dae_dit.make_optimizer(args, model)
        averages = weight_averages(transformer.parameters(), args.ema_decay)

        def run(batch: dict) -> None:
            losses = dae_dit.step_losses(model, batch, autoencoder, noise_scheduler, args, null_class, features)
            losses["loss"].backward()
            finish_step(args, list(model.parameters()), optimizer)
            averages.step(transformer.parameters())

        return Started(run, [optimizer], averages)

    def batch() -> dict:
        latents = torch.randn(args.batch_size, *latent_shape(autoencoder))
        return images_of(args.batch_size, autoencoder.config.image_size, num_classes) | {"latents": latents}

    yield "", Step([model], batch, start, [autoencoder], [features] if features else [])


def token_steps(args: ARArguments, device: str) -> Iterator[tuple[str, Step]]:
    """Of dae_ar.py."""
    num_classes = classes_of(args)
    autoencoder = autoencoder_of(args, device)
    num_codes = autoencoder.config.num_codes
    with torch.device(device):
        model = dae_ar.make_model(args, autoencoder, num_classes).train()

    def start() -> Started:
        optimizer = dae_ar.make_optimizer(args, model)
        averages = weight_averages(model.parameters(), args.ema_decay)

        def run(batch: dict) -> None:
            dae_ar.step_nats(model, batch, args, num_codes, num_classes).mean().backward()
            finish_step(args, list(model.parameters()), optimizer)
            averages.step(model.parameters())

        return Started(run, [optimizer], averages)

    def batch() -> dict:
        side = autoencoder.config.latent_size
        codes = torch.randint(num_codes, (args.batch_size, side, side))
        return labels_of(args.batch_size, num_classes) | {"codes": codes}

    yield "", Step([model], batch, start, [autoencoder])


def drift_steps(args: DriftArguments, device: str) -> Iterator[tuple[str, Step]]:
    """Of dae_drift.py; ValueError where a transformer is the start."""
    if args.init_from:
        raise ValueError("--init_from is not rehearsed: leave it out, with its --num_layers, --width and --num_heads.")
    num_classes = classes_of(args)
    autoencoder = autoencoder_of(args, device)
    spaces = feature_spaces(args, autoencoder)
    with torch.device(device):
        model = initial_transformer(args, autoencoder, num_classes).train()

    def start() -> Started:
        optimizer = dae_drift.make_optimizer(args, model)
        averages = weight_averages(model.parameters(), args.ema_decay)

        def run(batch: dict) -> None:
            loss, *_ = dae_drift.step_loss(model, batch, autoencoder, spaces, args)
            loss.backward()
            finish_step(args, list(model.parameters()), optimizer)
            averages.step(model.parameters())

        return Started(run, [optimizer], averages)

    def batch() -> dict:
        sets, shape = args.sets_per_batch, latent_shape(autoencoder)
        given = labels_of(sets, num_classes) | {"latents": torch.randn(sets, args.real_per_set, *shape)}
        if args.guidance_scale > 1:
            given["negatives"] = torch.randn(sets, args.negatives_per_set, *shape)
            given["weights"] = torch.ones(sets, args.real_per_set + args.negatives_per_set)
        return given

    yield (
        "",
        Step([model], batch, start, [autoencoder], [space for space in spaces if not isinstance(space, nn.Module)]),
    )


def gan_steps(args: GANArguments, device: str) -> Iterator[tuple[str, Step]]:
    """Of dae_gan.py, each of its stages, with the gradient penalty, which not every step has.

    Latents of a frozen encoder are zeros: it is loaded for their dimension, and not on the GPU while a GAN learns.
    """
    entry = entry_of(args)
    side = args.image_size or entry.image_size
    flip = PRESETS[entry.augmentation].flip
    dimension = ImageEmbedder(args.encoder, kind=args.features).dimension if args.latent == "simclr" else None
    held_out = SimpleNamespace(random_rows=range)  # as many images as are asked for
    with torch.device(device):
        model = VAEGAN(dae_gan.model_config(args, side, dimension, held_out))
    for stage in ("stage-1", "generator") if args.latent == "dae" else ("generator",):
        with torch.device(device):
            if stage == "generator" and args.latent == "dae":
                dae_gan.start_stage_2_(model, args)
            bare = dae_gan.make_discriminator(args, stage, side)
        model.train()

        def start(bare=bare) -> Started:
            learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
            optimizer, _ = dae_gan.make_optimizer(learned, args.max_train_steps, args)
            made = dae_gan.make_optimizer(list(bare.parameters()), args.max_train_steps, args)
            adversary = Adversary(args.term(), bare, bare, *made, ReconstructionGuard(0))
            averages = weight_averages(model.generator.parameters(), args.ema_decay)

            def run(batch: dict) -> None:
                key = {"seed": args.seed, "flip": flip}
                real = to_model_range(batch["images"], batch["sample_ids"], batch["epoch"], **key)
                fake, values = dae_gan.images_of(model, model.config, real, batch, args.seed)
                dae_gan.generator_loss(args, adversary, real, fake, values).backward()
                finish_step(args, learned, optimizer)
                adversary.step(_ONE_PROCESS, real, fake, adversary.term.start)
                averages.step(model.generator.parameters())

            return Started(run, [optimizer, adversary.optimizer], averages)

        def batch() -> dict:
            latents = {} if dimension is None else {"latents": torch.zeros(args.batch_size, dimension)}
            return images_of(args.batch_size, side) | latents

        yield stage, Step([model, bare], batch, start)


STEPS = {
    "contrastive": contrastive_steps,
    "dae_ar": token_steps,
    "dae_dit": transformer_steps,
    "dae_drift": drift_steps,
    "dae_gan": gan_steps,
    "dae_vq": autoencoder_steps,
}


def finish_step(args, learned: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Clipping and the optimiser's step, as the scripts have them."""
    if args.max_grad_norm:
        nn.utils.clip_grad_norm_(learned, args.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()


def entry_of(args) -> DatasetEntry:
    """The table's line of a run's data set; of one that is not in it the images are looked at."""
    name = args.dataset.partition("+")[0].partition("@")[0]
    return TABLE[name] if name in TABLE else load_images_for(args).entry


def classes_of(args: LatentRunArguments) -> int:
    """Number of classes that a run learns; of a data set for which it is not known here the images are looked at."""
    if args.unconditional:
        return 0
    return _CLASSES.get(args.dataset) or len(classes_of_run(args, load_images_for(args)))


def autoencoder_of(args: LatentRunArguments, device: str) -> VQAutoencoder:
    """The frozen autoencoder that a run would load, or train first; without its weights."""

    def untrained(argv: list[str]) -> VQAutoencoder:
        vq = parse(VQArguments, argv, "")
        side = vq.image_size or entry_of(vq).image_size
        with torch.device(device):
            model, stages = dae_vq.make_model(vq, SimpleNamespace(image_size=side))
            if stages[-1].decoder == "fresh":
                model.replace_decoder(vq.decoder_channels, vq.layers_per_block)
        return model

    made = autoencoder_of_run(args, untrained)
    if not isinstance(made, VQAutoencoder):
        config = VQConfig.from_pretrained(made)
        with torch.device(device):
            made = VQAutoencoder(config)
    if made.config.latent_mean is None:
        made.config.latent_mean = [0.0] * made.config.latent_channels
        made.config.latent_std = [1.0] * made.config.latent_channels
    return made.eval()


def perceptual_of(args: VQArguments, device: str) -> nn.Module | None:
    """The perceptual distance; LPIPS without the weights that it would download."""
    if args.perceptual != "lpips":
        return load_perceptual(args.perceptual) if args.perceptual else None
    with torch.device(device), without_vgg_weights():
        return load_perceptual("lpips")


@contextmanager
def without_vgg_weights() -> Iterator[None]:
    """Within the block torchvision's VGG-16 has no weights that it would download."""
    made = torchvision.models.vgg16
    with mock.patch.object(torchvision.models, "vgg16", lambda **_: made(weights=None, init_weights=False)):
        yield


def labels_of(count: int, num_classes: int) -> dict:
    """Labels and numbers of so many images."""
    ids = torch.arange(count)
    return {"labels": ids % max(1, num_classes), "sample_ids": ids, "epoch": 0}


def images_of(count: int, side: int, num_classes: int = 1) -> dict:
    """A batch of black images."""
    return {"images": torch.zeros(count, 3, side, side, dtype=torch.uint8)} | labels_of(count, num_classes)


def latent_shape(autoencoder: VQAutoencoder) -> tuple[int, int, int]:
    """Of one image's latent, (C, h, w)."""
    config = autoencoder.config
    return config.latent_channels, config.latent_size, config.latent_size


def reduced(script: str, args):
    """Arguments of a run that takes the same way through the code, so small that a CPU computes its step."""
    if script == "contrastive":
        queue = {"queue_size": 8 * args.batch_norm_splits} if args.negatives == "queue" else {}
        return replace(args, batch_size=min(args.batch_size, 64), **queue)
    if script == "dae_vq":
        return _small_autoencoder(args)
    if script == "dae_gan":
        return replace(args, batch_size=4, image_size=16, width=8, latent_dim=8, discriminator_width=8)
    small = {"num_layers": 2, "num_heads": 2, "width": 32, "batch_size": 4}
    if script == "dae_drift":
        small |= {"batch_size": 16, "images_per_set": 8, "real_per_set": 8, "negatives_per_set": 4}
    if script != "dae_ar":
        small["preset"] = None
    if getattr(args, "align_block", None):
        small["align_block"] = 1
    return replace(args, **small)


def _small_autoencoder(args: VQArguments) -> VQArguments:
    if args.init_from:
        return replace(args, batch_size=2)
    levels = len(args.encoder_channels)
    widths = [args.norm_num_groups] * levels
    codes = min(args.num_codes, 2048)  # from which on nearest codes are found in another way
    return replace(
        args,
        batch_size=2,
        image_size=2 ** (levels + 1),
        encoder_channels=widths,
        decoder_channels=widths,
        auxiliary_channels=widths,
        num_codes=codes,
        discriminator_width=8,
        discriminator_layers=args.discriminator_layers and 1,
    )
