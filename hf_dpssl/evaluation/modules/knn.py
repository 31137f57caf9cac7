"""`evaluate` module: k-nearest-neighbour accuracy of features: `hf_dpssl.evaluation.knn`."""

import evaluate

from hf_dpssl.evaluation import knn
from hf_dpssl.evaluation.loading import FEATURES, LABEL, as_tensors, metric_info

_INPUTS = """
Args:
    predictions: features (N, D) to classify.
    references: (N,) integer classes of these.
    bank: features (M, D) of the training images.
    bank_labels: (M,) integer classes of these.
    k, metric, weighting, temperature: as of hf_dpssl.evaluation.knn.

Returns:
    {"knn_top1": percent correct}, or one such entry per k.

Example:
    >>> from hf_dpssl import evaluation
    >>> module = evaluation.load("knn")
    >>> module.compute(
    ...     predictions=[[1.0, 0.0], [0.0, 1.0]], references=[0, 1],
    ...     bank=[[2.0, 0.0], [3.0, 1.0], [0.0, 2.0], [1.0, 3.0]], bank_labels=[0, 0, 1, 1], k=1,
    ... )
    {'knn_top1': 100.0}
"""
__test__ = {"example": _INPUTS}  # what doctest runs


class Knn(evaluate.Metric):
    """K-nearest-neighbour accuracy of features."""

    def _info(self):
        return metric_info(
            description="K-nearest-neighbour accuracy of features.",
            citation="Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination, CVPR 2018",
            inputs=_INPUTS,
            predictions=FEATURES,
            references=LABEL,
        )

    def _compute(
        self,
        predictions,
        references,
        bank,
        bank_labels,
        k=20,
        metric="cosine",
        weighting="uniform",
        temperature=0.07,
    ):
        arrays = as_tensors(bank, bank_labels, predictions, references)
        return knn(*arrays, k=k, metric=metric, weighting=weighting, temperature=temperature)
