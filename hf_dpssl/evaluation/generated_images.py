"""What generated images are like: of the asked-for class, not copied, and as diverse as real ones.

Distances are Euclidean between flattened images; all three say nothing about a person's judgement.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 512


def class_consistency(logits: Tensor, class_ids: Tensor) -> dict[str, float]:
    """Share of images that a classifier puts into the class they were generated for.

    Args:
        logits: (N, num_classes) of an independent classifier on the generated images.
        class_ids: (N,) int64 asked-for classes.

    Returns:
        {"class_consistency": percent}.
    """
    if logits.ndim != 2 or class_ids.shape != logits.shape[:1]:
        raise ValueError(f"logits are (N, classes), class_ids (N,); got {logits.shape} and {class_ids.shape}.")
    return {"class_consistency": 100 * float((logits.argmax(1) == class_ids).double().mean())}


def nearest_distances(images: Tensor, references: Tensor) -> Tensor:
    """Euclidean distance of each image to its nearest reference: (N,)."""
    images, references = images.flatten(1).double(), references.flatten(1).double()
    # cdist finds the nearest one; the difference then is exact, so that an identical image has distance 0.
    parts = ((part, torch.cdist(part, references).argmin(1)) for part in images.split(_CHUNK))
    return torch.cat([(part - references[nearest]).norm(dim=1) for part, nearest in parts])


def copies(generated: Tensor, training: Tensor, held_out: Tensor, *, percentile: float = 1.0) -> dict[str, float]:
    """Share of generated images suspiciously close to a training image.

    An image counts as a copy when its distance to the nearest training image is at most the given
    percentile of the same distance of held-out images; an identical image always does.

    Args:
        generated, training, held_out: (N, C, H, W), (M, C, H, W), (L, C, H, W) in the same range.
        percentile: of the held-out distances, in percent.

    Returns:
        {"copies": percent (about `percentile` for fresh real images), "copy_distance": the threshold}.
    """
    threshold = torch.quantile(nearest_distances(held_out, training), percentile / 100)
    return {
        "copies": 100 * float((nearest_distances(generated, training) <= threshold).double().mean()),
        "copy_distance": float(threshold),
    }


def diversity(generated: Tensor, generated_ids: Tensor, real: Tensor, real_ids: Tensor) -> dict[str, float]:
    """Mean distance between two images of the same class, generated relative to real.

    Args:
        generated, real: images (N, C, H, W) and (M, C, H, W) in the same range.
        generated_ids, real_ids: their classes (N,), (M,).

    Returns:
        {"diversity": ratio, 1 = as diverse as real; averaged over classes with two images of each kind}.

    Raises:
        ValueError: when no class has two generated and two real images.
    """
    ratios = []
    for class_id in torch.unique(real_ids).tolist():
        ours, theirs = generated[generated_ids == class_id], real[real_ids == class_id]
        if len(ours) >= 2 and len(theirs) >= 2:
            ratios.append(_mean_distance(ours) / _mean_distance(theirs))
    if not ratios:
        raise ValueError("diversity needs a class with at least two generated and two real images.")
    return {"diversity": float(torch.stack(ratios).mean())}


def _mean_distance(images: Tensor) -> Tensor:
    return torch.pdist(images.flatten(1).double()).mean()
