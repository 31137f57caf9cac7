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
    **options: of hf_dpssl.evaluation.knn.

Returns:
    {"knn_top1": percent correct}, or one such entry per k.

Example:
    hf_dpssl.evaluation.load("knn").compute(predictions=x, references=y, bank=a, bank_labels=b, k=20)
"""


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

    def _compute(self, predictions, references, bank, bank_labels, **options):
        bank, bank_labels, features, labels = as_tensors(bank, bank_labels, predictions, references)
        return knn(bank, bank_labels, features, labels, **options)
