"""The `evaluate` modules of this package, found where it is installed; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import torch
from torch import Tensor

_FOLDER = Path(__file__).parent / "modules"
MODULES = tuple(sorted(path.stem for path in _FOLDER.glob("*.py")))
FEATURES = datasets.Sequence(datasets.Value("float32"))  # columns of the modules: vectors, and class ids
LABEL = datasets.Value("int64")


def load(name: str, **options):
    """The `evaluate` module of a metric, ready for `add_batch` and `compute(predictions=..., ...)`.

    Args:
        name: one of MODULES; each wraps the function of that name in `hf_dpssl.evaluation`.
        options: of `evaluate.load`.

    Raises:
        ValueError: an unknown name.
    """
    if name not in MODULES:
        raise ValueError(f"there is no evaluate module {name!r}; there are {', '.join(MODULES)}.")
    import evaluate

    # A file, not a name: evaluate then never asks the Hub. In memory: runs that share a cache do not meet.
    return evaluate.load(str(_FOLDER / f"{name}.py"), **{"keep_in_memory": True} | options)


def metric_info(*, description: str, citation: str, inputs: str, **columns):
    """What a module's `_info` returns; columns: type of each column, FEATURES or LABEL."""
    import evaluate

    features = datasets.Features(columns)
    info = evaluate.MetricInfo(description=description, citation=citation, inputs_description=inputs, features=features)
    info.format = "numpy"  # evaluate's constructor allows it for plain values alone; rows of one length work too
    return info


def as_tensors(*arrays) -> list[Tensor]:
    """Tensors of what a module is given: arrays, tensors or nested lists."""
    return [array if torch.is_tensor(array) else torch.from_numpy(np.array(array)) for array in arrays]
