"""What `hf-dpssl evaluate` measures of an image encoder: protocols on frozen features."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Sequence

import torch
from datasets import IterableDataset
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from .. import evaluation
from ..data.image_data import ImageData, load_images
from ..data.image_table import BadImageError, decode_rows, stack
from ..data.views import NATURAL, TwoViews
from ..evaluation.feature_checks import accelerated
from .embedder import ImageEmbedder
from .evaluation_entries import Measured

_LABELLED = ("knn", "linear", "few_shot")


def measure_encoder(encoder: str, args: argparse.Namespace) -> Measured:
    """The chosen protocols on the held-out images, with the training images as the bank.

    Args:
        encoder: folder or Hub id (id@revision).
        args: flags of `hf-dpssl evaluate`.

    Raises:
        ValueError: no such encoder or data, no classes where a protocol needs them, or nothing could be measured. A
            protocol that has too few images beside others is left out, with a note.
    """
    columns = {"image_column": args.image_column, "label_column": args.label_column}
    data = load_images(args.dataset, **columns, revision=args.dataset_revision)
    labelled = [name for name in args.protocol if name in _LABELLED]
    if labelled:
        data.require_classes(f"{', '.join(labelled)} need: use --protocol geometry views, or mend the labels")
    if data.evaluation is None:
        raise ValueError(f"{args.dataset!r} has no held-out images to evaluate on.")
    embedder = ImageEmbedder(encoder, kind=args.features, mixed_precision=True)
    digest = hashlib.sha256()
    rows = data.random_rows(data.evaluation, args.evaluation_images, seed=args.seed)
    reading = {"batch_size": args.batch_size, "on_bad_image": args.on_bad_image}
    query, labels = extract_features(embedder, data, data.evaluation, rows, **reading, digest=digest)
    metrics = {}
    notes = []

    def compute(measure: Callable, *given: Tensor, **options) -> None:
        try:
            metrics.update(measure(*map(accelerated, given), **options))
        except ValueError as error:
            notes.append(f"{measure.__name__} was not measured: {error}")

    samples = {"evaluation": len(query)}
    if labelled:
        bank_rows = data.random_rows(data.train, args.evaluation_images, seed=args.seed)
        bank, bank_labels = extract_features(embedder, data, data.train, bank_rows, **reading, digest=digest)
        samples["bank"] = len(bank)
        for name, (measure, options) in _protocols(args).items():
            if name in labelled:
                compute(measure, bank, bank_labels, query, labels, **options)
    if "geometry" in args.protocol:
        compute(evaluation.uniformity, query)
        compute(evaluation.effective_rank, query)
    if "views" in args.protocol:
        first, second = extract_views(embedder, data, data.evaluation, rows, seed=args.seed, **reading)
        compute(evaluation.alignment, first, second)
    if not metrics:
        raise ValueError(" ".join(notes))
    how = "the encoder's own image processor"
    if embedder.rounded:
        notes.append("The encoder computed in bfloat16 (autocast).")
    return Measured(metrics, samples, embedder.fingerprint, digest.hexdigest(), how, notes=notes, splits=data.splits)


def _protocols(args: argparse.Namespace) -> dict[str, tuple[Callable, dict]]:
    k = args.knn_k[0] if len(args.knn_k) == 1 else args.knn_k
    weights = {"weighting": args.knn_weighting, "temperature": args.knn_temperature}
    few_shot = {"shots": args.shots, "trials": args.trials, "classifier": args.few_shot_classifier, "seed": args.seed}
    return {
        "knn": (evaluation.knn, {"k": k, "metric": args.knn_metric, **weights}),
        "linear": (evaluation.linear_probe, {"solver": args.linear_solver, "seed": args.seed}),
        "few_shot": (evaluation.few_shot, few_shot),
    }


def extract_features(
    embedder: ImageEmbedder,
    data: ImageData,
    split,
    rows: Sequence[int],
    batch_size: int = 64,
    on_bad_image: str = "error",
    digest=None,
) -> tuple[Tensor, Tensor]:
    """Features (N, D) float32 on the CPU and labels (N,) int64, -1 where there are none, of rows of a split.

    Args:
        embedder: prepares the pictures as the encoder wants them, and embeds them.
        data: where the split comes from.
        split: data.train or data.evaluation, not a stream.
        rows: of the split.
        batch_size: pictures embedded at once.
        on_bad_image: "error", or "skip" to leave unreadable pictures out.
        digest: of hashlib, updated with the pictures and labels that were read.

    Raises:
        BadImageError: an unreadable picture, or none that can be read. ValueError: a stream.
    """
    features = []
    labels = []
    for pictures, classes, _ in _readable(data, split, rows, batch_size, on_bad_image):
        features.append(embedder.embed_pictures(pictures))
        labels += classes
        for picture, label in zip(pictures, classes, strict=True) if digest else ():
            digest.update(f"{picture.size} {label}".encode() + picture.tobytes())
    return torch.cat(features), torch.tensor(labels)


def extract_views(
    embedder: ImageEmbedder,
    data: ImageData,
    split,
    rows: Sequence[int],
    *,
    seed: int,
    batch_size: int = 64,
    on_bad_image="error",
) -> tuple[Tensor, Tensor]:
    """Features (N, D) of two random views of each picture: crop, mirror and colour as `transforms.NATURAL` says.

    Arguments and errors as `extract_features`; seed: of the views, which depend on it and the row alone.
    """
    side = embedder.preprocess([Image.new("RGB", (64, 64))]).shape[-1]
    views = TwoViews(NATURAL, [0.0] * 3, [1.0] * 3, seed, crop=False)
    found = ([], [])
    for pictures, _, numbers in _readable(data, split, rows, batch_size, on_bad_image):
        sample_ids = torch.tensor(numbers)
        pair = views(stack(pictures, side, views, sample_ids, 0), sample_ids, 0)  # in [0, 1]
        for features, images in zip(found, pair, strict=True):
            arrays = (images * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
            features.append(embedder.embed_pictures([Image.fromarray(array) for array in arrays]))
    return torch.cat(found[0]), torch.cat(found[1])


def _readable(data: ImageData, split, rows: Sequence[int], batch_size: int, on_bad_image: str):
    """Batches of (pictures, labels, row numbers) of the rows that can be read."""
    if isinstance(split, IterableDataset):
        raise ValueError("features of a stream are not extracted: its length is not known.")
    batch = []
    count = 0
    decoded = decode_rows(data, ((split[row], f"row {row}") for row in rows))
    for row, found in zip(tqdm(rows, "features", unit="img", leave=False), decoded, strict=True):
        if isinstance(found, BadImageError):
            if on_bad_image == "error":
                raise found
            continue
        batch.append((*found, row))
        count += 1
        if len(batch) == batch_size:
            yield tuple(map(list, zip(*batch, strict=True)))
            batch = []
    if batch:
        yield tuple(map(list, zip(*batch, strict=True)))
    if not count:
        raise BadImageError(f"none of the {len(rows)} images of {data.name!r} can be read.")
