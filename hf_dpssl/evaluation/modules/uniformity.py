"""`evaluate` module: how evenly a cloud of vectors is spread: `hf_dpssl.evaluation.uniformity`."""

import evaluate

from hf_dpssl.evaluation import uniformity
from hf_dpssl.evaluation.loading import FEATURES, as_tensors, metric_info

_INPUTS = """
Args:
    predictions: vectors (N, D).
    **options: of hf_dpssl.evaluation.uniformity.

Returns:
    {"uniformity": on the sphere, "uniformity_raw": as the vectors are, at unit scale}; lower is more even.

Example:
    hf_dpssl.evaluation.load("uniformity").compute(predictions=x)
"""


class Uniformity(evaluate.Metric):
    """How evenly a cloud of vectors is spread."""

    def _info(self):
        return metric_info(
            description="How evenly a cloud of vectors is spread.",
            citation="Wang and Isola, Alignment and Uniformity on the Hypersphere, ICML 2020, arXiv 2005.10242",
            inputs=_INPUTS,
            predictions=FEATURES,
        )

    def _compute(self, predictions, **options):
        return uniformity(*as_tensors(predictions), **options)
