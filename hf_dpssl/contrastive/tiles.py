"""Partition functions over all pairs of points with their exact gradient, tile by tile in O(N D) memory.

A contrastive loss of 2N points needs the sums of k(y_i, y_j) over j and the gradient of their logarithm, not the
2N x 2N matrix itself. One pass over square tiles of its upper triangle gives both for one joint sum; a sum per
anchor takes a second pass, since a pair's gradient needs the sums of both its ends. The gradient is made together
with the value and only scaled in the backward pass.

Points come scaled, so that kernels need no temperature here and autograd carries its gradient:

    "cosine"     log k = y_i . y_j                              y = unit vectors / sqrt(temperature)
    "gaussian"   log k = -|y_i - y_j|^2                         y = x / sqrt(2 temperature)
    "student_t"  log k = -exponent * log(1 + |y_i - y_j|^2)     y = x / sqrt(temperature * dof), exponent (dof + 1)/2

As long as no log k can lie more than 80 below the largest, kernels are summed as they are: nothing underflows in
float32. Otherwise the same sums run over logarithms, about twice as slowly. Distances come from products, where far
points cancel; points so far apart that float32 would lose them are computed in float64.

Source: van der Maaten and Hinton 2008 (gradient of t-SNE); Rabe and Staats 2021 (sums of exponentials in chunks).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..models.matrix_products import product

_LARGEST_RANGE = 80.0  # exp(-80) is a normal float32
_LARGEST_SQUARE = 4096.0  # of a point's norm, times the exponent: float32 errs by 1e-3 in log k from there on
_KEPT_BYTES = 128 * 2**20  # kernels kept between the two passes; when they need more they are computed twice
_CPU_TILE, _GPU_TILE = 640, 4096  # near the cores; few launches on a GPU


def log_partition(
    points: Tensor, *, kernel: str, exponent: Tensor | float = 1.0, joint: bool, weights: Tensor | None = None
) -> Tensor:
    """Weighted sum of the anchors' log sum over j != i of k(y_i, y_j), or the log sum over all ordered pairs.

    Args:
        points: (M, D) scaled points (see above), M >= 2, float32 or float64.
        kernel: "cosine", "gaussian" or "student_t".
        exponent: of "student_t", > 0; a 0-dim tensor gets its gradient.
        joint: one sum over all pairs i != j instead of one per anchor; weights are not read then.
        weights: (M,) of the anchors, constants; None is 1/M each.

    Returns:
        Scalar, once differentiable.

    Raises:
        ValueError: when a point is NaN or infinite.
        RuntimeError: when a second derivative is asked for.
    """
    weights = points.new_full((len(points),), 1 / len(points)) if weights is None else weights.detach().to(points)
    exponent = torch.as_tensor(exponent, dtype=points.dtype, device=points.device)
    return _LogPartition.apply(points, None, exponent, weights, None, kernel, joint)


def log_cross_partition(
    left: Tensor, right: Tensor, *, kernel: str, exponent: Tensor | float = 1.0, weights: Tensor, right_weights: Tensor
) -> Tensor:
    """sum_i w_i log sum_j k(x_i, y_j) + sum_j v_j log sum_i k(x_i, y_j) between two sets of scaled points.

    Args:
        left, right: (M, D) and (K, D); weights (M,) and right_weights (K,) are constants. The rest as `log_partition`.
    """
    exponent = torch.as_tensor(exponent, dtype=left.dtype, device=left.device)
    return _LogPartition.apply(left, right, exponent, weights.to(left), right_weights.to(left), kernel, False)


class _Kernel:
    """A kernel between the rows of two matrices of scaled points: a tile is one product of extended rows."""

    def __init__(self, name: str, exponent: float, left: Tensor, right: Tensor):
        left_squares, right_squares = left.pow(2).sum(1, keepdim=True), right.pow(2).sum(1, keepdim=True)
        reach = float(left_squares.max()) ** 0.5, float(right_squares.max()) ** 0.5
        left_ones, right_ones = torch.ones_like(left_squares), torch.ones_like(right_squares)
        self.name, self.exponent, self.largest = name, exponent, 0.0
        if name == "cosine":
            self.largest, span = reach[0] * reach[1], 2 * reach[0] * reach[1]
            left, right = [left, left_ones], [right, -self.largest * right_ones]
        elif name == "gaussian":
            span = sum(reach) ** 2
            left, right = [2 * left, -left_squares, left_ones], [right, right_ones, -right_squares]
        else:
            span = exponent * math.log1p(sum(reach) ** 2)
            left, right = [-2 * left, 1 + left_squares, left_ones], [right, right_ones, right_squares]
        self.left, self.right = torch.cat(left, 1), torch.cat(right, 1)
        self.direct = span < _LARGEST_RANGE

    def similarity(self, rows: slice, columns: slice, spare: Tensor) -> tuple[Tensor, Tensor | None]:
        """k / exp(largest) of a tile, and 1 / (1 + squared distance) for "student_t"; `spare` is overwritten."""
        tile = product(self.left[rows], self.right[columns])
        if self.name != "student_t":
            return tile.clamp_(max=0).exp_(), None
        inverse = tile.clamp_(min=1).reciprocal_()
        return power_(spare, inverse, self.exponent), inverse

    def log_similarity(self, rows: slice, columns: slice, spare: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `similarity`, with the logarithm of the first."""
        tile = product(self.left[rows], self.right[columns])
        if self.name != "student_t":
            return tile.clamp_(max=0), None
        torch.log(tile.clamp_(min=1), out=spare)
        return spare.mul_(-self.exponent), tile.reciprocal_()


def power_(target: Tensor, base: Tensor, exponent: float) -> Tensor:
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


def precise(kernel: str, exponent: float, *points: Tensor) -> list[Tensor]:
    """The sets of scaled points, in float64 where float32 would lose small distances between far points.

    Raises:
        ValueError: when a point is NaN or infinite.
    """
    squares = [part.pow(2).sum(1) for part in points]
    largest = max(float(part.max()) for part in squares)
    if not math.isfinite(largest):
        bad = sum(int((~part.isfinite()).sum()) for part in squares)
        raise ValueError(f"embeddings must be finite, got NaN, inf or an overflow of squares in {bad} rows.")
    far = kernel != "cosine" and max(1.0, exponent) * largest > _LARGEST_SQUARE
    return [part.double() if far and part.device.type != "mps" else part for part in points]


class _Points:
    """One set of points: their sums, and what their gradient is made of."""

    def __init__(self, points: Tensor, weights: Tensor):
        self.points, self.weights = points, weights
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

    def gradient(self, kernel: _Kernel) -> Tensor:
        if kernel.name == "cosine":
            return self.pulls
        factor = -2 * (kernel.exponent if kernel.name == "student_t" else 1.0)
        return self.pulls.neg_().addcmul_(self.pull_sums[:, None], self.points).mul_(factor)


class _Pairs:
    """The pass over the tiles between two sets, or between one set and itself (each pair once)."""

    def __init__(self, left: _Points, right: _Points, kernel: _Kernel, with_gradient: bool, learn_exponent: bool):
        self.left, self.right, self.kernel = left, right, kernel
        self.with_gradient, self.learn_exponent = with_gradient, learn_exponent
        self.side = _CPU_TILE if left.points.device.type == "cpu" else _GPU_TILE
        elements = min(self.side, len(left.points)) * min(self.side, len(right.points))
        self.buffers = left.points.new_empty(2, elements)
        self.exponent_gradient = left.points.new_zeros(())
        self.symmetric = left is right

    def tiles(self) -> Iterator[tuple[slice, slice, bool]]:
        """(rows, columns, whether they are the same points)."""
        height, width = len(self.left.points), len(self.right.points)
        for top in range(0, height, self.side):
            for first in range(top if self.symmetric else 0, width, self.side):
                rows, columns = slice(top, min(top + self.side, height)), slice(first, min(first + self.side, width))
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
        left, right, distances = self.left, self.right, self.kernel.name != "cosine"
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
        left, right, kept = self.left, self.right, []
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
                share = left.weights[rows] / left.sums[rows], right.weights[columns] / right.sums[columns]
                strength.mul_(torch.add(share[0][:, None], share[1], out=self.buffer(1, rows, columns)))
                self.pull(strength, inverse, rows, columns, diagonal)
        return value

    def over_logarithms(self, joint: bool) -> Tensor:
        """The same in logarithms, for kernels of any range: two passes."""
        left, right = self.left, self.right
        for rows, columns, diagonal, log_k, _ in self.similarities(logarithm=True):
            left.log_sums[rows] = left.log_sums[rows].logaddexp(log_k.logsumexp(1))
            if not diagonal:
                right.log_sums[columns] = right.log_sums[columns].logaddexp(log_k.logsumexp(0))
        if joint:
            value = left.log_sums.logsumexp(0)
            left.log_sums.fill_(value)
            left.weights = torch.ones_like(left.weights)
            value = value + self.kernel.largest
        else:
            value = self._weighted([part.log_sums for part in self._sets()])
        if self.with_gradient:
            offset, right_offset = (part.weights.log() - part.log_sums for part in (left, right))
            for rows, columns, diagonal, log_k, inverse in self.similarities(logarithm=True):
                strength = torch.add(log_k, offset[rows, None], out=self.buffer(1, rows, columns)).exp_()
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
    def forward(ctx, left, right, exponent, weights, right_weights, kernel: str, joint: bool) -> Tensor:
        dtype, wanted = left.dtype, ctx.needs_input_grad
        with torch.autocast(left.device.type, enabled=False):
            power_of_kernel = float(exponent)
            points = precise(kernel, power_of_kernel, *([left] if right is None else [left, right]))
            sides = [_Points(points[0], weights.to(points[0]))]
            if right is not None:
                sides.append(_Points(points[1], right_weights.to(points[1])))
            learn_exponent = wanted[2] and kernel == "student_t"
            tiled = _Kernel(kernel, power_of_kernel, points[0], points[-1])
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
        refuse_second_derivatives()
        left, *right, exponent = (upstream * gradient for gradient in ctx.saved_tensors)
        return left, (right[0] if right else None), exponent, None, None, None, None


def refuse_second_derivatives() -> None:
    """Raise RuntimeError in a backward pass that is itself recorded: its result would be taken for a constant."""
    if torch.is_grad_enabled():
        raise RuntimeError("the loss has a first derivative only; call backward without create_graph=True.")
