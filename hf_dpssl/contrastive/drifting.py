"""The field that moves generated samples towards real ones, and the loss of a one-step generator that follows it.

Neighbour embedding with a generator as the embedding. P says which real samples are near a generated one, Q which
other generated ones are; as in t-SNE's gradient the former attract and the latter repel, both under a kernel:

    d_ij = |x_i - t_j| / mean distance                       targets t: real samples, negatives, generated ones (j != i)
    k_ij = kernel(d_ij, scale)
    A_ij = w_j sqrt(k_ij / sum_l w_l k_il  *  k_ij / sum_l k_lj)          symmetric, as t-SNE makes P symmetric
    A_ij = w_j k_ij / sum_l w_l k_il                                      per anchor, as in SNE
    V_i  = sum_real A_ij (sum_repelling A_il) t_j - sum_repelling A_ij (sum_real A_il) t_j

The weights of every V_i sum to 0, so that it follows translations and rotations of the space. V vanishes in the mean
where both sets are of one distribution. Each scale's V is brought to a mean square of 1, and they are added up: a loss
that regresses on x + V is flat by construction, and `Drift.squares` is what falls.

Kernels: "exponential" exp(-d / scale), and as in `log_similarities` with scale as the temperature "gaussian"
exp(-d^2 / scale) and "student_t" (1 + d^2 / (scale dof))^(-(dof + 1)/2).

What it descends: let the mean distance, the sizes that scales are brought to and all other samples be held, so that V_i
is a function of x_i alone. With the Gaussian kernel per anchor and one scale, s in squared units of the space, it is a
gradient: V_i = s / 2 times that of Q(real | x_i) = sum_real w_j k_ij / sum_l w_l k_il, of SNE's similarities of x_i and
all targets; a step descends -log Q(real | x_i), at the rate s Q(real | x_i) / 2. No other field here is a gradient. Of
every kernel per anchor V_i = Q(real | x_i) sum_j (p_ij - q_ij) t_j, q of all targets, p of the real ones among them:
SNE's coefficients, attraction minus repulsion. t-SNE's gradient has each of them times 1 / (1 + d_ij^2), a factor that
"student_t" has not here. A symmetric field depends on the other generated samples too; and as training moves them all
at once, no field is the gradient of one objective of the generator.

Source: Deng et al. 2026, arXiv 2602.04770 (field, normalisation); van der Maaten and Hinton 2008 (attraction and
repulsion).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..models.choices import FIELD_KERNELS, FIELD_SCALES
from ..models.matrix_products import full_float32
from .kernels import check_positive, in_float32, make_kernel

_TILE = 2**22  # distances held at once
_NOISE = 1024  # roundings: a field below so many, relative to what it is a difference of, is none
Space = Callable[[Tensor], Tensor]


class Drift(NamedTuple):
    """A field, and what it was before it was brought to unit size."""

    field: Tensor  # (..., N, D), in units of `unit`: the sum over scales, each of mean square 1, or 0 where it vanishes
    unit: Tensor  # (...,) mean distance / sqrt(D)
    squares: Tensor  # (..., number of scales) mean squares of the V, in units of `unit`


class DriftLoss(NamedTuple):
    """A loss, and what tells whether training gets on."""

    loss: Tensor  # scalar; its value is the mean square of the field, at most the number of scales squared
    field_square: Tensor  # scalar: mean of `Drift.squares`, without gradient


@torch.no_grad()
def drift_field(
    generated: Tensor,
    real: Tensor,
    *,
    kernel: str = "exponential",
    scales: Sequence[float] | None = None,
    dof: float = 5.0,
    weights: Tensor | None = None,
    negatives: Tensor | None = None,
    symmetric: bool = True,
) -> Drift:
    """Where each generated sample is to move; a constant for autograd. O((N + K + M) D) memory.

    Args:
        generated: (..., N, D) features of generated samples; leading dimensions are sets of their own (classes).
        real: (..., K, D) features of real ones, which attract.
        kernel: one of FIELD_KERNELS.
        scales: > 0, in mean distances; the fields of all are added up. None: FIELD_SCALES of the kernel.
        dof: degrees of freedom of "student_t", > 0.
        weights: (..., K + M), >= 0, of real samples and negatives: how often each counts; None: once. 0 leaves one
            out, so that sets of unequal sizes can be padded.
        negatives: (..., M, D) features of what repels beside the other generated samples: of all classes, for guidance.
        symmetric: normalise affinities over targets and over generated samples, or over targets only.

    Returns:
        Drift, float32 or the wider type of the features.

    Raises:
        ValueError: an unknown kernel, a scale or dof out of range, shapes that do not fit, a set without anything that
            repels or attracts, features that are not finite, or that all coincide.
    """
    log_kernels = log_kernels_of(kernel, scales, dof)
    if negatives is None:
        negatives = real[..., :0, :] if real.ndim > 1 else real
    _check_shapes(generated, real, negatives)
    generated, real, negatives = in_float32(generated, real, negatives)
    leading = generated.shape[:-2]
    with torch.autocast(generated.device.type, enabled=False):
        samples = generated.flatten(0, -3) if leading else generated[None]  # (B, N, D)
        targets = torch.cat([real, negatives, generated], -2).view(len(samples), -1, samples.shape[-1])  # (B, T, D)
        log_weights, fine = _log_weights(weights, real, negatives, samples)  # (B, T)
        per_set = samples.shape[1] * targets.shape[1]
        step = max(1, _TILE // per_set)
        parts = [
            _field(samples[i : i + step], targets[i : i + step], log_weights[i : i + step], real.shape[-2], log_kernels,
                   symmetric)
            for i in range(0, len(samples), step)
        ]  # fmt: skip
    joined = [torch.cat(values) for values in zip(*parts, strict=True)]
    _check_values({"generated": generated, "real": real, "negatives": negatives}, joined[1], fine)
    return Drift(*(value.view((*leading, *value.shape[1:])) for value in joined))


def drift_loss(
    generated: Tensor, real: Tensor, *, spaces: Space | Sequence[Space] = (), negatives: Tensor | None = None, **options
) -> DriftLoss:
    """Mean squared distance of generated samples from where the field moves them, over one or several feature spaces.

    loss = mean of |phi(x_i) / unit - stop_gradient(phi(x_i) / unit + V_i)|^2 over i, dimensions and spaces

    Several sets in one call are independent; over processes, gather the samples of a set first.

    Args:
        generated: (B, N, ...) samples of B sets, such as classes.
        real: (B, K, ...) real samples.
        spaces: feature spaces, each a callable from samples (n, ...) to features (n, ...), which are flattened; none:
            the samples themselves.
        negatives: (B, M, ...) samples that repel.
        options: kernel, scales, dof, weights and symmetric of `drift_field`.

    Raises:
        ValueError: as `drift_field`, or a space that gives another number of features than samples.
    """
    spaces = [spaces] if callable(spaces) else list(spaces) or [_identity]
    losses = []
    squares = []
    for space in spaces:
        points = _features(space, generated)
        with torch.no_grad():
            others = [None if part is None else _features(space, part) for part in (real, negatives)]
        drift = drift_field(points, others[0], negatives=others[1], **options)
        scaled = points / drift.unit[:, None, None].to(points)
        losses.append((scaled - (scaled + drift.field).detach()).square().mean())
        squares.append(drift.squares.mean())
    return DriftLoss(torch.stack(losses).mean(), torch.stack(squares).mean())


def _identity(samples: Tensor) -> Tensor:
    return samples


def _features(space: Space, samples: Tensor) -> Tensor:
    """(B, N, D) features of samples (B, N, ...), float32 or wider."""
    features = space(samples.flatten(0, 1))
    if len(features) != samples.shape[0] * samples.shape[1]:
        raise ValueError(f"a feature space gave {len(features)} features of {samples.shape[0] * samples.shape[1]}.")
    return in_float32(features.flatten(1).unflatten(0, samples.shape[:2]))[0]


def log_kernels_of(kernel: str, scales: Sequence[float] | None, dof: float) -> list[Callable[[Tensor], Tensor]]:
    """The logarithm of each scale's kernel, as a function of distances; arguments and errors of `drift_field`."""
    if kernel not in FIELD_KERNELS:
        raise ValueError(f"kernel must be one of {FIELD_KERNELS}, got {kernel!r}.")
    scales = FIELD_SCALES[kernel] if scales is None else scales
    if len(scales) == 0:
        raise ValueError(f"scales must hold at least one number, such as {FIELD_SCALES[kernel]}.")
    for scale in scales:
        check_positive(scale=scale)
    if kernel == "exponential":
        return [lambda distances, scale=scale: -distances / scale for scale in scales]
    kernels = [make_kernel(kernel, scale, dof) for scale in scales]
    return [lambda distances, made=made: made.of_squared_distances(distances.square()) for made in kernels]


def _check_shapes(generated: Tensor, real: Tensor, negatives: Tensor) -> None:
    shapes = [tuple(part.shape) for part in (generated, real, negatives)]
    fits = all(len(shape) >= 2 and shape[:-2] == shapes[0][:-2] and shape[-1] == shapes[0][-1] for shape in shapes)
    if not fits or 0 in shapes[0] or 0 in shapes[1]:
        raise ValueError(
            f"generated must be (..., N, D), real (..., K, D) and negatives (..., M, D), N and K at least 1, got "
            f"{shapes[0]}, {shapes[1]} and {shapes[2]}."
        )
    if generated.shape[-2] + negatives.shape[-2] < 2:
        raise ValueError("one generated sample alone has nothing that repels it: give at least two, or negatives.")


def _check_values(parts: dict[str, Tensor], unit: Tensor, weights: dict[str, Tensor]) -> None:
    """ValueError for features that are not finite, sets whose mean distance, `unit` (B,), is 0, or weights of which
    not everything is true that `_log_weights` gives; one read of them all."""
    finite = {name: part.isfinite().all() for name, part in parts.items()}
    rightly = [true.all() for true in weights.values()]
    if bool(torch.stack([*rightly, *finite.values(), (unit > 0).all()]).all()):
        return
    for message, true in weights.items():
        if not bool(true.all()):
            raise ValueError(message.format(set=int((~true).nonzero()[0, 0])))
    for name, part in parts.items():
        if not bool(finite[name]):
            raise ValueError(f"features must be finite, but {int((~part.isfinite()).sum())} values of {name} are not.")
    raise ValueError(
        f"all features of set {int((unit <= 0).nonzero()[0])} coincide: the feature space has collapsed, or the images "
        "are all alike; take another encoder or other images."
    )


def _log_weights(
    weights: Tensor | None, real: Tensor, negatives: Tensor, samples: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """(B, K + M + N): logarithms of the targets' weights, 0 of the generated ones; and {what is wrong: where it is not}
    of given ones, bool (B, ...), for `_check_values`."""
    shape = (*real.shape[:-2], real.shape[-2] + negatives.shape[-2])
    if weights is None:  # a set of one sample has negatives, as `_check_shapes` saw to
        return samples.new_zeros(len(samples), shape[-1] + samples.shape[1]), {}
    if tuple(weights.shape) != shape:
        raise ValueError(f"weights of real samples and negatives must be {shape}, got {tuple(weights.shape)}.")
    weights = weights.to(samples).reshape(len(samples), -1)
    attracting, repelling = weights.split([real.shape[-2], negatives.shape[-2]], 1)
    fine = {
        "weights must be finite and not negative (0 leaves a sample out).": (weights >= 0) & weights.isfinite(),
        "set {set} has no real sample of positive weight.": attracting.sum(1, keepdim=True) > 0,
    }
    if samples.shape[1] == 1:
        what = "a set of one generated sample needs a negative of positive weight: nothing repels it."
        fine[what] = repelling.sum(1, keepdim=True) > 0
    return torch.cat([weights, weights.new_ones(samples.shape[:2])], 1).log(), fine


def _field(
    samples: Tensor, targets: Tensor, log_weights: Tensor, num_real: int, log_kernels: list, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Field (B, N, D), unit (B,) and squares (B, scales) of some sets, a few rows of distances at a time."""
    count, dim = samples.shape[1:]
    num_targets = targets.shape[1]
    own = num_targets - count  # column of the first sample among the targets
    rows_at_once = max(1, _TILE // (len(samples) * num_targets))
    tiles = [slice(first, min(first + rows_at_once, count)) for first in range(0, count, rows_at_once)]
    weights = log_weights.exp()
    kept: list[Tensor] = []

    def distances(rows: slice) -> Tensor:
        """(B, n, T), infinite between a sample and itself; by differences, as products would lose near points."""
        if kept:
            return kept[0]
        tile = torch.cdist(samples[:, rows], targets, compute_mode="donot_use_mm_for_euclid_dist")
        tile[:, :, own + rows.start : own + rows.stop].diagonal(dim1=1, dim2=2).fill_(math.inf)
        if len(tiles) == 1:
            kept.append(tile)
        return tile

    total = sum((distances(rows).nan_to_num(posinf=0) * weights[:, None]).sum((1, 2)) for rows in tiles)
    mean = total / (count * (weights.sum(1) - 1))  # (B,)
    unit = mean / math.sqrt(dim)
    centred = (targets - targets.mean(1, keepdim=True)) / unit[:, None, None]
    field = torch.zeros_like(samples)
    squares = []
    for log_kernel in log_kernels:

        def log_k(rows: slice, log_kernel=log_kernel) -> Tensor:
            return log_kernel(distances(rows) / mean[:, None, None])

        column_sums = torch.zeros_like(log_weights)
        if symmetric:
            column_sums = torch.full_like(log_weights, -math.inf)
            for rows in tiles:
                column_sums = column_sums.logaddexp(log_k(rows).logsumexp(1))
            column_sums = column_sums.nan_to_num(neginf=0)  # the column of a lone sample holds nothing
        differences = torch.empty_like(samples)
        log_sizes = samples.new_empty(samples.shape[:2])
        for rows in tiles:
            logits = log_k(rows)
            row_sums = (logits + log_weights[:, None]).logsumexp(2, keepdim=True)
            normaliser = (row_sums + column_sums[:, None]) / 2 if symmetric else row_sums
            log_affinity = logits + log_weights[:, None] - normaliser  # (B, n, T)
            attraction, repulsion = log_affinity.split([num_real, num_targets - num_real], 2)
            with full_float32():
                near = attraction.softmax(2) @ centred[:, :num_real]
                far = repulsion.softmax(2) @ centred[:, num_real:]
            differences[:, rows] = near - far
            log_sizes[:, rows] = attraction.logsumexp(2) + repulsion.logsumexp(2)
        largest = log_sizes.amax(1, keepdim=True)  # (B, 1): squares of small sizes would underflow
        sizes = (log_sizes - largest).exp()
        raw = differences * sizes[:, :, None]
        square = raw.square().mean((1, 2))
        rounding = _NOISE * torch.finfo(samples.dtype).eps
        floor = rounding**2 * sizes.square().mean(1) * centred.square().mean((1, 2))
        field += torch.where((square > floor)[:, None, None], raw / square.sqrt()[:, None, None], 0)
        squares.append(torch.where(square > floor, square, 0) * (2 * largest[:, 0]).exp())
    return field, unit, torch.stack(squares, 1)
