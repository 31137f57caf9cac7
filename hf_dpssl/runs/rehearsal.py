"""A GPU that is not there: code runs on tensors "on cuda" without one, and what it would wait for is counted.

    python -m hf_dpssl.runs.rehearsal dae_dit --recipe dit-b2-imagenet    # as hf-dpssl rehearse

Devices and their rules are those of torch's FakeTensorMode. Beside every fake tensor runs a real one on the CPU, so
that values which are read are true ones and the code takes the branches it would take.

What a GPU would wait for ("synchronisation"): a value read on the host (`item`, `bool`, `float`, `tolist`, `nonzero`, a
mask as index, `bincount`), and a copy between host and GPU that is not `non_blocking`, as of a list as index.

C++ code takes fake tensors of the GPU for those of the meta device, which have no values. What it would do with them
unseen is done here: lists as indices, arrays, deep copies, `.data`, zeros of forward differentiation. So
are the casts of torch.autocast("cuda"), which asks a driver that does not know fake tensors.
"""

from __future__ import annotations

import runpy
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from numpy import ndarray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

_PACKAGE = Path(__file__).parents[1]
_ROOT = _PACKAGE.parent  # of a checkout
_aten = torch.ops.aten
# Their result's shape, or the result itself, is known when the GPU has computed it.
_READS = {
    _aten._local_scalar_dense,
    _aten.nonzero,
    _aten.masked_select,
    _aten.bincount,
    _aten._unique2,
    _aten.unique_dim,
    _aten.unique_consecutive,
    _aten.repeat_interleave,
    _aten.equal,
    _aten.is_nonzero,
}
_COPIES = {_aten._to_copy, _aten.copy_}
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_, _aten._unsafe_index, _aten._index_put_impl_}
# By autocast on CUDA in the lower precision, and in float32: torch's documentation, "CUDA Ops that can autocast".
_LOWER = {
    "__matmul__", "__rmatmul__", "addbmm", "addmm", "addmv", "addr", "baddbmm", "bmm", "chain_matmul", "conv1d",
    "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "einsum", "linear", "matmul",
    "mm", "multi_dot", "mv", "prelu", "scaled_dot_product_attention",
}  # fmt: skip
_FLOAT32 = {
    "__pow__", "__rdiv__", "__rpow__", "__rtruediv__", "acos", "asin", "binary_cross_entropy_with_logits", "cdist",
    "cosh", "cosine_embedding_loss", "cosine_similarity", "cross_entropy", "cumprod", "cumsum", "dist", "erfinv",
    "exp", "expm1", "group_norm", "hinge_embedding_loss", "huber_loss", "kl_div", "l1_loss", "layer_norm", "log",
    "log10", "log1p", "log2", "log_softmax", "logsumexp", "margin_ranking_loss", "mse_loss", "multi_margin_loss",
    "multilabel_margin_loss", "nll_loss", "norm", "normalize", "pdist", "poisson_nll_loss", "pow", "prod",
    "reciprocal", "renorm", "rms_norm", "rsqrt", "sinh", "smooth_l1_loss", "soft_margin_loss", "softmax", "softmin",
    "softplus", "sum", "tan", "triplet_margin_loss",
}  # fmt: skip


class Rehearsal(TorchDispatchMode):
    """What has been counted: `syncs`, one line "file:line function: operation" for each synchronisation, in order."""

    def __init__(self):
        super().__init__()
        self.syncs: list[str] = []

    def clear(self) -> None:
        """Count afresh, as after a first step, which may start what later ones go on with."""
        self.syncs.clear()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = tree_map(not_meta, kwargs or {})
        if func.namespace == "prim":
            return func(*args, **kwargs)
        if func is _aten._efficientzerotensor.default:
            func = _aten.zeros.default  # whose values can be read
            if is_of_number(args[0], kwargs["device"]):
                with unset_fake_temporarily():
                    return func(*args, **kwargs)
        args, kwargs = tree_map(self._faked, (args, kwargs))
        packet = func.overloadpacket
        if _waits(packet, args, kwargs):
            self.syncs.append(f"{_line()}: {packet.__name__}")
        device = self._device_of_result(func, args, kwargs)
        given = {id(_real(value)): value for value in tree_leaves((args, kwargs)) if isinstance(value, FakeTensor)}
        with unset_fake_temporarily():
            real = func(*tree_map(_real, args), **tree_map(_real, kwargs))
        if torch.Tag.inplace_view in func.tags:  # as unsqueeze_: the fake one's shape changes too
            func(*args, **kwargs)
        # What an operation changes in place it returns.
        return tree_map(lambda value: given[id(value)] if id(value) in given else self._fake(value, device), real)

    @staticmethod
    def _device_of_result(func, args, kwargs) -> torch.device:
        """RuntimeError for operands of two devices, where the GPU would raise it."""
        packet = func.overloadpacket
        leaves = tree_leaves((args, kwargs))
        if packet is _aten.copy_:
            return args[0].device
        if packet in _INDEXING:  # indices may lie on the CPU
            leaves = [args[0], *args[2:3]]
        if kwargs.get("device") is not None:
            return torch.device(kwargs["device"])
        tensors = [leaf for leaf in leaves if isinstance(leaf, FakeTensor)]
        return FakeTensor._find_common_device(func, tensors)[0] if tensors else torch.device("cpu")

    def _fake(self, real, device: torch.device | str):
        """A fake tensor whose values are those of a real one; what is no tensor as it is."""
        if not isinstance(real, Tensor):
            return real
        fake = torch.empty_strided(real.shape, real.stride(), dtype=real.dtype, device=device)
        fake.rehearsed = real
        return fake

    def _faked(self, value):
        """A tensor from before the rehearsal as one of the CPU within it."""
        real = isinstance(value, Tensor) and not isinstance(value, FakeTensor)
        return self._fake(value, "cpu") if real else value

    def fake_module_(self, module: nn.Module) -> nn.Module:
        """Move a module's parameters and buffers onto the GPU, in place."""
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    fake = nn.Parameter(self.fake_of(parameter), parameter.requires_grad)
                    part._parameters[name] = fake
            for name, buffer in part._buffers.items():
                part._buffers[name] = None if buffer is None else self.fake_of(buffer)
        return module

    def fake_of(self, real: Tensor) -> Tensor:
        """A fake tensor on the GPU whose values are those of a real one, or of a fake one of the CPU."""
        return self._fake(_real(real), "cuda")


def _real(value):
    """A fake tensor's real one, and the CPU for the GPU."""
    if isinstance(value, FakeTensor):
        return value.rehearsed
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == "cuda" else value


def not_meta(value):
    """The GPU for the meta device, where C++ code takes it to be that of its operands."""
    return torch.device("cuda", 0) if isinstance(value, torch.device) and value.type == "meta" else value


def is_of_number(size: list[int], device: torch.device) -> bool:
    """Whether a zero of forward differentiation is that of a Python number: C++ code reads it, so it must be real."""
    return not size and device.type == "cpu"


def _on_gpu(value) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cuda"


def _is_mask(index) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _waits(packet, args, kwargs) -> bool:
    """Whether the host would wait for the GPU."""
    if packet in _READS:
        return _on_gpu(args[0])
    if packet in _COPIES:
        target = args[0] if packet is _aten.copy_ else kwargs.get("device")
        source = args[1] if packet is _aten.copy_ else args[0]
        to_gpu = _on_gpu(target) if packet is _aten.copy_ else target is not None and target.type == "cuda"
        moves = to_gpu != _on_gpu(source) if packet is _aten.copy_ or target is not None else False
        blocking = not (args[2] if packet is _aten.copy_ and len(args) > 2 else kwargs.get("non_blocking", False))
        return moves and blocking
    if packet in _INDEXING:
        return _on_gpu(args[0]) and any(_is_mask(index) for index in args[1] or ())
    return False


def _line() -> str:
    """The innermost line of this repository that led here."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        ours = _PACKAGE in path.parents or (_ROOT in path.parents and "site-packages" not in path.parts)
        if ours and path != Path(__file__):
            return f"{path.relative_to(_ROOT)}:{frame.lineno} {frame.name}"
    return "outside of the package"


def _placed(index, device: torch.device) -> tuple:
    """An index whose lists are tensors of a device: those that torch makes of them hold nothing on a meta device."""
    if isinstance(index, list) and any(isinstance(part, (list, tuple, slice, Tensor)) for part in index):
        index = tuple(index)  # as torch takes it
    parts = index if isinstance(index, tuple) else (index,)
    lists = [isinstance(part, (list, range)) for part in parts]
    return tuple(_indices(part, device) if is_list else part for part, is_list in zip(parts, lists, strict=True))


def _indices(places: list | range, device: torch.device) -> Tensor:
    return torch.tensor(places, device=device, dtype=None if len(places) else torch.long)


def _get(tensor: Tensor, index) -> Tensor:
    return Tensor.__getitem__(tensor, _placed(index, tensor.device))


def _set(tensor: Tensor, index, value) -> None:
    Tensor.__setitem__(tensor, _placed(index, tensor.device), value)


def _numpy(tensor: Tensor, *, force: bool = False) -> ndarray:
    given = tensor.detach().cpu() if force else tensor
    if _on_gpu(given):
        raise TypeError("a tensor of the GPU cannot be an array: copy it first, by Tensor.cpu().")
    if given.requires_grad:
        raise RuntimeError("a tensor that requires gradients cannot be an array: use tensor.detach().numpy().")
    with _disable_current_modes():
        return given.rehearsed.detach().numpy()


def _deepcopy(tensor: Tensor, memo: dict) -> Tensor:
    if id(tensor) not in memo:
        copied = tensor.detach().clone()
        if isinstance(tensor, nn.Parameter):
            copied = nn.Parameter(copied, tensor.requires_grad)
        memo[id(tensor)] = copied.requires_grad_(tensor.requires_grad)
    return memo[id(tensor)]


def _set_data(tensor: Tensor, value: Tensor) -> None:
    Tensor.data.__set__(tensor, value)
    tensor.rehearsed, tensor.fake_device = value.rehearsed, value.fake_device


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


@contextmanager
def without_driver() -> Iterator[None]:
    """Inside, autograd takes fake tensors on "cuda" without asking a driver for the GPU's streams."""
    made = torch.Tensor._make_subclass

    def of_no_driver(cls, elem, *args, dispatch_device=False, device_for_backend_keys=None, **kwargs):
        # To autograd fake tensors of the GPU lie on the meta device.
        dispatch_device &= device_for_backend_keys.type == "cpu"
        options = {"dispatch_device": dispatch_device, "device_for_backend_keys": device_for_backend_keys}
        return made(cls, elem, *args, **options, **kwargs)

    with (
        mock.patch.object(torch.Tensor, "_make_subclass", of_no_driver),
        torch.autograd.set_multithreading_enabled(False),
    ):
        yield


@contextmanager
def rehearsal() -> Iterator[Rehearsal]:
    """Inside, device "cuda" exists, without driver; tensors of two devices in one operation raise RuntimeError.

    Models are moved with `fake_module_`, tensors with `fake_of`; torch.autocast("cuda") casts as on a GPU. Not
    rehearsed: fused attention, whose kernels no CPU computes (it takes its plain form); speed and memory (the latter:
    rehearsed_memory.py); waits inside of one operation's kernel.
    """
    mode = FakeTensorMode()
    rehearsed = Rehearsal()

    def tolist(tensor: Tensor) -> list:
        if _on_gpu(tensor):
            rehearsed.syncs.append(f"{_line()}: tolist")
        with unset_fake_temporarily():
            return tensor.rehearsed.tolist()

    with (
        without_driver(),
        casting(),
        mock.patch.object(FakeTensor, "tolist", tolist),
        mock.patch.multiple(FakeTensor, create=True, __getitem__=_get, __setitem__=_set),
        mock.patch.object(FakeTensor, "numpy", _numpy),
        mock.patch.object(Tensor, "__deepcopy__", _deepcopy),
        mock.patch.object(FakeTensor, "data", property(Tensor.data.__get__, _set_data)),
        sdpa_kernel(SDPBackend.MATH),
        mode,
        rehearsed,
    ):
        yield rehearsed


if __name__ == "__main__":  # the command is of a room above
    sys.argv[1:1] = ["rehearse"]
    runpy.run_module("hf_dpssl.cli", run_name="__main__", alter_sys=True)
