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

from dataclasses import dataclass
from pathlib import Path

import dae_vq
import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from hf_dpssl.batches import ordered_batches
from hf_dpssl.checkpoint import atomic_folder
from hf_dpssl.data import ImageData, load_images
from hf_dpssl.diffusion import dropped_labels, make_scheduler, make_transformer, training_example
from hf_dpssl.latent_run import LatentRunArguments, autoencoder_of_run, cached_training_images
from hf_dpssl.model_card import write_card
from hf_dpssl.modeling_vq import VQAutoencoder
from hf_dpssl.pipeline_vq_dit import VQDiTPipeline
from hf_dpssl.plots import plot_curves, save_grid
from hf_dpssl.recipe import option, parse, save_recipe
from hf_dpssl.results import write_results
from hf_dpssl.training_loop import TrainingLoop, finish, start_accelerator


@dataclass
class DiTArguments(LatentRunArguments):
    """Autoencoder, transformer, objective and optimiser; the defaults generate the embedded digits."""

    name: str = option("dit", "subfolder of output_dir for the finished pipeline")
    num_layers: int = option(4, "blocks of the transformer")
    width: int = option(128, "width of the transformer")
    num_heads: int = option(4, "attention heads")
    patch_size: int = option(2, "latent cells per token and side")
    objective: str = option("flow", "what is predicted", choices=["flow", "epsilon", "v_prediction"])
    ema_decay: float = option(0.998, "share of the old averaged weights kept at each step")
    max_train_steps: int = option(2400, "optimiser steps")
    learning_rate: float = option(2e-3, "peak learning rate")
    weight_decay: float = option(0.0, "weight decay")
    warmup_steps: int = option(50, "steps of linear warm-up")
    sampling_steps: int = option(25, "denoising steps of the sample grids")
    guidance_scale: float = option(1.5, "guidance of the guided sample grid")

    def __post_init__(self):
        super().__post_init__()
        if self.max_train_steps < 1:
            raise ValueError(f"--max_train_steps must be at least 1, got {self.max_train_steps}.")


def main(argv: list[str] | None = None) -> Path:
    """Run the script with command-line arguments `argv`; returns the folder of the finished pipeline."""
    args = parse(DiTArguments, argv, __doc__)
    autoencoder_folder = autoencoder_of_run(args, dae_vq.main)
    accelerator = start_accelerator(args)
    set_seed(args.seed)

    # Data: latents of the training images, encoded once
    data = load_images(
        args.dataset,
        image_column=args.image_column,
        label_column=args.label_column,
        streaming=args.streaming,
        revision=args.dataset_revision,
    )
    autoencoder = VQAutoencoder.from_pretrained(autoencoder_folder).eval().to(accelerator.device)
    latents, _, skipped = cached_training_images(args, autoencoder, data, accelerator, "latents")
    class_names = data.class_names or []

    # Model
    transformer = make_transformer(
        num_layers=args.num_layers,
        width=args.width,
        num_heads=args.num_heads,
        patch_size=args.patch_size,
        latent_channels=autoencoder.config.latent_channels,
        latent_size=autoencoder.config.latent_size,
        num_classes=len(class_names),
    )
    null_class = transformer.config.num_embeds_ada_norm
    noise_scheduler = make_scheduler(args.objective)
    optimizer = torch.optim.AdamW(
        transformer.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=args.weight_decay
    )
    steps = dict(num_warmup_steps=args.warmup_steps, num_training_steps=args.max_train_steps)
    scheduler = get_scheduler(args.lr_scheduler, optimizer, **steps)
    model, optimizer = accelerator.prepare(transformer, optimizer)
    ema = EMAModel(transformer.parameters(), decay=args.ema_decay)
    process = (accelerator.process_index, accelerator.num_processes)

    def make_loader(start):
        return ordered_batches(latents, args.batch_size, args.seed, start, process, args.num_workers)

    loop = TrainingLoop(args, accelerator, args.name, args.max_train_steps, make_loader, skipped)
    loop.keep(model=model, optimizer=optimizer, scheduler=scheduler, ema=ema)
    ema.to(accelerator.device)

    # Loop
    model.train()
    for batch in loop:
        key = dict(sample_ids=batch["sample_ids"], epoch=batch["epoch"], seed=args.seed)
        clean = autoencoder.normalize_latents(batch["latents"])
        noised, timesteps, target = training_example(clean, objective=args.objective, scheduler=noise_scheduler, **key)
        labels = dropped_labels(batch["labels"], probability=args.class_dropout, null_class=null_class, **key)
        with accelerator.accumulate(model):
            prediction = model(noised, timestep=timesteps, class_labels=labels).sample
            loss = F.mse_loss(prediction.float(), target)
            accelerator.backward(loss)
            if accelerator.sync_gradients and args.max_grad_norm:
                accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        loop.log(loss=loss.detach(), learning_rate=scheduler.get_last_lr()[0])
        if accelerator.sync_gradients:
            scheduler.step()
            ema.step(transformer.parameters())

    # Save
    target_folder = Path(args.output_dir) / args.name
    if accelerator.is_main_process:
        transformer = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        ema.copy_to(transformer.parameters())
        pipeline = VQDiTPipeline(
            transformer.eval(), autoencoder, noise_scheduler, dict(enumerate(class_names)), autoencoder.fingerprint()
        )
        save(pipeline, args, data, len(latents), loop, target_folder)
    finish(accelerator, args, skipped)
    return target_folder


def sample_grid(
    pipeline: VQDiTPipeline, args: DiTArguments, guidance_scale: float, per_class: int = 10
) -> torch.Tensor:
    """The first samples of seed `args.seed`, in [-1, 1]: one row per class (of at most 10), or one grid without."""
    class_ids = [class_id for class_id in range(len(pipeline.class_names))[:10] for _ in range(per_class)]
    images = pipeline(
        class_ids or None,
        num_images=None if class_ids else per_class**2,
        guidance_scale=guidance_scale,
        num_inference_steps=args.sampling_steps,
        generator=torch.Generator().manual_seed(args.seed),
        output_type="pt",
    ).images
    return images.float().cpu() * 2 - 1


def save(
    pipeline: VQDiTPipeline, args: DiTArguments, data: ImageData, num_latents: int, loop: TrainingLoop, target: Path
) -> None:
    """Write the complete pipeline folder with sample grids."""
    with atomic_folder(target) as folder:
        pipeline.save_pretrained(folder)
        save_recipe(args, folder / "recipe.yaml")
        plot_curves(loop.history, folder / "curves.png", title=f"DiT, {args.objective}")
        save_grid(sample_grid(pipeline, args, args.guidance_scale), folder / "samples.png", columns=10, min_side=64)
        save_grid(sample_grid(pipeline, args, 1.0), folder / "samples-unguided.png", columns=10, min_side=64)
        samples = {"train": num_latents}
        write_results(folder / "results.json", {}, dataset=data.name, seed=args.seed, samples=samples)
        write_card(folder, "dit", title=f"Latent DiT of {data.name}", license_of_data=data.entry.licence)
    print(f"{target}: pipeline and sample grids written")


if __name__ == "__main__":
    main()
