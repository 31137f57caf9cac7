"""How much memory a training step takes on a GPU that is not there: sizes are counted, nothing is computed.

Tensors "on cuda" are those of torch's FakeTensorMode, which have shapes and no values, so that a model of any size runs
on any machine. A storage counts from the operation that makes it until nothing holds it any more, as on a GPU.

Where code reads a value, it gets what `MemoryRehearsal.states` has stated, else 1 or True: a codebook counts as started
and its dead codes as being revived. Where values decide about a size (`nonzero`, a mask as index), it is the largest.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from .rehearsal import casting, is_of_number, not_meta, without_driver

_aten = torch.ops.aten
_attention = F.scaled_dot_product_attention  # also while it is replaced
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_, _aten._unsafe_index, _aten._index_put_impl_}


class MemoryCounter(TorchDispatchMode):
    """Bytes of a device: `held` now and `peak` since `clear`, without `gradients` and what `outside` names.

    Args:
        device: whose storages count, "cuda" or "cpu".
    """

    def __init__(self, device: str):
        super().__init__()
        self.device = device
        self.held = 0
        self.peak = 0
        self.gradients = 0
        self._sizes: dict[int, tuple[int, weakref.ref]] = {}  # of storages in `held`, by id
        self._outside = WeakIdKeyDictionary()

    def clear(self) -> None:
        """Look for the peak, and count gradients, afresh."""
        self.peak = self.held
        self.gradients = 0

    def outside(self, tensors: Iterable[Tensor]) -> int:
        """Count these tensors no longer; returns the bytes of those that were not outside before."""
        total = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage not in self._outside:
                self._outside[storage] = True
                total += storage.nbytes()
                self._forget(id(storage))
        return total

    def watch_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Count the gradients of these, once they are complete, in `gradients` and no longer in `held`."""
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._name_gradient)

    def _name_gradient(self, parameter: Tensor) -> None:
        self.gradients += self.outside([parameter.grad])

    def _forget(self, key: int) -> None:
        size, _ = self._sizes.pop(key, (0, None))
        self.held -= size

    def _count(self, value) -> None:
        if not isinstance(value, Tensor) or value.device.type != self.device:
            return
        storage = value.untyped_storage()
        key = id(storage)
        if key in self._sizes or storage in self._outside:
            return
        self._sizes[key] = (storage.nbytes(), weakref.ref(storage, lambda _: self._forget(key)))
        self.held += storage.nbytes()
        self.peak = max(self.peak, self.held)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            self._count(leaf)
        return result


class MemoryRehearsal(MemoryCounter):
    """Bytes on the GPU that is not there."""

    def __init__(self):
        super().__init__("cuda")
        self._stated = WeakIdKeyDictionary()

    def states(self, tensor: Tensor, value: float | list) -> None:
        """What is read from a tensor of one element, or by `tolist`."""
        self._stated[tensor.untyped_storage()] = value

    def fake_module_(self, module: nn.Module) -> nn.Module:
        """Move a module's parameters and buffers, of the meta device too, onto the GPU, in place."""
        moved: dict[int, Tensor] = {}
        for part in module.modules():
            for tensors in (part._parameters, part._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None and id(tensor) not in moved:  # weights may be shared
                        moved[id(tensor)] = _on_gpu(tensor)
                    tensors[name] = moved.get(id(tensor))
        self.watch_gradients(module.parameters())
        return module

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        if packet is _aten._local_scalar_dense:
            return self._scalar(args[0])
        if packet is _aten.equal:
            return True
        if packet is _aten._fused_sgd_:  # changes tensors in place, and torch has no shapes for it
            return None
        if packet is _aten._efficientzerotensor and is_of_number(args[0], kwargs["device"]):
            with unset_fake_temporarily():
                return _aten.zeros(*args, **kwargs)
        if packet in _INDEXING:
            args = (args[0], _without_masks(args[1]), *args[2:])
        if packet is _aten.split_with_sizes:
            args = (args[0], _that_fit(*args), *args[2:])
        found = self._largest(packet, *args, **(kwargs or {}))
        if found is None:
            return super().__torch_dispatch__(func, types, args, kwargs)
        self._count(found)
        return found

    def _scalar(self, tensor: Tensor):
        value = self._stated.get(tensor.untyped_storage(), 1)
        return bool(value) if tensor.dtype == torch.bool else float(value) if tensor.is_floating_point() else value

    def _largest(self, packet, *args, minlength: int = 0, **kwargs) -> Tensor | None:
        """The largest result of an operation whose values decide about its size; None: of another one."""
        if packet is _aten.nonzero:
            return args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.int64)
        if packet is _aten.masked_select:
            return args[0].new_empty((torch.broadcast_shapes(args[0].shape, args[1].shape).numel(),))
        if packet is _aten.bincount:
            counts = args[0].new_empty((args[2] if len(args) > 2 else minlength or 1,), dtype=torch.int64)
            self.states(counts, [0] * (len(counts) - 1) + [args[0].numel()])  # all in one bin
            return counts
        return None

    def listed(self, tensor: Tensor):
        """In place of `tolist`."""
        if tensor.untyped_storage() in self._stated and tensor.ndim:
            return self._stated[tensor.untyped_storage()]
        return [self.listed(part) for part in tensor] if tensor.ndim else tensor.item()


def _on_gpu(tensor: Tensor) -> Tensor:
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


def _without_masks(indices: list) -> list:
    """Indices of which each mask of n elements is n numbers per dimension: as many as it may choose."""
    found = []
    for index in indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            found += [index.new_zeros((index.numel(),), dtype=torch.int64) for _ in range(index.ndim)]
        else:
            found.append(index)
    return found


def _that_fit(tensor: Tensor, sizes: list[int], dim: int = 0) -> list[int]:
    """Sizes of a split; those that were counted, of values that are not there, put everything into one part."""
    whole = tensor.shape[dim]
    return sizes if sum(sizes) == whole else [0] * (len(sizes) - 1) + [whole]


class _NoMeta(FakeTensorMode):
    """C++ code, to which all operands lie on the meta device, makes its tensors on the GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return super().__torch_dispatch__(func, types, args, tree_map(not_meta, kwargs or {}))


def _fused_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Attention by the kernel that a GPU takes, which keeps no weights (B, heads, T, T), unless fused ones are off."""
    if not torch.backends.cuda.mem_efficient_sdp_enabled():
        return _attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (part.to(torch.get_autocast_dtype("cuda")) for part in (query, key, value))
    if enable_gqa:
        key, value = (part.repeat_interleave(query.shape[-3] // part.shape[-3], -3) for part in (key, value))
    if attn_mask is None and query.dtype != torch.float32:
        attend = _aten._scaled_dot_product_flash_attention
        return attend(query, key, value, dropout_p, is_causal, scale=scale)[0]
    attend = _aten._scaled_dot_product_efficient_attention
    return attend(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]


@contextmanager
def memory_rehearsal() -> Iterator[MemoryRehearsal]:
    """Inside, device "cuda" exists, without driver; what is made on it is counted.

    Models are moved with `MemoryRehearsal.fake_module_`; torch.autocast("cuda") casts as on a GPU. Not counted: the
    driver's context, workspaces of libraries, gaps between blocks, what one operation holds only while it runs.
    """
    memory = MemoryRehearsal()
    mode = _NoMeta(allow_non_fake_inputs=True)
    with (
        without_driver(),
        casting(),
        mock.patch.object(F, "scaled_dot_product_attention", _fused_attention),
        mock.patch.object(FakeTensor, "tolist", lambda tensor: memory.listed(tensor)),
        mode,
        memory,
    ):
        yield memory
