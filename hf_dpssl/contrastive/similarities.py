"""Similarities P of neighbour embedding, built from whatever says which points belong together.

Distances (perplexity), augmentation pairs, overlap of crops, mixup, noise, labels, or a matrix of
the user. Every builder returns P (n, n) in float64, non-negative, with a zero diagonal:
"joint": one distribution over all ordered pairs, the whole matrix sums to 1.
"anchor": P_{j|i}, each row sums to 1, or to the weight of its anchor (mean 1); the row of a point
that has no neighbour is zero and is left out when P is matched.
P is data: no gradient flows through it. Matching with Q: matching.py.

Source: Hu et al., ICLR 2023, section 3: the choice of positive pairs is the choice of P.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from ..models.choices import NORMALIZATIONS
from .kernels import check_positive


def normalize_similarities(matrix: Tensor, *, normalization: str, mask: Tensor | None = None) -> Tensor:
    """P from a user's matrix of similarities, in any scale.

    Args:
        matrix: (n, n) non-negative and finite, need not be symmetric; its diagonal is not used.
        normalization: "joint" divides by the sum, "anchor" divides each row by its own.
        mask: (n, n) bool, False for further pairs to leave out.

    Returns:
        (n, n) float64 P.

    Raises:
        ValueError: on another shape, negative or non-finite entries, or when no pair is left.
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"similarities must be a square matrix, got {tuple(matrix.shape)}.")
    if mask is not None and (mask.shape != matrix.shape or mask.dtype != torch.bool):
        raise ValueError(f"mask must be bool {tuple(matrix.shape)}, got {mask.dtype} {tuple(mask.shape)}.")
    allowed = _off_diagonal(matrix) if mask is None else _off_diagonal(matrix) & mask
    p = matrix.detach().double().where(allowed, 0)
    if not bool(p.isfinite().all()) or bool((p < 0).any()):
        raise ValueError("similarities must be finite and non-negative (off the diagonal).")
    if not bool((p > 0).any()):
        raise ValueError("similarities are zero for every pair: no point has a neighbour.")
    p = p / p.max()  # sums of huge or tiny entries stay in range
    if _is_joint(normalization):
        return p / p.sum()
    sums = p.sum(1, keepdim=True)
    return p / sums.where(sums > 0, 1)


def gaussian_similarities(points: Tensor, perplexity: float, *, normalization: str) -> Tensor:
    """P of SNE and t-SNE: Gaussian neighbours, each point's width set by the perplexity.

    anchor (SNE):  P_{j|i} = exp(-d_ij^2 / t_i) / sum_{k != i} exp(-d_ik^2 / t_i)
    joint (t-SNE): P_ij = (P_{j|i} + P_{i|j}) / (2n)

    Args:
        points: (n, D), n >= 3.
        perplexity: effective number of neighbours, in (1, n - 1).

    Returns:
        (n, n) float64 P.

    Raises:
        ValueError: on points that are not finite or a perplexity that cannot be met.

    Source: Hinton and Roweis 2002; van der Maaten and Hinton 2008, section 2 and 3.1.
    """
    distances = _squared_distances(points).where(_off_diagonal(points), torch.inf)
    distances = distances - distances.amin(1, keepdim=True)  # changes no probability, shrinks cancellation
    conditional = (-distances / perplexity_temperatures(distances, perplexity)[:, None]).softmax(1)
    return (conditional + conditional.T) / (2 * len(points)) if _is_joint(normalization) else conditional


def perplexity_temperatures(squared_distances: Tensor, perplexity: float) -> Tensor:
    """Temperature of each row at which the Gaussian softmax(-d^2 / temperature) has a given perplexity.

    perplexity = exp(entropy of the row in nats): the effective number of neighbours. It grows
    with the temperature, whose logarithm is found by bisection with Newton steps, in float64.

    Args:
        squared_distances: (N, M); an infinite entry is left out (a point's distance to itself).
        perplexity: > 1 and below the number of entries that each row keeps; met within 1e-10.

    Returns:
        (N,) float64, SNE's 2 sigma_i^2.

    Raises:
        ValueError: on a perplexity out of range, NaN or -inf, or a row in which so many nearest
            points are equally near that every temperature gives more than the perplexity.

    Source: Hinton and Roweis 2002 (SNE); van der Maaten and Hinton 2008, section 2.
    """
    distances = squared_distances.detach().double()
    if distances.ndim != 2 or bool((distances.isnan() | (distances == -math.inf)).any()):
        raise ValueError(f"squared_distances must be (N, M) without NaN or -inf, got {tuple(distances.shape)}.")
    kept = distances.isfinite()  # (N, M)
    fewest = int(kept.sum(1).min())
    if not 1 < perplexity < fewest:
        raise ValueError(f"perplexity must lie in (1, {fewest}), the number of neighbours, got {perplexity}.")
    gaps = distances - distances.amin(1, keepdim=True)  # a shift of the row changes no probability
    ties = ((gaps == 0) & kept).sum(1)
    if bool((ties >= perplexity).any()):
        row = int((ties >= perplexity).nonzero()[0])
        raise ValueError(
            f"row {row} has {int(ties[row])} nearest points at one distance, so its perplexity cannot fall to "
            f"{perplexity}: raise the perplexity or remove duplicate points."
        )
    longest = gaps.where(kept, 0).amax(1)
    shortest = gaps.where(kept & (gaps > 0), math.inf).amin(1)
    low = torch.maximum(shortest / 1e3, longest * 1e-300).log()  # only the nearest points count
    high = longest.log() + math.log(1e9)  # all count alike
    log_t = gaps.kthvalue(math.ceil(perplexity), dim=1).values.log()
    for step in itertools.count():
        log_p = (-gaps / log_t.exp()[:, None]).log_softmax(1)
        p = log_p.exp()
        log_p = log_p.where(kept, 0)
        entropy = -(p * log_p).sum(1)
        excess = entropy - math.log(perplexity)
        low = low.where(excess > 0, log_t)
        high = high.where(excess <= 0, log_t)
        done = (excess.abs() < 1e-12) | (high - low <= log_t.abs() * 1e-15)
        if bool(done.all()):
            return log_t.exp()
        slope = (p * (log_p + entropy[:, None]).square()).sum(1)  # of the entropy in log_t
        newton = log_t - excess / slope
        middle = (low + high) / 2
        inside = (newton > low) & (newton < high) & (step < 20)
        log_t = log_t.where(done, newton.where(inside, middle))


def pair_similarities(num_pairs: int, *, normalization: str, weights: Tensor | None = None) -> Tensor:
    """P of contrastive learning: a point's one neighbour is its other view.

    Args:
        num_pairs: N, >= 2; the 2N points come as cat[view_1, view_2].
        weights: (N,) weight of each pair, >= 0, relative to its mean; None weighs all alike.

    Returns:
        (2N, 2N) float64; a pair's two entries are w_i / (2N) ("joint") or w_i ("anchor"), mean weight 1.

    Raises:
        ValueError: on fewer than two pairs or weights that do not fit.

    Source: Hu et al., ICLR 2023, section 3; weighted positives: their appendix.
    """
    if num_pairs < 2:
        raise ValueError(f"at least 2 pairs are needed, got {num_pairs}.")
    weights = torch.ones(num_pairs) if weights is None else weights.detach()
    if weights.shape != (num_pairs,):
        raise ValueError(f"weights must have shape ({num_pairs},), got {tuple(weights.shape)}.")
    if not bool(weights.isfinite().all()) or bool((weights < 0).any()) or not bool((weights > 0).any()):
        raise ValueError("weights must be finite and non-negative with a positive sum.")
    weights = weights.double() / weights.double().mean()
    p = torch.diag_embed(weights, offset=num_pairs) + torch.diag_embed(weights, offset=-num_pairs)
    return p / (2 * num_pairs) if _is_joint(normalization) else p


def box_iou(boxes_1: Tensor, boxes_2: Tensor) -> Tensor:
    """Intersection over union of the i-th boxes, (N,) in [0, 1].

    Args:
        boxes_1: (N, 4) left, top, right, bottom, in any unit, right >= left and bottom >= top.
        boxes_2: (N, 4), same order: the other view's crop of the same image.

    Raises:
        ValueError: on other shapes, non-finite or inverted boxes, or two boxes without area.
    """
    if boxes_1.ndim != 2 or boxes_1.shape != boxes_2.shape or boxes_1.shape[1] != 4:
        raise ValueError(f"both sets of boxes must be (N, 4), got {tuple(boxes_1.shape)}, {tuple(boxes_2.shape)}.")
    boxes = torch.stack([boxes_1, boxes_2]).double()  # (2, N, 4)
    sides = boxes[..., 2:] - boxes[..., :2]
    if not bool(boxes.isfinite().all()) or bool((sides < 0).any()):
        raise ValueError("boxes must be finite (left, top, right, bottom) with right >= left and bottom >= top.")
    overlap = boxes[..., 2:].amin(0) - boxes[..., :2].amax(0)  # (N, 2)
    intersection = overlap.clamp_min(0).prod(1)
    union = sides.prod(2).sum(0) - intersection
    if bool((union == 0).any()):
        raise ValueError(f"boxes {int((union == 0).nonzero()[0])} have no area.")
    return intersection / union


def iou_weights(boxes_1: Tensor, boxes_2: Tensor, *, temperature: float) -> Tensor:
    """Weight of each pair for `losses.info_nce` or `t_simclr`: exp(IoU / temperature), mean 1, (N,) float64.

    A large temperature weighs all pairs alike; source: Hu et al., ICLR 2023, appendix. Boxes: see `box_iou`.
    """
    check_positive(temperature=temperature)
    scaled = box_iou(boxes_1, boxes_2) / temperature
    return len(scaled) * scaled.softmax(0)


def iou_similarities(boxes_1: Tensor, boxes_2: Tensor, *, temperature: float, normalization: str) -> Tensor:
    """P of augmentation pairs weighed by how much their crops overlap: `pair_similarities` with `iou_weights`."""
    weights = iou_weights(boxes_1, boxes_2, temperature=temperature)
    return pair_similarities(len(weights), normalization=normalization, weights=weights)


def noise_similarities(points: Tensor, *, noise_std: float, normalization: str, data: Tensor | None = None) -> Tensor:
    """P of Gaussian noise as augmentation: how likely two points are noisy views of one original.

    density(x, y) = integral over originals o of N(x; o, s^2 I) N(y; o, s^2 I)
    flat measure of originals (data=None): N(x - y; 0, 2 s^2 I), a function of the distance alone.
    originals are the rows of `data`: their mean, which equals the flat density times the density of
    data + N(0, s^2/2 I) at the midpoint (x + y)/2, so it is no function of the distance.

    Args:
        points: (n, D) at which the density is taken.
        noise_std: s, in the unit of the points.
        data: (M, D) originals; the cost is n^2 M.

    Returns:
        (n, n) float64 P, the density normalised over the given points.

    Raises:
        ValueError: on bad points or data, or a noise_std that is not positive.

    Source: Hu et al., ICLR 2023, Proposition 3.2 (the flat case; it does not hold for a finite data set).
    """
    check_positive(noise_std=noise_std)
    if data is None:
        return _normalize_log(-_squared_distances(points) / (4 * noise_std**2), normalization)
    log_views = -_squared_distances(points, data) / (2 * noise_std**2)  # (n, M)
    log_density = torch.stack([(row + log_views).logsumexp(1) for row in log_views])  # (n, n)
    return _normalize_log(log_density, normalization)


def mixup_similarities(
    points: Tensor,
    *,
    ratio: float,
    components: Tensor,
    component_std: float,
    normalization: str,
    samples: int = 4096,
    generator: torch.Generator | None = None,
) -> Tensor:
    """P of mixup as augmentation: the density of the difference of two mixed views of one original.

    A view is o + ratio (a - o) with a drawn from the data; two views of one o differ by ratio (a - c), and P(x, y)
    is the density of that at x - y (flat measure of o). With the data as a mixture of M Gaussians it is a mixture of
    M^2 of variance 2 ratio^2 component_std^2: all of them when M^2 <= samples (closed form), else a sample of them.

    Args:
        points: (n, D) at which the density is taken.
        ratio: mixing ratio, in (0, 1].
        components: (M, D) means of the data's Gaussians: its modes, or the data points themselves
            (kernel density estimate).
        component_std: their standard deviation, > 0; for data points, the kernel's width.
        samples: number of pairs (a, c) of components to draw when M^2 is larger.
        generator: random state of the draw.

    Returns:
        (n, n) float64 P, symmetric, the density normalised over the given points; cost n^2 min(M^2, 2 samples).

    Raises:
        ValueError: on bad points or components, or a number out of range.

    Source: Hu et al., ICLR 2023, section 3: it follows the span of the class means, Gaussian noise does not.
    """
    check_positive(component_std=component_std, samples=samples)
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must lie in (0, 1], got {ratio}.")
    points = _checked(points)
    components = _checked(components).to(points)
    count = len(components)
    if count**2 <= samples:
        shifts = ratio * (components[:, None] - components).flatten(0, 1)  # (M^2, D)
    else:
        drawn = torch.randint(count, (2, samples), generator=generator).to(points.device)
        shifts = ratio * (components[drawn[0]] - components[drawn[1]])
        shifts = torch.cat([shifts, -shifts])  # the density is even, and so is its estimate
    rows = [-_squared_distances(point - points, shifts) for point in points]  # n times (n, S)
    log_density = torch.stack([(row / (4 * ratio**2 * component_std**2)).logsumexp(1) for row in rows])
    return _normalize_log(log_density, normalization)


def label_similarities(labels: Tensor, *, normalization: str) -> Tensor:
    """P of supervised contrastive learning: a point's neighbours are the others of its class, all alike.

    Args:
        labels: (n,) integers.

    Returns:
        (n, n) float64: 1 / (class size - 1) within a class ("anchor"), divided by the number of points
        that have a neighbour ("joint": each such point has the same mass, not each pair).

    Raises:
        ValueError: when labels are no integers in one dimension or no class has two points.

    Source: Khosla et al. 2020 (supervised contrastive learning, L_out).
    """
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"labels must be integers of shape (n,), got {labels.dtype} {tuple(labels.shape)}.")
    conditional = normalize_similarities((labels[:, None] == labels).double(), normalization="anchor")
    return conditional / conditional.sum() if _is_joint(normalization) else conditional


def _is_joint(normalization: str) -> bool:
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization must be one of {NORMALIZATIONS}, got {normalization!r}.")
    return normalization == "joint"


def _off_diagonal(rows: Tensor) -> Tensor:
    return ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)


def _checked(points: Tensor) -> Tensor:
    points = points.detach().double()
    if points.ndim != 2 or points.numel() == 0 or not bool(points.isfinite().all()):
        raise ValueError(f"points must be (n, D), not empty and finite, got shape {tuple(points.shape)}.")
    return points


def _squared_distances(points: Tensor, others: Tensor | None = None) -> Tensor:
    """Float64, from differences: exactly 0 for duplicates, unlike the Gram trick."""
    points = _checked(points)
    others = points if others is None else _checked(others).to(points.device)
    if points.shape[1] != others.shape[1]:
        raise ValueError(f"points have {points.shape[1]} columns, the data has {others.shape[1]}.")
    return torch.cdist(points, others, compute_mode="donot_use_mm_for_euclid_dist").square()


def _normalize_log(log_density: Tensor, normalization: str) -> Tensor:
    """P from a log-density of pairs: no row underflows, however far its point is from the others."""
    if len(log_density) < 2:
        raise ValueError(f"at least 2 points are needed, got {len(log_density)}.")
    log_density = log_density.where(_off_diagonal(log_density), -torch.inf)
    if _is_joint(normalization):
        return log_density.flatten().softmax(0).view_as(log_density)
    return log_density.softmax(1)
