"""Train a one-step generator in the latents of a (decoupled) VQ autoencoder, and write a VQDriftPipeline.

    python training/dae_drift.py                                          # everything on digits, CPU, minutes
    python training/dae_drift.py --autoencoder outputs/run/autoencoder    # reuse an autoencoder (folder or Hub id)
    python training/dae_drift.py --features latent outputs/run/encoder    # neighbours as an encoder sees them, too
    python training/dae_drift.py --init_from outputs/run/dit --autoencoder outputs/run/dit/vae

Generated images are attracted by real ones of their class and repelled by each other, under a kernel on distances in
feature spaces (contrastive/drifting.py). The loss is flat by construction; what falls is `field_square` and
`two_sample`, and `spread` stays near 1. Without --autoencoder it first trains one with training/dae_vq.py
(`--autoencoder_recipe` and `--autoencoder_args` go there), or reuses OUTPUT_DIR/autoencoder. Writes OUTPUT_DIR/NAME
(pipeline folder with samples.png, results.json, recipe.yaml, curves.png, model card), a latent cache, and checkpoints
that `--resume_from_checkpoint latest` continues.
"""

from __future__ import annotations

import sys
from pathlib import Path

from hf_dpssl.cli.errors import reported
from hf_dpssl.latent_training.drift_arguments import DriftArguments
from hf_dpssl.runs.console import say
from hf_dpssl.runs.recipe import announce, parse, save_recipe

if __name__ == "__main__":
    announce(DriftArguments, __doc__)  # help and wrong flags end here, before the libraries are imported

import dae_vq
import torch
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from hf_dpssl.autoencoder import latent_codec
from hf_dpssl.contrastive import drift_loss
from hf_dpssl.data import keyed_random
from hf_dpssl.data.batches import ImageSource, load_images_for, ordered_batches
from hf_dpssl.data.image_data import ImageData
from hf_dpssl.generation.pipeline_vq_drift import VQDriftPipeline
from hf_dpssl.hub.model_card import write_card
from hf_dpssl.latent_training.drift_training import (
    DriftSets,
    Progress,
    feature_spaces,
    generate,
    initial_transformer,
)
from hf_dpssl.latent_training.generation_monitor import GenerationMonitor, sample_grid
from hf_dpssl.latent_training.latent_run import (
    autoencoder_of_run,
    cached_training_images,
    classes_of_run,
    make_optimizer,
    weight_averages,
)
from hf_dpssl.models.modeling_vq import VQAutoencoder
from hf_dpssl.runs.atomic_files import atomic_folder
from hf_dpssl.runs.lineage import lineage_of_run
from hf_dpssl.runs.plots import plot_curves, save_grid
from hf_dpssl.runs.results import logged_curve, write_results
from hf_dpssl.runs.sharding import copy_whole_
from hf_dpssl.runs.training_loop import TrainingLoop, finish, is_sharded, start_accelerator


def main(argv: list[str] | None = None) -> Path:
    """Run the script with command-line arguments `argv`; returns the folder of the finished pipeline."""
    args = parse(DriftArguments, argv, __doc__)
    data = load_images_for(args)
    names = dict(enumerate(classes_of_run(args, data)))
    autoencoder_folder = autoencoder_of_run(args, dae_vq.main)
    accelerator = start_accelerator(args, can_be_sharded=True)
    set_seed(args.seed)

    # Data: latents of the training images, encoded once, of which each step draws sets
    autoencoder = VQAutoencoder.from_pretrained(autoencoder_folder).eval().to(accelerator.device)
    spaces = feature_spaces(args, autoencoder)  # an encoder that does not fit is refused before anything is encoded
    latents, _, skipped = cached_training_images(args, autoencoder, data, accelerator, "latents", whole_batches=False)
    accumulate = args.gradient_accumulation_steps
    sets = DriftSets(latents, len(names), args, args.sets_per_batch * accelerator.num_processes * accumulate)
    images = None
    if args.validation_extractor:
        source = ImageSource.from_arguments(data, args, accelerator, autoencoder.config.image_size)
        images = source.training_table(together=True)

    # Model
    transformer = initial_transformer(args, autoencoder, len(names))
    model = transformer
    if args.compile:
        model.compile()
    optimizer = make_optimizer(args, model)
    scheduler = get_scheduler(args.lr_scheduler, optimizer, None, args.warmup_steps, args.max_train_steps)
    # A sharded transformer cannot sample on one process alone: a whole copy takes the averaged weights when it has to.
    sharded = is_sharded(accelerator)
    sampled = type(transformer).from_config(transformer.config) if sharded else transformer
    model, optimizer = accelerator.prepare(model, optimizer)
    ema = weight_averages(transformer.parameters(), args.ema_decay)
    pipeline = VQDriftPipeline(sampled, autoencoder, names, autoencoder.fingerprint())
    process = (accelerator.process_index, accelerator.num_processes)

    def make_loader(start):
        return ordered_batches(sets, args.sets_per_batch, args.seed, start, process, args.num_workers, accumulate)

    loop = TrainingLoop(
        args, accelerator, args.name, args.max_train_steps, make_loader, skipped, data,
        sources=latent_codec.sources(autoencoder),
    )  # fmt: skip
    monitor = GenerationMonitor(args, accelerator, pipeline, images) if args.validation_steps else None
    best = {"monitor": monitor} if monitor else {}
    loop.keep(model=model, optimizer=optimizer, scheduler=scheduler, ema=ema, **best)
    sampled.to(accelerator.device)

    # Loop
    model.train()
    progress = Progress(args)
    for batch in loop:
        with accelerator.accumulate(model):
            loss, logged, generated, real = step_loss(model, batch, autoencoder, spaces, args)
            accelerator.backward(loss)
            if accelerator.sync_gradients and args.max_grad_norm:
                accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        logged |= progress(loop.step + 1, generated, real)
        loop.log(**logged, learning_rate=scheduler.get_last_lr()[0])
        if accelerator.sync_gradients:
            scheduler.step()
            ema.step(transformer.parameters())
            if monitor and monitor.is_due(loop.step + 1):
                monitor.record(loop, ema)
    if monitor:
        monitor.finish(loop, ema)

    # Save
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    copy_whole_(sampled.parameters(), ema.shadow_params)
    sampled.eval()
    save(pipeline, args, data, len(latents), loop, monitor, autoencoder_folder)
    finish(accelerator, args, skipped)
    return Path(args.output_dir) / args.name


def step_loss(
    model: nn.Module, batch: dict, autoencoder: VQAutoencoder, spaces: list, args: DriftArguments
) -> tuple[Tensor, dict, Tensor, Tensor]:
    """Loss of a batch of sets, what is logged of it, and its generated and real latents (B, N or K, C, h, w)."""
    count = args.images_per_set
    real = normalized(batch["latents"], autoencoder)  # (B, K, C, h, w)
    negatives = normalized(batch["negatives"], autoencoder) if "negatives" in batch else None
    ids = (batch["sample_ids"][:, None] * count + torch.arange(count, device=real.device)).flatten()
    noise = keyed_random.normal(ids, tuple(real.shape[2:]), seed=args.seed, stream="noise", epoch=batch["epoch"])
    generated = generate(model, noise, batch["labels"].repeat_interleave(count)).unflatten(0, (-1, count))
    options = {"negatives": negatives, "weights": batch.get("weights")} | args.field
    found = drift_loss(generated, real, spaces=spaces, **options)
    logged = {"loss": found.loss.detach(), "field_square": found.field_square}
    return found.loss, logged, generated.detach(), real


def normalized(latents: Tensor, autoencoder: VQAutoencoder) -> Tensor:
    """Latents (B, K, C, h, w) of zero mean and unit deviation."""
    return autoencoder.normalize_latents(latents.flatten(0, 1)).unflatten(0, latents.shape[:2])


def save(
    pipeline: VQDriftPipeline,
    args: DriftArguments,
    data: ImageData,
    num_latents: int,
    loop: TrainingLoop,
    monitor: GenerationMonitor | None,
    autoencoder_folder: str | Path,
) -> None:
    """Write the complete pipeline folder with a sample grid; all processes call this, and draw the grid together."""
    target = Path(args.output_dir) / args.name
    if loop.accelerator.is_main_process:
        ancestors = {"autoencoder": autoencoder_folder, "initial transformer": args.init_from}
        ancestors |= {f"features of the field, {i + 1}": name for i, name in enumerate(args.encoders)}
        metrics, judged = {}, {"samples": {}}
        about = lineage_of_run(loop.accelerator, data, [loop.seconds], ancestors)
        if monitor and monitor.metrics:
            metrics, judged = monitor.metrics, monitor.judged()
            about |= monitor.summary(loop.history)
        about["curve"] = logged_curve(loop.history, "two_sample")  # the loss is flat by construction
        about["progress"] = [entry for entry in loop.history if "spread" in entry][-1]
        about |= judged | {"samples": {"train": num_latents} | judged["samples"]}
        with atomic_folder(target) as folder:
            pipeline.save_pretrained(folder)
            save_recipe(args, folder / "recipe.yaml")
            plot_curves(loop.history, folder / "curves.png", title=f"One-step generator, {args.kernel}")
            write_results(folder / "results.json", metrics, dataset=data.name, seed=args.seed, **about)
            write_card(folder)
    # The weights are safe before pictures are drawn.
    grid = sample_grid(pipeline, args.grid_images_per_class, args.grid, args, loop.accelerator)
    if loop.accelerator.is_main_process:
        save_grid(grid, target / "samples.png", columns=args.grid_images_per_class, min_side=64)
        write_card(target)  # now with the pictures
        say(f"{target}: pipeline and sample grid written")


if __name__ == "__main__":
    sys.exit(reported("dae_drift.py", main))
