"""`evaluate` module: how evenly a cloud of vectors is spread: `hf_dpssl.evaluation.uniformity`."""

import evaluate

from hf_dpssl.evaluation import uniformity
from hf_dpssl.evaluation.loading import FEATURES, as_tensors, metric_info

_INPUTS = """
Args:
    predictions: vectors (N, D).
    t: > 0, of the Gaussian potential.

Returns:
    {"uniformity": on the sphere, "uniformity_raw": as the vectors are, at unit scale}; lower is more even.

Example:
    >>> from hf_dpssl import evaluation
    >>> module = evaluation.load("uniformity")
    >>> found = module.compute(predictions=[[1.0, 0.0], [-1.0, 0.0]])
    >>> {name: round(value, 3) for name, value in found.items()}
    {'uniformity': -8.0, 'uniformity_raw': -4.0}
"""
__test__ = {"example": _INPUTS}  # what doctest runs


class Uniformity(evaluate.Metric):
    """How evenly a cloud of vectors is spread."""

    def _info(self):
        return metric_info(
            description="How evenly a cloud of vectors is spread.",
            citation="Wang and Isola, Alignment and Uniformity on the Hypersphere, ICML 2020, arXiv 2005.10242",
            inputs=_INPUTS,
            predictions=FEATURES,
        )

    def _compute(self, predictions, t=2.0):
        return uniformity(*as_tensors(predictions), t=t)
