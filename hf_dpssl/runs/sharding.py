"""States of models whose parameters are spread over processes (FSDP2): gathered whole, and spread again.

A checkpoint holds whole tensors, as that of a run without sharding; only the moments of a sharded optimiser stand under
the names of their parameters instead of numbers. All processes call these functions together.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

_GATHER = StateDictOptions(full_state_dict=True, cpu_offload=True)
_SPREAD = StateDictOptions(full_state_dict=True)


def whole_state(target, modules: Iterable[nn.Module]) -> dict:
    """`target.state_dict()` with whole tensors; those of a sharded target are on the CPU of process 0 and nowhere else.

    Args:
        target: a module, an optimiser (accelerate's wrapper too), an EMAModel, or what has `state_dict`.
        modules: those whose parameters a sharded optimiser has, always in the same order.
    """
    if not _is_sharded(target):  # torch's function would count a step of an optimiser that has taken none
        return target.state_dict()
    if isinstance(target, nn.Module):
        return get_model_state_dict(target, options=_GATHER)
    if isinstance(target, torch.optim.Optimizer):
        return get_optimizer_state_dict(nn.ModuleList(modules), _unwrapped(target), options=_GATHER)
    averages = get_model_state_dict(nn.ParameterList(target.shadow_params), options=_GATHER)
    return target.state_dict() | {"shadow_params": list(averages.values())}


def load_whole_state_(target, modules: Iterable[nn.Module], state: dict) -> None:
    """`target.load_state_dict(state)` of what `whole_state` gave, of which every process holds the same."""
    if not _is_sharded(target):
        target.load_state_dict(state)
    elif isinstance(target, nn.Module):
        set_model_state_dict(target, dict(state), options=_SPREAD)
    elif isinstance(target, torch.optim.Optimizer):
        set_optimizer_state_dict(nn.ModuleList(modules), _unwrapped(target), state, options=_SPREAD)
    else:
        averages = {str(number): value for number, value in enumerate(state["shadow_params"])}
        set_model_state_dict(nn.ParameterList(target.shadow_params), averages, options=_SPREAD)  # in place
        target.load_state_dict(state | {"shadow_params": target.shadow_params})


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
