"""Speed of the autoencoder's training step beside diffusers' VQModel of the same blocks and weights, in one run.

    make bench        # or: python tests/benchmarks/autoencoder.py [--rounds 7] [--threads 1]

Forward and backward of reconstruction and commitment on 8 x 3 x 64 x 64 images; ours also moves its codebook and
revives codes, diffusers' also has the codebook's gradient. Time is the processor's. Writes
tests/benchmarks/results/autoencoder.json.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import VQModel
from timing import Comparison, compare

from hf_dpssl import VQAutoencoder, VQConfig
from hf_dpssl.results import write_results

RESULTS = Path(__file__).parent / "results" / "autoencoder.json"
WIDTHS, LATENT_CHANNELS, NUM_CODES = (64, 128, 128), 64, 1024


def diffusers_model() -> VQModel:
    """diffusers' VQModel with WIDTHS, training mode."""
    levels = len(WIDTHS)
    return VQModel(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=WIDTHS,
        latent_channels=LATENT_CHANNELS,
        num_vq_embeddings=NUM_CODES,
    ).train()


def own_model(theirs: VQModel) -> VQAutoencoder:
    """Ours with the weights of `theirs` and the same commitment (its bug gives the weights 1 and 0.25)."""
    model = VQAutoencoder(
        VQConfig(
            image_size=64,
            encoder_block_out_channels=list(WIDTHS),
            norm_num_groups=32,
            latent_channels=LATENT_CHANNELS,
            num_codes=NUM_CODES,
            commitment_weight=1.25,
        )
    ).train()
    weights = {n.replace("quantize.embedding.weight", "quantizer.codebook"): v for n, v in theirs.state_dict().items()}
    model.load_state_dict(weights, strict=False)
    model.quantizer.sums.copy_(model.quantizer.codebook)
    model.quantizer.is_initialized.fill_(1)
    return model


def own_step(model: VQAutoencoder, images: torch.Tensor, context: Callable) -> Callable[[], float]:
    """Forward and backward of our loss."""

    def step() -> float:
        model.zero_grad()
        with context():
            loss = model(images).loss
        loss.backward()
        return loss.item()

    return step


def diffusers_step(model: VQModel, images: torch.Tensor, context: Callable) -> Callable[[], float]:
    """Forward and backward of the same loss with diffusers' model."""

    def step() -> float:
        model.zero_grad()
        with context():
            output = model(images)
            loss = F.mse_loss(output.sample.float(), images) + output.commit_loss
        loss.backward()
        return loss.item()

    return step


def bfloat16():
    """Autocast on the CPU."""
    return torch.autocast("cpu", torch.bfloat16)


def training_rows() -> list[Comparison]:
    """Ours in three settings beside diffusers' in float32, and in the same setting."""
    images = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    rows = []
    settings = {
        "training step": (torch.contiguous_format, contextlib.nullcontext),
        "training step, channels_last": (torch.channels_last, contextlib.nullcontext),
        "training step, bfloat16 autocast": (torch.contiguous_format, bfloat16),
        "training step, channels_last and bfloat16": (torch.channels_last, bfloat16),
    }
    for name, (memory_format, context) in settings.items():
        peer = diffusers_model()
        own = own_model(peer).to(memory_format=memory_format)
        plain = name == "training step"
        laid_out = images.to(memory_format=memory_format)
        ours = own_step(own, laid_out, context)
        theirs = diffusers_step(peer, images, contextlib.nullcontext)
        rows.append(
            Comparison(name, "diffusers VQModel, float32", ours, theirs, same_value=plain, aim=1.03 if plain else None)
        )
        if not plain:
            same = diffusers_step(diffusers_model().to(memory_format=memory_format), laid_out, context)
            rows.append(Comparison(name, "diffusers VQModel, in the same setting", ours, same))
    return rows


def main() -> None:
    """Run all comparisons and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="alternating rounds of each comparison")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    measured = compare(training_rows(), args.rounds, clock=time.process_time)
    RESULTS.parent.mkdir(exist_ok=True)
    samples = {"rounds": args.rounds, "images": 8, "image_size": 64}
    write_results(RESULTS, {"comparisons": measured}, dataset="uniform random numbers", seed=0, samples=samples)


if __name__ == "__main__":
    main()
