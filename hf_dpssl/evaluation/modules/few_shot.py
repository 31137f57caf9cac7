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
    shots, trials, classifier, seed: as of hf_dpssl.evaluation.few_shot.

Returns:
    {"few_shot_top1_<n>": percent correct, "few_shot_top1_<n>_ci95": half its 95 % interval}.

Example:
    >>> from hf_dpssl import evaluation
    >>> module = evaluation.load("few_shot")
    >>> module.compute(
    ...     predictions=[[1.0, 0.0], [0.0, 1.0]], references=[0, 1],
    ...     bank=[[2.0, 0.0], [3.0, 1.0], [0.0, 2.0], [1.0, 3.0]], bank_labels=[0, 0, 1, 1], shots=[1],
    ... )
    {'few_shot_top1_1': 100.0, 'few_shot_top1_1_ci95': 0.0}
"""
__test__ = {"example": _INPUTS}  # what doctest runs


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

    def _compute(
        self,
        predictions,
        references,
        bank,
        bank_labels,
        shots=(1, 5, 10),
        trials=20,
        classifier="centroid",
        seed=0,
    ):
        arrays = as_tensors(bank, bank_labels, predictions, references)
        return few_shot(*arrays, shots=shots, trials=trials, classifier=classifier, seed=seed)
