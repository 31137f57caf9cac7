"""States of models whose parameters are spread over processes (FSDP2): each process writes and reads its own part.

torch.distributed.checkpoint writes the parts while training goes on, and puts them together again for any number of
processes. All processes call these functions together.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path

import torch
import torch.distributed.checkpoint as distributed_checkpoint
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only


def own_part(target, modules: Iterable[nn.Module]) -> dict:
    """This process's part of the state of a sharded target, under names that all processes share; {} of another.

    Args:
        target: a module, an optimiser (accelerate's wrapper too), an EMAModel, or what has `state_dict`.
        modules: those whose parameters a sharded optimiser has, always in the same order.
    """
    if not _is_sharded(target):
        return {}
    if isinstance(target, nn.Module):
        return get_model_state_dict(target)
    if isinstance(target, torch.optim.Optimizer):
        return get_optimizer_state_dict(nn.ModuleList(modules), _unwrapped(target))
    return get_model_state_dict(nn.ParameterList(target.shadow_params))


def common_part(target) -> dict:
    """What is left of `target.state_dict()`, the same in every process: all of it where nothing is sharded."""
    if not _is_sharded(target):
        return target.state_dict()
    if isinstance(target, nn.Module | torch.optim.Optimizer):
        return {}
    return {name: value for name, value in target.state_dict().items() if name != "shadow_params"}


def load_(target, modules: Iterable[nn.Module], own: dict, common: dict) -> None:
    """Set the state of which `own_part` (with the values of the checkpoint) and `common_part` are the halves.

    Tensors go from the file to where they belong, one by one: no process has a second copy of its state, or another
    one's part.
    """
    sharded = _is_sharded(target)
    if isinstance(target, nn.Module):
        if sharded:
            set_model_state_dict(target, own)
        else:
            target.load_state_dict(common)
    elif isinstance(target, torch.optim.Optimizer):
        if sharded:
            set_optimizer_state_dict(nn.ModuleList(modules), _unwrapped(target), own)
        else:
            target.load_state_dict(common)
            _leave_file_(_unwrapped(target))
    elif hasattr(target, "shadow_params"):
        if sharded:
            set_model_state_dict(nn.ParameterList(target.shadow_params), own)  # in place
        else:
            copy_whole_(target.shadow_params, common["shadow_params"])
        # It would copy tensors that it is given, and keep those on the CPU.
        target.load_state_dict(common | {"shadow_params": None})
    else:
        target.load_state_dict(tree_map_only(Tensor, torch.clone, common))


def _leave_file_(optimizer: torch.optim.Optimizer) -> None:
    """What an optimiser has kept of the tensors it was given lies in a file that will be removed."""
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.device.type == "cpu":
                state[name] = value.clone()


class PartsOnDisk:
    """Writes every process's part into one folder, in the background; reads it again.

    Args:
        group: of all processes for tensors on the CPU, which the writing has to itself.
    """

    def __init__(self, group: torch.distributed.ProcessGroup):
        self._group = group
        self._written: Future | None = None

    def write(self, parts: dict[str, dict], folder: Path) -> None:
        """Copy the parts, begin to write them, and return; what was begun before must have been waited for."""
        self._written = distributed_checkpoint.async_save(parts, checkpoint_id=folder, process_group=self._group)

    def is_written(self) -> bool:
        """Whether this process's part of what was begun is on the disk."""
        return self._written is None or self._written.done()

    def wait(self) -> None:
        """Until what was begun is on the disk, of all processes; errors of the writing are raised here."""
        if self._written is not None:
            self._written.result()
            self._written = None
            torch.distributed.barrier(self._group)

    def read_(self, parts: dict[str, dict], folder: Path) -> None:
        """Fill the parts, which say what belongs to this process, from a folder."""
        distributed_checkpoint.load(parts, checkpoint_id=folder, process_group=self._group)


@torch.no_grad()
def copy_whole_(target: Iterable[Tensor], source: Iterable[Tensor]) -> None:
    """Copy tensors, of which the source may be sharded, into whole ones."""
    for whole, value in zip(target, source, strict=True):
        whole.copy_(value.full_tensor() if isinstance(value, DTensor) else value)


def _is_sharded(target) -> bool:
    if isinstance(target, nn.Module):
        tensors = target.parameters()
    elif isinstance(target, torch.optim.Optimizer):
        tensors = (parameter for group in target.param_groups for parameter in group["params"])
    else:
        tensors = getattr(target, "shadow_params", [])
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def _unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper keeps it there
