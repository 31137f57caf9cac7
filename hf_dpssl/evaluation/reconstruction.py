"""Faithfulness of reconstructions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 64
LPIPS_NETWORKS = ("alex", "vgg", "squeeze")


def psnr(images: Tensor, reconstructions: Tensor, *, value_range: float = 2.0) -> dict[str, float]:
    """Peak signal-to-noise ratio, averaged over images (not of the averaged error).

    Args:
        images: (N, C, H, W).
        reconstructions: (N, C, H, W), clamped by the caller to the range of the images.
        value_range: largest minus smallest possible value; 2 for images in [-1, 1].

    Returns:
        {"psnr": dB, higher is better; inf for equal images}.

    Raises:
        ValueError: unequal shapes.
    """
    _check(images, reconstructions)
    error = (images.double() - reconstructions.double()).pow(2).mean((1, 2, 3))
    return {"psnr": float((10 * (value_range**2 / error).log10()).mean())}


def ssim(
    images: Tensor, reconstructions: Tensor, *, value_range: float = 2.0, window: int = 11, sigma: float = 1.5
) -> dict[str, float]:
    """Structural similarity under a Gaussian window, averaged over positions, channels and images.

    Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment: from error visibility to structural similarity",
    IEEE TIP 2004, equation 13, with their constants 0.01 and 0.03. Windows at the border see the image reflected, as
    in torchmetrics, so that every pixel has one; the authors' own code leaves those positions out.

    Args:
        images: (N, C, H, W).
        reconstructions: (N, C, H, W), clamped by the caller to the range of the images.
        value_range: largest minus smallest possible value; 2 for images in [-1, 1].
        window: side of the window in pixels, odd. Images of at most half of it get the largest that reflection
            allows, and the result then has the key "ssim_window": such figures compare with those of the same only.
        sigma: of the Gaussian, in pixels.

    Returns:
        {"ssim": in [-1, 1], 1 for equal images}.

    Raises:
        ValueError: unequal shapes, an even window, or a value_range or sigma that is not positive.
    """
    _check(images, reconstructions)
    if window < 1 or window % 2 == 0 or not value_range > 0 or not sigma > 0:
        given = f"{window}, {value_range}, {sigma}"
        raise ValueError(f"window must be odd and positive, value_range and sigma positive, got {given}.")
    fitting = min(window, 2 * min(images.shape[2:]) - 1)
    offsets = torch.arange(fitting, dtype=torch.float64) - fitting // 2
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(images.device)
    pairs = zip(images.split(_CHUNK), reconstructions.split(_CHUNK), strict=True)
    total = sum(float(_ssim_map(x.double(), y.double(), kernel, value_range).mean((1, 2, 3)).sum()) for x, y in pairs)
    return {"ssim": total / len(images)} | ({} if fitting == window else {"ssim_window": float(fitting)})


def _ssim_map(x: Tensor, y: Tensor, kernel: Tensor, value_range: float) -> Tensor:
    """(B, C, H, W) local similarities."""
    # Around a middle value, as E[x^2] - E[x]^2 cancels; only the means need it back.
    shift = x.mean((2, 3), keepdim=True)
    margin = [len(kernel) // 2] * 4
    stacked = torch.stack([F.pad(image - shift, margin, mode="reflect") for image in (x, y)])
    moments = torch.cat([stacked, stacked.square(), (stacked[:1] * stacked[1:])]).flatten(0, 2)[:, None]
    moments = F.conv2d(F.conv2d(moments, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))
    mean_x, mean_y, square_x, square_y, product = moments.unflatten(0, (5, *x.shape[:2])).squeeze(3)
    variances = square_x + square_y - mean_x.square() - mean_y.square()
    covariance = product - mean_x * mean_y
    mean_x, mean_y = mean_x + shift, mean_y + shift
    c_1, c_2 = (0.01 * value_range) ** 2, (0.03 * value_range) ** 2
    luminance = (2 * mean_x * mean_y + c_1) / (mean_x.square() + mean_y.square() + c_1)
    return luminance * (2 * covariance + c_2) / (variances + c_2)


@torch.no_grad()
def lpips(images: Tensor, reconstructions: Tensor, *, network: str = "alex") -> dict[str, float]:
    """Learned perceptual distance, averaged over images; lower is better.

    Zhang et al., "The unreasonable effectiveness of deep features as a perceptual metric", CVPR 2018. Computed by
    torchmetrics; the network's weights are downloaded at first use.

    Args:
        images, reconstructions: (N, C, H, W) in [-1, 1], C = 1 (repeated) or 3; at least 32 pixels high and wide.
        network: "alex" (the usual one for evaluation), "vgg" or "squeeze".

    Returns:
        {"lpips": mean distance}.

    Raises:
        ValueError: unequal shapes, another number of channels, images too small, an unknown network, or weights
            that cannot be had. ImportError: without torchmetrics.
    """
    _check(images, reconstructions)
    if network not in LPIPS_NETWORKS or images.shape[1] not in (1, 3) or min(images.shape[2:]) < 32:
        raise ValueError(
            f"network must be one of {LPIPS_NETWORKS} and images (N, 1 or 3, at least 32, at least 32), got "
            f"{network!r} and {tuple(images.shape)}."
        )
    try:
        from torchmetrics.functional.image import learned_perceptual_image_patch_similarity as library
    except ImportError as error:
        raise ImportError("lpips needs torchmetrics: pip install 'hf_dpssl[eval]'.") from error
    total = 0.0
    for x, y in zip(images.split(_CHUNK), reconstructions.split(_CHUNK), strict=True):
        x, y = (part.float().clamp(-1, 1).expand(-1, 3, -1, -1) for part in (x, y))
        try:
            total += float(library(x, y, net_type=network, reduction="sum"))
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"lpips with {network!r} failed: {error}. The network's weights are downloaded at first use; without a "
                "network put them into the folder checkpoints of torch.hub.get_dir(), or use psnr, ssim and "
                "image_quality with prefix='r'."
            ) from error
    return {"lpips": total / len(images)}


def _check(images: Tensor, reconstructions: Tensor) -> None:
    if images.shape != reconstructions.shape or images.ndim != 4 or images.numel() == 0:
        shapes = f"{tuple(images.shape)} and {tuple(reconstructions.shape)}"
        raise ValueError(f"both must be (N, C, H, W) of the same size, and not empty, got {shapes}.")
