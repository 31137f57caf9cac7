"""LeJEPA: views of an image are drawn together, and all embeddings of a view towards a standard normal distribution.

No negatives and no temperature: a distribution is matched, not neighbours. It is compared with the losses of losses.py,
and sees the GLOBAL batch as they do. Values and gradients are in float32 also for half-precision input.

Source: Balestriero and LeCun 2025, arXiv 2511.08544; the statistic: Epps and Pulley 1983.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.matrix_products import differentiable_product
from .kernels import in_float32

DIRECTIONS = 256  # drawn for a step
_LARGEST = 3.0  # of the frequencies, and how many of them, as in the authors' code
_FREQUENCIES = 17


def random_directions(count: int, dimension: int, step: int | None = None) -> Tensor:
    """(count, dimension) unit vectors, uniform on the sphere, on the CPU.

    Args:
        step: of training; equal steps have equal directions, on every process. None: torch's generator goes on.

    Raises:
        ValueError: no direction or dimension.
    """
    if count < 1 or dimension < 1:
        raise ValueError(f"directions are at least one vector of one number, got {count} of {dimension}.")
    generator = None if step is None else torch.Generator().manual_seed(step)
    return torch.nn.functional.normalize(torch.randn(count, dimension, generator=generator, dtype=torch.float64), dim=1)


def sigreg(embeddings: Tensor, directions: Tensor) -> Tensor:
    """SIGReg: how far embeddings are from a standard normal distribution, mean over directions.

    mean over a of  N integral over [-3, 3] of |1/N sum_n exp(i t <a, z_n>) - exp(-t^2/2)|^2 exp(-t^2/2) dt,
    by the trapezoidal rule with 17 points on [0, 3], as the integrand is even.

    Args:
        embeddings: (N, D), N >= 1.
        directions: (M, D) unit vectors a, M >= 1, e.g. `random_directions`.

    Returns:
        Scalar >= 0, without unit; of normal embeddings about 1.05 for any N, of others it grows with N.

    Raises:
        ValueError: on shapes that do not fit, or embeddings that are not finite. On a GPU, where reading a value
            waits, the value of embeddings that are not finite is NaN instead.
    """
    if embeddings.ndim != 2 or directions.ndim != 2 or embeddings.shape[1] != directions.shape[1]:
        raise ValueError(
            f"embeddings must be (N, D) and directions (M, D), got {tuple(embeddings.shape)} and "
            f"{tuple(directions.shape)}."
        )
    if not len(embeddings) or not len(directions):
        raise ValueError(f"SIGReg needs embeddings and directions, got {len(embeddings)} and {len(directions)}.")
    if embeddings.device.type == "cpu" and not bool(embeddings.isfinite().all()):
        raise ValueError("embeddings must be finite: a NaN or infinite one was given.")
    (embeddings,) = in_float32(embeddings)
    projected = differentiable_product(embeddings, directions.to(embeddings, non_blocking=True))  # (N, M)
    frequencies = torch.linspace(0, _LARGEST, _FREQUENCIES, dtype=embeddings.dtype, device=embeddings.device)
    normal = (-frequencies.square() / 2).exp()  # characteristic function, and weight
    total = projected.new_zeros(projected.shape[1])
    for place in range(_FREQUENCIES):  # one at a time: all at once would hold (N, M, 17)
        angles = projected * frequencies[place]
        distance = (angles.cos().mean(0) - normal[place]).square() + angles.sin().mean(0).square()
        share = 1 if place in (0, _FREQUENCIES - 1) else 2  # of both halves of [-3, 3]
        total = total + share * normal[place] * distance
    return len(embeddings) * _LARGEST / (_FREQUENCIES - 1) * total.mean()


def lejepa(view_1: Tensor, view_2: Tensor, directions: Tensor, *, weight: float) -> Tensor:
    """LeJEPA of two views: (1 - weight) * invariance + weight * mean over the views of `sigreg`.

    invariance = mean over pairs, views and dimensions of (z - (z + z')/2)^2 = 1/4 mean of (z - z')^2

    Args:
        view_1, view_2: (N, D) embeddings as they come, in the same order, N >= 1.
        directions: (M, D) as `sigreg`.
        weight: of the regularisation, in (0, 1); 0.02 to 0.05 by the authors.

    Returns:
        Scalar >= 0.

    Raises:
        ValueError: on unequal shapes, a weight out of range, or as `sigreg`.

    Source: arXiv 2511.08544, with two views and both of them global; the mean over dimensions as in the authors' code.
    """
    if view_1.shape != view_2.shape:
        raise ValueError(f"both views must be (N, D), got {tuple(view_1.shape)} and {tuple(view_2.shape)}.")
    if not 0 < weight < 1:
        raise ValueError(f"weight is the regularisation's share of the loss, in (0, 1), got {weight}.")
    view_1, view_2 = in_float32(view_1, view_2)
    regularization = (sigreg(view_1, directions) + sigreg(view_2, directions)) / 2
    return (1 - weight) * (view_1 - view_2).square().mean() / 4 + weight * regularization
