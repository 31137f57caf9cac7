"""`evaluate` module: accuracy with few labelled examples per class: `hf_dpssl.evaluation.few_shot`."""

import evaluate

from hf_dpssl.evaluation import few_shot
from hf_dpssl.evaluation.loading import FEATURES, LABEL, as_tensors, metric_info

_INPUTS = """
Args:
    predictions: features (N, D) to classify.
    references: (N,) integer classes of these.
    bank: features (M, D) of the training images.
    bank_labels: (M,) integer classes of these.
    **options: of hf_dpssl.evaluation.few_shot.

Returns:
    {"few_shot_top1_<n>": percent correct, "few_shot_top1_<n>_ci95": half its 95 % interval}.

Example:
    hf_dpssl.evaluation.load("few_shot").compute(predictions=x, references=y, bank=a, bank_labels=b, shots=(1, 5))
"""


class FewShot(evaluate.Metric):
    """Accuracy with few labelled examples per class."""

    def _info(self):
        return metric_info(
            description="Accuracy with few labelled examples per class.",
            citation="Snell et al., Prototypical Networks for Few-shot Learning, NeurIPS 2017",
            inputs=_INPUTS,
            predictions=FEATURES,
            references=LABEL,
        )

    def _compute(self, predictions, references, bank, bank_labels, **options):
        bank, bank_labels, features, labels = as_tensors(bank, bank_labels, predictions, references)
        return few_shot(bank, bank_labels, features, labels, **options)
