"""Tensors and batch statistics over processes, with the gradient that DistributedDataParallel needs.

All functions are the identity (or a plain copy) in a single process, so models call them always.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_Found = TypeVar("_Found")


def is_distributed() -> bool:
    """True when a process group of more than one process is up."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first() -> bool:
    """Whether this is the only process, or the one of rank 0."""
    return not is_distributed() or dist.get_rank() == 0


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        # Every process computes the same loss from the same gathered batch, so the sum over
        # processes of its gradients is world_size times our own slice; DDP's mean over processes
        # then leaves exactly the gradient of the global loss.
        return own_rows(gradient) * dist.get_world_size()


def gather_with_gradient(tensor: Tensor) -> Tensor:
    """Concatenate (B, ...) tensors of all processes in rank order: (world_size * B, ...).

    Each process must hold the same B and compute the same loss from the result. The gradient that
    comes back is right for DistributedDataParallel, which averages parameter gradients.
    """
    return _Gather.apply(tensor) if is_distributed() else tensor


@torch.no_grad()
def gather_without_gradient(tensor: Tensor) -> Tensor:
    """As `gather_with_gradient`, detached: for MoCo's keys, code statistics and metrics."""
    if not is_distributed():
        return tensor.detach()
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.detach().contiguous())
    return torch.cat(parts)


@torch.no_grad()
def gather_rows(own: Tensor | None, numbers: Sequence[int]) -> Tensor:
    """The rows of all processes in the order of their numbers.

    Args:
        own: this process's rows (B, ...); None where it has none.
        numbers: of them, in the same order; no two processes have the same.

    Returns:
        (N, ...) on the CPU, the same on every process.

    Raises:
        ValueError: no process has a row.
    """
    numbers = torch.tensor(numbers, dtype=torch.int64)
    held = gather_objects((len(numbers), None if own is None else (own.shape[1:], own.dtype)))
    kinds = [kind for _, kind in held if kind is not None]
    if not kinds:
        raise ValueError("there are no rows to gather: no process has one.")
    if len(held) == 1:
        return own.detach().cpu()[numbers.argsort()]
    shape, dtype = kinds[0]
    most = max(count for count, _ in held)
    on_gpu = torch.cuda.is_available() and dist.get_backend() != "gloo"
    rows = torch.zeros(most, *shape, dtype=dtype, device="cuda" if on_gpu else "cpu")
    if own is not None:
        rows[: len(own)] = own
    places = torch.zeros(most, dtype=torch.int64, device=rows.device)
    places[: len(numbers)] = numbers
    filled = torch.cat([torch.arange(most) < count for count, _ in held])
    order = gather_without_gradient(places).cpu()[filled].argsort()
    return gather_without_gradient(rows).cpu()[filled][order]


def gather_shares(own: Tensor | None, total: int) -> Tensor:
    """All `total` >= 1 rows in their order, of which each process has its `own_share`, None where that is empty.

    Returns:
        (total, ...) on the CPU, the same on every process.
    """
    return gather_rows(own, own_share(range(total)))


def own_share(rows: Sequence) -> Sequence:
    """Of rows (N) that all processes have, those that this one works on: every n-th of n processes."""
    return rows[dist.get_rank() :: dist.get_world_size()] if is_distributed() else rows


@torch.no_grad()
def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum of all processes' tensors of one shape, where this one lies."""
    if not is_distributed():
        return tensor
    total = tensor.to("cuda" if torch.cuda.is_available() and dist.get_backend() != "gloo" else "cpu", copy=True)
    dist.all_reduce(total)
    return total.to(tensor.device)


def gather_objects(own: object) -> list:
    """The small objects of all processes, pickled, in rank order."""
    if not is_distributed():
        return [own]
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found


def all_succeed(part: Callable[[], _Found]) -> _Found:
    """What `part()` returns, this process's share of common work, in which nothing is exchanged.

    Raises:
        Exception: of `part`. RuntimeError: it failed in another process. So nobody waits for what never comes.
    """
    if not is_distributed():
        return part()
    found = failure = None
    try:
        found = part()
    except Exception as error:
        failure = error
    failures = gather_objects(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    for rank, reason in enumerate(failures):
        if reason is not None:
            raise RuntimeError(f"process {rank} failed: {reason}")
    return found


def own_rows(gathered: Tensor) -> Tensor:
    """This process's rows (B, ...) of a gathered tensor (world_size * B, ...)."""
    return gathered.chunk(dist.get_world_size())[dist.get_rank()] if is_distributed() else gathered


@torch.no_grad()
def broadcast_(tensor: Tensor) -> Tensor:
    """Overwrite `tensor` on every process with process 0's, in place, so that rounding cannot differ."""
    if is_distributed():
        dist.broadcast(tensor, src=0)
    return tensor


def in_turns(tensor: Tensor, groups: int) -> Tensor:
    """Reorder (N, ...) rows: the first of each of `groups` equal parts, then the second of each, and so on.

    `in_turns(in_turns(x, groups), N // groups)` is x again.
    """
    return tensor.unflatten(0, (groups, -1)).transpose(0, 1).flatten(0, 1)


@torch.no_grad()
def deal_out(tensor: Tensor) -> Tensor:
    """Mix (B, ...) tensors over processes: each gets B rows, as equally many of every process as can be.

    All rows, put in turns (first row of each process, second of each, ...), are cut into equal parts, of which nobody
    holds more than its own. MoCo deals out the images of its keys, so that a key and its query are batch-normalised
    in different company; MoCo's own code shuffles them at random for this.
    """
    if not is_distributed():
        return tensor
    world, rank, count = dist.get_world_size(), dist.get_rank(), len(tensor)
    places = torch.arange(count) * world + rank  # of this process's rows among all of them, in turns
    senders = (torch.arange(count) + rank * count) % world  # of the rows that it gets
    sent, taken = ((part.bincount(minlength=world)).tolist() for part in (places // count, senders))
    received = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, tensor.contiguous(), taken, sent)
    return received[senders.to(tensor.device, non_blocking=True).argsort(stable=True).argsort()]


@torch.no_grad()
def gather_dealt(tensor: Tensor) -> Tensor:
    """Gather what was computed from rows of `deal_out` in the order of `gather_without_gradient` before dealing."""
    return in_turns(gather_without_gradient(tensor), len(tensor)) if is_distributed() else tensor.detach()


class _BatchNormOverProcesses(torch.autograd.Function):
    """Sums over processes in both directions; every other step is local."""

    @staticmethod
    def forward(ctx, tensor: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float):
        dims = [dim for dim in range(tensor.dim()) if dim != 1]
        wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        variance, mean = torch.var_mean(wide, dims, correction=0)  # (C,)
        count = mean.new_full((1,), tensor.numel() // tensor.shape[1])
        moments = gather_without_gradient(torch.cat([count, mean, variance])[None])  # (world_size, 1 + 2C)
        counts, means, variances = moments.split([1, len(mean), len(mean)], dim=1)
        share = counts / counts.sum()  # (world_size, 1)
        mean = (share * means).sum(0)
        # Deviations from the common mean, as E[x^2] - E[x]^2 cancels (Chan, Golub and LeVeque 1983).
        variance = (share * (variances + (means - mean).square())).sum(0)
        total = counts.sum()
        ctx.save_for_backward(tensor, weight, mean, (variance + eps).rsqrt(), total)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(mean, variance, total)
        return F.batch_norm(tensor, mean, variance, weight, bias, False, 0.0, eps), mean, variance, total

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor, *_):
        tensor, weight, mean, inverse_std, total = ctx.saved_tensors
        dims = [dim for dim in range(tensor.dim()) if dim != 1]
        shape = [1, -1, *[1] * (tensor.dim() - 2)]
        wide = gradient.to(mean.dtype)
        normalized = (tensor - mean.view(shape)) * inverse_std.view(shape)
        # Of this process only: DDP averages the gradients of weight and bias itself.
        sums = torch.stack([wide.sum(dims), (wide * normalized).sum(dims)])  # (2, C): of bias and weight
        weight_gradient = None if weight is None else sums[1].to(weight.dtype)
        bias_gradient = None if ctx.bias_dtype is None else sums[0].to(ctx.bias_dtype)
        means = sums.clone()
        if is_distributed():
            dist.all_reduce(means)
        means /= total
        scale = inverse_std if weight is None else inverse_std * weight
        centred = wide - means[0].view(shape) - normalized * means[1].view(shape)
        return (centred * scale.view(shape)).to(tensor.dtype), weight_gradient, bias_gradient, None


def batch_norm_over_processes(
    tensor: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Batch norm with the statistics of all processes' batches, on any device and backend.

    Args:
        tensor: (B, C, ...); B and the trailing sizes may differ between processes, B >= 1.
        weight, bias: (C,) or None; their gradients are this process's share, which DDP averages.
        eps: added to the variance.

    Returns:
        Normalised tensor; mean (C,), variance (C,) (divided by the count) and count () over all processes,
        in float32 at least and without gradient.

    Relations: torch's SyncBatchNorm computes the same, but refuses CPU tensors, and waits for the GPU in every layer,
    to leave out empty batches.
    """
    return _BatchNormOverProcesses.apply(tensor, weight, bias, eps)
