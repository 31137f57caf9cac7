"""Weights of models that were built on the meta device: drawn later, as the constructor draws them."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


@torch.no_grad()
def draw_after_meta_(model: PreTrainedModel) -> None:
    """Give every tensor of a model built on the meta device and moved by `to_empty` what its constructor draws.

    For `init_weights`: blocks of other libraries draw in their constructors, each in its own way, and have no other
    code for it. Where that already happened, or still all is meta, nothing changes.
    """
    tensors = {name: tensor for named in (model.named_parameters, model.named_buffers) for name, tensor in named()}
    if any(tensor.is_meta for tensor in tensors.values()):
        model._awaits_weights = True
    elif getattr(model, "_awaits_weights", False):
        model._awaits_weights = False
        with torch.device("cpu"):
            drawn = type(model)(model.config)
        for named in (drawn.named_parameters, drawn.named_buffers):
            for name, tensor in named():
                tensors[name].copy_(tensor)
        for module in model.modules():
            module._is_hf_initialized = True  # nothing is left to draw
