"""Weights of models that transformers builds on the meta device: a checkpoint holds all of them, or they are drawn."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel


def load_complete(from_pretrained: Callable, *args, **kwargs):
    """Call `from_pretrained(*args, **kwargs)` and refuse a checkpoint that lacks weights of the model.

    transformers builds models on the meta device; what a checkpoint lacks is then uninitialised
    memory unless `_init_weights` redraws it, which for blocks of other libraries it must not.

    Raises:
        ValueError: naming the tensors that the checkpoint lacks or holds in another shape.
    """
    wants_info = kwargs.pop("output_loading_info", False)
    kwargs["ignore_mismatched_sizes"] = True  # reported here, with what lacks, instead of as RuntimeError
    model, info = from_pretrained(*args, output_loading_info=True, **kwargs)
    wrong = sorted([*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])])
    if wrong:
        raise ValueError(
            f"{args[0] if args else 'the checkpoint'} lacks {len(wrong)} tensors of {type(model).__name__} "
            f"({', '.join(wrong[:3])}, ...): it is incomplete, or belongs to another class or config."
        )
    return (model, info) if wants_info else model


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
