"""`evaluate` module: how close the two views of an image are: `hf_dpssl.evaluation.alignment`."""

import evaluate

from hf_dpssl.evaluation import alignment
from hf_dpssl.evaluation.loading import FEATURES, as_tensors, metric_info

_INPUTS = """
Args:
    predictions: vectors (N, D) of one view.
    references: vectors (N, D) of the other view, in the same order.
    alpha: exponent of the distance, > 0.

Returns:
    {"alignment": on the sphere, "alignment_raw": as the vectors are, at unit scale}; 0 is best.

Example:
    >>> from hf_dpssl import evaluation
    >>> module = evaluation.load("alignment")
    >>> module.compute(predictions=[[1.0, 0.0], [0.0, 1.0]], references=[[1.0, 0.0], [0.0, 1.0]])
    {'alignment': 0.0, 'alignment_raw': 0.0}
"""
__test__ = {"example": _INPUTS}  # what doctest runs


class Alignment(evaluate.Metric):
    """How close the two views of an image are."""

    def _info(self):
        return metric_info(
            description="How close the two views of an image are.",
            citation="Wang and Isola, Alignment and Uniformity on the Hypersphere, ICML 2020, arXiv 2005.10242",
            inputs=_INPUTS,
            predictions=FEATURES,
            references=FEATURES,
        )

    def _compute(self, predictions, references, alpha=2.0):
        return alignment(*as_tensors(predictions, references), alpha=alpha)
