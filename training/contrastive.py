"""Train a contrastive encoder: SimCLR, t-SimCLR, MoCo-v2 or t-MoCo-v2 (or LeJEPA beside them), over any timm backbone.

    python training/contrastive.py                                     # t-SimCLR on digits, CPU, minutes
    python training/contrastive.py --dataset path/to/images --image_size 64
    accelerate launch training/contrastive.py --recipe t-moco-v2-resnet50-imagenet
    python training/contrastive.py --autoencoder outputs/run/autoencoder    # of latents, for dae_drift.py --features

Writes OUTPUT_DIR/NAME (encoder in timm's layout, `pretraining/` with head and queue, results.json,
recipe.yaml, curves.png, model card) and checkpoints that `--resume_from_checkpoint latest` continues.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from inspect import signature
from pathlib import Path

from hf_dpssl.cli.errors import reported
from hf_dpssl.runs.console import say
from hf_dpssl.runs.contrastive_arguments import ContrastiveArguments
from hf_dpssl.runs.recipe import announce, parse, save_recipe

if __name__ == "__main__":
    announce(ContrastiveArguments, __doc__)  # help and wrong flags end here, before the libraries are imported

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler

from hf_dpssl import evaluation
from hf_dpssl.autoencoder import latent_codec
from hf_dpssl.contrastive.backbone_check import check_backbone, fitting_model_args
from hf_dpssl.contrastive.batch_norm import batch_norms
from hf_dpssl.contrastive.modeling_pretraining import ContrastiveOutput, MoCoForPreTraining, SimCLRForPreTraining
from hf_dpssl.contrastive.momentum import choose_queue_size, momentum_at
from hf_dpssl.contrastive.warm_start import freeze_all_but_last_layer_, start_from_encoder_, start_from_pretraining_
from hf_dpssl.data.batches import ImageSource, evaluation_batches, load_images_for
from hf_dpssl.data.views import PRESETS, TwoViews, normalize
from hf_dpssl.evaluation.feature_checks import accelerated
from hf_dpssl.hub.model_card import write_card
from hf_dpssl.models.gather import broadcast_, gather_rows, own_share
from hf_dpssl.models.modeling_contrastive import ContrastiveConfig, ContrastiveEncoder
from hf_dpssl.models.modeling_vq import VQAutoencoder
from hf_dpssl.runs.atomic_files import atomic_folder
from hf_dpssl.runs.lineage import lineage_of_run
from hf_dpssl.runs.plots import plot_curves
from hf_dpssl.runs.results import Measures, logged_curve, write_results
from hf_dpssl.runs.training_loop import TrainingLoop, finish, start_accelerator


def main(argv: list[str] | None = None) -> Path:
    """Run the script with command-line arguments `argv`; returns the folder of the finished encoder."""
    args = parse(ContrastiveArguments, argv, __doc__)
    accelerator = start_accelerator(args)
    if args.batch_size * accelerator.num_processes < 2:
        raise ValueError(f"--batch_size {args.batch_size} leaves one pair, which has no negatives: give at least 2.")
    set_seed(args.seed)
    model_args = json.loads(args.model_args) if args.model_args else None
    autoencoder = load_autoencoder(args, accelerator.device) if args.autoencoder else None
    if autoencoder is None:
        check_backbone(args.architecture, model_args, args.stem, args.image_size)
    else:  # the encoder learns latents
        latents = autoencoder.config
        args.image_size = latents.image_size
        check_backbone(args.architecture, model_args, args.stem, latents.latent_size, latents.latent_channels)

    # Data
    data = load_images_for(args)
    image_size = args.image_size or data.entry.image_size
    if args.image_size is None:
        check_backbone(args.architecture, model_args, args.stem, image_size)
    mean, std = statistics_of(data.entry, autoencoder)
    augmentation = PRESETS[args.augmentation or data.entry.augmentation]
    views = TwoViews(augmentation, mean, std, args.seed, mode=args.augmentation_mode)
    source = ImageSource.from_arguments(data, args, accelerator, image_size, views)
    total_steps = args.max_train_steps
    if total_steps is None:
        total_steps = args.num_train_epochs * source.steps_per_epoch

    # Model
    if args.negatives == "queue":
        set_queue_size(args, source, accelerator)
    model = make_model(args, image_size, mean, std, autoencoder)
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if args.compile:
        model.compile()
    optimizer = make_optimizer(args, model)
    steps = dict(num_warmup_steps=args.warmup_steps, num_training_steps=total_steps)
    scheduler = get_scheduler(args.lr_scheduler, optimizer, **steps)
    own_statistics = batch_norms(model) and args.batch_norm != "global"
    loop = TrainingLoop(
        args, accelerator, args.name, total_steps, source.loader, source.skipped, data,
        bound_to_processes=f"its batch norms are those of --batch_norm {args.batch_norm}, whose statistics are each "
        "process's own" if own_statistics else None,
        sources=latent_codec.sources(autoencoder) if autoencoder else None,
    )  # fmt: skip
    model, optimizer = accelerator.prepare(model, optimizer)
    loop.keep(model=model, optimizer=optimizer, scheduler=scheduler)

    # Loop
    model.train()
    if args.freeze == "all_but_last_layer":
        freeze_all_but_last_layer_(accelerator.unwrap_model(model))
    for batch in loop:
        output = step_output(model, views, batch, args, loop.step, total_steps, autoencoder)
        accelerator.backward(output.loss)
        if args.max_grad_norm:
            accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        loop.log(loss=output.loss.detach(), learning_rate=scheduler.get_last_lr()[0])
        scheduler.step()

    # Save
    target = Path(args.output_dir) / args.name
    for read in (source.training_table, source.evaluation_table):  # by all processes: what is measured there
        read(together=True)
    with torch.compiler.set_stance("force_eager"):  # a graph of another batch size would be compiled for one use
        save(accelerator.unwrap_model(model).eval(), args, source, loop, target, autoencoder)
    finish(accelerator, args, source.skipped)
    return target


def load_autoencoder(args: ContrastiveArguments, device: torch.device) -> VQAutoencoder:
    """The frozen --autoencoder of whose latents the encoder learns; ValueError for an --image_size that is not its."""
    autoencoder = VQAutoencoder.from_pretrained(args.autoencoder).eval().requires_grad_(False).to(device)
    size = autoencoder.config.image_size
    if args.image_size not in (None, size):
        raise ValueError(
            f"--autoencoder {args.autoencoder} is of pictures of {size} px, --image_size is {args.image_size}: leave "
            "it out."
        )
    return autoencoder


def statistics_of(entry, autoencoder: VQAutoencoder | None) -> tuple[list[float], list[float]]:
    """Mean and deviation by which pictures of a data set are normalised: to [-1, 1] where they are to be encoded."""
    return entry.statistics if autoencoder is None else ([0.5] * 3, [0.5] * 3)


@torch.no_grad()
def encoded(pictures: torch.Tensor, autoencoder: VQAutoencoder | None) -> torch.Tensor:
    """What the encoder takes of normalised pictures (B, 3, S, S): themselves, or their normalised latents."""
    if autoencoder is None:
        return pictures
    if autoencoder.config.num_channels == 1:
        pictures = pictures.mean(1, keepdim=True)
    return autoencoder.normalize_latents(autoencoder.encode_latents(pictures).float())


def set_queue_size(args: ContrastiveArguments, source: ImageSource, accelerator) -> None:
    """Choose --queue_size where it is not given, and print how old the oldest key gets; ValueError when too small."""
    num_images, batch_size = source.num_images, args.batch_size * accelerator.num_processes
    chosen = args.queue_size is None
    if chosen:
        args.queue_size = choose_queue_size(num_images, batch_size)
    if args.queue_size < batch_size:
        raise ValueError(
            f"--queue_size {args.queue_size} is smaller than the batch of all processes ({batch_size}): give at least "
            f"that, leave it out ({choose_queue_size(num_images, batch_size)}), or lower --batch_size."
        )
    if num_images is None:
        age = "; its age in epochs is not known, since the length of a stream is not: --queue_size sets it"
    else:
        age = f": the oldest are {args.queue_size / num_images:.3g} epochs old"
    say(f"queue of {args.queue_size:,} keys{' (chosen)' if chosen else ''}{age}")


def make_model(
    args: ContrastiveArguments, image_size: int, mean, std, autoencoder: VQAutoencoder | None = None
) -> SimCLRForPreTraining | MoCoForPreTraining:
    """The pretraining model that the arguments describe, of pictures or of an autoencoder's latents."""
    model_args = json.loads(args.model_args) if args.model_args else None
    channels = 3
    if autoencoder is not None:
        channels, image_size = autoencoder.config.latent_channels, autoencoder.config.latent_size
        mean, std = [0.0] * channels, [1.0] * channels  # they are normalised
        model_args = (model_args or {}) | {"in_chans": channels}
    flags = {name: value for name, value in vars(args).items() if name in signature(ContrastiveConfig).parameters}
    if not args.queue_size:
        del flags["queue_size"]
    flags["model_args"] = fitting_model_args(args.architecture, model_args, image_size)
    preprocessing = {
        "input_size": [channels, image_size, image_size],
        "mean": list(mean),
        "std": list(std),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
    }
    if autoencoder is not None:
        flags["vae_fingerprint"] = autoencoder.fingerprint()
        flags["latent_statistics"] = latent_codec.statistics(autoencoder)
    config = ContrastiveConfig(**flags, pretrained_cfg=preprocessing)
    model = (MoCoForPreTraining if args.negatives == "queue" else SimCLRForPreTraining)(config)
    if args.init_encoder:
        start_from_encoder_(model, ContrastiveEncoder.from_pretrained(args.init_encoder))
    if args.init_pretraining:
        start_from_pretraining_(model, args.init_pretraining)
    if args.freeze == "all_but_last_layer":
        freeze_all_but_last_layer_(model)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model


def make_optimizer(args: ContrastiveArguments, model) -> torch.optim.Optimizer:
    """AdamW or SGD with momentum 0.9 over what learns of encoder, head and kernel (never the key branch)."""
    decayed, kernel = (
        [parameter for parameter in group if parameter.requires_grad]
        for group in (model.trainable_parameters(), model.undecayed_parameters())
    )
    parameters = [{"params": decayed}, *([{"params": kernel, "weight_decay": 0.0}] if kernel else [])]
    if args.optimizer == "sgd":
        return torch.optim.SGD(parameters, args.learning_rate, momentum=0.9, weight_decay=args.weight_decay, fused=True)
    return torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)


def step_output(
    model,
    views: TwoViews,
    batch: dict,
    args: ContrastiveArguments,
    step: int,
    total_steps: int,
    autoencoder: VQAutoencoder | None = None,
) -> ContrastiveOutput:
    """Output, with the loss, for two views of a batch's images at a step, counted from 0."""
    view_1, view_2 = views(batch["images"], batch["sample_ids"], batch["epoch"])
    if autoencoder is not None:
        view_1, view_2 = encoded(torch.cat([view_1, view_2]), autoencoder).chunk(2)
    options = {}
    if args.negatives == "queue":
        schedule = {"momentum": args.momentum, "schedule": args.momentum_schedule}
        options["momentum"] = momentum_at(step, total_steps, **schedule)
    if args.sigreg_weight:
        options["step"] = step
    return model(view_1, view_2, **options)


@torch.no_grad()
def embed(
    model, table, rows, mean, std, accelerator: Accelerator, autoencoder: VQAutoencoder | None
) -> dict[str, torch.Tensor]:
    """features (N, F), embeddings (N, D) and labels (N,) of rows of a table, unaugmented.

    The processes share them, in the precision of the run: all call this and get all.
    """
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))
    parts: dict[str, list] = {"features": [], "embeddings": [], "labels": []}
    numbers = []
    for batch in evaluation_batches(table, 512, own_share(rows)):
        pictures = normalize(batch["images"].to(model.device).float() / 255, mean, std)
        inputs = encoded(pictures, autoencoder)
        with accelerator.autocast():
            output = model(inputs)
        parts["features"].append(output.features.float().cpu())
        parts["embeddings"].append(output.embeddings.float().cpu())
        parts["labels"].append(batch["labels"])
        numbers += batch["sample_ids"].tolist()
    return {name: gather_rows(torch.cat(values) if values else None, numbers) for name, values in parts.items()}


@torch.no_grad()
def embed_views(
    model, table, rows, views: TwoViews, accelerator: Accelerator, autoencoder: VQAutoencoder | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (N, D), (N, D) of two views of rows of a table, which the processes share as in `embed`."""
    found, numbers = ([], []), []
    for batch in evaluation_batches(table, 512, own_share(rows)):
        for embeddings, view in zip(found, views(batch["images"], batch["sample_ids"], 0), strict=True):
            inputs = encoded(view.to(model.device), autoencoder)
            with accelerator.autocast():
                embeddings.append(model(inputs).embeddings.float().cpu())
        numbers += batch["sample_ids"].tolist()
    return tuple(gather_rows(torch.cat(parts) if parts else None, numbers) for parts in found)


def evaluate(
    model,
    args: ContrastiveArguments,
    source: ImageSource,
    accelerator: Accelerator,
    autoencoder: VQAutoencoder | None,
) -> tuple[Measures, dict]:
    """Measures of features and (key ending in _embeddings) embeddings of held-out images: kNN accuracy where there
    are labels, uniformity, effective rank; of embeddings alignment too. None without held-out images. And counts.

    All processes call this: they embed together, and the first one measures.
    """
    train, held_out = source.training_table(), source.evaluation_table()
    taken = Measures()
    if held_out is None:
        return taken, {"train": len(train), "evaluation": 0}
    bank_rows, query_rows = (table.random_rows(args.evaluation_images) for table in (train, held_out))
    samples = {"train": len(train), "bank": len(bank_rows), "evaluation": len(query_rows)}
    mean, std = statistics_of(source.data.entry, autoencoder)
    augmentation = PRESETS[args.augmentation or source.data.entry.augmentation]
    views = TwoViews(augmentation, mean, std, args.seed, mode=args.augmentation_mode)
    for buffer in model.buffers():
        broadcast_(buffer)  # batch norms of --batch_norm local have each process's own; the first one's are written
    bank = embed(model, train, bank_rows, mean, std, accelerator, autoencoder)
    query = embed(model, held_out, query_rows, mean, std, accelerator, autoencoder)
    first, second = embed_views(model, held_out, query_rows, views, accelerator, autoencoder)
    if not accelerator.is_main_process:
        return taken, samples

    def take(measure: Callable, suffix: str, *given: torch.Tensor, **options) -> None:
        def measured():
            found = measure(*map(accelerated, given), **options)
            return {key + suffix: value for key, value in found.items()}

        taken.take(measure.__name__ + suffix, measured)

    for kind, suffix in (("features", ""), ("embeddings", "_embeddings")):
        if source.data.class_names is not None:
            given = (bank[kind], bank["labels"], query[kind], query["labels"])
            take(evaluation.knn, suffix, *given, k=args.knn_k, metric=args.knn_metric)
        take(evaluation.uniformity, suffix, query[kind])
        take(evaluation.effective_rank, suffix, query[kind])
    take(evaluation.alignment, "_embeddings", first, second)
    return taken, samples


def save(
    model,
    args: ContrastiveArguments,
    source: ImageSource,
    loop: TrainingLoop,
    target: Path,
    autoencoder: VQAutoencoder | None,
) -> None:
    """Write weights, config and recipe, evaluate, and write the complete checkpoint folder.

    All processes call this: the first one writes, they evaluate together.
    """
    data, accelerator = source.data, loop.accelerator
    kernel = None if args.sigreg_weight else model.calibration.numbers()
    model.config.dpssl = {
        "method_name": method_name(args),
        "dataset": data.name,
        "licence_of_data": data.entry.licence,
        "steps": loop.step,
        "kernel": kernel,
        "metrics": {},
    }

    def write_weights(folder: Path) -> None:
        model.encoder.save_pretrained(folder)
        model.save_pretrained(folder / "pretraining")
        save_recipe(args, folder / "recipe.yaml")
        plot_curves(loop.history, folder / "curves.png", title=method_name(args))

    if accelerator.is_main_process:
        with atomic_folder(target) as folder:
            write_weights(folder)
    # The weights are safe before they are measured, which takes long and may fail.
    taken, samples = evaluate(model, args, source, accelerator, autoencoder)
    if not accelerator.is_main_process:
        return
    metrics = model.config.dpssl["metrics"] = taken.metrics
    with atomic_folder(target) as folder:
        write_weights(folder)
        settings = {"k": args.knn_k, "metric": args.knn_metric}
        about = dict(dataset=data.name, seed=args.seed, samples=samples)
        started = {"initial encoder": args.init_encoder, "initial encoder and head": args.init_pretraining}
        started |= {"autoencoder of its latents": args.autoencoder}
        about |= lineage_of_run(accelerator, data, [loop.seconds], started)
        about |= {"loss_curve": logged_curve(loop.history, "loss")}
        write_results(folder / "results.json", metrics, **about, **taken.results(), knn=settings, kernel=kernel)
        write_card(folder)
    scores = ", ".join(f"{name} {value:.2f} %" for name, value in metrics.items() if name.startswith("knn"))
    say(f"{target}: " + (scores or "no labels, not evaluated"))


def method_name(args: ContrastiveArguments) -> str:
    """SimCLR, t-SimCLR, MoCo-v2, t-MoCo-v2 or LeJEPA."""
    if args.sigreg_weight:
        return "LeJEPA"
    prefix = "t-" if args.kernel == "student_t" else ""
    return prefix + ("MoCo-v2" if args.negatives == "queue" else "SimCLR")


if __name__ == "__main__":
    sys.exit(reported("contrastive.py", main))
