"""A VQ autoencoder for pictures of 8 px, pictures for it, and what tests ask of its weights."""

from __future__ import annotations

import torch

from hf_dpssl import VQAutoencoder, VQConfig

SMALL = {
    "image_size": 8,
    "encoder_block_out_channels": [8, 16],
    "norm_num_groups": 4,
    "latent_channels": 3,
    "num_codes": 12,
}


def images(seed: int = 0, count: int = 4) -> torch.Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def make(**options) -> VQAutoencoder:
    """An autoencoder whose codebook has been started on one batch; eval mode."""
    torch.manual_seed(0)
    model = VQAutoencoder(VQConfig(**(SMALL | options))).train()
    with torch.no_grad():
        model(images())
    return model.eval()


def state(model: torch.nn.Module, *prefixes: str) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if not prefixes or k.split(".")[0] in prefixes}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def train_steps(model: VQAutoencoder, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        model(images(step)).loss.backward()
        optimizer.step()


def gradients(model: VQAutoencoder, pixel_values: torch.Tensor, seed: int = 1) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    model.zero_grad()
    model(pixel_values).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
