"""Train a GAN on one of four latents: noise (DCGAN), SimCLR features, VAEGAN, or DAE-VAEGAN; one flag is the ablation.

    python training/dae_gan.py                                   # DAE-VAEGAN on digits, CPU, a minute
    python training/dae_gan.py --latent noise                    # the same generator, discriminator and steps
    python training/dae_gan.py --latent simclr --encoder outputs/demo/encoder --sample_from mixture
    accelerate launch training/dae_gan.py --recipe gan-cifar10-jpeg --latent vae
    python training/dae_gan.py --validation_steps 50 --validation_extractor outputs/demo/encoder

Writes OUTPUT_DIR/NAME (a VAEGAN with the density its latents are drawn from, samples.png, results.json, recipe.yaml,
curves.png, model card) and checkpoints that `--resume_from_checkpoint latest` continues. The discriminator is kept
in the checkpoints only. Adversarial losses do not fall as images get better: --validation_steps watches the averaged
generator (of --latent dae that of stage 2) by its Frechet distance to held-out images.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from hf_dpssl.cli.errors import reported
from hf_dpssl.latent_training.gan_arguments import GANArguments
from hf_dpssl.runs.console import say
from hf_dpssl.runs.recipe import announce, parse, save_recipe

if __name__ == "__main__":
    announce(GANArguments, __doc__)  # help and wrong flags end here, before the libraries are imported

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler

from hf_dpssl.autoencoder.adversarial_term import Adversary, ReconstructionGuard
from hf_dpssl.data import keyed_random
from hf_dpssl.data.batches import ImageSource, load_images_for
from hf_dpssl.data.image_table import ImageTable
from hf_dpssl.data.keyed_random import derive_seed
from hf_dpssl.data.views import PRESETS, to_model_range
from hf_dpssl.embedding.embedder import ImageEmbedder
from hf_dpssl.embedding.feature_extractors import load_extractor
from hf_dpssl.evaluation.image_measures import Extractor
from hf_dpssl.hub.model_card import write_card
from hf_dpssl.latent_training.gan_training import (
    FeatureBank,
    GANPipeline,
    Judge,
    density_settings,
    drawn_share,
    fit_density_,
    pictures,
)  # fmt: skip
from hf_dpssl.latent_training.generation_monitor import GenerationMonitor
from hf_dpssl.latent_training.latent_run import weight_averages
from hf_dpssl.models.gather import gather_shares, own_share
from hf_dpssl.models.latent_density import LatentDensity
from hf_dpssl.models.modeling_discriminator import PatchDiscriminator, PatchDiscriminatorConfig
from hf_dpssl.models.modeling_vaegan import VAEGAN, Generator, VAEGANConfig
from hf_dpssl.runs.atomic_files import atomic_folder
from hf_dpssl.runs.lineage import lineage_of_run
from hf_dpssl.runs.plots import plot_curves, save_grid
from hf_dpssl.runs.results import Measures, logged_curve, write_results
from hf_dpssl.runs.training_loop import TrainingLoop, finish, start_accelerator


def main(argv: list[str] | None = None) -> Path:
    """Run the script with command-line arguments `argv`; returns the folder of the finished model."""
    args = parse(GANArguments, argv, __doc__)
    accelerator = start_accelerator(args)
    extractors = [load_extractor(name, device=accelerator.device) for name in args.extractor]
    set_seed(args.seed)

    # Data
    data = load_images_for(args)
    source = ImageSource.from_arguments(data, args, accelerator, args.image_size or data.entry.image_size)
    training, held_out = source.training_table(together=True), source.evaluation_table(together=True)
    if args.validation_extractor and held_out is None:
        raise ValueError(f"{args.dataset!r} has no held-out images to validate with: leave out --validation_extractor.")
    bank = None
    if args.latent == "simclr":
        bank = FeatureBank(
            ImageEmbedder(args.encoder, kind=args.features, device=accelerator.device), training, held_out
        )

    # Model
    config = model_config(args, source.image_size, None if bank is None else bank.training.shape[1], held_out)
    set_seed(args.seed)
    model = VAEGAN(config)
    if bank is not None:
        model.feature_mean.copy_(bank.mean)
        model.feature_std.copy_(bank.std)
    model.to(accelerator.device)
    monitor = GenerationMonitor(args, accelerator, GANPipeline(model), held_out) if args.validation_steps else None

    # Stages
    history, seconds, before = [], {}, 0
    if args.latent == "dae":
        entries, seconds["stage-1"] = train(model, "stage-1", args.stage_1_steps, args, accelerator, source, bank)
        history, before = [entry | {"stage": "stage-1"} for entry in entries], args.stage_1_steps
        start_stage_2_(model, args)
    entries, seconds["generator"] = train(
        model, "generator", args.max_train_steps, args, accelerator, source, bank, monitor
    )
    history += [entry | {"step": entry["step"] + before, "stage": "generator"} for entry in entries]

    # Save
    target = Path(args.output_dir) / args.name
    ancestors = {"encoder of the latents": args.encoder if bank else None}
    about = lineage_of_run(accelerator, data, seconds.values(), ancestors) if accelerator.is_main_process else {}
    if monitor and monitor.metrics:
        about |= monitor.summary(entries)
    save(model.eval(), args, source, bank, history, target, about, extractors, accelerator)
    finish(accelerator, args, source.skipped)
    return target


def model_config(
    args: GANArguments, image_size: int, feature_dim: int | None, held_out: ImageTable | None
) -> VAEGANConfig:
    """Of the model of the first stage; `feature_dim`: of the frozen encoder's features, of --latent simclr."""
    return VAEGANConfig(
        image_size=image_size,
        width=args.width,
        latent_dim=feature_dim or args.latent_dim,
        latent=args.latent,
        features=args.features if args.latent == "simclr" else None,
        dropout=args.stage_1_dropout if args.latent == "dae" else 0.0,
        density=args.density,
        **density_settings(args.density, args, held_out),
    )


def start_stage_2_(model: VAEGAN, args: GANArguments) -> None:
    """Freeze the encoder, and put a fresh generator in the place of the weak one."""
    model.encoder.eval().requires_grad_(False)
    model.config.dropout = 0.0
    torch.manual_seed(derive_seed(args.seed, "generator of stage 2"))
    model.generator = Generator(model.config).to(model.device)


def train(
    model: VAEGAN, stage: str, steps: int, args: GANArguments, accelerator: Accelerator, source: ImageSource,
    bank: FeatureBank | None, monitor: GenerationMonitor | None = None,
) -> tuple[list[dict], float | None]:  # fmt: skip
    """Train one stage (or find it finished in a checkpoint); its log and seconds; the generator is the averaged one."""
    flip = PRESETS[source.data.entry.augmentation].flip
    parameters = [p for p in model.train().parameters() if p.requires_grad]
    optimizer, scheduler = make_optimizer(parameters, steps, args)
    own_statistics = "the discriminator's batch norms have each process's own statistics (--discriminator_norm batch)"
    loop = TrainingLoop(
        args, accelerator, f"{args.name}/{stage}", steps, partial(batches_of, source, bank), source.skipped,
        source.data,
        bound_to_processes=own_statistics if args.discriminator_norm == "batch" else None,
    )  # fmt: skip
    if args.compile:
        model.compile()  # not the discriminator: its gradient penalty is differentiated twice, which cannot be compiled
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    adversary = make_adversary(args, stage, steps, source, accelerator)
    ema = weight_averages(model.generator.parameters(), args.ema_decay)
    best = {"monitor": monitor} if monitor else {}
    # Validated images are of the density that a run which ended now would have.
    fit = partial(fit_density_, model.density, model, args, bank, source.training_table(), source.evaluation_table())
    loop.keep(model=wrapped, optimizer=optimizer, scheduler=scheduler, ema=ema, **adversary.kept(), **best)

    for batch in loop:
        real = to_model_range(batch["images"], batch["sample_ids"], batch["epoch"], seed=args.seed, flip=flip)
        with accelerator.accumulate(wrapped, *adversary.wrapped()):
            # Generator
            fake, values = images_of(wrapped, model.config, real, batch, args.seed)
            loss = generator_loss(args, adversary, real, fake, values)
            accelerator.backward(loss)
            if accelerator.sync_gradients and args.max_grad_norm:
                accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            # Discriminator, on the same batch
            values["adv_d"] = adversary.step(accelerator, real, fake, loop.step)
        loop.log(**{name: value.detach() for name, value in values.items()})
        if accelerator.sync_gradients:
            scheduler.step()
            adversary.scheduler.step()
            ema.step(model.generator.parameters())
            if monitor and monitor.is_due(loop.step + 1):
                fit()
                monitor.record(loop, ema)
    if monitor:
        fit()
        monitor.finish(loop, ema)

    ema.copy_to(model.generator.parameters())
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    accelerator.free_memory()
    return loop.history, loop.seconds


def batches_of(source: ImageSource, bank: FeatureBank | None, **start) -> Iterable[dict]:
    """Batches from `start` on, with a bank also "latents": looked up here, where a GPU need not say which they are."""
    batches = source.loader(**start)
    return batches if bank is None else bank.with_latents(batches)


def images_of(
    model: torch.nn.Module, config: VAEGANConfig, real: torch.Tensor, batch: dict, seed: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Images of a batch's latents, of a model with an encoder reconstructions too; and the latter's terms."""
    key = {"seed": seed, "epoch": batch["epoch"]}
    if config.latent == "simclr":
        return model(latents=batch["latents"]).generated, {}
    latents = keyed_random.normal(batch["sample_ids"], (config.latent_dim,), stream="prior", **key)
    if not config.has_encoder:
        return model(latents=latents).generated, {}
    noise = keyed_random.normal(batch["sample_ids"], (config.latent_dim,), stream="posterior", **key)
    output = model(real, noise, latents)
    return torch.cat([output.pixel_values, output.generated]), {"recon": output.recon, "kl": output.kl}


def generator_loss(
    args: GANArguments, adversary: Adversary, real: torch.Tensor, fake: torch.Tensor, values: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Adversarial loss and, of a model with an encoder, reconstruction error and KL; the terms go into `values`."""
    if "kl" not in values:
        values["adv_g"] = adversary.term.value(adversary.bare, fake)
        return values["adv_g"]
    error = values["recon"]
    if args.reconstruction == "discriminator":
        values["adv_g"], error = adversary.term.value_and_feature_error(adversary.bare, fake, real)
        values["feature_recon"] = error
    else:
        values["adv_g"] = adversary.term.value(adversary.bare, fake)
    return values["adv_g"] + args.reconstruction_weight * error + args.kl_weight * values["kl"]


def make_optimizer(parameters: list, steps: int, args: GANArguments):
    """Adam with DCGAN's first beta, and its schedule."""
    optimizer = torch.optim.Adam(parameters, lr=args.learning_rate, betas=(0.5, 0.999), fused=True)
    schedule = dict(num_warmup_steps=args.warmup_steps, num_training_steps=steps)
    return optimizer, get_scheduler(args.lr_scheduler, optimizer, **schedule)


def make_discriminator(args: GANArguments, stage: str, image_size: int) -> PatchDiscriminator:
    """A discriminator of the same start in every variant."""
    torch.manual_seed(derive_seed(args.seed, "discriminator", stage))
    sizes = dict(width=args.discriminator_width, image_size=image_size, norm=args.discriminator_norm)
    return PatchDiscriminator(PatchDiscriminatorConfig(**sizes)).train()


def make_adversary(
    args: GANArguments, stage: str, steps: int, source: ImageSource, accelerator: Accelerator
) -> Adversary:
    """Discriminator and its optimiser."""
    bare = make_discriminator(args, stage, source.image_size).to(accelerator.device)
    optimizer, scheduler = make_optimizer(list(bare.parameters()), steps, args)
    discriminator, optimizer = accelerator.prepare(bare, optimizer)
    return Adversary(args.term(), bare, discriminator, optimizer, scheduler, ReconstructionGuard(0))


def save(
    model: VAEGAN, args: GANArguments, source: ImageSource, bank: FeatureBank | None, history: list[dict],
    target: Path, made: dict, extractors: list[Extractor], accelerator: Accelerator,
) -> None:  # fmt: skip
    """Write weights, config and recipe, judge images, and write the complete folder; `made` goes into results.json.

    All processes call this: the first one writes, they draw and embed images together.
    """
    data, training, held_out = source.data, source.training_table(), source.evaluation_table()
    fit_density_(model.density, model, args, bank, training, held_out)
    about = {"dataset": data.name, "licence_of_data": data.entry.licence, "metrics": {}}
    model.config.dpssl = about | ({"encoder": bank.encoder} if bank else {})

    def write_weights(folder: Path) -> None:
        model.save_pretrained(folder)
        save_recipe(args, folder / "recipe.yaml")
        plot_curves(history, folder / "curves.png", title=f"GAN, latent: {args.latent}")

    if accelerator.is_main_process:
        with atomic_folder(target) as folder:
            write_weights(folder)
    # The weights are safe before images are drawn and judged, which takes long and may fail.
    number = args.num_generated
    generated = drawn_share(model, model.density, args, accelerator)
    taken, fingerprints, densities = Measures(), {}, {}
    samples = {"train": len(training), "evaluation": 0, "generated": number}
    if held_out is not None:
        references = (pictures(training, args.evaluation_images), pictures(held_out, args.evaluation_images))
        judge = Judge(*references, extractors, args.seed)
        samples["evaluation"] = len(judge.held_out)
        taken.take("quality", judge, generated, number)
        taken.take("quality of training images", judge.ceiling, number)
        fingerprints = judge.fingerprints(number)
        for kind in args.other_densities:
            density = LatentDensity(kind, model.config.latent_dim, **density_settings(kind, args, held_out))
            fit_density_(density, model, args, bank, training, held_out)
            other = Measures()
            images = drawn_share(model, density, args, accelerator)
            other.take(f"quality with latents of {kind}", judge, images, number)
            densities[kind] = other.metrics
            taken.left_out |= other.left_out
    shown = min(100, number)
    shown = gather_shares(None if generated is None else generated[: len(own_share(range(shown)))], shown)
    if not accelerator.is_main_process:
        return
    metrics = model.config.dpssl["metrics"] = taken.metrics
    about = {"latent": args.latent, "sampled_from": args.density, "densities": densities, "quality": fingerprints}
    about |= made | taken.results() | {"curve": logged_curve(history, "adv_d")}
    with atomic_folder(target) as folder:
        write_weights(folder)
        save_grid(shown, folder / "samples.png", columns=10, min_side=64)
        write_results(folder / "results.json", metrics, dataset=data.name, seed=args.seed, samples=samples, **about)
        write_card(folder)
    say(f"{target}: " + ", ".join(f"{name} {value:.3g}" for name, value in metrics.items()))


if __name__ == "__main__":
    sys.exit(reported("dae_gan.py", main))
