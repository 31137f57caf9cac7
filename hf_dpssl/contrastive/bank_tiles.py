"""Partition functions of queries over a bank of constants, such as MoCo's queue: one pass, no copy of the bank.

The gradient is made together with the value, as in tiles.py, so that nothing of the bank is kept for the backward
pass. Sums run relative to each query's largest kernel so far and are rescaled when a larger one comes.

Source: He et al. 2020 (MoCo); Rabe and Staats 2021 (running maximum over chunks).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.matrix_products import product
from .tiles import power_, precise, refuse_second_derivatives


def log_bank_partition(
    query: Tensor, bank: Tensor, *, kernel: str, scale: Tensor | float, exponent: Tensor | float = 1.0
) -> Tensor:
    """log sum over j of k(q_i, b_j) for every query, over a bank of constants such as MoCo's queue.

    The bank is read once and never copied, and nothing of it is kept for the backward pass, so it may be
    overwritten right after the call.

    Args:
        query: (B, D), unit vectors for "cosine".
        bank: (K, D) of any length for "cosine" (normalised here), K >= 1, without gradient.
        kernel: "cosine" (log k = scale * q . b), "gaussian" (-scale |q - b|^2) or "student_t"
            (-exponent log(1 + scale |q - b|^2)).
        scale, exponent: numbers, or 0-dim tensors that get their gradient.

    Returns:
        (B,), once differentiable in query, scale and exponent.
    """
    scale, exponent = (torch.as_tensor(value, dtype=query.dtype, device=query.device) for value in (scale, exponent))
    return _LogBankPartition.apply(query, bank.detach(), scale, exponent, kernel)


class _Bank:
    """Running sums of queries over chunks of a bank, relative to each query's largest kernel so far."""

    def __init__(
        self, query: Tensor, bank: Tensor, scale: float, exponent: float, kernel: str, learn: tuple[bool, bool]
    ):
        self.kernel, self.scale, self.exponent, self.bank = kernel, scale, exponent, bank
        self.learn_scale, self.learn_exponent = learn
        self.centre = torch.zeros_like(query[0]) if kernel == "cosine" else query.mean(0)
        self.query = query - self.centre
        squares, ones = self.query.pow(2).sum(1, keepdim=True), query.new_ones(len(query), 1)
        parts = {
            "cosine": [scale * self.query],
            "gaussian": [2 * scale * self.query, -scale * squares, ones],
            "student_t": [-2 * scale * self.query, 1 + scale * squares, ones],
        }
        self.left = torch.cat(parts[kernel], 1)
        self.log_offset = query.new_full((len(query), 1), -math.inf)
        self.sums, self.pull_sums, self.log_sums = (query.new_zeros(len(query), 1) for _ in range(3))
        self.pulls = torch.zeros_like(query)

    def visit(self) -> None:
        on_cpu = self.query.device.type == "cpu"
        height, width = (256, 1024) if on_cpu else (4096, 4096)
        for chunk in self.bank.split(width):
            chunk = chunk.to(self.query)
            chunk = F.normalize(chunk, dim=1) if self.kernel == "cosine" else chunk - self.centre
            right = chunk if self.kernel == "cosine" else self._extended(chunk)
            for top in range(0, len(self.query), height):
                rows = slice(top, min(top + height, len(self.query)))
                self._add(product(self.left[rows], right), chunk, rows)

    def _extended(self, chunk: Tensor) -> Tensor:
        squares = chunk.pow(2).sum(1, keepdim=True) * self.scale
        return torch.cat([chunk, torch.ones_like(squares), squares if self.kernel == "student_t" else -squares], 1)

    def _add(self, tile: Tensor, chunk: Tensor, rows: slice) -> None:
        """Add a chunk's kernels; what was summed before is rescaled when a query meets a larger kernel."""
        if self.kernel == "student_t":
            inverse = tile.clamp_(min=1).reciprocal_()
            nearest = inverse.amax(1, keepdim=True)
            similarity = power_(torch.empty_like(inverse), inverse / nearest, self.exponent)
            largest = self.exponent * nearest.log()
        else:
            largest = tile.amax(1, keepdim=True)
            similarity = tile.sub_(largest).exp_()
        offset = torch.maximum(self.log_offset[rows], largest)
        old, new = (self.log_offset[rows] - offset).exp(), (largest - offset).exp()
        self.log_offset[rows] = offset
        self.sums[rows] = self.sums[rows] * old + similarity.sum(1, keepdim=True) * new
        if self.learn_exponent or (self.learn_scale and self.kernel == "gaussian"):
            log_k = inverse.log() if self.kernel == "student_t" else similarity.log().clamp_(min=-1e4) + largest
            self.log_sums[rows] = self.log_sums[rows] * old + (similarity * log_k).sum(1, keepdim=True) * new
        if self.kernel == "student_t":
            similarity.mul_(inverse)
            self.pull_sums[rows] = self.pull_sums[rows] * old + similarity.sum(1, keepdim=True) * new
        self.pulls[rows] = self.pulls[rows] * old + product(similarity, chunk.T) * new

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Derivatives of each query's log sum by the query (B, D), by the scale (B, 1) and by the exponent (B, 1)."""
        pulls, log_sums = self.pulls / self.sums, self.log_sums / self.sums
        if self.kernel == "cosine":
            return self.scale * pulls, (self.query * pulls).sum(1, keepdim=True), torch.zeros_like(log_sums)
        if self.kernel == "gaussian":
            return 2 * self.scale * (pulls - self.query), log_sums / self.scale, torch.zeros_like(log_sums)
        share = self.pull_sums / self.sums
        by_query = 2 * self.exponent * self.scale * (pulls - share * self.query)
        return by_query, self.exponent / self.scale * (share - 1), log_sums


class _LogBankPartition(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, bank: Tensor, scale: Tensor, exponent: Tensor, kernel: str) -> Tensor:
        dtype, factor, power_of_kernel = query.dtype, float(scale), float(exponent)
        with torch.autocast(query.device.type, enabled=False):
            learn = ctx.needs_input_grad[2], ctx.needs_input_grad[3] and kernel == "student_t"
            # Far points of the bank need no more precision: only those near a query, so about as far, matter.
            centred = (query - query.mean(0)) * factor**0.5
            query = query.to(precise(kernel, power_of_kernel, centred)[0].dtype)
            sums = _Bank(query, bank, factor, power_of_kernel, kernel, learn)
            sums.visit()
            ctx.save_for_backward(*(gradient.to(dtype) for gradient in sums.gradients()))
            return (sums.sums.log() + sums.log_offset)[:, 0].to(dtype)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        refuse_second_derivatives()
        by_query, by_scale, by_exponent = (upstream[:, None] * gradient for gradient in ctx.saved_tensors)
        return by_query, None, by_scale.sum(), by_exponent.sum(), None
