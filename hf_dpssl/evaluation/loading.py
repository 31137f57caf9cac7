"""The `evaluate` modules of this package, found where it is installed; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

_FOLDER = Path(__file__).parent / "modules"
MODULES = tuple(sorted(path.stem for path in _FOLDER.glob("*.py")))
FEATURES = datasets.Sequence(datasets.Value("float32"))  # columns of the modules: vectors, images, and class ids
IMAGES = datasets.Sequence(datasets.Sequence(FEATURES))  # (C, H, W)
LABEL = datasets.Value("int64")


def load(name: str, **options):
    """The `evaluate` module of a metric, ready for `add_batch` and `compute(predictions=..., ...)`.

    Args:
        name: one of MODULES; each wraps the function of that name in `hf_dpssl.evaluation`, reconstruction
            psnr and ssim.
        options: of `evaluate.load`. Several processes give num_process, process_id, an experiment_id of their own and
            keep_in_memory=False; `compute` then gives the result to process 0 and None to the others.

    Raises:
        ValueError: an unknown name.
    """
    if name not in MODULES:
        raise ValueError(f"there is no evaluate module {name!r}; there are {', '.join(MODULES)}.")
    import evaluate

    # A file, not a name: evaluate then never asks the Hub. In memory: runs that share a cache do not meet.
    return evaluate.load(str(_FOLDER / f"{name}.py"), **{"keep_in_memory": True} | options)


def metric_info(*, description: str, citation: str, inputs: str, **columns):
    """What a module's `_info` returns; columns: type of each column, FEATURES, IMAGES or LABEL."""
    import evaluate

    features = datasets.Features(columns)
    info = evaluate.MetricInfo(description=description, citation=citation, inputs_description=inputs, features=features)
    info.format = "arrow"  # evaluate's constructor allows it for plain values alone; as numpy, images take minutes
    return info


def as_tensors(*arrays) -> list[Tensor]:
    """Tensors of what a module is given: arrays, tensors, nested lists, or columns of FEATURES, IMAGES or LABEL.

    Raises:
        ValueError: rows of a column that differ in length.
    """
    return [_tensor(array) for array in arrays]


def _tensor(array) -> Tensor:
    if torch.is_tensor(array):
        return array
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    if not isinstance(array, pa.Array):
        return torch.from_numpy(np.array(array))
    shape = [len(array)]
    while pa.types.is_list(array.type):
        lengths = pc.unique(pc.list_value_length(array)).to_pylist()
        if len(lengths) > 1:
            raise ValueError(f"rows must be of one length, got {sorted(lengths)}.")
        shape += lengths or [0]
        array = array.flatten()
    return torch.from_numpy(array.to_numpy(zero_copy_only=False).reshape(shape).copy())
