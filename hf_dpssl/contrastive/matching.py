"""Contrastive learning and neighbour embedding as one thing: similarities P matched by similarities Q.

    loss = match(P, log Q, divergence)

P says which points belong together (its builders stand in similarities.py and are reached from here, as
`matching.gaussian_similarities`), Q how near their embeddings are, under a kernel; both are normalised per anchor or
jointly. Slow and clear: losses.py holds the named losses, each of which is one cell (N pairs in 2N rows,
z = cat[view_1, view_2]):

    loss                P                          Q                      divergence
    info_nce            pairs, weights per pair    cosine, anchor         kl
    t_simclr, anchor    pairs, weights per pair    student_t, anchor      kl
    t_simclr, joint     pairs, weights per pair    student_t, joint       kl + entropy of P (log 2N if unweighted)
    moco                torch.eye(B, B + K)        either, anchor [1]     kl
    clip                torch.eye(N)               either, anchor [2]     kl
    sup_con             labels                     either, anchor         kl + entropy of P
    sne                 Gaussian, perplexity       gaussian, anchor       kl
    t_sne               Gaussian, perplexity       student_t, joint       kl
    drift_field         real samples               generator's samples    [3]
    [1] of the queries, others=cat[key, queue], mask=cat[torch.eye(B), torch.ones(B, K)]: no other query's key
    [2] mean over images with others=text and texts with others=image
    [3] gaussian, anchor: sample i of the generator descends -log of the sum of Q_ij over real j; see drifting.py

"kl + entropy of P" is `cross_entropy`; the entropy does not depend on the embeddings.

Source: Hu et al., ICLR 2023, section 3 (P, Q); Im, Verma and Branson 2018 (t-SNE under f-divergences).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..models.choices import NORMALIZATIONS
from .kernels import KERNELS, log_similarities
from .similarities import (
    box_iou,
    gaussian_similarities,
    iou_similarities,
    iou_weights,
    label_similarities,
    mixup_similarities,
    noise_similarities,
    normalize_similarities,
    pair_similarities,
)

DIVERGENCES = ("kl", "reverse_kl", "jensen_shannon", "alpha", "chi_square")
TOLERANCE = 1e-3  # of a sum that should be 1: float32 sums of large matrices stay far below it

__all__ = [
    "DIVERGENCES",
    "KERNELS",
    "NORMALIZATIONS",
    "box_iou",
    "cross_entropy",
    "gaussian_similarities",
    "iou_similarities",
    "iou_weights",
    "label_similarities",
    "match",
    "mixup_similarities",
    "noise_similarities",
    "normalize_similarities",
    "pair_similarities",
    "q_similarities",
]


def q_similarities(
    embeddings: Tensor,
    others: Tensor | None = None,
    *,
    kernel: str,
    normalization: str,
    temperature: float | Tensor,
    dof: float | Tensor = 5.0,
    mask: Tensor | None = None,
) -> Tensor:
    """LOG of the similarities Q of embeddings, normalised; -inf where a pair is left out.

    anchor: log Q_{j|i} = log k(z_i, z_j) - log sum_k k(z_i, z_k)
    joint:  log Q_ij    = log k(z_i, z_j) - log sum_{k, l} k(z_k, z_l)

    Args:
        embeddings: (N, D).
        others: (M, D) candidates; None compares the embeddings with each other, a point itself left out.
        kernel: "cosine" (of normalised embeddings), "gaussian" or "student_t" (of raw ones).
        normalization: "anchor" or "joint".
        temperature: > 0, divides the cosine or the squared distance.
        dof: degrees of freedom, > 0, read for "student_t" only; math.inf is the Gaussian of twice the temperature.
        mask: (N, M) bool, False for further pairs to leave out.

    Returns:
        (N, M) log Q, float32 or the wider type of the embeddings.

    Raises:
        ValueError: on an unknown option, shapes that do not fit, or a row with no pair left.
    """
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization must be one of {NORMALIZATIONS}, got {normalization!r}.")
    candidates = embeddings if others is None else others
    if embeddings.ndim != 2 or candidates.ndim != 2 or embeddings.shape[1] != candidates.shape[1]:
        raise ValueError(
            f"embeddings must be (N, D) and others (M, D), got {tuple(embeddings.shape)}, {tuple(candidates.shape)}."
        )
    shape = (len(embeddings), len(candidates))
    if mask is not None and (mask.shape != shape or mask.dtype != torch.bool):
        raise ValueError(f"mask must be bool {shape}, got {mask.dtype} {tuple(mask.shape)}.")
    allowed = torch.ones(shape, dtype=torch.bool, device=embeddings.device) if mask is None else mask
    if others is None:
        allowed = allowed & ~torch.eye(len(embeddings), dtype=torch.bool, device=embeddings.device)
    if not bool(allowed.any(1).all()):
        raise ValueError(f"row {int((~allowed.any(1)).nonzero()[0])} of Q has no pair left: it cannot be normalised.")
    log_k = log_similarities(embeddings, candidates, kernel=kernel, temperature=temperature, dof=dof)
    log_k = log_k.masked_fill(~allowed, -math.inf)
    return log_k.log_softmax(1) if normalization == "anchor" else log_k.flatten().log_softmax(0).view(shape)


def match(p: Tensor, log_q: Tensor, divergence: str = "kl", *, alpha: float = 0.5, smoothing: float = 0.0) -> Tensor:
    """Divergence of Q from P: 0 where they are equal, positive elsewhere.

    kl:             sum p log(p / q)                                   SNE, t-SNE, contrastive losses
    reverse_kl:     sum q log(q / p)
    jensen_shannon: (KL(p || m) + KL(q || m)) / 2, m = (p + q) / 2     at most log 2
    alpha:          (sum p^alpha q^(1 - alpha) - 1) / (alpha (alpha - 1))   kl at 1, reverse_kl at 0,
                    4 (1 - sum sqrt(p q)) at 1/2, half of chi_square at 2
    chi_square:     sum (p - q)^2 / q                                  Pearson

    0 log 0 = 0. A Q normalised jointly is matched over all pairs. A Q normalised per anchor is matched
    row by row, and the rows are averaged with the row sums of P as weights; rows of P that are zero
    drop out. (This is the divergence between P and P(i) Q_{j|i}, with the marginal P(i) taken from P.)

    Args:
        p: (N, M) P, non-negative, zero where log_q is -inf; of the same normalisation as log_q.
        log_q: (N, M) from `q_similarities`.
        divergence: one of DIVERGENCES.
        alpha: order of "alpha", any real number; not read otherwise.
        smoothing: share in [0, 1) of P that is spread evenly over the pairs log_q allows. Where P has
            zeros, "reverse_kl" and "alpha" <= 0 are infinite without it.

    Returns:
        Scalar, differentiable in log_q and p. "chi_square" and large alpha hold 1/q and overflow to inf
        where P keeps a pair with log q < -88 in float32 (-709 in float64).

    Raises:
        ValueError: when P and Q do not fit, an option is out of range, or the divergence is infinite.

    Source: Lin 1991 (jensen_shannon); Cichocki and Amari 2010 (alpha); Im, Verma and Branson 2018.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {DIVERGENCES}, got {divergence!r}.")
    if not math.isfinite(alpha):
        raise ValueError(f"alpha must be finite, got {alpha}.")
    p, log_q, allowed, weights = _distributions(p, log_q, smoothing)
    q = log_q.exp().where(allowed, 0)
    log_p = p.where(p > 0, 1).log()  # 0 where p is 0: its uses below have p as a factor, or are replaced there
    log_ratio = (log_p - log_q).where(p > 0, 0)
    if divergence == "jensen_shannon":
        log_m = torch.logaddexp(log_p, log_q).where(p > 0, log_q) - math.log(2)
        values = (p * (log_p - log_m) + q * (log_q - log_m)) / 2
    elif divergence == "chi_square":
        values = (p - q) * log_ratio.expm1().where(p > 0, -1)
    else:
        order = {"kl": 1, "reverse_kl": 0, "alpha": alpha}[divergence]
        if order <= 0 and bool((allowed & (p == 0)).any()):
            raise ValueError(
                f"{divergence if divergence != 'alpha' else f'alpha = {alpha}'} is infinite where P is 0 and Q is not: "
                "pass smoothing (for example 0.1) to spread a share of P evenly, or take another divergence."
            )
        values = _alpha_divergence(p, log_q, q, log_ratio, order)
    return (values.sum(1) * weights).sum()


def cross_entropy(p: Tensor, log_q: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """-sum p log q: "kl" plus the entropy of P, averaged over anchors as in `match` (same arguments and errors)."""
    p, log_q, _, weights = _distributions(p, log_q, smoothing)
    return (-(p * log_q).sum(1) * weights).sum()


def _alpha_divergence(p: Tensor, log_q: Tensor, q: Tensor, log_ratio: Tensor, alpha: float) -> Tensor:
    """Terms that sum to the alpha divergence, KL at 1 and reverse KL at 0; exact also close to either."""
    if alpha == 1:
        return p * log_ratio
    if alpha == 0:
        return -q * log_ratio
    if alpha > 0.5:
        return p * ((alpha - 1) * log_ratio).expm1() / (alpha * (alpha - 1))
    exponent = alpha * log_ratio  # q expm1(exponent), where expm1 may overflow while q underflows
    terms = ((log_q + exponent).exp() - q).where(exponent > 1, q * exponent.clamp(max=1).expm1())
    return terms.where(p > 0, -q) / (alpha * (alpha - 1))


def _distributions(p: Tensor, log_q: Tensor, smoothing: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows that each hold one distribution: p, log_q (0 where left out), allowed, and weights that sum to 1."""
    if p.shape != log_q.shape or p.ndim != 2:
        raise ValueError(f"P and log Q must be (N, M) and of equal shape, got {tuple(p.shape)}, {tuple(log_q.shape)}.")
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must lie in [0, 1), got {smoothing}.")
    p = p.to(log_q)
    if not bool(p.isfinite().all()) or bool((p < 0).any()) or not bool((p > 0).any()):
        raise ValueError("P must be finite and non-negative with a positive sum.")
    sums = log_q.detach().logsumexp(1)  # (N,)
    if not bool(sums.abs().max() < TOLERANCE):  # not one distribution per row: is it one in all?
        if not abs(float(sums.logsumexp(0))) < TOLERANCE:
            raise ValueError("log Q is not normalised, or not finite: make it by q_similarities of finite embeddings.")
        if not abs(float(p.detach().sum()) - 1) < TOLERANCE:
            raise ValueError(f"Q is normalised jointly, so P must sum to 1, got {float(p.detach().sum()):.6g}.")
        p = p.flatten()[None]
        log_q = log_q.flatten()[None]
    allowed = log_q > -math.inf
    if bool(((p > 0) & ~allowed).any()):
        raise ValueError("P has mass where log Q is -inf (a point with itself, or a masked pair): set it to 0.")
    mass = p.sum(1)
    has_neighbour = mass > 0
    log_q = log_q[has_neighbour]
    allowed = allowed[has_neighbour]
    mass = mass[has_neighbour]
    p = p[has_neighbour] / mass[:, None]
    p = (1 - smoothing) * p + smoothing * allowed / allowed.sum(1, keepdim=True)
    return p, log_q.where(allowed, 0), allowed, mass / mass.sum()
