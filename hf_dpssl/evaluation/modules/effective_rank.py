"""`evaluate` module: how many directions a set of vectors fills: `hf_dpssl.evaluation.effective_rank`."""

import evaluate

from hf_dpssl.evaluation import effective_rank
from hf_dpssl.evaluation.loading import FEATURES, as_tensors, metric_info

_INPUTS = """
Args:
    predictions: vectors (N, D).
    centre: subtract the mean first.

Returns:
    {"effective_rank": in [1, min(N, D)]}.

Example:
    >>> from hf_dpssl import evaluation
    >>> module = evaluation.load("effective_rank")
    >>> module.compute(predictions=[[1.0, 0.0], [0.0, 1.0]])
    {'effective_rank': 2.0}
"""
__test__ = {"example": _INPUTS}  # what doctest runs


class EffectiveRank(evaluate.Metric):
    """How many directions a set of vectors fills."""

    def _info(self):
        return metric_info(
            description="How many directions a set of vectors fills.",
            citation="Roy and Vetterli, The Effective Rank: A Measure of Effective Dimensionality, EUSIPCO 2007",
            inputs=_INPUTS,
            predictions=FEATURES,
        )

    def _compute(self, predictions, centre=False):
        return effective_rank(*as_tensors(predictions), centre=centre)
