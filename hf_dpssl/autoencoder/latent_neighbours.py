"""What a decoder makes of latents beside those of images: forecasts of how well a generator will do on the latent.

Sources: Xu et al. 2026 (arXiv 2603.05630, iFID: each latent is interpolated with its nearest neighbour); Qiu et al.
2025 (arXiv 2503.08354 and 2509.12474, pFID: a share of the codes is replaced by near ones of the codebook).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.matrix_products import full_float32
from ..models.modeling_vq import VQAutoencoder

CODE_SHARE = 0.4  # of an image's codes that are replaced
CODE_NEIGHBOURS = 1 / 16  # of the codebook's other codes, from which the new ones are drawn


def interpolated_latents(latents: Tensor, bank: Tensor, share: float = 0.5) -> Tensor:
    """(N, C, h, w): so much of the way from each of `latents` (N, C, h, w) to its nearest of `bank` (M, C, h, w).

    ValueError: no bank, or latents of another shape.
    """
    if len(bank) == 0 or bank.shape[1:] != latents.shape[1:]:
        raise ValueError(f"the bank must be (M, {', '.join(map(str, latents.shape[1:]))}), got {tuple(bank.shape)}.")
    with full_float32():
        nearest = [torch.cdist(part.flatten(1), bank.flatten(1)).argmin(1) for part in latents.split(256)]
    return torch.lerp(latents, bank[torch.cat(nearest)], share)


def perturbed_codes(codes: Tensor, codebook: Tensor, *, share: float, neighbours: int, seed: int) -> Tensor:
    """Codes (N, h, w) of which a random `share` is replaced, each by one of its `neighbours` nearest other codes.

    `codebook`: (K, D). ValueError: fewer than `neighbours` other codes, or a share outside [0, 1].
    """
    if not (0 <= share <= 1 and 1 <= neighbours < len(codebook)):
        raise ValueError(
            f"share lies in [0, 1] and neighbours in [1, {len(codebook) - 1}], got {share} and {neighbours}."
        )
    random = torch.Generator().manual_seed(seed)
    distances = torch.cdist(codebook.double(), codebook.double()).fill_diagonal_(float("inf"))
    near = distances.topk(neighbours, largest=False).indices
    drawn = torch.randint(neighbours, codes.shape, generator=random)
    replaced = torch.rand(codes.shape, generator=random) < share
    return torch.where(replaced, near[codes, drawn], codes)


@torch.no_grad()
def decoded_interpolations(model: VQAutoencoder, latents: Tensor, bank: Tensor, batch_size: int = 256) -> Tensor:
    """Images (N, C, H, W) in [-1, 1] of `interpolated_latents`, quantised where the model quantises."""
    between = interpolated_latents(latents, bank)
    images = []
    for batch in between.split(batch_size):
        batch = batch.to(model.device)
        quantized = batch if model.quantizer is None else model.quantize(batch).quantized
        images.append(model.decode(quantized).pixel_values.float().clamp(-1, 1).cpu())
    return torch.cat(images)


@torch.no_grad()
def decoded_perturbations(model: VQAutoencoder, codes: Tensor, seed: int, batch_size: int = 256) -> Tensor:
    """Images (N, C, H, W) in [-1, 1] of `perturbed_codes` with this module's share and neighbours."""
    codebook = model.quantizer.codebook.detach().float().cpu()
    neighbours = max(1, round(CODE_NEIGHBOURS * (len(codebook) - 1)))
    changed = perturbed_codes(codes, codebook, share=CODE_SHARE, neighbours=neighbours, seed=seed)
    batches = (model.decode_codes(batch.to(model.device)).pixel_values for batch in changed.split(batch_size))
    return torch.cat([images.float().clamp(-1, 1).cpu() for images in batches])
