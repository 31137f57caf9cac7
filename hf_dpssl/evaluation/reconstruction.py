"""Faithfulness of reconstructions: PSNR, SSIM and LPIPS of torchmetrics, which is imported when one is measured."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 64
_SIGMA = 1.5  # pixels, of the Gaussian window of SSIM, which reaches 3.5 of it: 11 pixels
LPIPS_NETWORKS = ("alex", "vgg", "squeeze")


def psnr(images: Tensor, reconstructions: Tensor, *, value_range: float | None = None) -> dict[str, float]:
    """Peak signal-to-noise ratio, averaged over images (not of the averaged error).

    Args:
        images: (N, C, H, W).
        reconstructions: (N, C, H, W), clamped by the caller to the range of the images.
        value_range: largest minus smallest possible value; None: 2, for images in [-1, 1], some of which are dark.

    Returns:
        {"psnr": dB, higher is better; inf for equal images}.

    Raises:
        ValueError: unequal shapes, a value_range that is not positive, or values that do not fit into it.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    value_range = _check(images, reconstructions, value_range)
    given = reconstructions.double(), images.double()
    return {"psnr": float(peak_signal_noise_ratio(*given, data_range=value_range, dim=(1, 2, 3)))}


def ssim(images: Tensor, reconstructions: Tensor, *, value_range: float | None = None) -> dict[str, float]:
    """Structural similarity under a Gaussian window, averaged over positions, channels and images.

    Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment: from error visibility to structural similarity",
    IEEE TIP 2004, equation 13, with their window of 11 pixels, deviation 1.5 and constants 0.01 and 0.03. Windows at
    the border see the image reflected, so that every pixel has one; the authors' own code leaves those positions out.

    Args:
        images: (N, C, H, W).
        reconstructions: (N, C, H, W), clamped by the caller to the range of the images.
        value_range: largest minus smallest possible value; None: 2, for images in [-1, 1], some of which are dark.

    Returns:
        {"ssim": in [-1, 1], 1 for equal images}; of images of at most 5 pixels, whose window is the largest that
        reflection allows, also {"ssim_window": its side}: such figures compare with those of the same only.

    Raises:
        ValueError: unequal shapes, a value_range that is not positive, or values that do not fit into it.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    value_range = _check(images, reconstructions, value_range)
    reach = min(images.shape[2:]) - 1
    tiny = reach < int(3.5 * _SIGMA + 0.5)
    options = {"data_range": value_range, "sigma": max(reach / 3.5, 0.1) if tiny else _SIGMA, "reduction": "sum"}
    pairs = zip(images.split(_CHUNK), reconstructions.split(_CHUNK), strict=True)
    total = sum(float(structural_similarity_index_measure(y.float(), x.float(), **options)) for x, y in pairs)
    return {"ssim": total / len(images)} | ({"ssim_window": float(2 * reach + 1)} if tiny else {})


@torch.no_grad()
def lpips(images: Tensor, reconstructions: Tensor, *, network: str = "alex") -> dict[str, float]:
    """Learned perceptual distance, averaged over images; lower is better.

    Zhang et al., "The unreasonable effectiveness of deep features as a perceptual metric", CVPR 2018. The network's
    weights are downloaded at first use.

    Args:
        images, reconstructions: (N, C, H, W) in [-1, 1], C = 1 (repeated) or 3; at least 32 pixels high and wide.
        network: "alex" (the usual one for evaluation), "vgg" or "squeeze".

    Returns:
        {"lpips": mean distance}.

    Raises:
        ValueError: unequal shapes, another number of channels, images too small, an unknown network, or weights
            that cannot be had.
    """
    _check(images, reconstructions, None)
    if network not in LPIPS_NETWORKS or images.shape[1] not in (1, 3) or min(images.shape[2:]) < 32:
        raise ValueError(
            f"network must be one of {LPIPS_NETWORKS} and images (N, 1 or 3, at least 32, at least 32), got "
            f"{network!r} and {tuple(images.shape)}."
        )
    from torchmetrics.image import LearnedPerceptualImagePatchSimilarity

    try:
        metric = LearnedPerceptualImagePatchSimilarity(net_type=network)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"lpips with {network!r} failed: {error}. The network's weights are downloaded at first use; without a "
            "network put them into the folder checkpoints of torch.hub.get_dir(), or use psnr, ssim and "
            "image_quality with prefix='r'."
        ) from error
    metric.to(images.device)
    for x, y in zip(images.split(_CHUNK), reconstructions.split(_CHUNK), strict=True):
        metric.update(*(part.float().clamp(-1, 1).expand(-1, 3, -1, -1) for part in (x, y)))
    return {"lpips": float(metric.compute())}


def _check(images: Tensor, reconstructions: Tensor, value_range: float | None) -> float:
    """The range of values; ValueError where shapes or values do not fit."""
    if images.shape != reconstructions.shape or images.ndim != 4 or images.numel() == 0:
        shapes = f"{tuple(images.shape)} and {tuple(reconstructions.shape)}"
        raise ValueError(f"both must be (N, C, H, W) of the same size, and not empty, got {shapes}.")
    assumed = value_range is None
    value_range = 2.0 if assumed else value_range
    if not value_range > 0:
        raise ValueError(f"value_range must be positive, got {value_range}.")
    for name, pictures in (("images", images), ("reconstructions", reconstructions)):
        low, high = (float(value) for value in torch.aminmax(pictures))
        if not high - low <= 1.01 * value_range:  # NaN is not
            raise ValueError(
                f"{name} must be finite and span at most value_range={value_range:g}, got [{low:.3g}, {high:.3g}]: "
                "give the range of these pictures (2 for [-1, 1], 1 for [0, 1], 255 for bytes), clamp reconstructions."
            )
    if assumed and images.min() >= 0:
        raise ValueError(
            "no pixel of the images is below 0: they seem to lie in [0, 1], where [-1, 1] is assumed. Give "
            "value_range=1 for [0, 1], value_range=2 for pictures in [-1, 1] that are that bright."
        )
    return value_range
