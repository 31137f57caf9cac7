"""Modules whose running statistics half precision would stop: they stay float32 whatever the model becomes."""

from __future__ import annotations

from torch import Tensor, nn


class Float32Module(nn.Module):
    """A module that follows moves between devices, and no change of its own tensors' precision.

    Its tensors are to be made with dtype=torch.float32: torch's default is the model's precision while transformers
    builds one.
    """

    def _apply(self, fn, recurse: bool = True):
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if tensor.is_floating_point() and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        return super()._apply(keep_precision, recurse)
