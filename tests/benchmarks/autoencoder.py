"""Speed of the quantiser and of the autoencoder's training step beside the peers', in one run on the same inputs.

    make bench        # or: python tests/benchmarks/autoencoder.py [--rounds 7] [--threads 1]

Quantiser: 2,048 vectors of 64 numbers, codes drawn as the vectors are. Ours also moves an EMA codebook and revives
codes, diffusers' does neither. `agreement` says how many codes differ from diffusers', and by how much of the distance.

Autoencoder: diffusers' VQModel of the same blocks and weights; forward and backward of reconstruction and commitment on
8 x 3 x 64 x 64 images; ours also moves its codebook, diffusers' also has the codebook's gradient.

Time is the processor's. Writes tests/benchmarks/results/autoencoder.json.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import VQModel
from diffusers.models.autoencoders.vae import VectorQuantizer as DiffusersQuantizer
from timing import Comparison, compare, parser
from vector_quantize_pytorch import VectorQuantize

from hf_dpssl import VectorQuantizer, VQAutoencoder, VQConfig
from hf_dpssl.models.codebook_search import nearest_codes
from hf_dpssl.runs.results import write_results

RESULTS = Path(__file__).parent / "results" / "autoencoder.json"
FORWARD_AIMS = {256: 1.0, 1024: 0.7, 16384: 0.4}
WIDTHS, LATENT_CHANNELS, NUM_CODES = (64, 128, 128), 64, 1024


def quantizers(num_codes: int) -> tuple[VectorQuantizer, DiffusersQuantizer, torch.Tensor]:
    """Ours and diffusers' with the same codes, training mode, and latents (8, 64, 16, 16)."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(8, LATENT_CHANNELS, 16, 16, generator=generator)
    own = VectorQuantizer(num_codes, LATENT_CHANNELS).train()
    own.codebook.copy_(torch.randn(num_codes, LATENT_CHANNELS, generator=generator))
    own.sums.copy_(own.codebook)
    own.is_initialized.fill_(1)
    theirs = DiffusersQuantizer(num_codes, LATENT_CHANNELS, beta=0.25, legacy=False).train()
    theirs.embedding.weight.data.copy_(own.codebook)
    return own, theirs, latents


def forward_rows(num_codes: int) -> list[Comparison]:
    """The search alone, and the whole layer in both modes, beside diffusers' whole layer."""
    aim = FORWARD_AIMS[num_codes]
    own, theirs, latents = quantizers(num_codes)
    fixed = quantizers(num_codes)[0].eval()
    vectors = latents.permute(0, 2, 3, 1).reshape(-1, LATENT_CHANNELS)
    calls = {  # ours, aim
        "nearest codes": (lambda: float(nearest_codes(vectors, fixed.codebook)[0]), aim),
        "quantiser, evaluation forward": (lambda: fixed(latents).commitment.item(), aim),
        "quantiser, training forward": (lambda: own(latents).commitment.item(), None),
    }

    def peer() -> float:
        return theirs(latents)[1].item()

    what = "diffusers VectorQuantizer, forward"
    return [Comparison(f"{name}, {num_codes} codes", what, call, peer, aim=aim) for name, (call, aim) in calls.items()]


def step_rows(num_codes: int) -> list[Comparison]:
    """One training step of a quantiser, codebook update included where there is one."""
    own, gradient, latents = quantizers(num_codes)
    latents.requires_grad_()
    flat = latents.detach().flatten(2).transpose(1, 2).requires_grad_()
    lucid = VectorQuantize(LATENT_CHANNELS, num_codes, decay=0.99, threshold_ema_dead_code=0.03).train()

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

    name = f"quantiser, training step, {num_codes} codes"
    return [
        Comparison(name, "vector_quantize_pytorch VectorQuantize", ours, ema_peer),
        Comparison(name, "diffusers VectorQuantizer (no EMA, no revival)", ours, gradient_peer),
    ]


def agreement(num_codes: int) -> dict:
    """Share of the vectors whose code is not diffusers', and how far the distances differ, relative."""
    own, theirs, latents = quantizers(num_codes)
    ours, (_, _, (_, _, others)) = own.eval()(latents).codes.flatten(), theirs(latents)
    vectors, codebook = latents.permute(0, 2, 3, 1).reshape(-1, LATENT_CHANNELS).double(), own.codebook.double()
    distances = [(vectors - codebook[codes]).norm(dim=1) for codes in (ours, others)]
    return {
        "codes": num_codes,
        "share_that_differs": float((ours != others).double().mean()),
        "largest_relative_difference": float(((distances[0] - distances[1]).abs() / distances[1]).max()),
    }


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
    args = parser(__doc__, 7).parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = [row for num_codes in FORWARD_AIMS for row in (*forward_rows(num_codes), *step_rows(num_codes))]
    measured = compare([*rows, *training_rows()], args.rounds, clock=time.process_time)
    RESULTS.parent.mkdir(exist_ok=True)
    samples = {"rounds": args.rounds, "vectors": 8 * 16 * 16, "images": 8, "image_size": 64}
    metrics = {"comparisons": measured, "agreement": [agreement(num_codes) for num_codes in FORWARD_AIMS]}
    write_results(RESULTS, metrics, dataset="random numbers", seed=0, samples=samples)


if __name__ == "__main__":
    main()
