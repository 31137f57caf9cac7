"""`evaluate` module: how sure and how varied a classifier finds images: `hf_dpssl.evaluation.classifier_scores`."""

import evaluate
import torch

from hf_dpssl.evaluation import inception_score
from hf_dpssl.evaluation.loading import FEATURES, as_tensors, metric_info

_INPUTS = """
Args:
    predictions: logits (N, classes) of a classifier on generated images.
    splits: parts that get a score each; default: 10, or N where there are fewer images.
    seed: of the order.

Returns:
    {"inception_score": mean over splits, in [1, classes], "inception_score_std": standard deviation}.

Example:
    >>> from hf_dpssl import evaluation
    >>> module = evaluation.load("inception_score")
    >>> module.compute(predictions=[[99.0, 0.0], [0.0, 99.0]], splits=1)
    {'inception_score': 2.0, 'inception_score_std': 0.0}
"""
__test__ = {"example": _INPUTS}  # what doctest runs


class InceptionScore(evaluate.Metric):
    """How sure a classifier is of each image, and how evenly its classes occur."""

    def _info(self):
        return metric_info(
            description="How sure a classifier is of each image, and how evenly its classes occur.",
            citation="Salimans et al., Improved Techniques for Training GANs, NeurIPS 2016",
            inputs=_INPUTS,
            predictions=FEATURES,
        )

    def _compute(self, predictions, splits=None, seed=0):
        (logits,) = as_tensors(predictions)
        splits = min(10, len(logits)) if splits is None else splits
        return inception_score(logits, splits=splits, generator=torch.Generator().manual_seed(seed))
