"""`evaluate` module: accuracy of a linear classifier on frozen features: `hf_dpssl.evaluation.linear_probe`."""

import evaluate

from hf_dpssl.evaluation import linear_probe
from hf_dpssl.evaluation.loading import FEATURES, LABEL, as_tensors, metric_info

_INPUTS = """
Args:
    predictions: features (N, D) to classify.
    references: (N,) integer classes of these.
    bank: features (M, D) of the training images.
    bank_labels: (M,) integer classes of these.
    **options: of hf_dpssl.evaluation.linear_probe.

Returns:
    {"linear_top1": percent correct, "linear_c" or "linear_learning_rate": what was chosen}.

Example:
    hf_dpssl.evaluation.load("linear_probe").compute(predictions=x, references=y, bank=a, bank_labels=b)
"""


class LinearProbe(evaluate.Metric):
    """Accuracy of a linear classifier on frozen features."""

    def _info(self):
        return metric_info(
            description="Accuracy of a linear classifier on frozen features.",
            citation="He et al., Momentum Contrast for Unsupervised Visual Representation Learning, CVPR 2020",
            inputs=_INPUTS,
            predictions=FEATURES,
            references=LABEL,
        )

    def _compute(self, predictions, references, bank, bank_labels, **options):
        bank, bank_labels, features, labels = as_tensors(bank, bank_labels, predictions, references)
        return linear_probe(bank, bank_labels, features, labels, **options)
