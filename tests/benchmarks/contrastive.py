"""Speed and memory of the contrastive losses beside the peers', forward and backward, in one run on the same inputs.

    make bench        # or: python tests/benchmarks/contrastive.py [--rounds 9] [--threads 1]

Writes tests/benchmarks/results/contrastive.json.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import Comparison, compare, parser
from torch import Tensor

from hf_dpssl.contrastive.losses import info_nce, moco, t_simclr
from hf_dpssl.contrastive.momentum import enqueue_
from hf_dpssl.runs.results import write_results

RESULTS = Path(__file__).parent / "results" / "contrastive.json"
DIMENSION, DOF = 128, 5.0
LOSSES = {
    "InfoNCE": partial(info_nce, temperature=0.5),
    "t-SimCLR per anchor": partial(t_simclr, temperature=8.0, dof=DOF, normalization="anchor"),
    "t-SimCLR joint": partial(t_simclr, temperature=8.0, dof=DOF),
    "Gaussian per anchor": partial(t_simclr, temperature=8.0, dof=math.inf, normalization="anchor"),
    "Gaussian joint": partial(t_simclr, temperature=8.0, dof=math.inf),
}
# Largest ratio to lightly's NTXentLoss aimed at, by the number of pairs.
AIMS = {
    "InfoNCE": {512: 1 / 2, 2048: 1 / 3, 4096: 1 / 5},
    "t-SimCLR per anchor": {512: 1 / 2, 2048: 1 / 3, 4096: 1 / 5},
    "t-SimCLR joint": {512: 1 / 2, 2048: 1 / 6, 4096: 1 / 9},
}
MEMORY_PAIRS, MEMORY_AIM_MB = 16_384, 250


def two_views(pairs: int) -> Tensor:
    """(2, pairs, 128) standard normal numbers that take a gradient."""
    return torch.randn(2, pairs, DIMENSION, generator=torch.Generator().manual_seed(0)).requires_grad_()


def backward(views: Tensor, loss: Callable[[], Tensor]) -> float:
    """Value of a loss after its backward pass."""
    views.grad = None
    value = loss()
    value.backward()
    return value.item()


def loss_rows(pairs: int) -> list[Comparison]:
    """The three losses beside lightly's, and at 512 pairs beside t-SimCNE's."""
    from lightly.loss import NTXentLoss
    from tsimcne.losses.infonce import InfoNCECosine, InfoNCET

    views = two_views(pairs)
    ours = {name: partial(backward, views, lambda loss=LOSSES[name]: loss(*views)) for name in AIMS}
    lightly = NTXentLoss(temperature=0.5)
    lightly_call = partial(backward, views, lambda: lightly(*views))
    rows = [
        Comparison(
            f"{name}, {pairs} pairs", "lightly NTXentLoss", call, lightly_call, name == "InfoNCE", AIMS[name][pairs]
        )
        for name, call in ours.items()
    ]
    if pairs == 512:
        cosine, student = InfoNCECosine(temperature=0.5), InfoNCET(dof=DOF, temperature=1 / (2 * 8.0))
        peers = {"InfoNCE": ("InfoNCECosine", cosine), "t-SimCLR per anchor": ("InfoNCET", student)}
        for name, (title, peer) in peers.items():
            theirs = partial(backward, views, lambda peer=peer: peer(views.flatten(0, 1))["loss"])
            rows.append(Comparison(f"{name}, {pairs} pairs", f"tsimcne {title}", ours[name], theirs, True, 1.03))
    return rows


def product_row(pairs: int = 8192) -> Comparison:
    """The joint loss beside what a dense implementation cannot avoid: three 2N x 2N x D products."""
    views = two_views(pairs)
    points = views.detach().flatten(0, 1)

    def products() -> float:
        gram = points @ points.T
        return float((gram @ points + gram.T @ points)[0, 0])

    ours = partial(backward, views, lambda: t_simclr(*views, temperature=8.0, dof=DOF))
    return Comparison(f"t-SimCLR joint, {pairs} pairs", "three dense products of its size", ours, products, False, 0.5)


def queue_row(kernel: str, queue_size: int, batch: int = 256) -> Comparison:
    """MoCo's loss, backward and update of the queue beside lightly's memory bank."""
    from lightly.loss import NTXentLoss

    generator = torch.Generator().manual_seed(0)
    query = torch.randn(batch, DIMENSION, generator=generator).requires_grad_()
    key = F.normalize(torch.randn(batch, DIMENSION, generator=generator), dim=1)
    queue = F.normalize(torch.randn(queue_size, DIMENSION, generator=generator), dim=1)
    cursor, filled = torch.tensor(0), torch.tensor(queue_size)
    bank = NTXentLoss(temperature=0.2, memory_bank_size=(queue_size, DIMENSION))
    temperature = 0.2 if kernel == "cosine" else 5.0

    def ours() -> float:
        value = backward(query, lambda: moco(query, key, queue, kernel=kernel, temperature=temperature))
        enqueue_(queue, cursor, filled, key)
        return value

    name = "MoCo" if kernel == "cosine" else "t-MoCo"
    what, peer = f"{name}, batch {batch}, queue {queue_size}", "lightly NTXentLoss with memory bank"
    return Comparison(what, peer, ours, partial(backward, query, lambda: bank(query, key)), False, 0.4)


def peak_of(name: str) -> float:
    """MB that forward and backward of a loss take at their peak beyond inputs and libraries (Linux)."""
    small, views = two_views(64), two_views(MEMORY_PAIRS)
    backward(small, lambda: LOSSES[name](*small))  # threads and libraries

    def resident(entry: str) -> int:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.split(f"{entry}:")[1].split()[0])

    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak counts from now on
    before = resident("VmRSS")
    backward(views, lambda: LOSSES[name](*views))
    return (resident("VmHWM") - before) / 1000


def memory_rows() -> list[dict]:
    """Extra memory of each loss at 16,384 pairs, each in a fresh process."""
    rows = []
    for name in LOSSES:
        output = subprocess.run(
            [sys.executable, __file__, "--peak-of", name], capture_output=True, text=True, check=True
        )
        rows.append({"what": name, "pairs": MEMORY_PAIRS, "extra_mb": float(output.stdout), "aim_mb": MEMORY_AIM_MB})
        print(f"{name:<24} {rows[-1]['extra_mb']:>6.0f} MB extra at {MEMORY_PAIRS} pairs (aim {MEMORY_AIM_MB})")
    return rows


def main() -> None:
    """Run all comparisons and write the JSON."""
    flags = parser(__doc__, 9)
    flags.add_argument("--peak-of", choices=LOSSES, help=argparse.SUPPRESS)
    args = flags.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak_of:
        print(peak_of(args.peak_of))
        return
    rows = [*loss_rows(512), *loss_rows(2048), *loss_rows(4096), product_row()]
    rows += [queue_row("cosine", 65_536), queue_row("student_t", 65_536)]
    measured = compare(rows, args.rounds)
    memory = memory_rows() if os.path.exists("/proc/self/clear_refs") else []
    RESULTS.parent.mkdir(exist_ok=True)
    samples, metrics = {"rounds": args.rounds, "dimension": DIMENSION}, {"comparisons": measured, "memory": memory}
    write_results(RESULTS, metrics, dataset="random normal numbers", seed=0, samples=samples)


if __name__ == "__main__":
    main()
