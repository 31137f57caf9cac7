"""The subcommand `hf-dpssl evaluate`: protocols on frozen features of any image encoder, numbers as JSON."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from datasets import IterableDataset
from torch import Tensor
from tqdm.auto import tqdm

from . import evaluation
from .batches import spread_rows
from .data import ImageData, load_images
from .embedder import KINDS, ImageEmbedder
from .evaluation.neighbours import METRICS, WEIGHTINGS
from .evaluation.probes import CLASSIFIERS, SOLVERS
from .image_table import BadImageError, decode_row
from .results import write_results

PROTOCOLS = ("knn", "linear", "few_shot", "shape")


def evaluate_encoder(argv: list[str]) -> int:
    """`hf-dpssl evaluate`: returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        metrics, samples = _measure(args)
    except (ValueError, OSError) as error:
        print(f"hf-dpssl evaluate: {error}", file=sys.stderr)
        return 2
    for name, value in metrics.items():
        print(f"{name:<28}{value:.4g}")
    if args.output:
        options = {name: value for name, value in vars(args).items() if name not in ("output", "dataset", "seed")}
        write_results(args.output, metrics, dataset=args.dataset, seed=args.seed, samples=samples, options=options)
        print(f"written to {Path(args.output)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-dpssl evaluate",
        description="Measure an image encoder: features of both splits are extracted once, then each protocol runs. "
        "knn, linear and few_shot classify the held-out images (percent) and need labels; shape gives uniformity and "
        "effective rank of their features.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "encoder", help="folder or Hub id (id@revision) of an image encoder: ours, timm's, transformers'"
    )
    parser.add_argument(
        "--dataset", default="digits", help="name of the table in data.py, Hub id, folder or parquet file"
    )
    parser.add_argument("--dataset_revision", help="branch, tag or commit of a Hub data set")
    parser.add_argument("--image_column", help="column of pictures; found by its type when not given")
    parser.add_argument("--label_column", help="column of classes; found by its type when not given")
    parser.add_argument("--on_bad_image", default="error", choices=["error", "skip"], help="unreadable pictures")
    parser.add_argument("--protocol", nargs="+", default=["knn", "linear"], choices=PROTOCOLS, help="what is measured")
    parser.add_argument("--features", default="features", choices=KINDS, help="of the backbone, or after the head")
    parser.add_argument("--evaluation_images", type=int, default=10_000, help="at most so many of each split")
    parser.add_argument("--batch_size", type=int, default=64, help="pictures embedded at once")
    parser.add_argument("--knn_k", type=int, nargs="+", default=[20], help="neighbours; several give a key each")
    parser.add_argument("--knn_metric", default="cosine", choices=METRICS, help="of the neighbours")
    parser.add_argument("--knn_weighting", default="uniform", choices=WEIGHTINGS, help="votes of the neighbours")
    parser.add_argument("--knn_temperature", type=float, default=0.07, help="of exponential votes")
    parser.add_argument("--linear_solver", default="logistic", choices=SOLVERS, help="of the linear probe")
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 5, 10], help="examples per class of few_shot")
    parser.add_argument("--trials", type=int, default=20, help="draws of these examples")
    parser.add_argument("--few_shot_classifier", default="centroid", choices=CLASSIFIERS, help="of few_shot")
    parser.add_argument("--seed", type=int, default=0, help="of splits and draws")
    parser.add_argument("--output", help="JSON file of the results, with command, versions and machine")
    return parser


def _measure(args: argparse.Namespace) -> tuple[dict[str, float], dict[str, int]]:
    for name in ("evaluation_images", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}.")
    columns = {"image_column": args.image_column, "label_column": args.label_column}
    data = load_images(args.dataset, **columns, revision=args.dataset_revision)
    labelled = [name for name in args.protocol if name != "shape"]
    if labelled and data.class_names is None:
        raise ValueError(f"{args.dataset!r} has no classes, which {', '.join(labelled)} need: use --protocol shape.")
    if data.evaluation is None:
        raise ValueError(f"{args.dataset!r} has no held-out images to evaluate on.")
    embedder = ImageEmbedder(args.encoder, kind=args.features)

    def features(split) -> tuple[Tensor, Tensor]:
        rows = spread_rows(len(split), args.evaluation_images)
        return extract_features(embedder, data, split, rows, args.batch_size, args.on_bad_image)

    query, labels = features(data.evaluation)
    metrics, samples = {}, {"evaluation": len(query)}
    if labelled:
        bank, bank_labels = features(data.train)
        samples["bank"] = len(bank)
        given = {"predictions": query, "references": labels, "bank": bank, "bank_labels": bank_labels}
        for name, (module, options) in _protocols(args).items():
            if name in labelled:
                metrics |= evaluation.load(module).compute(**given, **options)
    if "shape" in args.protocol:
        for module in ("uniformity", "effective_rank"):
            metrics |= evaluation.load(module).compute(predictions=query)
    return metrics, samples


def _protocols(args: argparse.Namespace) -> dict[str, tuple[str, dict]]:
    k = args.knn_k[0] if len(args.knn_k) == 1 else args.knn_k
    weights = {"weighting": args.knn_weighting, "temperature": args.knn_temperature}
    few_shot = {"shots": args.shots, "trials": args.trials, "classifier": args.few_shot_classifier, "seed": args.seed}
    return {
        "knn": ("knn", {"k": k, "metric": args.knn_metric, **weights}),
        "linear": ("linear_probe", {"solver": args.linear_solver, "seed": args.seed}),
        "few_shot": ("few_shot", few_shot),
    }


def extract_features(
    embedder: ImageEmbedder, data: ImageData, split, rows: range, batch_size: int = 64, on_bad_image: str = "error"
) -> tuple[Tensor, Tensor]:
    """Features (N, D) float32 on the CPU and labels (N,) int64, -1 where there are none, of rows of a split.

    Args:
        embedder: prepares the pictures as the encoder wants them, and embeds them.
        data: where the split comes from.
        split: data.train or data.evaluation, not a stream.
        rows: of the split.
        batch_size: pictures embedded at once.
        on_bad_image: "error", or "skip" to leave unreadable pictures out.

    Raises:
        BadImageError: an unreadable picture, or none that can be read. ValueError: a stream.
    """
    if isinstance(split, IterableDataset):
        raise ValueError("features of a stream are not extracted: its length is not known.")
    features, labels, pictures = [], [], []
    for row in tqdm(rows, "features", unit="img", leave=False):
        try:
            picture, label = decode_row(data, split[row], f"row {row}")
        except BadImageError:
            if on_bad_image == "error":
                raise
            continue
        pictures.append(picture), labels.append(label)
        if len(pictures) == batch_size:
            features.append(embedder.embed_pictures(pictures))
            pictures = []
    if pictures:
        features.append(embedder.embed_pictures(pictures))
    if not features:
        raise BadImageError(f"none of the {len(rows)} images of {data.name!r} can be read.")
    return torch.cat(features), torch.tensor(labels)
