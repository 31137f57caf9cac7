"""States of models whose parameters are spread over processes (FSDP2): gathered whole, and spread again.

A checkpoint holds whole tensors, as that of a run without sharding. All processes call these functions together.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def gathered(value):
    """The same nest of dicts and lists with every sharded tensor whole, on the CPU; anything else as it is."""
    if isinstance(value, DTensor):
        return value.detach().full_tensor().cpu()
    if isinstance(value, dict):
        return type(value)((key, gathered(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return type(value)(gathered(item) for item in value)
    return value


def spread_as(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, sharded as `like` is, on its device; unchanged where `like` is whole or of another shape.

    Every process must hold the same value: nothing is sent.
    """
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    whole = value.to(like.device_mesh.device_type)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def load_gathered_(target, state: dict) -> None:
    """`target.load_state_dict(state)` of a module, optimiser, average or anything else, whole or sharded.

    Args:
        target: an nn.Module, an optimiser (accelerate's wrapper too), an EMAModel, or what has `load_state_dict`.
        state: from `gathered(target.state_dict())`.
    """
    if isinstance(target, nn.Module):
        now = target.state_dict()
        state = {key: spread_as(value, now[key]) if key in now else value for key, value in state.items()}
    elif "param_groups" in state:
        parameters = [parameter for group in target.param_groups for parameter in group["params"]]
        moments = {
            number: {k: spread_as(v, parameters[number]) if torch.is_tensor(v) else v for k, v in values.items()}
            for number, values in state["state"].items()
        }
        state = state | {"state": moments}
    elif "shadow_params" in state:
        pairs = zip(state["shadow_params"], target.shadow_params, strict=True)
        state = state | {"shadow_params": [spread_as(value, like) for value, like in pairs]}
    target.load_state_dict(state)


@torch.no_grad()
def copy_whole_(target: Iterable[Tensor], source: Iterable[Tensor]) -> None:
    """Copy tensors, of which the source may be sharded, into whole ones."""
    for whole, value in zip(target, source, strict=True):
        whole.copy_(value.full_tensor() if isinstance(value, DTensor) else value)
