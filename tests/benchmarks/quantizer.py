"""Speed of the quantiser's training step beside the peers', in one run on the same inputs.

    make bench        # or: python tests/benchmarks/quantizer.py [--rounds 15] [--threads 1]

Writes tests/benchmarks/results/quantizer.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers.models.autoencoders.vae import VectorQuantizer as DiffusersQuantizer
from timing import Comparison, compare
from vector_quantize_pytorch import VectorQuantize

from hf_dpssl.quantizer import VectorQuantizer
from hf_dpssl.results import write_results

RESULTS = Path(__file__).parent / "results" / "quantizer.json"


def quantizer_rows(num_codes: int, channels: int = 64) -> list[Comparison]:
    """One training step of a quantiser on 8 x 16 x 16 latents, codebook update included where there is one."""
    latents = torch.randn(8, channels, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    flat = latents.detach().flatten(2).transpose(1, 2).requires_grad_()
    own = VectorQuantizer(num_codes, channels).train()
    own.initialize_(torch.randn(num_codes, channels))
    lucid = VectorQuantize(dim=channels, codebook_size=num_codes, decay=0.99, threshold_ema_dead_code=0.03).train()
    gradient = DiffusersQuantizer(num_codes, channels, beta=0.25, legacy=False).train()

    def ours() -> float:
        output = own(latents)
        (output.quantized.sum() + output.commitment).backward()
        return output.commitment.item()

    def ema_peer() -> float:
        quantized, _, commitment = lucid(flat)
        (quantized.sum() + commitment.sum()).backward()
        return commitment.item()

    def gradient_peer() -> float:
        quantized, loss, _ = gradient(latents)
        (quantized.sum() + loss).backward()
        return loss.item()

    name = f"quantiser, {num_codes} codes"
    return [
        Comparison(name, "vector_quantize_pytorch VectorQuantize", ours, ema_peer),
        Comparison(name, "diffusers VectorQuantizer (no EMA, no revival)", ours, gradient_peer),
    ]


def main() -> None:
    """Run all comparisons and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="alternating rounds of each comparison")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    measured = compare([*quantizer_rows(1024), *quantizer_rows(16384)], args.rounds)
    RESULTS.parent.mkdir(exist_ok=True)
    samples = {"rounds": args.rounds, "latents": 8 * 16 * 16}
    write_results(RESULTS, {"comparisons": measured}, dataset="random normal numbers", seed=0, samples=samples)


if __name__ == "__main__":
    main()
