"""Contrastive losses as pure functions on tensors: InfoNCE, t-SimCLR, MoCo with both kernels.

They see the GLOBAL batch: models gather over processes before calling them (gather.py). Formulas
and conventions: the positive pair is in the denominator, only a point itself is left out, and
`temperature` divides (the cosine, or the squared distance).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import (
    KERNELS,
    NORMALIZATIONS,
    check_positive,
    in_float32,
    log_cosine,
    log_student_t,
    student_t_from_squared_distance,
)


def info_nce(view_1: Tensor, view_2: Tensor, *, temperature: float, weights: Tensor | None = None) -> Tensor:
    """InfoNCE / NT-Xent over both views of a batch.

    loss = 1/(2N) sum_i w_i [ l(x_i, x_i') + l(x_i', x_i) ],
    l(x, x') = -log exp(cos(x, x')/temperature) / sum over the other 2N - 1 points.

    Args:
        view_1: (N, D) embeddings of one view, N >= 2; normalised here.
        view_2: (N, D) embeddings of the other view, same order.
        temperature: > 0, divides the cosine.
        weights: (N,) weight of each pair, used relative to its mean; None weighs all alike.

    Returns:
        Scalar; log(2N - 1) when all embeddings coincide.

    Raises:
        ValueError: on unequal shapes, fewer than two pairs or a bad temperature.

    Source: Chen et al. 2020 (SimCLR); as SNE: Hu et al., ICLR 2023, section 3.
    Relations: the Student-t form is `t_simclr`; with a queue of negatives see `moco`.
    """
    _check_views(view_1, view_2)
    z = torch.cat([view_1, view_2])  # (2N, D)
    log_q = log_cosine(z, z, temperature=temperature)  # (2N, 2N)
    positives = log_q.diagonal(len(view_1))  # (N,) both directions are equal
    return _anchor_loss(log_q, positives, weights)


def t_simclr(
    view_1: Tensor,
    view_2: Tensor,
    *,
    temperature: float,
    dof: float,
    normalization: str = "joint",
    weights: Tensor | None = None,
) -> Tensor:
    """t-SimCLR: InfoNCE with a Student-t kernel on unnormalised embeddings.

    k(x, y) = (1 + |x - y|^2 / (temperature * dof))^(-(dof + 1)/2)
    joint:  loss = -1/N sum_i w_i log k(x_i, x_i') + log sum over ordered pairs j != k of k(x_j, x_k)
    anchor: as `info_nce`, one denominator per anchor.

    Args:
        view_1: (N, D) raw projector outputs, N >= 2.
        view_2: (N, D), same order.
        temperature: > 0, divides the squared distance.
        dof: degrees of freedom, > 0; 1 is Cauchy, infinity Gaussian.
        normalization: "joint" (the paper) or "anchor" (the t-MoCo-v2 code, t-SimCNE).
        weights: (N,) weight of each pair, used relative to its mean.

    Returns:
        Scalar; at coinciding embeddings log(2N(2N - 1)) (joint) or log(2N - 1) (anchor).

    Raises:
        ValueError: on unequal shapes, fewer than two pairs, or an option out of range.

    Source: Hu et al., ICLR 2023, section 4.
    """
    _check_views(view_1, view_2)
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization must be one of {NORMALIZATIONS}, got {normalization!r}.")
    z = torch.cat([view_1, view_2])  # (2N, D)
    log_q = log_student_t(z, z, temperature=temperature, dof=dof)  # (2N, 2N)
    positives = _log_student_t_pairs(view_1, view_2, temperature, dof)  # (N,)
    if normalization == "anchor":
        return _anchor_loss(log_q, positives, weights)
    log_partition = _without_self(log_q).flatten().logsumexp(0)
    return log_partition - (positives * _relative(weights, positives)).mean()


def moco(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    *,
    kernel: str = "cosine",
    temperature: float = 0.2,
    dof: float = 10.0,
) -> Tensor:
    """MoCo's InfoNCE over one positive key and a queue of negatives, with either kernel.

    loss = -1/B sum_b log k(q_b, k_b) / ( k(q_b, k_b) + sum_j k(q_b, queue_j) )

    Args:
        query: (B, D) embeddings with gradient.
        key: (B, D) momentum embeddings of the other view (their gradient, if any, is not cut here).
        queue: (K, D) earlier keys, K >= 1.
        kernel: "cosine" (MoCo-v2) or "student_t" (t-MoCo-v2, on batch-normalised embeddings).
        temperature: > 0; MoCo-v2 uses 0.2, t-MoCo-v2 5.
        dof: degrees of freedom of the Student-t kernel; not read for "cosine".

    Returns:
        Scalar.

    Raises:
        ValueError: on shapes that do not fit or an option out of range.

    Source: He et al. 2020; Chen et al. 2020 (MoCo-v2); Hu et al., ICLR 2023 (t-MoCo-v2). The
    denominator is per query and contains the positive.
    """
    if query.ndim != 2 or query.shape != key.shape or queue.ndim != 2 or queue.shape[1] != query.shape[1]:
        raise ValueError(
            "query and key must be (B, D) and queue (K, D), got "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(queue.shape)}."
        )
    if len(queue) == 0:
        raise ValueError("queue holds no key: MoCo needs at least one negative.")
    if kernel == "cosine":
        positive = _log_cosine_pairs(query, key, temperature)  # (B,)
        negatives = log_cosine(query, queue, temperature=temperature)  # (B, K)
    elif kernel == "student_t":
        positive = _log_student_t_pairs(query, key, temperature, dof)
        negatives = log_student_t(query, queue, temperature=temperature, dof=dof)
    else:
        raise ValueError(f"kernel must be one of {KERNELS}, got {kernel!r}.")
    log_q = torch.cat([positive[:, None], negatives], dim=1)  # (B, 1 + K)
    return (log_q.logsumexp(1) - positive).mean()


def _check_views(view_1: Tensor, view_2: Tensor) -> None:
    if view_1.ndim != 2 or view_1.shape != view_2.shape:
        raise ValueError(
            f"both views must be (N, D) and of equal shape, got {tuple(view_1.shape)} and {tuple(view_2.shape)}."
        )
    if len(view_1) < 2:
        raise ValueError(f"a contrastive loss needs at least 2 pairs, got {len(view_1)}.")


def _relative(weights: Tensor | None, like: Tensor) -> Tensor | float:
    if weights is None:
        return 1.0
    if weights.shape != like.shape:
        raise ValueError(f"weights must have shape {tuple(like.shape)}, got {tuple(weights.shape)}.")
    if bool((weights < 0).any()) or not bool(weights.sum() > 0):
        raise ValueError("weights must be non-negative with a positive sum.")
    return weights.to(like) / weights.to(like).mean()


def _without_self(log_q: Tensor) -> Tensor:
    diagonal = torch.eye(len(log_q), dtype=torch.bool, device=log_q.device)
    return log_q.masked_fill(diagonal, float("-inf"))


def _anchor_loss(log_q: Tensor, positives: Tensor, weights: Tensor | None) -> Tensor:
    """Mean over the 2N anchors of log-partition minus positive; log_q (2N, 2N), positives (N,)."""
    log_partition = _without_self(log_q).logsumexp(1)  # (2N,)
    per_pair = log_partition.view(2, -1).mean(0) - positives  # (N,)
    return (per_pair * _relative(weights, positives)).mean()


def _log_cosine_pairs(x: Tensor, y: Tensor, temperature: float) -> Tensor:
    check_positive(temperature=temperature)
    x, y = in_float32(x, y)
    return F.cosine_similarity(x, y, dim=1) / temperature


def _log_student_t_pairs(x: Tensor, y: Tensor, temperature: float, dof: float) -> Tensor:
    """The positives' log-similarities from differences: exact also where points nearly coincide."""
    x, y = in_float32(x, y)
    return student_t_from_squared_distance((x - y).pow(2).sum(1), temperature=temperature, dof=dof)
