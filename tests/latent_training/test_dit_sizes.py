"""Sizes of the DiT paper: its tables, and diffusers' transformer counted parameter by parameter."""

import pytest
import torch
from cases import for_each
from dit_operations import multiplications
from torch.utils.flop_counter import FlopCounterMode

from hf_dpssl.latent_training.diffusion import make_transformer
from hf_dpssl.latent_training.dit_sizes import PRESETS, preset

LATENTS = dict(in_channels=4, out_channels=8)
# Peebles and Xie 2023, tables 1 and 4: depth, width, heads; millions of parameters (patch 2); Gflops by patch.
PAPER = {
    "s": ((12, 384, 6), 33.0, {2: 6.06, 4: 1.41, 8: 0.36}),
    "b": ((12, 768, 12), 130.5, {2: 23.01, 4: 5.56, 8: 1.42}),
    "l": ((24, 1024, 16), 458.1, {2: 80.71, 4: 19.70, 8: 5.01}),
    "xl": ((28, 1152, 16), 675.1, {2: 118.64, 4: 29.05, 8: 7.39}),
}
DIFFUSERS = {"s": 39.8, "b": 147.4, "l": 511.6, "xl": 749.8}


def on_meta(name: str, num_layers: int | None = None):
    size = PRESETS[name]
    with torch.device("meta"):
        return make_transformer(
            num_layers=num_layers or size.num_layers, width=size.width, num_heads=size.num_heads,
            patch_size=size.patch_size, latent_channels=4, latent_size=32, num_classes=1000,
            learned_variance=True,
        )  # fmt: skip


@for_each("letters", PAPER)
def test_size_is_the_papers_in_shape_operations_and_parameters(letters):
    dimensions, millions, operations = PAPER[letters]
    for patch, gflops in operations.items():
        size = preset(f"dit-{letters}-{patch}")
        assert (size.num_layers, size.width, size.num_heads, size.patch_size) == (*dimensions, patch)
        found = multiplications(size, latent_size=32, **LATENTS)
        assert found / 1e9 == pytest.approx(gflops, rel=0.01, abs=0.005)  # the paper gives two decimals
    transformer = on_meta(f"dit-{letters}-2")
    counts = {name: parameter.numel() for name, parameter in transformer.named_parameters()}
    assert sum(counts.values()) / 1e6 == pytest.approx(DIFFUSERS[letters], abs=0.06)
    # diffusers' transformer embeds time and label in every block, the paper's once; its table of positions is counted.
    surplus = sum(
        n for name, n in counts.items() if "norm1.emb." in name and not name.startswith("transformer_blocks.0.")
    )
    positions = 256 * transformer.inner_dim
    assert (sum(counts.values()) - surplus + positions) / 1e6 == pytest.approx(millions, abs=0.06)


def test_operations_are_those_that_torch_counts():
    for name, size in PRESETS.items():
        transformer = on_meta(name, num_layers=2)
        with FlopCounterMode(display=False) as counter, torch.device("meta"):
            labels = torch.empty(1, dtype=torch.int64)
            transformer(torch.empty(1, 4, 32, 32), timestep=torch.empty(1), class_labels=labels)
        shallow = type(size)(2, size.width, size.num_heads, size.patch_size)
        assert counter.get_total_flops() == 2 * multiplications(shallow, latent_size=32, embedders=3, **LATENTS)


def test_unknown_size_is_refused_with_the_closest():
    with pytest.raises(ValueError, match="no size 'dit-s2'; the closest are .*'dit-s-2'"):
        preset("dit-s2")
