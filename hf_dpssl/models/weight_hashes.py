"""Hashes of tensors and of sets of tensors: how checkpoints, caches and samples are recognised."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def tensor_sha256(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """SHA-256 of each tensor's bytes, by name; dtype and shape are part of the hash."""
    hashes = {}
    for name, tensor in tensors.items():
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(data)
        hashes[name] = digest.hexdigest()
    return hashes


def combined_sha256(hashes: Mapping[str, str]) -> str:
    """One SHA-256 for a set of named hashes, whatever their order."""
    return hashlib.sha256("\n".join(f"{name} {hashes[name]}" for name in sorted(hashes)).encode()).hexdigest()
