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
    solver, grid, validation, epochs, batch_size, seed: as of hf_dpssl.evaluation.linear_probe.

Returns:
    {"linear_top1": percent correct, "linear_c" or "linear_learning_rate": what was chosen}.

Example:
    >>> from hf_dpssl import evaluation
    >>> module = evaluation.load("linear_probe")
    >>> module.compute(
    ...     predictions=[[1.0, 0.0], [0.0, 1.0]], references=[0, 1],
    ...     bank=[[2.0, 0.0], [3.0, 1.0], [0.0, 2.0], [1.0, 3.0]], bank_labels=[0, 0, 1, 1], grid=[1.0],
    ... )
    {'linear_top1': 100.0, 'linear_c': 1.0}
"""
__test__ = {"example": _INPUTS}  # what doctest runs


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

    def _compute(
        self,
        predictions,
        references,
        bank,
        bank_labels,
        solver="logistic",
        grid=None,
        validation=0.1,
        epochs=100,
        batch_size=256,
        seed=0,
    ):
        arrays = as_tensors(bank, bank_labels, predictions, references)
        return linear_probe(
            *arrays, solver=solver, grid=grid, validation=validation, epochs=epochs, batch_size=batch_size, seed=seed
        )
