"""`evaluate` module: whether generated images are of their class: `hf_dpssl.evaluation.class_consistency`."""

import evaluate

from hf_dpssl.evaluation import class_consistency
from hf_dpssl.evaluation.loading import FEATURES, LABEL, as_tensors, metric_info

_INPUTS = """
Args:
    predictions: logits (N, classes) of an independent classifier on generated images.
    references: (N,) integer classes that were asked for.

Returns:
    {"class_consistency": percent}.

Example:
    >>> from hf_dpssl import evaluation
    >>> module = evaluation.load("class_consistency")
    >>> module.compute(predictions=[[2.0, 1.0], [2.0, 1.0]], references=[0, 1])
    {'class_consistency': 50.0}
"""
__test__ = {"example": _INPUTS}  # what doctest runs


class ClassConsistency(evaluate.Metric):
    """Share of generated images that a classifier puts into their class."""

    def _info(self):
        return metric_info(
            description="Share of generated images that a classifier puts into their class.",
            citation="Ravuri and Vinyals, Classification Accuracy Score for Conditional Generative Models, 2019",
            inputs=_INPUTS,
            predictions=FEATURES,
            references=LABEL,
        )

    def _compute(self, predictions, references):
        return class_consistency(*as_tensors(predictions, references))
