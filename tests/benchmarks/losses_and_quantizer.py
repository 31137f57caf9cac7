"""Speed of losses and quantiser beside the peers', forward and backward, in one run on the same inputs.

    make bench        # or: python tests/benchmarks/losses_and_quantizer.py [--rounds 15] [--threads 1]

Ours and theirs alternate; the minimum of all rounds counts, and the ratio is ours / theirs (below 1: ours is
faster). Where both compute the same function, their values are compared first. Writes
tests/benchmarks/results/losses_and_quantizer.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import VectorQuantizer as DiffusersQuantizer
from lightly.loss import NTXentLoss
from torch import Tensor
from tqdm import tqdm
from tsimcne.losses.infonce import InfoNCECosine, InfoNCET
from vector_quantize_pytorch import VectorQuantize

from hf_dpssl.losses import info_nce, moco, t_simclr
from hf_dpssl.momentum import enqueue_
from hf_dpssl.quantizer import VectorQuantizer
from hf_dpssl.results import write_results

RESULTS = Path(__file__).parent / "results" / "losses_and_quantizer.json"
DIMENSION, DOF = 128, 5.0


def loss_rows(pairs: int) -> list[tuple[str, str, Callable, Callable, bool]]:
    """(what, peer, ours, theirs, equal functions) for two views of `pairs` images."""
    views = torch.randn(2, pairs, DIMENSION, generator=torch.Generator().manual_seed(0)).requires_grad_()
    lightly, cosine = NTXentLoss(temperature=0.5), InfoNCECosine(temperature=0.5)
    student = InfoNCET(dof=DOF, temperature=1 / (2 * 8.0))

    def backward(loss: Callable[[], Tensor]) -> float:
        views.grad = None
        value = loss()
        value.backward()
        return value.item()

    ours = {
        "info_nce": partial(backward, lambda: info_nce(*views, temperature=0.5)),
        "anchor": partial(backward, lambda: t_simclr(*views, temperature=8.0, dof=DOF, normalization="anchor")),
        "joint": partial(backward, lambda: t_simclr(*views, temperature=8.0, dof=DOF)),
    }
    theirs = {
        "lightly NTXentLoss": partial(backward, lambda: lightly(*views)),
        "tsimcne InfoNCECosine": partial(backward, lambda: cosine(views.flatten(0, 1))["loss"]),
        "tsimcne InfoNCET": partial(backward, lambda: student(views.flatten(0, 1))["loss"]),
    }
    return [
        (f"InfoNCE, {pairs} pairs", "lightly NTXentLoss", ours["info_nce"], theirs["lightly NTXentLoss"], True),
        (f"InfoNCE, {pairs} pairs", "tsimcne InfoNCECosine", ours["info_nce"], theirs["tsimcne InfoNCECosine"], True),
        (f"t-SimCLR per anchor, {pairs} pairs", "tsimcne InfoNCET", ours["anchor"], theirs["tsimcne InfoNCET"], True),
        (f"t-SimCLR joint, {pairs} pairs", "lightly NTXentLoss", ours["joint"], theirs["lightly NTXentLoss"], False),
    ]


def queue_row(queue_size: int, batch: int = 256) -> tuple[str, str, Callable, Callable, bool]:
    """MoCo's loss, backward and update of the queue beside lightly's memory bank."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(batch, DIMENSION, generator=generator).requires_grad_()
    key = F.normalize(torch.randn(batch, DIMENSION, generator=generator), dim=1)
    queue = F.normalize(torch.randn(queue_size, DIMENSION, generator=generator), dim=1)
    cursor, filled = torch.tensor(0), torch.tensor(queue_size)
    bank = NTXentLoss(temperature=0.2, memory_bank_size=(queue_size, DIMENSION))

    def ours() -> float:
        query.grad = None
        value = moco(query, key, queue.clone(), kernel="cosine", temperature=0.2)  # the copy that the model makes
        value.backward()
        enqueue_(queue, cursor, filled, key)
        return value.item()

    def theirs() -> float:
        query.grad = None
        value = bank(query, key)
        value.backward()
        return value.item()

    return f"MoCo, batch {batch}, queue {queue_size}", "lightly NTXentLoss with memory bank", ours, theirs, False


def quantizer_rows(num_codes: int, channels: int = 64) -> list[tuple[str, str, Callable, Callable, bool]]:
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
        (name, "vector_quantize_pytorch VectorQuantize", ours, ema_peer, False),
        (name, "diffusers VectorQuantizer (no EMA, no revival)", ours, gradient_peer, False),
    ]


def compare(ours: Callable, theirs: Callable, rounds: int) -> dict[str, float]:
    """Minimum seconds of both over alternating rounds, and their ratio."""
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    ours(), theirs()  # warm-up
    for _ in range(rounds):
        for name, call in (("ours", ours), ("theirs", theirs)):
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    best = {f"{name}_ms": round(1e3 * min(values), 3) for name, values in seconds.items()}
    return best | {"ratio": round(best["ours_ms"] / best["theirs_ms"], 3)}


def main() -> None:
    """Run all comparisons and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="alternating rounds of each comparison")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = [*loss_rows(256), *loss_rows(512), queue_row(4096), queue_row(65536)]
    rows += [*quantizer_rows(1024), *quantizer_rows(16384)]
    measured = []
    for what, peer, ours, theirs, equal in tqdm(rows, desc="comparisons"):
        if equal:
            torch.testing.assert_close(ours(), theirs(), rtol=1e-5, atol=1e-5)
        measured.append({"what": what, "peer": peer, "same_value": equal} | compare(ours, theirs, args.rounds))
    for row in measured:
        print(f"{row['what']:<36} {row['ours_ms']:>9.2f} ms  {row['ratio']:>6.2f} of {row['peer']}")
    RESULTS.parent.mkdir(exist_ok=True)
    samples = {"rounds": args.rounds, "dimension": DIMENSION}
    write_results(RESULTS, {"comparisons": measured}, dataset="random normal numbers", seed=0, samples=samples)


if __name__ == "__main__":
    main()
