"""Matrix products of rows with rows, as fast as the processor allows in full float32."""

from __future__ import annotations

import torch
from torch import Tensor


def product(x: Tensor, y: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (N, D) @ y.T (D, M) + bias (M,), a new tensor; x has contiguous rows, y contiguous rows or columns.

    float32 on a CPU goes through oneDNN, which uses the widest instructions on processors of all makers; the BLAS
    that torch calls by default does so on one maker's only, and takes twice the time elsewhere.
    """
    onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if onednn is None or x.device.type != "cpu" or x.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return x @ y.T if bias is None else torch.addmm(bias, x, y.T)
    return onednn(x, y, bias, "none", [], "")
