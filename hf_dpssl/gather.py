"""Collect tensors over processes, with the gradient that DistributedDataParallel needs.

All functions are the identity (or a plain copy) in a single process, so models call them always.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """True when a process group of more than one process is up."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor.contiguous())
        ctx.batch_size = len(tensor)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        # Every process computes the same loss from the same gathered batch, so the sum over
        # processes of its gradients is world_size times our own slice; DDP's mean over processes
        # then leaves exactly the gradient of the global loss.
        start = dist.get_rank() * ctx.batch_size
        return gradient[start : start + ctx.batch_size] * dist.get_world_size()


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
def broadcast_(tensor: Tensor) -> Tensor:
    """Overwrite `tensor` on every process with process 0's, in place, so that rounding cannot differ."""
    if is_distributed():
        dist.broadcast(tensor, src=0)
    return tensor
