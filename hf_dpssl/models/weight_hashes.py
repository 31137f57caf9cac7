"""Hashes of tensors and of sets of tensors: how checkpoints, caches and samples are recognised."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

# What half precision may make of float32 values; a third conversion changes nothing more (but beyond float16's range).
_ROUNDINGS = (
    (torch.float16,),
    (torch.bfloat16,),
    (torch.float16, torch.bfloat16),
    (torch.bfloat16, torch.float16),
)


def tensor_sha256(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """SHA-256 of each tensor's bytes, by name; dtype and shape are part of the hash."""
    hashes = {}
    for name, tensor in tensors.items():
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(data)
        hashes[name] = digest.hexdigest()
    return hashes


def value_sha256(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """As `tensor_sha256`, of the values: a tensor kept in half precision has the hash of its float32 copy."""
    return tensor_sha256({name: _float32(tensor) for name, tensor in tensors.items()})


def rounded_sha256(tensors: Mapping[str, Tensor]) -> list[str]:
    """Combined `value_sha256` of what storage in float16, in bfloat16, and in one after the other makes of tensors."""
    hashes = []
    for dtypes in _ROUNDINGS:
        rounded = dict(tensors)
        for dtype in dtypes:
            rounded = {name: t.detach().to(dtype) if t.is_floating_point() else t for name, t in rounded.items()}
        hashes.append(combined_sha256(value_sha256(rounded)))
    return hashes


def combined_sha256(hashes: Mapping[str, str]) -> str:
    """One SHA-256 for a set of named hashes, whatever their order."""
    return hashlib.sha256("\n".join(f"{name} {hashes[name]}" for name in sorted(hashes)).encode()).hexdigest()


def _float32(tensor: Tensor) -> Tensor:
    return tensor.detach().float() if tensor.is_floating_point() else tensor
