"""Matrix products of rows with rows, as fast as the processor allows in full float32."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, library

ROUNDING = {  # largest relative error of rounding to nearest
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.bfloat16: 2.0**-8,
}
_FULL = ("ieee", "none", "highest")  # settings of float32 products that round no operand
_lock = threading.Lock()
_pinned = 0  # contexts that are open, in all threads
_before: list[str] = []  # what was set when the first of them opened


@contextmanager
def full_float32() -> Iterator[None]:
    """Products of float32 inside keep all their bits, whatever torch.set_float32_matmul_precision says, or TF32.

    Distances of near points are small differences of large products: 8 or 10 bits of those leave nothing. All threads
    share the setting, so the first to come changes it and the last to leave restores it.
    """
    global _pinned, _before
    with _lock:
        if _pinned == 0:
            _before = _precision()
            if not set(_before) <= set(_FULL):
                _set_precision([_FULL[0]] * len(_before))
        _pinned += 1
    try:
        yield
    finally:
        with _lock:
            _pinned -= 1
            if _pinned == 0 and not set(_before) <= set(_FULL):
                _set_precision(_before)


def _precision() -> list[str]:
    """How exact float32 products are: on a GPU and on a CPU, or with torch before 2.9 on both."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        return [torch.get_float32_matmul_precision()]
    return [torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision]


def _set_precision(values: list[str]) -> None:
    if len(values) == 1:
        torch.set_float32_matmul_precision("highest" if values[0] in _FULL else values[0])
    else:
        torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision = values


def allow_tf32(device: torch.device) -> None:
    """Let a GPU round what float32 products read to 10 bits (TF32), but for those in `full_float32`; nothing elsewhere.

    Convolutions of cuDNN do so by default. torch.set_float32_matmul_precision would round a CPU's products, too.
    """
    if device.type == "cuda":
        # By this name, after which torch's old and new questions about the setting are answered alike.
        torch.backends.cuda.matmul.allow_tf32 = True


def gpu_computes_in_bfloat16() -> bool:
    """Whether there is a GPU that computes in bfloat16 itself."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


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
    if torch.compiler.is_dynamo_compiling():
        return _product_in_a_graph(x, y, bias)
    with full_float32():
        return _product(x, y, bias)


# The setting that `full_float32` pins counts when a graph runs, not when it is traced: within one the product is an
# operation of its own, which pins it then.
@library.custom_op("hf_dpssl::product", mutates_args=(), schema="(Tensor x, Tensor y, Tensor? bias) -> Tensor")
def _product_in_a_graph(x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
    with full_float32():
        return _product(x, y, bias)


@_product_in_a_graph.register_fake
def _(x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(len(x), len(y))


def _product(x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
    onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    possible = onednn is not None and x.device.type == "cpu" and torch.backends.mkldnn.is_available()
    if not possible or not (x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and has_fast_bfloat16(x.device))):
        return x @ y.T if bias is None else torch.addmm(bias, x, y.T)
    return onednn(x, y, bias, "none", [], "")


def differentiable_product(x: Tensor, y: Tensor) -> Tensor:
    """x (N, D) @ y.T (D, M), whose gradients are in full float32 too."""
    return _DifferentiableProduct.apply(x, y)


class _DifferentiableProduct(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> Tensor:
        if torch.compiler.is_dynamo_compiling():
            return _product_in_a_graph(x.contiguous(), y.contiguous(), None)
        with full_float32():
            return x @ y.T

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        return differentiable_product(upstream, y.T), differentiable_product(upstream.T, x.T)
