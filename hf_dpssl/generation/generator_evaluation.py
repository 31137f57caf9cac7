"""What `hf-dpssl evaluate` measures of a generator: FID with its interval, inception score, class consistency.

Pipelines draw by bulk_sampling.py, one random seed per image, by any number of processes.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from .. import evaluation
from ..autoencoder.autoencoder_evaluation import CROPPED, frechet, real_images, weights_sha256
from ..embedding.embedder import best_device
from ..embedding.evaluation_entries import Measured
from ..embedding.feature_extractors import FeatureExtractor, check_classifier, features_of, load_extractor
from ..evaluation.image_measures import metric_key
from ..models.modeling_vaegan import VAEGAN
from ..runs.lineage import well_formed
from .bulk_sampling import SampleJob, sample_images
from .choices import OPTIONS
from .sample_folder import picture_path

_NO_JUDGE = (
    "a generator is judged by named networks: give --extractor (FID, and the inception score where it classifies), "
    "--classifier (inception score, class consistency), or both."
)


@dataclass
class _Drawn:
    images: Tensor  # (N, C, S, S) in [-1, 1], as 8 bits can hold them
    class_ids: Tensor | None  # (N,) int64 asked-for classes
    num_classes: int
    model: str


def measure_generator(checkpoint: str, folder: Path, kind: str, args: argparse.Namespace) -> Measured:
    """Drawn images beside real ones.

    Args:
        checkpoint: folder or Hub id (id@revision).
        folder: where its files are.
        kind: "dit", "drift", "token" or "gan".
        args: flags of `hf-dpssl evaluate`.

    Raises:
        ValueError: neither extractor nor classifier, one that cannot be had, an option that this kind of pipeline
            does not know, or a classifier of another number of classes. RuntimeError: a process failed.
    """
    if not (args.extractor or args.classifier):
        raise ValueError(_NO_JUDGE)
    given = {"extractor": args.extractor, "classifier": args.classifier}
    judges = {part: load_extractor(name) for part, name in given.items() if name}
    if "classifier" in judges and judges["classifier"].head is None:
        check_classifier(judges["classifier"], 0, 1)  # says so
    drawn = _generate(folder, args) if kind == "gan" else _sample(checkpoint, args)
    if "classifier" in judges and drawn.class_ids is not None:
        check_classifier(judges["classifier"], drawn.num_classes, drawn.images.shape[-1])
    metrics, notes, samples, data = {}, [], {"generated": len(drawn.images)}, ""
    features = {part: features_of(judge, drawn.images, args.batch_size) for part, judge in judges.items()}
    if "extractor" in judges:
        real_features, data = _real(judges["extractor"], drawn.images, args)
        samples[args.reference] = len(real_features)
        metrics |= frechet(judges["extractor"], real_features, features["extractor"], "", notes)
    metrics |= _judged(judges, features, drawn.class_ids, args.seed, notes)
    return Measured(metrics, samples, drawn.model, data, CROPPED.format(drawn.images.shape[-1]), judges, notes)


def _judged(
    judges: dict[str, FeatureExtractor], features: dict[str, Tensor], class_ids: Tensor | None, seed: int, notes: list
) -> dict[str, float]:
    """Inception score by whatever classifies, and class consistency by the classifier."""
    part = "classifier" if "classifier" in judges else "extractor"
    judge = judges[part]
    if judge.head is None:
        notes.append(f"{judge.name} does not classify: no inception score, no class consistency without --classifier.")
        return {}
    logits = judge.head(features[part])
    random = torch.Generator().manual_seed(seed)
    scores = evaluation.inception_score(logits, splits=min(10, len(logits)), generator=random)
    metrics = {metric_key("", name, judge.name): value for name, value in scores.items()}
    if part == "classifier" and class_ids is not None:
        metrics |= evaluation.class_consistency(logits, class_ids)
    elif part == "classifier":
        notes.append("the generator has no classes: no class consistency.")
    return metrics


def _real(extractor: FeatureExtractor, generated: Tensor, args: argparse.Namespace) -> tuple[Tensor, str]:
    """Features (M, D) of real images of the size of generated ones, and a hash of these images."""
    columns = {"image_column": args.image_column, "label_column": args.label_column, "revision": args.dataset_revision}
    features, digest = [], hashlib.sha256()
    for images in real_images(args, args.reference, generated.shape[-1], generated.shape[1], **columns):
        digest.update(images.numpy().tobytes())
        features.append(extractor.features(images))
    return torch.cat(features), digest.hexdigest()


def _sample(checkpoint: str, args: argparse.Namespace) -> _Drawn:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("evaluate is not for accelerate launch: --num_processes draws with several processes.")
    options = {name: value for name in OPTIONS if (value := getattr(args, name, None)) is not None}
    with nullcontext(args.samples_dir) if args.samples_dir else tempfile.TemporaryDirectory() as folder:
        job = SampleJob(
            pipeline=checkpoint, folder=folder, num_images=args.num_images, options=options, seed=args.seed,
            batch_size=args.batch_size,
        )  # fmt: skip
        plan = sample_images(job, num_processes=args.num_processes)
        paths = [picture_path(Path(folder), plan, number) for number in range(args.num_images)]
        images = torch.stack([_read(path) for path in paths])
    class_ids = plan["class_ids"]
    if class_ids is not None:
        class_ids = torch.tensor([class_ids[number % len(class_ids)] for number in range(args.num_images)])
    return _Drawn(images, class_ids, len(plan["class_names"]), plan["fingerprint"])


def _read(path: Path) -> Tensor:
    with Image.open(path) as picture:
        return pil_to_tensor(picture).float() / 127.5 - 1


def _generate(folder: Path, args: argparse.Namespace) -> _Drawn:
    with well_formed(folder):
        model = VAEGAN.from_pretrained(folder).eval().float().to(best_device())
    generator = torch.Generator().manual_seed(args.seed)
    with torch.no_grad():
        images = model.generate(args.num_images, generator, batch_size=args.batch_size).cpu()
    images = ((images + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1  # as pictures in a file
    return _Drawn(images, None, 0, weights_sha256(model))
