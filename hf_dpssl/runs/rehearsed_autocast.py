"""What torch.autocast("cuda") does to operands where there is no GPU: the driver does not know fake tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

# By autocast on CUDA in the lower precision, and in float32: torch's documentation, "CUDA Ops that can autocast".
_LOWER = set(
    "__matmul__ __rmatmul__ addbmm addmm addmv addr baddbmm bmm chain_matmul conv1d conv2d conv3d conv_transpose1d "
    "conv_transpose2d conv_transpose3d einsum linear matmul mm multi_dot mv prelu scaled_dot_product_attention".split()
)
_FLOAT32 = set(
    "__pow__ __rdiv__ __rpow__ __rtruediv__ acos asin binary_cross_entropy_with_logits cdist cosh "
    "cosine_embedding_loss cosine_similarity cross_entropy cumprod cumsum dist erfinv exp expm1 group_norm "
    "hinge_embedding_loss huber_loss kl_div l1_loss layer_norm log log10 log1p log2 log_softmax logsumexp "
    "margin_ranking_loss mse_loss multi_margin_loss multilabel_margin_loss nll_loss norm normalize pdist "
    "poisson_nll_loss pow prod reciprocal renorm rms_norm rsqrt sinh smooth_l1_loss soft_margin_loss softmax softmin "
    "softplus sum tan triplet_margin_loss".split()
)


class _Casts(TorchFunctionMode):
    """What autocast on CUDA does to operands; torch's own passes over tensors that the driver does not know.

    Weights in float32 are cast once until autocast ends, as there, and again where no gradient is kept.
    """

    def __init__(self):
        super().__init__()
        self.weights: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if torch.is_autocast_enabled("cuda"):
            if name in _LOWER:
                args, kwargs = tree_map(self._lower, (args, kwargs))
            elif name in _FLOAT32:
                args, kwargs = tree_map(_in_float32, (args, kwargs))
        return func(*args, **kwargs)

    def _lower(self, value):
        kind = torch.get_autocast_dtype("cuda")
        if not _is_cast(value) or value.dtype == kind:
            return value
        learned = value.is_leaf and value.requires_grad and torch.is_grad_enabled()  # else its cast has no gradient
        if not (learned and torch.is_autocast_cache_enabled()):
            return value.to(kind)
        if id(value) not in self.weights:
            self.weights[id(value)] = (value, value.to(kind))
        return self.weights[id(value)][1]


def _is_cast(value) -> bool:
    floats = (torch.float32, torch.bfloat16, torch.float16)
    return isinstance(value, Tensor) and value.device.type == "cuda" and value.dtype in floats


def _in_float32(value):
    return value.float() if _is_cast(value) else value


@contextmanager
def casting() -> Iterator[None]:
    """Inside, torch.autocast("cuda") casts, although there is no GPU."""
    casts = _Casts()
    enter, leave = torch.autocast.__enter__, torch.autocast.__exit__

    def entered(context):
        casts.__enter__()
        return enter(context)

    def left(context, *error):
        casts.__exit__(*error)
        return leave(context, *error)

    with (
        mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        mock.patch.object(torch.cuda, "is_bf16_supported", lambda: True),
        mock.patch.object(torch, "clear_autocast_cache", casts.weights.clear),
        mock.patch.object(torch.autocast, "__enter__", entered),  # also where the backward pass computes again
        mock.patch.object(torch.autocast, "__exit__", left),
    ):
        yield
