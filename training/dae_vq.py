"""Train a VQ autoencoder: decoupled (DAE: weak auxiliary decoder, freeze, real decoder) or jointly.

    python training/dae_vq.py                                    # DAE on digits, CPU, minutes
    python training/dae_vq.py --scheme joint                     # ordinary training, the SUM of both stages' steps
    python training/dae_vq.py --scheme joint --budget encoder    # joint for stage 1's steps, then the decoder alone
    accelerate launch training/dae_vq.py --dataset path/to/images --image_size 64

Writes OUTPUT_DIR/NAME (autoencoder with latent statistics and hashes of the frozen tensors,
results.json, recipe.yaml, reconstructions.png, curves.png, model card) and checkpoints that
`--resume_from_checkpoint latest` continues, in either stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler

from hf_dpssl.batches import ImageSource, evaluation_batches, spread_rows
from hf_dpssl.checkpoint import atomic_folder
from hf_dpssl.data import load_images
from hf_dpssl.evaluation import codebook_usage, psnr
from hf_dpssl.image_table import ImageTable
from hf_dpssl.keyed_random import derive_seed
from hf_dpssl.model_card import write_card
from hf_dpssl.modeling_vq import VQAutoencoder, VQConfig
from hf_dpssl.plots import plot_curves, save_grid
from hf_dpssl.recipe import RunArguments, option, parse, save_recipe
from hf_dpssl.results import write_results
from hf_dpssl.training_loop import TrainingLoop, finish, start_accelerator
from hf_dpssl.transforms import PRESETS, to_model_range


@dataclass
class VQArguments(RunArguments):
    """Scheme, architecture and optimiser; the defaults are a decoupled autoencoder of the embedded digits."""

    name: str = option("autoencoder", "subfolder of output_dir for the finished autoencoder")
    scheme: str = option("dae", "decoupled or ordinary training", choices=["dae", "joint"])
    budget: str = option(
        "total",
        "of --scheme joint: joint training for the sum of both stages' steps (total), or for stage 1's steps and then "
        "the decoder alone (encoder)",
        choices=["total", "encoder"],
    )
    stage_1_steps: int = option(400, "optimiser steps of stage 1")
    stage_2_steps: int = option(400, "optimiser steps of stage 2")
    encoder_channels: list[int] = option([16, 32], "width of each encoder level; n levels downsample by 2^(n-1)")
    decoder_channels: list[int] = option([24, 48], "width of each decoder level")
    layers_per_block: int = option(1, "residual blocks per level")
    auxiliary_channels: list[int] = option([16, 32], "width of each level of stage 1's weak decoder")
    auxiliary_dropout: float = option(0.05, "dropout in the residual blocks of stage 1's weak decoder")
    norm_num_groups: int = option(8, "groups of the group norms")
    mid_block_attention: bool = option(False, "self-attention at the lowest resolution")
    latent_channels: int = option(4, "channels of latents and codes")
    quantizer: str = option("vq", "vq, or none for a plain autoencoder", choices=["vq", "none"])
    num_codes: int = option(256, "size of the codebook")
    codebook_decay: float = option(0.99, "share kept of the codebook's statistics at each step")
    revival_threshold: float = option(0.03, "codes used below this share of the mean restart; 0: never")
    commitment_weight: float = option(0.25, "weight of the commitment term")
    reconstruction_loss: str = option("l2", "pixel loss", choices=["l2", "l1"])
    learning_rate: float = option(2e-3, "peak learning rate of each stage")
    weight_decay: float = option(0.0, "weight decay")
    batch_size: int = option(32, "images per process and batch")
    warmup_steps: int = option(20, "steps of linear warm-up in each stage")

    def __post_init__(self):
        super().__post_init__()
        for name in ("stage_1_steps", "stage_2_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")


@dataclass
class Stage:
    """One optimisation: its name, its steps, and whether encoder and codebook learn."""

    name: str
    steps: int
    train_encoder: bool


def stages_of(args: VQArguments) -> list[Stage]:
    """The stages of a scheme and budget."""
    if args.scheme == "dae":
        return [Stage("stage-1", args.stage_1_steps, True), Stage("stage-2", args.stage_2_steps, False)]
    if args.budget == "encoder":
        return [Stage("joint", args.stage_1_steps, True), Stage("decoder", args.stage_2_steps, False)]
    return [Stage("joint", args.stage_1_steps + args.stage_2_steps, True)]


def main(argv: list[str] | None = None) -> Path:
    """Run the script with command-line arguments `argv`; returns the folder of the finished autoencoder."""
    args = parse(VQArguments, argv, __doc__)
    accelerator = start_accelerator(args)
    set_seed(args.seed)

    # Data
    data = load_images(
        args.dataset,
        image_column=args.image_column,
        label_column=args.label_column,
        streaming=args.streaming,
        revision=args.dataset_revision,
    )
    source = ImageSource.from_arguments(data, args, accelerator, args.image_size or data.entry.image_size)

    # Model
    model = make_model(args, source.image_size).to(accelerator.device)
    initialize_codebook(model, source, args)

    # Stages
    history = []
    for stage in stages_of(args):
        if not stage.train_encoder:
            model.freeze_encoder()
            if args.scheme == "dae":
                torch.manual_seed(derive_seed(args.seed, "decoder of stage 2"))
                model.replace_decoder(args.decoder_channels, args.layers_per_block)
        model, entries = train_stage(model, stage, args, accelerator, source)
        history += [entry | {"step": entry["step"] + (history[-1]["step"] if history else 0)} for entry in entries]
        if not stage.train_encoder:
            model.check_encoder_unchanged()

    # Save
    target = Path(args.output_dir) / args.name
    if accelerator.is_main_process:
        save(model.eval(), args, source, history, target)
    finish(accelerator, args, source.skipped)
    return target


def make_model(args: VQArguments, image_size: int) -> VQAutoencoder:
    """The autoencoder of the first stage."""
    weak = args.scheme == "dae"
    config = VQConfig(
        image_size=image_size,
        encoder_block_out_channels=args.encoder_channels,
        decoder_block_out_channels=args.auxiliary_channels if weak else args.decoder_channels,
        encoder_layers_per_block=args.layers_per_block,
        decoder_dropout=args.auxiliary_dropout if weak else 0.0,
        **{
            name: getattr(args, name)
            for name in "norm_num_groups mid_block_attention latent_channels quantizer num_codes codebook_decay "
            "revival_threshold commitment_weight reconstruction_loss".split()
        },
    )
    return VQAutoencoder(config)


@torch.no_grad()
def initialize_codebook(model: VQAutoencoder, source: ImageSource, args: VQArguments) -> None:
    """k-means start on the latents of the first optimiser step's images."""
    if model.quantizer is None:
        return
    batches = iter(source.loader())
    latents = []
    for _ in range(args.gradient_accumulation_steps):
        batch = next(batches)
        pixel_values = to_model_range(batch["images"], batch["sample_ids"], 0, seed=args.seed, flip=0.0)
        latents.append(model.encode(pixel_values.to(model.device)).latents)
    torch.manual_seed(derive_seed(args.seed, "k-means"))
    model.quantizer.initialize_(torch.cat(latents).permute(0, 2, 3, 1).flatten(0, 2))


def train_stage(
    model: VQAutoencoder, stage: Stage, args: VQArguments, accelerator: Accelerator, source: ImageSource
) -> tuple[VQAutoencoder, list[dict]]:
    """Train one stage (or find it finished in a checkpoint); returns the model and its log."""
    flip = PRESETS[source.data.entry.augmentation].flip
    parameters = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=args.weight_decay)
    steps = dict(num_warmup_steps=args.warmup_steps, num_training_steps=stage.steps)
    scheduler = get_scheduler(args.lr_scheduler, optimizer, **steps)
    loop = TrainingLoop(args, accelerator, f"{args.name}/{stage.name}", stage.steps, source.loader, source.skipped)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    loop.keep(model=wrapped, optimizer=optimizer, scheduler=scheduler)
    quantizer = model.quantizer if stage.train_encoder else None
    if quantizer is not None:
        quantizer.defer_update = True  # the codebook moves once per optimiser step

    for batch in loop:
        with accelerator.accumulate(wrapped):
            pixel_values = to_model_range(
                batch["images"], batch["sample_ids"], batch["epoch"], seed=args.seed, flip=flip
            )
            output = wrapped(pixel_values)
            accelerator.backward(output.loss)
            if accelerator.sync_gradients and args.max_grad_norm:
                accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        usage = None if output.codes is None else 100 * len(output.codes.unique()) / args.num_codes
        loop.log(recon=output.recon.detach(), commit=output.commit.detach(), perplexity=output.perplexity, usage=usage)
        if accelerator.sync_gradients:
            scheduler.step()
            if quantizer is not None:
                quantizer.update_codebook_()

    model = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    accelerator.free_memory()
    return model, [entry | {"stage": stage.name} for entry in loop.history]


@torch.no_grad()
def measure_latents(model: VQAutoencoder, table: ImageTable, rows: range) -> None:
    """Store mean and standard deviation of each latent channel over training images in the config."""
    count, total, squares = 0, 0.0, 0.0
    for batch in evaluation_batches(table, 256, rows):
        pixel_values = batch["images"].to(model.device, torch.float32) / 127.5 - 1
        latents = model.encode(pixel_values).latents.double().cpu()
        count += latents.numel() // latents.shape[1]
        total = total + latents.sum((0, 2, 3))
        squares = squares + latents.pow(2).sum((0, 2, 3))
    mean = total / count
    model.config.latent_mean = mean.tolist()
    model.config.latent_std = (squares / count - mean.pow(2)).clamp_min(1e-12).sqrt().tolist()


@torch.no_grad()
def evaluate(model: VQAutoencoder, table: ImageTable, rows: range) -> tuple[dict[str, float], torch.Tensor]:
    """PSNR and code statistics on held-out images, and a picture (16, 3, H, W): eight of them, then reconstructed."""
    count, total, codes, pictures = 0, 0.0, [], None
    for batch in evaluation_batches(table, 256, rows):
        pixel_values = batch["images"].to(model.device, torch.float32) / 127.5 - 1
        output = model(pixel_values)
        reconstructions = output.pixel_values.clamp(-1, 1).float()
        count += len(pixel_values)
        total += len(pixel_values) * psnr(pixel_values, reconstructions)["psnr"]
        if pictures is None:
            pictures = torch.cat([pixel_values[:8], reconstructions[:8]]).cpu()
        if output.codes is not None:
            codes.append(output.codes.cpu())
    metrics = {"psnr": total / count}
    if codes:
        metrics |= codebook_usage(torch.cat(codes), model.config.num_codes)
    return metrics, pictures


def save(model: VQAutoencoder, args: VQArguments, source: ImageSource, history: list[dict], target: Path) -> None:
    """Measure, evaluate, and write the complete checkpoint folder."""
    data, training_table = source.data, source.training_table()
    held_out = source.evaluation_table() or training_table
    train_rows, held_out_rows = (spread_rows(len(t), args.evaluation_images) for t in (training_table, held_out))
    measure_latents(model, training_table, train_rows)
    metrics, pictures = evaluate(model, held_out, held_out_rows)
    model.config.dpssl = {
        "scheme": args.scheme,
        "dataset": data.name,
        "licence_of_data": data.entry.licence,
        "class_names": data.class_names,
        "metrics": metrics,
    }
    samples = {"train": len(training_table), "latent_statistics": len(train_rows), "evaluation": len(held_out_rows)}
    with atomic_folder(target) as folder:
        model.save_pretrained(folder)
        save_recipe(args, folder / "recipe.yaml")
        plot_curves(history, folder / "curves.png", title=f"autoencoder, {args.scheme}")
        save_grid(pictures, folder / "reconstructions.png", columns=8, min_side=64)
        write_results(folder / "results.json", metrics, dataset=data.name, seed=args.seed, samples=samples)
        title = f"VQ autoencoder ({args.scheme}) of {data.name}"
        write_card(folder, "autoencoder", title=title, license_of_data=data.entry.licence)
    print(f"{target}: " + ", ".join(f"{name} {value:.2f}" for name, value in metrics.items()))


if __name__ == "__main__":
    main()
