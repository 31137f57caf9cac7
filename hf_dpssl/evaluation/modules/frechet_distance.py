"""`evaluate` module: Frechet distance of two clouds: `hf_dpssl.evaluation.frechet_distance_of_features`."""

import evaluate

from hf_dpssl.evaluation import frechet_distance_of_features
from hf_dpssl.evaluation.loading import FEATURES, as_tensors, metric_info

_INPUTS = """
Args:
    predictions: features (N, D) of generated or reconstructed images.
    real: features (M, D) of real images, for `compute`.

Returns:
    {"frechet_distance": squared distance of the two Gaussians}; FID when the features are Inception's.

Example:
    >>> from hf_dpssl import evaluation
    >>> module = evaluation.load("frechet_distance")
    >>> module.compute(predictions=[[0.0], [2.0]], real=[[1.0], [3.0]])
    {'frechet_distance': 1.0}
"""
__test__ = {"example": _INPUTS}  # what doctest runs


class FrechetDistance(evaluate.Metric):
    """Frechet distance of two clouds of features, each taken as a Gaussian."""

    def _info(self):
        return metric_info(
            description="Frechet distance of two clouds of features, each taken as a Gaussian.",
            citation="Heusel et al., GANs Trained by a Two Time-Scale Update Rule Converge ..., NeurIPS 2017",
            inputs=_INPUTS,
            predictions=FEATURES,
        )

    def _compute(self, predictions, real):
        generated, real = as_tensors(predictions, real)
        return {"frechet_distance": frechet_distance_of_features(real, generated)}
