"""Train a contrastive encoder: SimCLR, t-SimCLR, MoCo-v2 or t-MoCo-v2, over any timm backbone.

    python training/contrastive.py                                     # t-SimCLR on digits, CPU, minutes
    python training/contrastive.py --dataset path/to/images --image_size 64
    accelerate launch training/contrastive.py --recipe t-moco-v2-resnet50-imagenet

Writes OUTPUT_DIR/NAME (encoder in timm's layout, `pretraining/` with head and queue, results.json,
recipe.yaml, curves.png, model card) and checkpoints that `--resume_from_checkpoint latest` continues.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler

from hf_dpssl.batches import ImageSource, evaluation_batches, spread_rows
from hf_dpssl.checkpoint import atomic_folder
from hf_dpssl.data import load_images
from hf_dpssl.evaluation import knn
from hf_dpssl.model_card import write_card
from hf_dpssl.modeling_contrastive import ContrastiveConfig, ContrastiveEncoder
from hf_dpssl.modeling_contrastive_pretraining import MoCoForPreTraining, SimCLRForPreTraining
from hf_dpssl.plots import plot_curves
from hf_dpssl.recipe import RunArguments, option, parse, save_recipe
from hf_dpssl.results import write_results
from hf_dpssl.training_loop import TrainingLoop, finish, start_accelerator
from hf_dpssl.transforms import PRESETS, TwoViews, normalize


@dataclass
class ContrastiveArguments(RunArguments):
    """Method, backbone and optimiser; the defaults are t-SimCLR on the embedded digits."""

    name: str = option("encoder", "subfolder of output_dir for the finished encoder")
    negatives: str = option("batch", "batch (SimCLR) or queue (MoCo)", choices=["batch", "queue"])
    kernel: str = option("student_t", "similarity of embeddings", choices=["cosine", "student_t"])
    normalization: str = option("joint", "denominator over all pairs or per anchor", choices=["joint", "anchor"])
    feature_norm: str = option("none", "normalisation of embeddings", choices=["l2", "batch", "none"])
    temperature: str = option("2.0", "divides the cosine or the squared distance; auto: set by --perplexity")
    perplexity: float | None = option(None, "of Q, as a share of the candidates, with --temperature auto")
    dof: float = option(5.0, "degrees of freedom of the Student-t kernel")
    learnable_dof: bool = option(False, "train the degrees of freedom too")
    queue_size: int = option(65536, "negatives of MoCo")
    momentum: float = option(0.999, "share of the old key encoder kept at each step of MoCo")
    architecture: str = option("resnet10t", "timm model")
    model_args: str | None = option('{"channels": [32, 64, 128, 256]}', "JSON keyword arguments of timm.create_model")
    init_encoder: str | None = option(None, "folder or Hub id of an encoder of this architecture to start from")
    stem: str = option("timm", "timm, or small_image: 3x3 stride-1 stem of a ResNet", choices=["timm", "small_image"])
    projection_dim: int = option(32, "dimension of the embeddings")
    projection_hidden_dim: int | None = option(None, "width of the head; default: the features'")
    projection_layers: int = option(2, "linear layers of the head")
    projection_batch_norm: bool = option(False, "batch norm in the head")
    augmentation: str | None = option(None, "preset of transforms.py; default: what suits the data set")
    num_train_epochs: int = option(100, "epochs")
    max_train_steps: int | None = option(None, "steps instead of epochs; needed with --streaming")
    optimizer: str = option("adamw", "optimiser", choices=["adamw", "sgd"])
    learning_rate: float = option(2e-3, "peak learning rate")
    weight_decay: float = option(1e-4, "weight decay")
    batch_size: int = option(256, "images per process and step; each gives two views")
    knn_k: int = option(20, "neighbours of the kNN evaluation")
    knn_metric: str = option("euclidean", "distance of the kNN evaluation", choices=["cosine", "euclidean"])

    def __post_init__(self):
        super().__post_init__()
        if self.temperature != "auto":
            try:
                self.temperature = float(self.temperature)
            except ValueError:
                raise ValueError(f"--temperature must be a number or auto, got {self.temperature!r}.") from None
        if self.gradient_accumulation_steps > 1:
            raise ValueError(
                "--gradient_accumulation_steps > 1 would change the loss: negatives come from one batch (or, with a "
                "queue, from keys that the accumulated batches themselves enqueue). Use a larger --batch_size or "
                "more processes; embeddings are gathered over processes with their gradient."
            )
        if self.streaming and self.max_train_steps is None:
            raise ValueError("--streaming needs --max_train_steps: the length of a stream is not known.")


def main(argv: list[str] | None = None) -> Path:
    """Run the script with command-line arguments `argv`; returns the folder of the finished encoder."""
    args = parse(ContrastiveArguments, argv, __doc__)
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
    image_size = args.image_size or data.entry.image_size
    mean, std = data.entry.statistics
    augmentation = PRESETS[args.augmentation or data.entry.augmentation]
    views = TwoViews(augmentation, mean, std, args.seed)
    source = ImageSource.from_arguments(data, args, accelerator, image_size, views)
    total_steps = args.max_train_steps or args.num_train_epochs * source.steps_per_epoch

    # Model
    model = make_model(args, image_size, mean, std)
    optimizer = make_optimizer(args, model)
    steps = dict(num_warmup_steps=args.warmup_steps, num_training_steps=total_steps)
    scheduler = get_scheduler(args.lr_scheduler, optimizer, **steps)
    loop = TrainingLoop(args, accelerator, args.name, total_steps, source.loader, source.skipped)
    model, optimizer = accelerator.prepare(model, optimizer)
    loop.keep(model=model, optimizer=optimizer, scheduler=scheduler)

    # Loop
    model.train()
    for batch in loop:
        view_1, view_2 = views(batch["images"], batch["sample_ids"], batch["epoch"])
        output = model(view_1, view_2)
        accelerator.backward(output.loss)
        if args.max_grad_norm:
            accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        loop.log(loss=output.loss.detach(), learning_rate=scheduler.get_last_lr()[0])
        scheduler.step()

    # Save
    target = Path(args.output_dir) / args.name
    if accelerator.is_main_process:
        save(accelerator.unwrap_model(model).eval(), args, source, loop, target)
    finish(accelerator, args, source.skipped)
    return target


def make_model(args: ContrastiveArguments, image_size: int, mean, std) -> SimCLRForPreTraining | MoCoForPreTraining:
    """The pretraining model that the arguments describe."""
    model_args = json.loads(args.model_args) if args.model_args else None
    config = ContrastiveConfig(
        architecture=args.architecture,
        model_args=model_args,
        pretrained_cfg={
            "input_size": [3, image_size, image_size],
            "mean": list(mean),
            "std": list(std),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
        },
        **{
            name: getattr(args, name)
            for name in "stem kernel normalization feature_norm temperature perplexity dof learnable_dof queue_size "
            "momentum projection_dim projection_hidden_dim projection_layers projection_batch_norm".split()
        },
    )
    model = (MoCoForPreTraining if args.negatives == "queue" else SimCLRForPreTraining)(config)
    if args.init_encoder:
        start_from(model, ContrastiveEncoder.from_pretrained(args.init_encoder))
    return model


def start_from(model: SimCLRForPreTraining | MoCoForPreTraining, encoder: ContrastiveEncoder) -> None:
    """Copy the weights of a trained encoder into the backbone, and of MoCo into both; ValueError when they differ."""
    for backbone in [model.encoder, *([model.key_encoder] if isinstance(model, MoCoForPreTraining) else [])]:
        try:
            backbone.load_state_dict(encoder.state_dict())
        except RuntimeError as error:
            given, wanted = (f"{config.architecture} {config.model_args}" for config in (encoder.config, model.config))
            raise ValueError(
                f"--init_encoder holds {given}, the run asks for {wanted}: pass its --architecture and --model_args."
            ) from error


def make_optimizer(args: ContrastiveArguments, model) -> torch.optim.Optimizer:
    """AdamW or SGD with momentum 0.9 over encoder and head (never the key branch)."""
    parameters = [{"params": model.trainable_parameters()}]
    if model.undecayed_parameters():
        parameters.append({"params": model.undecayed_parameters(), "weight_decay": 0.0})
    if args.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=args.learning_rate, momentum=0.9, weight_decay=args.weight_decay)
    return torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=args.weight_decay)


@torch.no_grad()
def embed(model, table, rows, mean, std) -> dict[str, torch.Tensor]:
    """features (N, F), embeddings (N, D) and labels (N,) of rows of a table, unaugmented."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))
    parts: dict[str, list] = {"features": [], "embeddings": [], "labels": []}
    for batch in evaluation_batches(table, 512, rows):
        output = model(normalize(batch["images"].to(model.device).float() / 255, mean, std))
        parts["features"].append(output.features.float().cpu())
        parts["embeddings"].append(output.embeddings.float().cpu())
        parts["labels"].append(batch["labels"])
    return {name: torch.cat(values) for name, values in parts.items()}


def evaluate(model, args: ContrastiveArguments, source: ImageSource) -> tuple[dict, dict]:
    """kNN accuracy of features and embeddings on the held-out images; ({}, counts) without labels."""
    train, held_out = source.training_table(), source.evaluation_table()
    if held_out is None or source.data.class_names is None:
        return {}, {"train": len(train), "evaluation": 0}
    bank_rows, query_rows = (spread_rows(len(table), args.evaluation_images) for table in (train, held_out))
    samples = {"train": len(train), "bank": len(bank_rows), "evaluation": len(query_rows)}
    statistics = source.data.entry.statistics
    bank, query = embed(model, train, bank_rows, *statistics), embed(model, held_out, query_rows, *statistics)
    metrics = {}
    for kind in ("features", "embeddings"):
        options = {"k": min(args.knn_k, len(bank_rows)), "metric": args.knn_metric}
        value = knn(bank[kind], bank["labels"], query[kind], query["labels"], **options)["knn_top1"]
        metrics["knn_top1" if kind == "features" else "knn_top1_embeddings"] = value
    return metrics, samples


def save(model, args: ContrastiveArguments, source: ImageSource, loop: TrainingLoop, target: Path) -> None:
    """Evaluate, and write the complete checkpoint folder."""
    metrics, samples = evaluate(model, args, source)
    data = source.data
    kernel = model.kernel_scale.numbers()
    model.config.dpssl = {
        "method_name": method_name(args),
        "dataset": data.name,
        "licence_of_data": data.entry.licence,
        "steps": loop.step,
        "kernel": kernel,
        "metrics": metrics,
    }
    with atomic_folder(target) as folder:
        model.encoder.save_pretrained(folder)
        model.save_pretrained(folder / "pretraining")
        save_recipe(args, folder / "recipe.yaml")
        plot_curves(loop.history, folder / "curves.png", title=method_name(args))
        settings = {"k": args.knn_k, "metric": args.knn_metric}
        about = dict(dataset=data.name, seed=args.seed, samples=samples)
        write_results(folder / "results.json", metrics, **about, knn=settings, kernel=kernel)
        write_card(folder, "encoder", title=f"{method_name(args)} on {data.name}", license_of_data=data.entry.licence)
    print(f"{target}: " + (", ".join(f"{k} {v:.2f} %" for k, v in metrics.items()) or "no labels, not evaluated"))


def method_name(args: ContrastiveArguments) -> str:
    """SimCLR, t-SimCLR, MoCo-v2 or t-MoCo-v2."""
    prefix = "t-" if args.kernel == "student_t" else ""
    return prefix + ("MoCo-v2" if args.negatives == "queue" else "SimCLR")


if __name__ == "__main__":
    main()
