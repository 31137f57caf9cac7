"""The shape of a cloud of features, without labels: how many directions it fills, how evenly it is spread."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..contrastive import losses
from ..contrastive.kernels import Kernel
from ..contrastive.tiles import log_partition
from .feature_checks import finite_norms


@torch.no_grad()
def effective_rank(latents: Tensor, *, centre: bool = False) -> dict[str, float]:
    """How many directions a set of vectors fills: exp of the entropy of its normalised singular values.

    effective_rank = exp(-sum_i p_i log p_i), p_i = s_i / sum_j s_j

    Args:
        latents: (N, D); its singular values s are taken in float64.
        centre: subtract the mean first. Not by default, as in RankMe: a mean far from 0 then counts as one
            strong direction.

    Returns:
        {"effective_rank": in [1, min(N, D)]: D for equal singular values, 1 for multiples of one vector}.

    Raises:
        ValueError: no matrix, numbers that are not finite, or zeros only (after centring).

    Source: Roy and Vetterli 2007, definition 1; Garrido et al. 2023 (RankMe), without its epsilon.
    """
    if latents.ndim != 2 or 0 in latents.shape:
        raise ValueError(f"latents must be (N, D) and not empty, got {tuple(latents.shape)}.")
    finite_norms(latents.float(), "latents")
    latents = latents.double()
    latents = latents - latents.mean(0) if centre else latents
    if len(latents) > 2 * latents.shape[1]:
        latents = torch.linalg.qr(latents, mode="r").R  # the same singular values, far fewer rows
    values = torch.linalg.svdvals(latents)
    if not bool(values.sum() > 0):
        raise ValueError("effective rank is not defined for vectors that are all 0" + " after centring." * centre)
    shares = values / values.sum()
    return {"effective_rank": float((-torch.special.xlogy(shares, shares).sum()).exp())}


@torch.no_grad()
def spectrum(latents: Tensor) -> Tensor:
    """Variances of a cloud along its principal axes, descending: how many directions it really uses.

    Args:
        latents: (N, ...), N >= 2, flattened; centred and in float64.

    Returns:
        (min(N, D),) eigenvalues of the covariance (divided by N) as shares of their sum; curves of different latents
        are comparable. A flat curve uses all directions, one that falls at once has collapsed.

    Raises:
        ValueError: fewer than two vectors, numbers that are not finite, or vectors that are all the same.
    """
    if latents.ndim < 2 or len(latents) < 2 or not latents.numel():
        raise ValueError(f"a spectrum needs (N, ...) latents with N >= 2, got {tuple(latents.shape)}.")
    latents = latents.flatten(1).double()
    finite_norms(latents, "latents")
    latents = latents - latents.mean(0)
    if len(latents) > 2 * latents.shape[1]:
        latents = torch.linalg.qr(latents, mode="r").R
    variances = torch.linalg.svdvals(latents).square()
    if not bool(variances.sum() > 0):
        raise ValueError("all vectors are the same: their spectrum has no scale.")
    return variances / variances.sum()


@torch.no_grad()
def alignment(view_1: Tensor, view_2: Tensor, *, alpha: float = 2.0) -> dict[str, float]:
    """How close the two views of an image are: mean |x - y|^alpha over pairs, on the sphere and in the raw space.

    Args:
        view_1, view_2: (N, D) features or embeddings of two views of N >= 2 images.
        alpha: exponent, > 0.

    Returns:
        alignment: of L2-normalised vectors, in [0, 2^alpha], 0 is best (`losses.alignment`).
        alignment_raw: of the vectors as they are, divided by the scale at which the mean squared distance of all
            pairs of vectors is 2, as it is for a uniform cloud on the sphere: comparable, and unchanged when all
            vectors are shifted or scaled. For methods whose embeddings are not on the sphere, as t-SimCLR's.

    Raises:
        ValueError: unequal shapes, fewer than two pairs, alpha <= 0, numbers that are not finite, or vectors that
            are all the same.

    Source: Wang and Isola 2020, section 4.1; the raw form is ours.
    """
    value = float(losses.alignment(view_1, view_2, alpha=alpha))
    finite_norms(view_1.float(), "view_1")
    finite_norms(view_2.float(), "view_2")
    scale = _scale(torch.cat([view_1, view_2]).double())
    raw = ((view_1.double() - view_2.double()).norm(dim=1) / scale).pow(alpha).mean()
    return {"alignment": value, "alignment_raw": float(raw)}


@torch.no_grad()
def uniformity(embeddings: Tensor, *, t: float = 2.0) -> dict[str, float]:
    """How evenly a cloud is spread: log mean over pairs of exp(-t |x_i - x_j|^2), on the sphere and in the raw space.

    Args:
        embeddings: (N, D), N >= 2.
        t: > 0, of the Gaussian potential.

    Returns:
        uniformity: of L2-normalised vectors, in [-4t, 0], lower is more even (`losses.uniformity`).
        uniformity_raw: of the vectors as they are, scaled to a mean squared distance of 2 (see `alignment`); -2t is
            the bound from below, reached when all distances are equal.

    Raises:
        ValueError: fewer than two vectors, t <= 0, numbers that are not finite, or vectors that are all the same.

    Source: Wang and Isola 2020, section 4.1; the raw form is ours.
    """
    value = float(losses.uniformity(embeddings, t=t))
    finite_norms(embeddings.float(), "embeddings")
    points = embeddings.double()
    points = (points - points.mean(0)) / _scale(points)
    pairs = len(points) * (len(points) - 1)
    raw = log_partition(points, Kernel("gaussian", t), joint=True) - math.log(pairs)
    return {"uniformity": value, "uniformity_raw": float(raw)}


def _scale(points: Tensor) -> float:
    """Root of half the mean squared distance between two different points (N, D): their deviation over all columns."""
    variance = float(points.var(0, correction=1).sum())
    if not variance > 0:
        raise ValueError("all vectors are the same: their spread has no scale.")
    return variance**0.5
