"""Partition functions, sums of kernels over many pairs of points, with their exact gradient, tile by tile.

`log_partition` and `log_cross_partition`: over all pairs of a batch in O(N D) memory. A contrastive loss of 2N points
needs the sums of k(y_i, y_j) over j and the gradient of their logarithm, not the 2N x 2N matrix itself. One pass over
square tiles of its upper triangle gives both for one joint sum; a sum per anchor takes a second pass, since a pair's
gradient needs the sums of both its ends.

`log_bank_partition`: of queries over a bank of constants, such as MoCo's queue, in one pass that copies nothing of
the bank. Sums run relative to each query's largest kernel so far and are rescaled when a larger one comes.

The gradient is made together with the value and only scaled in the backward pass. Points of a batch are first scaled
(`Kernel.scaled`), so that kernels need no temperature here and autograd carries its gradient.

As long as no log k can lie more than 80 below the largest, kernels are summed as they are: nothing underflows in
float32. Otherwise the same sums run over logarithms, about twice as slowly. Distances come from products, where far
points cancel; points so far apart that float32 would lose them are computed in float64.

Source: van der Maaten and Hinton 2008 (gradient of t-SNE); He et al. 2020 (MoCo); Rabe and Staats 2021 (sums of
exponentials in chunks, with a running maximum).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.matrix_products import product
from .kernels import Kernel, in_float32

_LARGEST_RANGE = 80.0  # exp(-80) is a normal float32
_LARGEST_SQUARE = 4096.0  # of a point's norm, times the exponent: float32 errs by 1e-3 in log k from there on
_KEPT_BYTES = 128 * 2**20  # kernels kept between the two passes; when they need more they are computed twice
_CPU_TILE = 640  # near the cores
_GPU_TILE = 4096  # few launches
_CPU_BANK_TILE = (256, 1024)  # queries, and points of the bank
_GPU_BANK_TILE = (4096, 4096)


def log_partition(
    points: Tensor, kernel: Kernel, *, joint: bool, weights: Tensor | None = None, reach: float | None = None
) -> Tensor:
    """Weighted sum of the anchors' log sum over j != i of k(x_i, x_j), or the log sum over all ordered pairs.

    Args:
        points: (M, D), M >= 2; normalised here for "cosine".
        kernel: its scale and exponent get their gradient where they are tensors.
        joint: one sum over all pairs i != j instead of one per anchor; weights are not read then.
        weights: (M,) of the anchors, constants; None is 1/M each.
        reach: no point of `kernel.scaled` is further from their mean than that; None: it is read from the device.

    Returns:
        Scalar, once differentiable.

    Raises:
        ValueError: when a point is NaN or infinite.
        RuntimeError: when a second derivative is asked for.
    """
    (points,) = kernel.scaled(points)
    weights = points.new_full((len(points),), 1 / len(points)) if weights is None else weights.detach().to(points)
    exponent = _as_tensor(kernel.exponent, points)
    return _LogPartition.apply(points, None, exponent, weights, None, kernel, joint, reach)


def log_cross_partition(
    left: Tensor, right: Tensor, kernel: Kernel, *, weights: Tensor, right_weights: Tensor
) -> Tensor:
    """sum_i w_i log sum_j k(x_i, y_j) + sum_j v_j log sum_i k(x_i, y_j) between two sets of points.

    Args:
        left, right: (M, D) and (K, D); weights (M,) and right_weights (K,) are constants. The rest as `log_partition`.
    """
    left, right = kernel.scaled(left, right)
    exponent = _as_tensor(kernel.exponent, left)
    weights, right_weights = weights.to(left), right_weights.to(left)
    return _LogPartition.apply(left, right, exponent, weights, right_weights, kernel, False, None)


def log_bank_partition(query: Tensor, bank: Tensor, kernel: Kernel) -> Tensor:
    """log sum over j of k(q_i, b_j) for every query, over a bank of constants such as MoCo's queue.

    The bank is read once and never copied, and nothing of it is kept for the backward pass, so it may be
    overwritten right after the call.

    Args:
        query: (B, D); normalised here for "cosine".
        bank: (K, D), K >= 1, without gradient; normalised here for "cosine".
        kernel: its scale and exponent get their gradient where they are tensors.

    Returns:
        (B,), once differentiable in query, scale and exponent.
    """
    (query,) = in_float32(query)
    if kernel.form == "cosine":
        query = F.normalize(query, dim=1)
    scale = _as_tensor(kernel.scale, query)
    exponent = _as_tensor(kernel.exponent, query)
    return _LogBankPartition.apply(query, bank.detach(), scale, exponent, kernel)


def _as_tensor(value: float | Tensor, like: Tensor) -> Tensor:
    """A 0-dim tensor of the type and device of `like`; a number is filled in there, not copied to it."""
    return value.to(like) if isinstance(value, Tensor) else like.new_full((), value)


class _TiledKernel:
    """A kernel between the rows of two matrices of scaled points: a tile is one product of extended rows."""

    def __init__(self, name: str, exponent: float, left: Tensor, right: Tensor, left_reach: float, right_reach: float):
        left_squares = left.pow(2).sum(1, keepdim=True)
        right_squares = right.pow(2).sum(1, keepdim=True)
        left_ones = torch.ones_like(left_squares)
        right_ones = torch.ones_like(right_squares)
        self.name = name
        self.exponent = exponent
        self.largest = 0.0  # no log k lies above it
        if name == "cosine":
            self.largest = left_reach * right_reach
            span = 2 * left_reach * right_reach
            left_columns = [left, left_ones]
            right_columns = [right, -self.largest * right_ones]
        elif name == "gaussian":
            span = (left_reach + right_reach) ** 2
            left_columns = [2 * left, -left_squares, left_ones]
            right_columns = [right, right_ones, -right_squares]
        else:
            span = exponent * math.log1p((left_reach + right_reach) ** 2)
            left_columns = [-2 * left, 1 + left_squares, left_ones]
            right_columns = [right, right_ones, right_squares]
        self.left = torch.cat(left_columns, 1)
        self.right = torch.cat(right_columns, 1)
        self.direct = span < _LARGEST_RANGE

    def similarity(self, rows: slice, columns: slice, spare: Tensor) -> tuple[Tensor, Tensor | None]:
        """k / exp(largest) of a tile, and 1 / (1 + squared distance) for "student_t"; `spare` is overwritten."""
        tile = product(self.left[rows], self.right[columns])
        if self.name != "student_t":
            return tile.clamp_(max=0).exp_(), None
        inverse = tile.clamp_(min=1).reciprocal_()
        return _power_(spare, inverse, self.exponent), inverse

    def log_similarity(self, rows: slice, columns: slice, spare: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `similarity`, with the logarithm of the first."""
        tile = product(self.left[rows], self.right[columns])
        if self.name != "student_t":
            return tile.clamp_(max=0), None
        torch.log(tile.clamp_(min=1), out=spare)
        return spare.mul_(-self.exponent), tile.reciprocal_()


def _power_(target: Tensor, base: Tensor, exponent: float) -> Tensor:
    """base ** exponent into target, base in (0, 1]; by products when the exponent is a small multiple of 1/2."""
    if not (1 <= exponent <= 16 and (2 * exponent).is_integer()):
        return torch.log(base, out=target).mul_(exponent).exp_()
    whole = int(exponent)
    digits = f"{whole:b}"
    torch.pow(base, int(digits[:2], 2), out=target)  # 1, 2 or 3: one pass
    for digit in digits[2:]:
        target.mul_(target)
        if digit == "1":
            target.mul_(base)
    return target if exponent == whole else target.mul_(base.sqrt())


def _read(kernel: Kernel, *points: Tensor, reach: float | None = None) -> tuple[float, float, list[float]]:
    """Scale, exponent, and the largest squared norm of each set of scaled points, in one read of the device.

    Nothing is read where all is known: of a cosine of given temperature the norms are the root of the scale; `reach`
    says how large they are at most. On a CPU,
    which has nothing to wait for, they are read nevertheless, so that a NaN is found here and not in the loss.

    Raises:
        ValueError: when a point is NaN or infinite.
    """
    given = [kernel.scale, 1.0 if kernel.form == "cosine" else kernel.exponent]
    learned = [value.detach().to(points[0]) for value in given if isinstance(value, Tensor)]
    known = kernel.scale if kernel.form == "cosine" else reach and reach**2
    if known is not None and not learned and points[0].device.type != "cpu":
        scale, exponent = map(float, given)
        return scale, exponent, [float(known)] * len(points)
    values = torch.stack([*learned, *(part.pow(2).sum(1).max().to(points[0]) for part in points)]).tolist()
    scale, exponent = (values.pop(0) if isinstance(value, Tensor) else float(value) for value in given)
    if not all(map(math.isfinite, values)):
        bad = sum(int((~part.pow(2).sum(1).isfinite()).sum()) for part in points)
        raise ValueError(f"embeddings must be finite, got NaN, inf or an overflow of squares in {bad} rows.")
    return scale, exponent, values


def _precise(kernel: str, exponent: float, squares: list[float], *points: Tensor) -> list[Tensor]:
    """The sets of scaled points, in float64 where float32 would lose small distances between far points."""
    far = kernel != "cosine" and max(1.0, exponent) * max(squares) > _LARGEST_SQUARE
    return [part.double() if far and part.device.type != "mps" else part for part in points]


class _Points:
    """One set of points: their sums, and what their gradient is made of."""

    def __init__(self, points: Tensor, weights: Tensor):
        self.points = points
        self.weights = weights
        self.log_sums = points.new_full((len(points),), -math.inf)  # log sum over j of k_ij
        self.sums = points.new_zeros(len(points))
        self.pulls = torch.zeros_like(points)  # sum over j of v_ij y_j: v the derivative by log k (times inverse)
        self.pull_sums = points.new_zeros(len(points))  # sum over j of v_ij
        self._transposed: tuple[slice | None, Tensor] = None, points

    def transposed(self, rows: slice) -> Tensor:
        """(D, len(rows)) points with contiguous rows; made once for all tiles of the same rows."""
        if self._transposed[0] != rows:
            self._transposed = rows, self.points[rows].T.contiguous()
        return self._transposed[1]

    def gradient(self, kernel: _TiledKernel) -> Tensor:
        if kernel.name == "cosine":
            return self.pulls
        factor = -2 * (kernel.exponent if kernel.name == "student_t" else 1.0)
        return self.pulls.neg_().addcmul_(self.pull_sums[:, None], self.points).mul_(factor)


class _Pairs:
    """The pass over the tiles between two sets, or between one set and itself (each pair once)."""

    def __init__(self, left: _Points, right: _Points, kernel: _TiledKernel, with_gradient: bool, learn_exponent: bool):
        self.left = left
        self.right = right
        self.kernel = kernel
        self.with_gradient = with_gradient
        self.learn_exponent = learn_exponent
        self.side = _CPU_TILE if left.points.device.type == "cpu" else _GPU_TILE
        elements = min(self.side, len(left.points)) * min(self.side, len(right.points))
        self.buffers = left.points.new_empty(2, elements)
        self.exponent_gradient = left.points.new_zeros(())
        self.symmetric = left is right

    def tiles(self) -> Iterator[tuple[slice, slice, bool]]:
        """(rows, columns, whether they are the same points)."""
        height = len(self.left.points)
        width = len(self.right.points)
        for top in range(0, height, self.side):
            for first in range(top if self.symmetric else 0, width, self.side):
                rows = slice(top, min(top + self.side, height))
                columns = slice(first, min(first + self.side, width))
                yield rows, columns, self.symmetric and top == first

    def buffer(self, index: int, rows: slice, columns: slice) -> Tensor:
        shape = rows.stop - rows.start, columns.stop - columns.start
        return self.buffers[index, : shape[0] * shape[1]].view(shape)

    def similarities(self, logarithm: bool = False) -> Iterator[tuple[slice, slice, bool, Tensor, Tensor | None]]:
        """(rows, columns, diagonal, kernel or its logarithm, inverse) of each tile, to be used before the next."""
        compute = self.kernel.log_similarity if logarithm else self.kernel.similarity
        for rows, columns, diagonal in self.tiles():
            similarity, inverse = compute(rows, columns, self.buffer(0, rows, columns))
            if diagonal:
                similarity.fill_diagonal_(-math.inf if logarithm else 0)
            yield rows, columns, diagonal, similarity, inverse

    def pull(self, strength: Tensor, inverse: Tensor | None, rows: slice, columns: slice, diagonal: bool) -> None:
        """Gradient of the tile's pairs; strength: derivative by log k of both orders of a pair, overwritten."""
        if self.learn_exponent:
            self.exponent_gradient += (strength * inverse.log()).sum() / (2 if diagonal else 1)
        if inverse is not None:
            strength.mul_(inverse)
        left = self.left
        right = self.right
        distances = self.kernel.name != "cosine"
        left.pulls[rows] += product(strength, right.points[columns].T)
        if distances:
            left.pull_sums[rows] += strength.sum(1)
        if not diagonal:
            right.pulls[columns] += product(left.transposed(rows), strength.T).T
            if distances:
                right.pull_sums[columns] += strength.sum(0)

    def joint(self) -> Tensor:
        """log of the sum over all ordered pairs: one pass."""
        total = self.left.points.new_zeros(())
        for rows, columns, diagonal, similarity, inverse in self.similarities():
            total += similarity.sum() * (1 if diagonal else 2)
            if self.with_gradient:
                self.pull(similarity, inverse, rows, columns, diagonal)
        for part in (self.left.pulls, self.left.pull_sums, self.exponent_gradient):
            part.mul_(2 / total)
        return total.log() + self.kernel.largest

    def per_anchor(self) -> Tensor:
        """Weighted log sums of both sets: two passes, the second over kept kernels where they are small."""
        left = self.left
        right = self.right
        kept = []
        pairs = len(left.points) * len(right.points) // (2 if self.symmetric else 1)
        keep = self.with_gradient and not self.learn_exponent and pairs * left.points.element_size() <= _KEPT_BYTES
        for rows, columns, diagonal, similarity, inverse in self.similarities():
            left.sums[rows] += similarity.sum(1)
            if not diagonal:
                right.sums[columns] += similarity.sum(0)
            if keep:
                strength = similarity.clone() if inverse is None else similarity * inverse
                kept.append((rows, columns, diagonal, strength, None))
        value = self._weighted([part.sums.log() for part in self._sets()])
        if self.with_gradient:
            for rows, columns, diagonal, strength, inverse in kept or self.similarities():
                left_share = left.weights[rows] / left.sums[rows]
                right_share = right.weights[columns] / right.sums[columns]
                strength.mul_(torch.add(left_share[:, None], right_share, out=self.buffer(1, rows, columns)))
                self.pull(strength, inverse, rows, columns, diagonal)
        return value

    def over_logarithms(self, joint: bool) -> Tensor:
        """The same in logarithms, for kernels of any range: two passes."""
        left = self.left
        right = self.right
        for rows, columns, diagonal, log_k, _ in self.similarities(logarithm=True):
            left.log_sums[rows] = left.log_sums[rows].logaddexp(log_k.logsumexp(1))
            if not diagonal:
                right.log_sums[columns] = right.log_sums[columns].logaddexp(log_k.logsumexp(0))
        if joint:
            total = left.log_sums.logsumexp(0)
            left.log_sums.fill_(total)
            left.weights = torch.ones_like(left.weights)
            value = total + self.kernel.largest
        else:
            value = self._weighted([part.log_sums for part in self._sets()])
        if self.with_gradient:
            left_offset = left.weights.log() - left.log_sums
            right_offset = right.weights.log() - right.log_sums
            for rows, columns, diagonal, log_k, inverse in self.similarities(logarithm=True):
                strength = torch.add(log_k, left_offset[rows, None], out=self.buffer(1, rows, columns)).exp_()
                strength += log_k.add_(right_offset[columns]).exp_()
                self.pull(strength, inverse, rows, columns, diagonal)
        return value

    def _sets(self) -> list[_Points]:
        return [self.left] if self.symmetric else [self.left, self.right]

    def _weighted(self, log_sums: list[Tensor]) -> Tensor:
        terms = zip(self._sets(), log_sums, strict=True)
        return sum((part.weights * (values + self.kernel.largest)).sum() for part, values in terms)


class _LogPartition(torch.autograd.Function):
    @staticmethod
    def forward(ctx, left, right, exponent, weights, right_weights, kernel: Kernel, joint: bool, reach) -> Tensor:
        dtype = left.dtype
        wanted = ctx.needs_input_grad
        with torch.autocast(left.device.type, enabled=False):
            points = [left] if right is None else [left, right]
            _, power_of_kernel, squares = _read(kernel, *points, reach=reach)
            points = _precise(kernel.form, power_of_kernel, squares, *points)
            sides = [_Points(points[0], weights.to(points[0]))]
            if right is not None:
                sides.append(_Points(points[1], right_weights.to(points[1])))
            learn_exponent = wanted[2] and kernel.form == "student_t"
            reaches = squares[0] ** 0.5, squares[-1] ** 0.5
            tiled = _TiledKernel(kernel.form, power_of_kernel, points[0], points[-1], *reaches)
            pairs = _Pairs(sides[0], sides[-1], tiled, any(wanted[:3]), learn_exponent)
            if not tiled.direct:
                value = pairs.over_logarithms(joint)
            else:
                value = pairs.joint() if joint else pairs.per_anchor()
            gradients = [side.gradient(tiled).to(dtype) for side in sides] if any(wanted[:3]) else []
        ctx.save_for_backward(*gradients, pairs.exponent_gradient.to(dtype))
        return value.to(dtype)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        _refuse_second_derivatives()
        left, *right, exponent = (upstream * gradient for gradient in ctx.saved_tensors)
        return left, (right[0] if right else None), exponent, None, None, None, None, None


class _Bank:
    """Running sums of queries over chunks of a bank, relative to each query's largest kernel so far."""

    def __init__(
        self,
        query: Tensor,
        bank: Tensor,
        scale: float,
        exponent: float,
        kernel: str,
        learn_scale: bool,
        learn_exponent: bool,
    ):
        self.bank = bank
        self.kernel = kernel
        self.scale = scale
        self.exponent = exponent
        self.learn_scale = learn_scale
        self.learn_exponent = learn_exponent
        self.centre = torch.zeros_like(query[0]) if kernel == "cosine" else query.mean(0)
        self.query = query - self.centre
        squares = self.query.pow(2).sum(1, keepdim=True)
        ones = query.new_ones(len(query), 1)
        columns = {
            "cosine": [scale * self.query],
            "gaussian": [2 * scale * self.query, -scale * squares, ones],
            "student_t": [-2 * scale * self.query, 1 + scale * squares, ones],
        }
        self.left = torch.cat(columns[kernel], 1)
        self.log_offset = query.new_full((len(query), 1), -math.inf)  # each query's largest log k so far
        self.sums = query.new_zeros(len(query), 1)  # sum over j of k_ij / exp(offset), and so are the next three
        self.log_sums = query.new_zeros(len(query), 1)  # of k_ij times what the scale or the exponent multiplies
        self.pull_sums = query.new_zeros(len(query), 1)  # of k_ij / (1 + squared distance)
        self.pulls = torch.zeros_like(query)  # of k_ij, or that, times b_j

    def visit(self) -> None:
        on_cpu = self.query.device.type == "cpu"
        height, width = _CPU_BANK_TILE if on_cpu else _GPU_BANK_TILE
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
            similarity = _power_(torch.empty_like(inverse), inverse / nearest, self.exponent)
            largest = self.exponent * nearest.log()
        else:
            largest = tile.amax(1, keepdim=True)
            similarity = tile.sub_(largest).exp_()
        offset = torch.maximum(self.log_offset[rows], largest)
        old = (self.log_offset[rows] - offset).exp()
        new = (largest - offset).exp()
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
        pulls = self.pulls / self.sums
        log_sums = self.log_sums / self.sums
        if self.kernel == "cosine":
            return self.scale * pulls, (self.query * pulls).sum(1, keepdim=True), torch.zeros_like(log_sums)
        if self.kernel == "gaussian":
            return 2 * self.scale * (pulls - self.query), log_sums / self.scale, torch.zeros_like(log_sums)
        share = self.pull_sums / self.sums
        by_query = 2 * self.exponent * self.scale * (pulls - share * self.query)
        return by_query, self.exponent / self.scale * (share - 1), log_sums


class _LogBankPartition(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, bank: Tensor, scale: Tensor, exponent: Tensor, kernel: Kernel) -> Tensor:
        dtype = query.dtype
        with torch.autocast(query.device.type, enabled=False):
            learn_scale = ctx.needs_input_grad[2]
            learn_exponent = ctx.needs_input_grad[3] and kernel.form == "student_t"
            # Far points of the bank need no more precision: only those near a query, so about as far, matter.
            centred = (query - query.mean(0)) * scale**0.5
            factor, power_of_kernel, squares = _read(kernel, centred)
            query = query.to(_precise(kernel.form, power_of_kernel, squares, centred)[0].dtype)
            sums = _Bank(query, bank, factor, power_of_kernel, kernel.form, learn_scale, learn_exponent)
            sums.visit()
            ctx.save_for_backward(*(gradient.to(dtype) for gradient in sums.gradients()))
            return (sums.sums.log() + sums.log_offset)[:, 0].to(dtype)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        _refuse_second_derivatives()
        by_query, by_scale, by_exponent = (upstream[:, None] * gradient for gradient in ctx.saved_tensors)
        return by_query, None, by_scale.sum(), by_exponent.sum(), None


def _refuse_second_derivatives() -> None:
    """Raise RuntimeError in a backward pass that is itself recorded: its result would be taken for a constant."""
    if torch.is_grad_enabled():
        raise RuntimeError("the loss has a first derivative only; call backward without create_graph=True.")
