"""What features and labels must be before anything is measured of them."""

from __future__ import annotations

import torch
from torch import Tensor


def finite_norms(rows: Tensor, name: str, first: int = 0) -> Tensor:
    """(N,) norms; ValueError naming the first row with a NaN, an infinity, or a number too large to be squared."""
    norms = rows.norm(dim=1)
    if not bool(norms.isfinite().all()):
        row = int((~norms.isfinite()).nonzero()[0])
        what = "too large for float32" if bool(rows[row].isfinite().all()) else "NaN or infinite"
        raise ValueError(f"row {first + row} of {name} is {what}: features must be finite, with a finite norm.")
    return norms


def check_clouds(*clouds: Tensor) -> None:
    """ValueError unless all are finite (N, D) with N >= 2 and one D."""
    shapes = [tuple(cloud.shape) for cloud in clouds]
    if any(len(shape) != 2 or shape[0] < 2 or shape[1] < 1 for shape in shapes) or len({s[1] for s in shapes}) > 1:
        raise ValueError(f"features must be (N, D) with N >= 2 and the same D, got {', '.join(map(str, shapes))}.")
    for cloud in clouds:
        if not torch.isfinite(cloud).all():
            raise ValueError("features must be finite: NaN or infinity was given.")


def widened(features: Tensor) -> Tensor:
    """Detached and in float64, where they lie, or on the CPU if their device has no float64 (Apple's)."""
    features = features.detach()
    return (features.cpu() if features.device.type == "mps" else features).double()


def accelerated(features: Tensor) -> Tensor:
    """On the GPU where there is one (CUDA or ROCm), else as they are: measures compute where their features lie."""
    return features.to("cuda") if torch.cuda.is_available() else features


def check_labels(*labels: Tensor) -> None:
    """ValueError unless all are integers of at least 0."""
    for given in labels:
        if given.dtype.is_floating_point or given.dtype.is_complex or given.dtype == torch.bool:
            raise ValueError(f"labels must be integer class ids, got {given.dtype}.")
        if int(given.min()) < 0:
            raise ValueError(
                f"labels must be 0 or larger, got {int(given.min())}: the data set has images without a class."
            )
