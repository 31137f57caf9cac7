"""Train a causal language model over the codes of a (decoupled) VQ autoencoder, and write a VQTokenPipeline.

    python training/dae_ar.py                                          # everything on digits, CPU, minutes
    python training/dae_ar.py --autoencoder outputs/run/autoencoder    # reuse an autoencoder (folder or Hub id)
    accelerate launch training/dae_ar.py --recipe ar-faceshq --autoencoder org/vq-dae-f16-faceshq

Without --autoencoder it first trains one with training/dae_vq.py (`--autoencoder_recipe` and
`--autoencoder_args` go there), or reuses OUTPUT_DIR/autoencoder. Writes OUTPUT_DIR/NAME (pipeline
folder with samples.png, results.json, recipe.yaml, curves.png, model card), a cache of codes, and
checkpoints that `--resume_from_checkpoint latest` continues. Nats per image of held-out codes are
measured on the averaged weights while it trains, and stored in results.json at the end.
"""

from __future__ import annotations

import math
import sys
from contextlib import contextmanager
from pathlib import Path

from hf_dpssl.cli.errors import reported
from hf_dpssl.latent_training.token_arguments import ARArguments
from hf_dpssl.runs.console import say
from hf_dpssl.runs.recipe import announce, parse, save_recipe

if __name__ == "__main__":
    announce(ARArguments, __doc__)  # help and wrong flags end here, before the libraries are imported

import dae_vq
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from transformers import PreTrainedModel

from hf_dpssl.autoencoder.measures import generation_quality
from hf_dpssl.data.batches import load_images_for, ordered_batches
from hf_dpssl.data.image_data import ImageData
from hf_dpssl.data.subsets import random_rows
from hf_dpssl.embedding.feature_extractors import load_extractor
from hf_dpssl.generation.bulk_sampling import draw_images
from hf_dpssl.generation.pipeline_vq_token import VQTokenPipeline, code_nats, make_language_model
from hf_dpssl.hub.model_card import write_card
from hf_dpssl.latent_training.diffusion import dropped_labels
from hf_dpssl.latent_training.generation_monitor import sample_grid
from hf_dpssl.latent_training.latent_cache import CodeTable
from hf_dpssl.latent_training.latent_run import (
    autoencoder_of_run,
    cached_training_images,
    classes_of_run,
    weight_averages,
)
from hf_dpssl.models.configuration_vq import VQConfig
from hf_dpssl.models.gather import all_succeed, own_share
from hf_dpssl.models.modeling_vq import VQAutoencoder
from hf_dpssl.runs.atomic_files import atomic_folder
from hf_dpssl.runs.lineage import lineage_of_run
from hf_dpssl.runs.plots import plot_curves, save_grid
from hf_dpssl.runs.results import Measures, logged_curve, write_results
from hf_dpssl.runs.training_loop import TrainingLoop, finish, start_accelerator


def main(argv: list[str] | None = None) -> Path:
    """Run the script with command-line arguments `argv`; returns the folder of the finished pipeline."""
    args = parse(ARArguments, argv, __doc__)
    data = load_images_for(args)
    class_names = classes_of_run(args, data)
    autoencoder_folder = autoencoder_of_run(args, dae_vq.main)
    accelerator = start_accelerator(args)
    set_seed(args.seed)

    # Data: codes of the images, encoded once
    autoencoder = VQAutoencoder.from_pretrained(autoencoder_folder).eval().to(accelerator.device)
    codes, held_out, skipped = cached_training_images(args, autoencoder, data, accelerator, "codes")
    num_codes, null_class = autoencoder.config.num_codes, len(class_names)

    # Model
    language_model = make_model(args, autoencoder, null_class)
    if args.compile:
        language_model.compile()
    optimizer = make_optimizer(args, language_model)
    steps = dict(num_warmup_steps=args.warmup_steps, num_training_steps=args.max_train_steps)
    scheduler = get_scheduler(args.lr_scheduler, optimizer, **steps)
    model, optimizer = accelerator.prepare(language_model, optimizer)
    ema = weight_averages(language_model.parameters(), args.ema_decay)
    process = (accelerator.process_index, accelerator.num_processes)

    def make_loader(start):
        return ordered_batches(codes, args.batch_size, args.seed, start, process, args.num_workers)

    loop = TrainingLoop(
        args, accelerator, args.name, args.max_train_steps, make_loader, skipped, data,
        sources={"autoencoder": autoencoder.fingerprint()},
    )  # fmt: skip
    loop.keep(model=model, optimizer=optimizer, scheduler=scheduler, ema=ema)

    # Loop
    model.train()
    for batch in loop:
        with accelerator.accumulate(model):
            nats = step_nats(model, batch, args, num_codes, null_class)
            accelerator.backward(nats.mean())
            if accelerator.sync_gradients and args.max_grad_norm:
                accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        validation = None
        if accelerator.sync_gradients:
            scheduler.step()
            ema.step(language_model.parameters())
            if held_out is not None and args.measures_at(loop.step + 1):
                with averaged(language_model, ema):
                    validation = nats_per_image(language_model, held_out, null_class, num_codes, args, accelerator)
        train = nats.detach().sum(1).mean()
        rate = scheduler.get_last_lr()[0]
        loop.log(nats_per_image_train=train, nats_per_image=validation, learning_rate=rate)
    # The last weights are in their checkpoint before they are measured, which may fail; it is written again with that.
    if held_out is not None and "nats_per_image" not in loop.history[-1]:
        with averaged(language_model, ema):
            validation = nats_per_image(language_model, held_out, null_class, num_codes, args, accelerator)
        loop.history[-1]["nats_per_image"] = validation
        accelerator.log({f"{loop.name}/nats_per_image": validation}, step=loop.step)
        loop.save(wait=True)

    # Save
    target = Path(args.output_dir) / args.name
    language_model = accelerator.unwrap_model(model, keep_fp32_wrapper=False).eval()
    ema.copy_to(language_model.parameters())
    pipeline = VQTokenPipeline(language_model, autoencoder, dict(enumerate(class_names)), autoencoder.fingerprint())
    about = lineage_of_run(accelerator, data, [loop.seconds], {"autoencoder": autoencoder_folder})
    about["curve"] = logged_curve(loop.history, "nats_per_image_train")
    with torch.compiler.set_stance("force_eager"):
        save(pipeline, args, data, codes, held_out, loop, target, about)
    finish(accelerator, args, skipped)
    return target


def make_model(args: ARArguments, autoencoder: VQAutoencoder, num_classes: int) -> PreTrainedModel:
    """The language model over the autoencoder's codes."""
    model = make_language_model(
        args.architecture,
        num_layers=args.num_layers,
        width=args.width,
        num_heads=args.num_heads,
        num_codes=autoencoder.config.num_codes,
        num_classes=num_classes,
        num_tokens=autoencoder.config.latent_size**2,
        dropout=args.dropout,
    )
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model


def step_nats(model: torch.nn.Module, batch: dict, args: ARArguments, num_codes: int, null_class: int) -> torch.Tensor:
    """Negative log-likelihood (B, h*w) in nats of a batch's codes; labels are dropped by image and epoch."""
    key = dict(sample_ids=batch["sample_ids"], epoch=batch["epoch"], seed=args.seed)
    labels = torch.full_like(batch["labels"], null_class)
    if null_class:
        labels = dropped_labels(batch["labels"], probability=args.class_dropout, null_class=null_class, **key)
    return code_nats(model, batch["codes"], labels, num_codes)


def make_optimizer(args: ARArguments, model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW with the betas of GPT."""
    return torch.optim.AdamW(parameter_groups(model, args), args.learning_rate, betas=(0.9, 0.95), fused=True)


def parameter_groups(model: torch.nn.Module, args: ARArguments) -> list[dict]:
    """Matrices with weight decay; embeddings, norms and biases without."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    groups = {args.weight_decay: [], 0.0: []}
    for parameter in model.parameters():
        decays = parameter.ndim >= 2 and id(parameter) not in embeddings
        groups[args.weight_decay if decays else 0.0].append(parameter)
    return [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items() if parameters]


@contextmanager
def averaged(model: torch.nn.Module, ema: EMAModel):
    """The averaged weights in place of the model's, without dropout and eager; afterwards all is as before."""
    parameters = list(model.parameters())
    ema.store(parameters)
    ema.copy_to(parameters)
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):  # what is compiled is compiled for training
            yield
    finally:
        ema.restore(parameters)
        model.train()


@torch.no_grad()
def nats_per_image(
    model: torch.nn.Module,
    table: CodeTable,
    null_class: int,
    num_codes: int,
    args: ARArguments,
    accelerator: Accelerator,
) -> float:
    """Mean negative log-likelihood of an image's codes given its class, over at most `evaluation_images` of a table.

    The processes share them: all call this.
    """
    total = torch.zeros(1, dtype=torch.float64, device=accelerator.device)
    rows = torch.tensor(random_rows(len(table), args.evaluation_images, labels=table.labels))
    mine = rows[accelerator.process_index :: accelerator.num_processes]
    for part in mine.split(max(1, 2**14 // table.shards[0][0].size)) if len(mine) else ():
        labels = table.labels[part]
        labels = torch.where((labels < 0) | (labels >= null_class), null_class, labels)
        with accelerator.autocast():
            nats = code_nats(model, table.codes(part).to(accelerator.device), labels.to(accelerator.device), num_codes)
        total += nats.double().sum()
    return float(accelerator.reduce(total)) / len(rows)


def drawn_share(pipeline: VQTokenPipeline, args: ARArguments, accelerator: Accelerator) -> torch.Tensor | None:
    """This process's share, None where it is empty, of `num_generated` images without guidance in [-1, 1].

    They are those of hf-dpssl sample.
    """
    classes = list(range(len(pipeline.class_names))) or None
    mine, images = own_share(range(args.num_generated)), []
    for first in range(0, len(mine), args.batch_size):
        numbers = list(mine[first : first + args.batch_size])
        with accelerator.autocast():
            images.append(draw_images(pipeline, numbers, classes, seed=args.seed, options={"guidance_scale": 1.0}))
    return torch.cat(images) * 2 - 1 if images else None


def judged(
    generated: torch.Tensor | None, name: str, config: VQConfig, args: ARArguments, device: torch.device
) -> dict[str, float]:
    """Quality of generated images, of which this process has its share, beside held-out ones, of each part of a union.

    All processes call this, with the name of an extractor and the autoencoder's configuration.
    """
    extractor = all_succeed(lambda: load_extractor(name, device=device))
    common = {"image_size": config.image_size, "num_channels": config.num_channels, "seed": args.seed}
    common |= {"limit": args.evaluation_images}
    data = {"image_column": args.image_column, "label_column": args.label_column, "revision": args.dataset_revision}
    return generation_quality(generated, args.num_generated, args.dataset, extractor, **common, **data)


def save(
    pipeline: VQTokenPipeline,
    args: ARArguments,
    data: ImageData,
    codes: CodeTable,
    held_out: CodeTable | None,
    loop: TrainingLoop,
    target: Path,
    about: dict,
) -> None:
    """Write the pipeline folder, measure, and complete it with sample grids; `about` goes into results.json.

    All processes call this: the first one writes, they measure together.
    """
    if loop.accelerator.is_main_process:
        with atomic_folder(target) as folder:
            pipeline.save_pretrained(folder)
            save_recipe(args, folder / "recipe.yaml")
            plot_curves(loop.history, folder / "curves.png", title=f"token model, {args.architecture}")
    # The weights are safe before they are measured and pictures are drawn, which takes long and may fail.
    num_codes, null_class = pipeline.vae.config.num_codes, len(pipeline.class_names)
    taken = Measures()
    for name, table in (("nats_per_image", held_out), ("nats_per_image_train", codes)):
        if table is not None:
            nats = nats_per_image(pipeline.language_model, table, null_class, num_codes, args, loop.accelerator)
            taken.metrics[name] = nats
    samples = {"train": len(codes), "evaluation": 0 if held_out is None else len(held_out)}
    if args.extractors and held_out is not None:
        images = drawn_share(pipeline, args, loop.accelerator)
        device = loop.accelerator.device
        for name in args.extractors:
            taken.take(f"quality in features of {name}", judged, images, name, pipeline.vae.config, args, device)
        samples["generated"] = args.num_generated
    if loop.accelerator.is_main_process:
        write_measures(pipeline, args, data, taken, samples, target, about)
    grids = {"samples-guided.png": args.guidance_scale} if pipeline.class_names else {}
    for name, scale in (grids | {"samples.png": 1.0}).items():
        options = {"guidance_scale": scale, "temperature": args.temperature, "top_k": args.top_k}
        grid = sample_grid(pipeline, args.samples_per_class, options, args, loop.accelerator)
        if loop.accelerator.is_main_process:
            save_grid(grid, target / name, columns=args.samples_per_class, min_side=64)
    if loop.accelerator.is_main_process:
        write_card(target)  # now with the pictures


def write_measures(
    pipeline: VQTokenPipeline, args: ARArguments, data: ImageData, taken: Measures, samples: dict[str, int],
    target: Path, about: dict,
) -> None:  # fmt: skip
    """Write results and card; arguments as in `save`."""
    uniform = pipeline.num_tokens * math.log(pipeline.vae.config.num_codes)
    metrics = taken.metrics | {"nats_per_image_uniform": uniform}
    about |= taken.results() | {"samples": samples}
    write_results(target / "results.json", metrics, dataset=data.name, seed=args.seed, **about)
    write_card(target)
    say(f"{target}: " + ", ".join(f"{name} {value:.2f}" for name, value in metrics.items()))


if __name__ == "__main__":
    sys.exit(reported("dae_ar.py", main))
