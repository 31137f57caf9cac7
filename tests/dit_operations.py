"""Operations of a diffusion transformer by formula, with which counts and stated costs are compared."""

from __future__ import annotations

from hf_dpssl.latent_training.dit_sizes import DiTSize


def multiplications(size: DiTSize, *, latent_size: int, in_channels: int, out_channels: int, embedders: int = 1) -> int:
    """Multiply-adds of one forward pass of one image, which the paper calls Gflops.

    Args:
        size: of the transformer.
        latent_size: side of the latents.
        in_channels: of the latents.
        out_channels: of the prediction, twice as many with learned variance.
        embedders: evaluations of the time embedder: 1 in the paper, `num_layers` + 1 in diffusers' transformer.
    """
    width = size.width
    pixels = size.patch_size**2
    tokens = (latent_size // size.patch_size) ** 2
    block = 12 * tokens * width**2 + 2 * tokens**2 * width + 6 * width**2
    ends = tokens * width * pixels * (in_channels + out_channels) + 2 * width**2
    return size.num_layers * block + ends + embedders * (256 * width + width**2)
