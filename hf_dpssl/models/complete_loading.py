"""The refusal to run with weights that a checkpoint did not hold."""

from __future__ import annotations

from collections.abc import Callable


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
