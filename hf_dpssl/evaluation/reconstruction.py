"""Faithfulness of reconstructions."""

from __future__ import annotations

from torch import Tensor


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
    if images.shape != reconstructions.shape or images.ndim != 4:
        raise ValueError(f"both must be (N, C, H, W), got {tuple(images.shape)} and {tuple(reconstructions.shape)}.")
    error = (images.double() - reconstructions.double()).pow(2).mean((1, 2, 3))
    return {"psnr": float((10 * (value_range**2 / error).log10()).mean())}
