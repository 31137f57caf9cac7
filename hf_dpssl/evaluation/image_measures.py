"""Quality of generated images beside real ones: distances, scores and overlaps in one extractor's features."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterable
from importlib import metadata
from typing import Protocol

import torch
from torch import Tensor

from ..models.call_arguments import check_pixel_values
from .classifier_scores import inception_score
from .feature_checks import accelerated, check_clouds
from .frechet import frechet_distance_of_features
from .manifold import manifold_overlap
from .maximum_mean_discrepancy import kernel_distance

MEASURES = ("fid", "kid", "manifold", "inception_score")
_LIBRARIES = ("hf_dpssl", "torch", "torchvision", "numpy", "scipy", "timm", "transformers", "torch-fidelity")


class Extractor(Protocol):
    """What `image_quality` asks of an extractor; `feature_extractors.load_extractor` gives such ones.

    name: becomes the end of the keys. fingerprint: what decides its numbers. features: images (B, C, H, W) in [-1, 1]
    to (B, D). head: features (B, D) to logits (B, classes), None where it is no classifier.
    """

    name: str
    fingerprint: str
    features: Callable[[Tensor], Tensor]
    head: Callable[[Tensor], Tensor] | None


Images = Tensor | Iterable[Tensor]


def image_quality(
    real: Images,
    generated: Images,
    extractor: Extractor | str,
    *,
    classifier: Extractor | None = None,
    measures: tuple[str, ...] = MEASURES,
    prefix: str = "",
    seed: int = 0,
    batch_size: int = 256,
    k: int = 5,
    subsets: int = 100,
    subset_size: int = 1000,
    splits: int = 10,
) -> dict[str, float]:
    """Frechet and kernel distance, precision, recall, density, coverage and inception score.

    Args:
        real, generated: images (N, C, H, W) in [-1, 1], an iterable of such batches, or features (N, D) that the
            extractor has given already. `prefix="r"` with images and their reconstructions gives rFID.
        extractor: as `Extractor` says; or its name, where both are features.
        classifier: for the inception score, where it is another one than the extractor; it needs `generated` as a
            tensor or a list, which can be read twice.
        measures: of MEASURES. "inception_score" is left out where nothing classifies.
        prefix: put before every key.
        seed: of subsets and splits.
        batch_size: images at once, where a tensor is given.
        k, subsets, subset_size, splits: of `manifold_overlap`, `kernel_distance` and `inception_score`; each is
            lowered to what the number of images allows.

    Returns:
        {"fid_<name>", "kid_<name>", "kid_std_<name>", "precision_<name>", "recall_<name>", "density_<name>",
        "coverage_<name>", "inception_score_<classifier>", "inception_score_std_<classifier>"}; of the extractor
        "inception" without the end: "fid". Lower is better for fid and kid, higher for the others.

    Raises:
        ValueError: unknown measures, fewer than two images, images that are not finite, outside [-1, 1] or all above 0
            (pictures in [0, 1]), or what the measures themselves refuse.

    Warns:
        UserWarning: fewer images than dimensions, with which the Frechet distance is far too large.
    """
    unknown = sorted(set(measures) - set(MEASURES))
    if unknown:
        raise ValueError(f"measures must be among {MEASURES}, got {unknown}.")
    name = extractor if isinstance(extractor, str) else extractor.name
    given = {"real": real, "generated": generated}
    clouds = [_features(images, extractor, batch_size, which) for which, images in given.items()]
    check_clouds(*clouds)
    found = _distances([accelerated(cloud) for cloud in clouds], measures, seed, k, subsets, subset_size)
    result = {metric_key(prefix, key, name): value for key, value in found.items()}
    judge = classifier or (None if isinstance(extractor, str) else extractor)
    if "inception_score" in measures and judge is not None and judge.head is not None:
        features = clouds[1] if judge is extractor else _features(generated, judge, batch_size, "generated")
        options = {"splits": min(splits, len(features)), "generator": torch.Generator().manual_seed(seed)}
        scores = inception_score(judge.head(features), **options)
        result |= {metric_key(prefix, key, judge.name): value for key, value in scores.items()}
    return result


def _distances(clouds: list[Tensor], measures, seed, k, subsets, subset_size) -> dict[str, float]:
    found, fewest = {}, min(map(len, clouds))
    if "fid" in measures:
        warn_about_few(fewest, clouds[0].shape[1])
        found["fid"] = frechet_distance_of_features(*clouds)
    if "kid" in measures:
        options = {"subsets": subsets, "subset_size": subset_size, "generator": torch.Generator().manual_seed(seed)}
        found |= kernel_distance(*clouds, **options)
    if "manifold" in measures:
        found |= manifold_overlap(*clouds, k=min(k, fewest - 1))
    return found


def warn_about_few(number: int, dimension: int) -> None:
    """Warn that a Frechet distance of fewer features than dimensions is biased."""
    if number <= dimension:
        message = (
            f"{number} images for features of {dimension} dimensions: the covariance has rank {number - 1}, and the "
            f"Frechet distance is far too large. Use more than {dimension} images (10 times as many for figures to "
            "be compared), kid, or frechet_extrapolation."
        )
        warnings.warn(message, UserWarning, stacklevel=4)


def _features(images: Images, extractor: Extractor | str, batch_size: int, name: str) -> Tensor:
    if torch.is_tensor(images) and images.ndim == 2:
        return images
    if isinstance(extractor, str):
        raise ValueError(f"with the extractor's name {extractor!r} both must be features (N, D), got images.")
    batches = images.split(batch_size) if torch.is_tensor(images) else images
    features = []
    low = math.inf
    for batch in batches:
        check_pixel_values(batch, name)
        low = min(low, float(batch.min()))
        features.append(extractor.features(batch).detach().float().cpu())
    if not features:
        raise ValueError(f"there are no {name} images to measure.")
    if low >= 0:
        raise ValueError(
            f"no pixel of the {name} images is darker than mid-grey: they seem to lie in [0, 1], where [-1, 1] is "
            "wanted; give 2 * x - 1. Where they are that bright, give their features, `extractor.features(images)`."
        )
    return torch.cat(features)


def metric_key(prefix: str, measure: str, name: str) -> str:
    """Key of a measure in the features of the extractor `name`: "rfid_<name>", of Inception "rfid"."""
    return f"{prefix}{measure}" if name == "inception" else f"{prefix}{measure}_{name}"


def quality_fingerprint(extractor: Extractor, *, reference: str, num_real: int, num_generated: int, **options) -> dict:
    """What two figures must share to be compared, as plain values for a JSON file.

    Args:
        extractor: that was used.
        reference: which real images, e.g. "cifar10 test".
        num_real, num_generated: how many images.
        options: everything else given to `image_quality`: seed, k, subsets, resize of the images, ...

    Returns:
        {"extractor", "extractor_sha256" (weights and resize), "reference", "num_real", "num_generated", **options,
        "versions", "sha256" of all but the versions}.
    """
    content = {
        "extractor": extractor.name,
        "extractor_sha256": extractor.fingerprint,
        "reference": reference,
        "num_real": num_real,
        "num_generated": num_generated,
        **options,
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return content | {"versions": {library: _version(library) for library in _LIBRARIES}, "sha256": digest}


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "not installed"
