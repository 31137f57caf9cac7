"""Train a latent diffusion transformer in the latents of a (decoupled) VQ autoencoder, and write a VQDiTPipeline.

    python training/dae_dit.py                                          # everything on digits, CPU, minutes
    python training/dae_dit.py --autoencoder outputs/run/autoencoder    # reuse an autoencoder (folder or Hub id)
    accelerate launch training/dae_dit.py --recipe dit-b2-imagenet --autoencoder org/vq-dae-f8-imagenet

Without --autoencoder it first trains one with training/dae_vq.py (`--autoencoder_recipe` and
`--autoencoder_args` go there), or reuses OUTPUT_DIR/autoencoder. Writes OUTPUT_DIR/NAME (pipeline
folder with samples.png, results.json, recipe.yaml, curves.png, model card), a latent cache, and
checkpoints that `--resume_from_checkpoint latest` continues.
"""

from __future__ import annotations

import sys
from pathlib import Path

from hf_dpssl.cli.errors import reported
from hf_dpssl.latent_training.dit_arguments import DiTArguments
from hf_dpssl.runs.console import say
from hf_dpssl.runs.recipe import announce, parse, save_recipe

if __name__ == "__main__":
    announce(DiTArguments, __doc__)  # help and wrong flags end here, before the libraries are imported

import dae_vq
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DiTTransformer2DModel, SchedulerMixin
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from hf_dpssl.autoencoder import latent_codec
from hf_dpssl.data.batches import ImageSource, load_images_for, ordered_batches
from hf_dpssl.data.image_data import ImageData
from hf_dpssl.generation.interval_channel import with_interval
from hf_dpssl.generation.pipeline_vq_dit import VQDiTPipeline
from hf_dpssl.hub.model_card import write_card
from hf_dpssl.latent_training.diffusion import (
    dropped_labels,
    make_scheduler,
    objective_loss,
    training_example,
)
from hf_dpssl.latent_training.generation_monitor import GenerationMonitor, sample_grid
from hf_dpssl.latent_training.latent_run import (
    autoencoder_of_run,
    cached_training_images,
    classes_of_run,
    make_optimizer,
    new_transformer,
    weight_averages,
)
from hf_dpssl.latent_training.mean_flow import mean_flow_example, mean_flow_loss, mean_flow_target
from hf_dpssl.latent_training.token_alignment import (
    LatentsWithImages,
    SpatialFeatures,
    TokenAlignedTransformer,
    default_block,
    token_alignment_loss,
)
from hf_dpssl.models.modeling_contrastive import ContrastiveEncoder
from hf_dpssl.models.modeling_vq import VQAutoencoder
from hf_dpssl.runs.atomic_files import atomic_folder
from hf_dpssl.runs.lineage import lineage_of_run
from hf_dpssl.runs.plots import plot_curves, save_grid
from hf_dpssl.runs.results import logged_curve, write_results
from hf_dpssl.runs.sharding import copy_whole_
from hf_dpssl.runs.training_loop import TrainingLoop, finish, is_sharded, start_accelerator

_ALIGN_WEIGHT = 0.5  # of the alignment beside the denoising loss, as in Yu et al. 2025 (REPA)


def main(argv: list[str] | None = None) -> Path:
    """Run the script with command-line arguments `argv`; returns the folder of the finished pipeline."""
    args = parse(DiTArguments, argv, __doc__)
    data = load_images_for(args)
    names = dict(enumerate(classes_of_run(args, data)))
    autoencoder_folder = autoencoder_of_run(args, dae_vq.main)
    # Forward differentiation needs the whole transformer.
    accelerator = start_accelerator(args, can_be_sharded=args.objective != "mean_flow")
    set_seed(args.seed)

    # Data: latents of the training images, encoded once; the images themselves where something looks at them
    autoencoder = VQAutoencoder.from_pretrained(autoencoder_folder).eval().to(accelerator.device)
    latents, _, skipped = cached_training_images(args, autoencoder, data, accelerator, "latents")
    images = None
    if args.align_encoder or args.validation_extractor:
        source = ImageSource.from_arguments(data, args, accelerator, autoencoder.config.image_size)
        images = source.training_table(together=True)

    # Model
    transformer = transformer_of(args, autoencoder, len(names))
    model, features = transformer, None
    if args.align_encoder:
        latents = LatentsWithImages(latents, images)
        model, features = align(args, transformer, accelerator)
    if args.compile:
        model.compile()
    optimizer = make_optimizer(args, model)
    scheduler = get_scheduler(args.lr_scheduler, optimizer, None, args.warmup_steps, args.max_train_steps)
    # A sharded transformer cannot sample on one process alone: a whole copy takes the averaged weights when it has to.
    sharded = is_sharded(accelerator)
    sampled = DiTTransformer2DModel.from_config(transformer.config) if sharded else transformer
    model, optimizer = accelerator.prepare(model, optimizer)
    ema = weight_averages(transformer.parameters(), args.ema_decay)
    noise_scheduler, sampler = (make_scheduler(args.objective, args.learned_variance) for _ in range(2))
    pipeline = VQDiTPipeline(sampled, autoencoder, sampler, names, autoencoder.fingerprint())
    null_class = transformer.config.num_embeds_ada_norm
    process = (accelerator.process_index, accelerator.num_processes)
    accumulate = args.gradient_accumulation_steps

    def make_loader(start):
        return ordered_batches(latents, args.batch_size, args.seed, start, process, args.num_workers, accumulate)

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
    for batch in loop:
        with accelerator.accumulate(model):
            losses = step_losses(model, batch, autoencoder, noise_scheduler, args, null_class, features)
            accelerator.backward(losses["loss"])
            if accelerator.sync_gradients and args.max_grad_norm:
                accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        loop.log(**{name: loss.detach() for name, loss in losses.items()}, learning_rate=scheduler.get_last_lr()[0])
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


def transformer_of(args: DiTArguments, autoencoder: VQAutoencoder, num_classes: int) -> DiTTransformer2DModel:
    """The transformer of a run's latents and classes."""
    options = {"learned_variance": args.learned_variance, "mean_flow": args.objective == "mean_flow"}
    transformer = new_transformer(args, autoencoder, num_classes, **options)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    return transformer


def align(
    args: DiTArguments, transformer: DiTTransformer2DModel, accelerator: Accelerator
) -> tuple[TokenAlignedTransformer, SpatialFeatures]:
    """The transformer with a projector, and the frozen encoder that its tokens are aligned with."""
    encoder = ContrastiveEncoder.from_pretrained(args.align_encoder)
    side = transformer.config.sample_size // args.patch_size
    features = SpatialFeatures(encoder, side, accelerator.device)
    block = args.align_block or default_block(args.num_layers)
    return TokenAlignedTransformer(
        transformer, block=block, features=features.dimension, width=args.align_width
    ), features


def step_losses(
    model: nn.Module,
    batch: dict,
    autoencoder: VQAutoencoder,
    scheduler: SchedulerMixin,
    args: DiTArguments,
    null_class: int,
    features: SpatialFeatures | None = None,
) -> dict[str, Tensor]:
    """Loss of a batch and its parts; noise, timesteps and dropped labels are those of its images in this epoch."""
    key = dict(sample_ids=batch["sample_ids"], epoch=batch["epoch"], seed=args.seed)
    clean = autoencoder.normalize_latents(batch["latents"])
    labels = dropped_labels(batch["labels"], probability=args.class_dropout, null_class=null_class, **key)
    mean_flow = args.objective == "mean_flow"
    if mean_flow:
        noised, timesteps, intervals, velocity = mean_flow_example(clean, **key)
        bare = next(module for module in model.modules() if isinstance(module, DiTTransformer2DModel))
        target = mean_flow_target(bare, noised, timesteps, intervals, velocity, labels)
        inputs = with_interval(noised, intervals)
    else:
        options = dict(objective=args.objective, scheduler=scheduler)
        inputs, timesteps, target = training_example(clean, logit_normal=args.logit_normal, **options, **key)
    output = model(inputs, timestep=timesteps, class_labels=labels)
    prediction = output.sample if features is None else output[0]
    if mean_flow:
        losses = mean_flow_loss(prediction, target)
    else:
        losses = objective_loss(prediction, target, timesteps, min_snr_gamma=args.min_snr_gamma, **options)
    if features is not None:
        losses["alignment"] = token_alignment_loss(output[1], features(batch["images"]))
        losses["loss"] = losses["loss"] + _ALIGN_WEIGHT * losses["alignment"]
    return losses


def save(
    pipeline: VQDiTPipeline,
    args: DiTArguments,
    data: ImageData,
    num_latents: int,
    loop: TrainingLoop,
    monitor: GenerationMonitor | None,
    autoencoder_folder: str | Path,
) -> None:
    """Write the complete pipeline folder with sample grids; all processes call this, and draw the grids together."""
    target = Path(args.output_dir) / args.name
    if loop.accelerator.is_main_process:
        ancestors = {"autoencoder": autoencoder_folder, "features that tokens were aligned with": args.align_encoder}
        metrics, judged = {}, {"samples": {}}
        about = lineage_of_run(loop.accelerator, data, [loop.seconds], ancestors)
        if monitor and monitor.metrics:
            metrics, judged = monitor.metrics, monitor.judged()
            about |= monitor.summary(loop.history)
        about["curve"] = logged_curve(loop.history, "error" if args.objective == "mean_flow" else "loss")
        about |= judged | {"samples": {"train": num_latents} | judged["samples"]}
        with atomic_folder(target) as folder:
            pipeline.save_pretrained(folder)
            save_recipe(args, folder / "recipe.yaml")
            plot_curves(loop.history, folder / "curves.png", title=f"DiT, {args.objective}")
            write_results(folder / "results.json", metrics, dataset=data.name, seed=args.seed, **about)
            write_card(folder)
    # The weights are safe before pictures are drawn, which takes minutes for a large model.
    for name, options in (("samples.png", args.grid), ("samples-unguided.png", args.sampling)):
        grid = sample_grid(pipeline, args.grid_images_per_class, options, args, loop.accelerator)
        if loop.accelerator.is_main_process:
            save_grid(grid, target / name, columns=args.grid_images_per_class, min_side=64)
    if loop.accelerator.is_main_process:
        write_card(target)  # now with the pictures
        say(f"{target}: pipeline and sample grids written")


if __name__ == "__main__":
    sys.exit(reported("dae_dit.py", main))
