"""`evaluate` module: faithfulness of reconstructions: `hf_dpssl.evaluation.psnr` and `ssim`."""

import evaluate

from hf_dpssl.evaluation import psnr, ssim
from hf_dpssl.evaluation.loading import IMAGES, as_tensors, metric_info

_INPUTS = """
Args:
    predictions: reconstructions (N, C, H, W), clamped to the range of the images.
    references: images (N, C, H, W).
    value_range: largest minus smallest possible value; None: 2, for images in [-1, 1], some of which are dark.

Returns:
    {"psnr": dB, "ssim": in [-1, 1]}, both averaged over images; small images also "ssim_window".

Example:
    >>> from hf_dpssl import evaluation
    >>> dark = [[[[-0.5] * 8] * 8]]
    >>> lighter = [[[[-0.3] * 8] * 8]]
    >>> found = evaluation.load("reconstruction").compute(predictions=lighter, references=dark)
    >>> round(found["psnr"], 3)
    20.0
"""
__test__ = {"example": _INPUTS}  # what doctest runs


class Reconstruction(evaluate.Metric):
    """PSNR and structural similarity of reconstructions."""

    def _info(self):
        return metric_info(
            description="PSNR and structural similarity of reconstructions.",
            citation="Wang et al., Image Quality Assessment: From Error Visibility to Structural Similarity, TIP 2004",
            inputs=_INPUTS,
            predictions=IMAGES,
            references=IMAGES,
        )

    def _compute(self, predictions, references, value_range=None):
        reconstructions, images = as_tensors(predictions, references)
        options = {"value_range": value_range}
        return psnr(images, reconstructions, **options) | ssim(images, reconstructions, **options)
