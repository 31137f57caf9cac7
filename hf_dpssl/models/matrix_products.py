"""Matrix products of rows with rows, as fast as the processor allows in full float32."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = {  # largest relative error of rounding to nearest
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.bfloat16: 2.0**-8,
}
PRODUCT_ERROR = {"highest": 0.0, "high": 2.0**-9, "medium": 2.0**-7}  # of torch.set_float32_matmul_precision


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products are fast and summed in float32: CPUs with AMX or AVX512-BF16."""
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in checks)


def product(x: Tensor, y: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (N, D) @ y.T (D, M) + bias (M,), a new tensor; x has contiguous rows, y contiguous rows or columns.

    float32 on a CPU goes through oneDNN, which uses the widest instructions on processors of all makers; the BLAS
    that torch calls by default does so on one maker's only, and takes twice the time elsewhere. bfloat16 does so where
    it is fast: for tall x, torch's own way to oneDNN takes up to 1.4 times as long.
    """
    onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    possible = onednn is not None and x.device.type == "cpu" and torch.backends.mkldnn.is_available()
    if not possible or not (x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and has_fast_bfloat16(x.device))):
        return x @ y.T if bias is None else torch.addmm(bias, x, y.T)
    return onednn(x, y, bias, "none", [], "")
