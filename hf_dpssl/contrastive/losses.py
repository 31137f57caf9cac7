"""Contrastive and neighbour-embedding losses as pure functions on tensors.

They see the GLOBAL batch: models gather over processes before calling them (gather.py). Conventions: the positive
pair is in the denominator, only a point itself is left out; `temperature` divides (the cosine, or the squared
distance); temperature and dof are numbers or 0-dim tensors, which get their gradient; dof = math.inf is the
Gaussian kernel of twice the temperature. Values and gradients are exact, in float32 also for half-precision input;
those without a similarity matrix as argument need O(N D) memory (tiles.py). A batch of one pair, such as a loop's
last one, has no negatives: its loss is a constant of the formula (0, or log 2 jointly), its gradient 0, and a warning
says so. What each of them matches: matching.py.
"""

from __future__ import annotations

import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.choices import KERNELS, NORMALIZATIONS
from .kernels import Kernel, check_positive, in_float32, make_kernel
from .tiles import log_bank_partition, log_cross_partition, log_partition


def info_nce(view_1: Tensor, view_2: Tensor, *, temperature: float | Tensor, weights: Tensor | None = None) -> Tensor:
    """InfoNCE / NT-Xent over both views of a batch.

    loss = 1/(2N) sum_i w_i [ l(x_i, x_i') + l(x_i', x_i) ],
    l(x, x') = -log exp(cos(x, x')/temperature) / sum over the other 2N - 1 points.

    Args:
        view_1: (N, D) embeddings of one view, N >= 1; normalised here.
        view_2: (N, D) embeddings of the other view, same order.
        temperature: > 0, divides the cosine.
        weights: (N,) weight of each pair, none negative, used relative to its mean; None weighs all alike.

    Returns:
        Scalar; log(2N - 1) when all embeddings coincide.

    Raises:
        ValueError: on unequal shapes, no pair, embeddings that are not finite, a bad temperature or bad weights.
            On a GPU, where reading a value waits, the loss of such embeddings or weights is NaN instead.

    Source: Chen et al. 2020 (SimCLR); as SNE: Hu et al., ICLR 2023, section 3.
    Relations: the Student-t form is `t_simclr`; with a queue of negatives see `moco`; over two modalities `clip`.
    """
    _check_views(view_1, view_2)
    return _pair_loss(view_1, view_2, make_kernel("cosine", temperature), "anchor", weights)


def t_simclr(
    view_1: Tensor,
    view_2: Tensor,
    *,
    temperature: float | Tensor,
    dof: float | Tensor,
    normalization: str = "joint",
    weights: Tensor | None = None,
) -> Tensor:
    """t-SimCLR: InfoNCE with a Student-t kernel on unnormalised embeddings.

    k(x, y) = (1 + |x - y|^2 / (temperature * dof))^(-(dof + 1)/2)
    joint:  loss = -1/N sum_i w_i log k(x_i, x_i') + log sum over ordered pairs j != k of k(x_j, x_k)
    anchor: as `info_nce`, one denominator per anchor.

    Args:
        view_1: (N, D) raw projector outputs, N >= 1.
        view_2: (N, D), same order.
        temperature: > 0, divides the squared distance.
        dof: degrees of freedom, > 0; 1 is Cauchy, math.inf Gaussian.
        normalization: "joint" (the paper) or "anchor" (the t-MoCo-v2 code, t-SimCNE).
        weights: (N,) weight of each pair, used relative to its mean.

    Returns:
        Scalar; at coinciding embeddings log(2N(2N - 1)) (joint) or log(2N - 1) (anchor).

    Raises:
        ValueError: on unequal shapes, no pair, embeddings that are not finite, or an option out of range.

    Source: Hu et al., ICLR 2023, section 4.
    """
    _check_views(view_1, view_2)
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization must be one of {NORMALIZATIONS}, got {normalization!r}.")
    return _pair_loss(view_1, view_2, make_kernel("student_t", temperature, dof), normalization, weights)


def moco(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    *,
    kernel: str = "cosine",
    temperature: float | Tensor = 0.2,
    dof: float | Tensor = 10.0,
) -> Tensor:
    """MoCo's InfoNCE over one positive key and a queue of negatives, with either kernel.

    loss = -1/B sum_b log k(q_b, k_b) / ( k(q_b, k_b) + sum_j k(q_b, queue_j) )

    Args:
        query: (B, D) embeddings with gradient.
        key: (B, D) momentum embeddings of the other view (their gradient, if any, is not cut here).
        queue: (K, D) earlier keys, K >= 1: constants. It may be overwritten as soon as the function has returned.
        kernel: "cosine" (MoCo-v2) or "student_t" (t-MoCo-v2, on batch-normalised embeddings).
        temperature: > 0; MoCo-v2 uses 0.2, t-MoCo-v2 5.
        dof: degrees of freedom of the Student-t kernel; not read for "cosine".

    Returns:
        Scalar.

    Raises:
        ValueError: on shapes that do not fit, a queue that asks for a gradient, or an option out of range.

    Source: He et al. 2020; Chen et al. 2020 (MoCo-v2); Hu et al., ICLR 2023 (t-MoCo-v2).
    """
    if query.ndim != 2 or query.shape != key.shape or queue.ndim != 2 or queue.shape[1] != query.shape[1]:
        raise ValueError(
            "query and key must be (B, D) and queue (K, D), got "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(queue.shape)}."
        )
    if len(queue) == 0:
        raise ValueError("queue holds no key: MoCo needs at least one negative.")
    if queue.requires_grad:
        raise ValueError("queue must not ask for a gradient: its keys are constants. Pass queue.detach().")
    chosen = _chosen_kernel(kernel, temperature, dof)
    query, key = in_float32(query, key)  # once, so that the gradients of both terms are summed before they are rounded
    positive = chosen.pairs(query, key)  # (B,)
    negatives = log_bank_partition(query, queue, chosen)  # (B,)
    # log(k + s) - log k as it stands would lose a small loss beside a large log k.
    return F.softplus(negatives - positive, threshold=40).mean()


def clip(
    image: Tensor,
    text: Tensor,
    *,
    temperature: float | Tensor,
    kernel: str = "cosine",
    dof: float | Tensor = 5.0,
) -> Tensor:
    """CLIP's symmetric InfoNCE between two modalities, with either kernel.

    loss = 1/(2N) sum_i [ -log k(x_i, y_i) / sum_j k(x_i, y_j)  -  log k(x_i, y_i) / sum_j k(x_j, y_i) ]

    Args:
        image: (N, D) embeddings of one modality, N >= 1; normalised here for "cosine".
        text: (N, D) embeddings of the other, same order.
        temperature: > 0, divides; CLIP learns exp(-log_temperature), so a tensor is welcome.
        kernel: "cosine" or "student_t".
        dof: degrees of freedom of the Student-t kernel; not read for "cosine".

    Returns:
        Scalar; log N when all embeddings coincide. Raises ValueError as `info_nce`, or for an unknown kernel.

    Source: Radford et al. 2021, figure 3. Negatives are of the other modality only, unlike `info_nce`.
    """
    _check_views(image, text)
    _warn_of_one_pair(image)
    chosen = _chosen_kernel(kernel, temperature, dof)
    image, text = in_float32(image, text)
    positives = chosen.pairs(image, text)  # (N,)
    weights = positives.new_full(positives.shape, 0.5 / len(positives))
    return log_cross_partition(image, text, chosen, weights=weights, right_weights=weights) - positives.mean()


def sup_con(
    embeddings: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor,
    kernel: str = "cosine",
    dof: float | Tensor = 5.0,
) -> Tensor:
    """Supervised contrastive loss: the positives of an anchor are all other points of its class.

    loss = mean over anchors i that have a positive of
           -1/|P(i)| sum over p in P(i) of log k(x_i, x_p) / sum over a != i of k(x_i, x_a)

    Args:
        embeddings: (N, D), N >= 2, e.g. both views of a batch; normalised here for "cosine".
        labels: (N,) integers.
        temperature, kernel, dof: as `clip`.

    Returns:
        Scalar; log(N - 1) when all embeddings coincide.

    Raises:
        ValueError: on shapes that do not fit, no two points of one class, or an option out of range.
            On a GPU, where reading a value waits, the loss of labels without a class of two is NaN instead.

    Source: Khosla et al. 2020, L_out (equation 2), without its constant temperature / base_temperature.
    The positives' term holds an (N, N) matrix.
    """
    if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1] or len(labels) < 2:
        raise ValueError(
            f"embeddings must be (N, D) with N >= 2 and labels (N,), got {tuple(embeddings.shape)} and "
            f"{tuple(labels.shape)}."
        )
    same = (labels[:, None] == labels).fill_diagonal_(False)
    counts = same.sum(1)
    if counts.device.type == "cpu" and not bool(counts.any()):
        raise ValueError("labels holds no class twice: there is no positive pair.")
    chosen = _chosen_kernel(kernel, temperature, dof)
    (embeddings,) = in_float32(embeddings)
    log_k = chosen.matrix(embeddings, embeddings)
    weights = (counts > 0).to(log_k) / (counts > 0).sum()
    partition = log_partition(embeddings, chosen, joint=False, weights=weights)
    return partition - (log_k * same * (weights / counts.clamp(min=1))[:, None]).sum()


def sne(similarities: Tensor, embeddings: Tensor, *, temperature: float | Tensor = 1.0) -> Tensor:
    """Stochastic neighbour embedding: mean over i of KL(P_i || Q_i) with a Gaussian Q.

    q_{j|i} = exp(-|y_i - y_j|^2 / temperature) / sum over k != i

    Args:
        similarities: (N, N) p_{j|i}, rows that sum to 1, diagonal 0 (`kernels`: rows of a given perplexity).
        embeddings: (N, D).
        temperature: > 0, divides the squared distance.

    Returns:
        Scalar >= 0, in nats (the paper sums over i).

    Raises:
        ValueError: on shapes that do not fit or similarities that are not such a matrix.

    Source: Hinton and Roweis 2002.
    """
    similarities, embeddings = _check_similarities(similarities, embeddings, rows=True)
    kernel = make_kernel("gaussian", temperature)
    log_k = kernel.matrix(embeddings, embeddings)
    negative_entropy = torch.special.xlogy(similarities, similarities).sum()
    partition = log_partition(embeddings, kernel, joint=False)
    return (negative_entropy - (similarities * log_k).sum()) / len(similarities) + partition


def t_sne(similarities: Tensor, embeddings: Tensor, *, dof: float | Tensor = 1.0) -> Tensor:
    """t-SNE: KL(P || Q) of joint similarities with a Student-t Q.

    q_ij = (1 + |y_i - y_j|^2 / dof)^(-(dof + 1)/2) / sum over k != l

    Args:
        similarities: (N, N) joint p_ij that sum to 1, diagonal 0.
        embeddings: (N, D).
        dof: degrees of freedom, > 0.

    Returns:
        Scalar >= 0, in nats.

    Raises:
        ValueError: on shapes that do not fit or similarities that are not such a matrix.

    Source: van der Maaten and Hinton 2008; degrees of freedom: van der Maaten 2009.
    """
    similarities, embeddings = _check_similarities(similarities, embeddings, rows=False)
    kernel = make_kernel("student_t", 1.0, dof)
    log_k = kernel.matrix(embeddings, embeddings)
    negative_entropy = torch.special.xlogy(similarities, similarities).sum()
    return negative_entropy - (similarities * log_k).sum() + log_partition(embeddings, kernel, joint=True)


def alignment(view_1: Tensor, view_2: Tensor, *, alpha: float = 2.0) -> Tensor:
    """mean |x - y|^alpha of positive pairs of L2-normalised embeddings (N, D); in [0, 2^alpha], 0 is best.

    Source: Wang and Isola 2020. Raises ValueError on unequal shapes or alpha <= 0.
    """
    _check_views(view_1, view_2)
    check_positive(alpha=alpha)
    view_1, view_2 = in_float32(view_1, view_2)
    difference = F.normalize(view_1, dim=1) - F.normalize(view_2, dim=1)
    return difference.norm(dim=1).pow(alpha).mean()


def uniformity(embeddings: Tensor, *, t: float = 2.0) -> Tensor:
    """log mean over pairs of exp(-t |x_i - x_j|^2), L2-normalised embeddings (N, D); in [-4t, 0], lower is better.

    Source: Wang and Isola 2020. Raises ValueError for fewer than two points, t <= 0 or embeddings that are not finite;
    on a GPU, where reading a value waits, the value of the last is NaN instead.
    """
    if embeddings.ndim != 2 or len(embeddings) < 2:
        raise ValueError(f"embeddings must be (N, D) with N >= 2, got {tuple(embeddings.shape)}.")
    check_positive(t=t)
    points = F.normalize(in_float32(embeddings)[0], dim=1)
    count = len(points)
    reach = 2 * t**0.5  # of unit vectors from their mean
    return log_partition(points, Kernel("gaussian", t), joint=True, reach=reach) - math.log(count * (count - 1))


def _pair_loss(view_1: Tensor, view_2: Tensor, kernel: Kernel, normalization: str, weights: Tensor | None) -> Tensor:
    """Log-partition (joint, or mean over 2N anchors) minus the mean positive."""
    _warn_of_one_pair(view_1)
    view_1, view_2 = in_float32(view_1, view_2)
    positives = kernel.pairs(view_1, view_2)  # (N,)
    share = _shares(weights, positives)  # (N,), sums to 1
    points = torch.cat([view_1, view_2])  # (2N, D)
    partition = log_partition(points, kernel, joint=normalization == "joint", weights=share.repeat(2) / 2)
    return partition - (positives * share).sum()


def _chosen_kernel(name: str, temperature: float | Tensor, dof: float | Tensor) -> Kernel:
    """The kernel of an option; ValueError for another name than `KERNELS` or a temperature or dof out of range."""
    if name not in KERNELS:
        raise ValueError(f"kernel must be one of {KERNELS}, got {name!r}.")
    return make_kernel(name, temperature, dof)


def _check_views(view_1: Tensor, view_2: Tensor) -> None:
    if view_1.ndim != 2 or view_1.shape != view_2.shape:
        raise ValueError(
            f"both views must be (N, D) and of equal shape, got {tuple(view_1.shape)} and {tuple(view_2.shape)}."
        )
    if len(view_1) == 0:
        raise ValueError("a contrastive loss needs at least one pair, got none.")


def _warn_of_one_pair(views: Tensor) -> None:
    if len(views) == 1:
        warnings.warn("a batch of one pair has no negatives: its loss is constant and teaches nothing.", stacklevel=4)


def _shares(weights: Tensor | None, like: Tensor) -> Tensor:
    """Weights of pairs as shares that sum to 1."""
    if weights is None:
        return like.new_full(like.shape, 1 / len(like))
    if weights.shape != like.shape:
        raise ValueError(f"weights must have shape {tuple(like.shape)}, got {tuple(weights.shape)}.")
    fine = (weights >= 0).all() & (weights.sum() > 0)
    if fine.device.type == "cpu" and not bool(fine):
        raise ValueError("weights must be non-negative with a positive sum.")
    shares = weights.to(like) / weights.to(like).sum()
    return shares.where(fine.to(like.device), math.nan)  # a GPU is not waited for


def _check_similarities(similarities: Tensor, embeddings: Tensor, *, rows: bool) -> tuple[Tensor, Tensor]:
    (embeddings,) = in_float32(embeddings)
    similarities = similarities.to(embeddings)
    count = len(embeddings)
    if embeddings.ndim != 2 or count < 2 or similarities.shape != (count, count):
        raise ValueError(
            "similarities must be (N, N) and embeddings (N, D) with N >= 2, got "
            f"{tuple(similarities.shape)} and {tuple(embeddings.shape)}."
        )
    sums = similarities.sum(1) if rows else similarities.sum()
    wrong = (similarities < 0).any() | similarities.isnan().any() | similarities.diagonal().any()
    negative, elsewhere = torch.stack([wrong, ((sums - 1).abs() >= 1e-3).any()]).tolist()
    if negative:
        raise ValueError("similarities must be non-negative with a diagonal of 0.")
    if elsewhere:
        raise ValueError(f"similarities must sum to 1 {'in every row' if rows else 'over all pairs'}.")
    return similarities, embeddings
