"""Batch norm whose statistics are not those of this process's batch: of all processes, or of parts of the batch.

`set_batch_norm_` changes the class of a model's batch norms in place and leaves weights, buffers and
their names as they are, so that checkpoints stay those of the stock model. In evaluation mode nothing differs.

Source: Ioffe and Szegedy 2015; He et al. 2020 (MoCo), section 3.3, for why groups of images matter.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from ..models.choices import check_batch_norm
from ..models.gather import batch_norm_over_processes, is_distributed


class _Regrouped:
    """The forward of the three classes below; `num_splits` 0 means statistics over all processes."""

    num_splits = 0

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training or (self.num_splits == 0 and not is_distributed()):
            return super().forward(inputs)
        self._check_input_dim(inputs)
        normalized = self._split(inputs) if self.num_splits else self._global(inputs)
        return self.act(self.drop(normalized)) if isinstance(self, BatchNormAct2d) else normalized

    def _share_of_new(self) -> float:
        """Weight of this batch in the running statistics; 0 where none are kept."""
        if not self.track_running_stats:
            return 0.0
        self.num_batches_tracked.add_(1)
        return 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum

    def _global(self, inputs: Tensor) -> Tensor:
        normalized, mean, variance, count = batch_norm_over_processes(inputs, self.weight, self.bias, self.eps)
        share = self._share_of_new()
        if self.track_running_stats:
            unbiased = variance * (count / (count - 1))
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), share)
        return normalized

    def _split(self, inputs: Tensor) -> Tensor:
        count, channels, *rest = inputs.shape
        splits = self.num_splits
        if count % splits:
            raise ValueError(
                f"a batch of {count} images cannot be split into {splits} equal parts: choose a batch size divisible "
                "by batch_norm_splits."
            )
        mean, variance, weight, bias = (
            None if value is None else value.repeat(splits)
            for value in (self.running_mean, self.running_var, self.weight, self.bias)
        )
        # Image n belongs to part n % splits, so both views of a pair, half a batch apart, share their part.
        parts = inputs.reshape(count // splits, splits * channels, *rest)
        share = self._share_of_new()
        normalized = F.batch_norm(parts, mean, variance, weight, bias, True, share, self.eps).reshape(inputs.shape)
        if self.track_running_stats:
            with torch.no_grad():
                self.running_mean.copy_(mean.view(splits, -1).mean(0))
                self.running_var.copy_(variance.view(splits, -1).mean(0))
        return normalized

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, " + (f"splits={self.num_splits}" if self.num_splits else "over all processes")


class RegroupedBatchNorm1d(_Regrouped, nn.BatchNorm1d):
    """`nn.BatchNorm1d` with the statistics that `set_batch_norm_` chose."""


class RegroupedBatchNorm2d(_Regrouped, nn.BatchNorm2d):
    """`nn.BatchNorm2d` with the statistics that `set_batch_norm_` chose."""


class RegroupedBatchNormAct2d(_Regrouped, BatchNormAct2d):
    """timm's `BatchNormAct2d` (batch norm, drop, activation) with the statistics that `set_batch_norm_` chose."""


_REGROUPED = {
    nn.BatchNorm1d: RegroupedBatchNorm1d,
    nn.BatchNorm2d: RegroupedBatchNorm2d,
    BatchNormAct2d: RegroupedBatchNormAct2d,
}


def batch_norms(module: nn.Module) -> list[nn.Module]:
    """All batch norms within a module."""
    return [layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]


def set_batch_norm_(module: nn.Module, batch_norm: str, num_splits: int = 1) -> None:
    """Choose over which images all batch norms within a module take their statistics in training mode; in place.

    Args:
        module: with `nn.BatchNorm1d`, `nn.BatchNorm2d` or timm's `BatchNormAct2d` layers, or none.
        batch_norm: "local": this process's batch (stock). "global": the batches of all processes; in a single process
            the same as "local". "split": each of `num_splits` equal parts of this process's batch by itself, image n
            in part n % num_splits, as if the parts were on as many devices; running statistics are the parts' mean.
        num_splits: at least 2 for "split", otherwise 1.

    Raises:
        ValueError: on another name or number. TypeError: on a batch norm of another class, which has a forward of its
            own. In training with "split", ValueError for a batch that is not divisible.
    """
    check_batch_norm(batch_norm, num_splits)
    stock = {regrouped: original for original, regrouped in _REGROUPED.items()}
    for layer in batch_norms(module):
        original = stock.get(type(layer), type(layer))
        if batch_norm == "local":
            layer.__class__ = original
        elif original in _REGROUPED:
            layer.__class__ = _REGROUPED[original]
            layer.num_splits = num_splits if batch_norm == "split" else 0
        else:
            names = [known.__name__ for known in _REGROUPED]
            raise TypeError(f"batch_norm={batch_norm!r} is defined for {names}, the model has {original.__name__}.")


def keep_statistics_in_recomputation_(module: nn.Module) -> None:
    """Batch norms whose activations are computed again in the backward pass count a batch once; in place."""
    for layer in batch_norms(module):
        if layer.track_running_stats and _pause_statistics not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(_pause_statistics)
            # Recomputation is cut short by an exception, in the last layer that is needed.
            layer.register_forward_hook(_resume_statistics, always_call=True)


def _pause_statistics(layer: nn.Module, inputs: tuple) -> None:
    if layer.training and torch._C._current_graph_task_id() != -1:  # within a backward pass
        layer.momentum_outside = layer.momentum
        layer.momentum = 0.0


def _resume_statistics(layer: nn.Module, inputs: tuple, output: Tensor) -> None:
    if hasattr(layer, "momentum_outside"):
        layer.momentum = layer.momentum_outside
        del layer.momentum_outside
        layer.num_batches_tracked.sub_(1)
