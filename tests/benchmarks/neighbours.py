"""Speed and memory of the kNN evaluation beside lightly's, on the same features, in one run.

    make bench        # or: python tests/benchmarks/neighbours.py [--rounds 9] [--threads 1]

1,000 queries x 50,000 features of 512 numbers, k = 200, exponential votes. Features are normalised beforehand, as
lightly needs them; ours normalises them again and checks them. Ours goes through bfloat16 where that is fast: the time
of that product alone, which finds nothing, is the least that it could take. Both metrics also stand beside ten plain
lines: one product, one topk. Seconds are those of the processor. Writes tests/benchmarks/results/neighbours.json.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from lightly.utils.benchmarking import knn_predict
from timing import Comparison, compare, parser

from hf_dpssl.evaluation import knn, nearest_neighbours
from hf_dpssl.models.matrix_products import product
from hf_dpssl.runs.results import write_results

RESULTS = Path(__file__).parent / "results" / "neighbours.json"
QUERIES, ROWS, COLUMNS, K, CLASSES, TEMPERATURE = 1000, 50_000, 512, 200, 10, 0.1
CLOUDS = ("random directions", "clusters after a ReLU")
AIM = 0.8  # of lightly's time
TILE = 2**14  # rows, as ours has


def features(cloud: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unit vectors and classes: bank (M, D), (M,), queries (Q, D), (Q,)."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(ROWS + QUERIES, COLUMNS, generator=generator)
    labels = torch.randint(CLASSES, (ROWS + QUERIES,), generator=generator)
    if cloud != CLOUDS[0]:
        rows = (rows + torch.randn(CLASSES, COLUMNS, generator=generator)[labels]).relu()
    rows = F.normalize(rows, dim=1)
    return rows[:ROWS], labels[:ROWS], rows[ROWS:], labels[ROWS:]


def classifiers(cloud: str) -> dict[str, Callable[[], float]]:
    """Accuracy in percent by lightly and by ours, as functions without arguments."""
    bank, bank_labels, queries, labels = features(cloud)
    transposed = bank.T.contiguous()

    def lightly() -> float:
        predicted = knn_predict(queries, transposed, bank_labels, CLASSES, knn_k=K, knn_t=TEMPERATURE)[:, 0]
        return 100 * float((predicted == labels).double().mean())

    def ours(k=K) -> float:
        found = knn(bank, bank_labels, queries, labels, k=k, weighting="exponential", temperature=TEMPERATURE)
        return found["knn_top1"] if k == K else found[f"knn_top1_k{K}"]

    return {"lightly": lightly, "ours": ours, "ours, k = 1, 20, 200 at once": partial(ours, (1, 20, K))}


def plain_lines(bank: torch.Tensor, queries: torch.Tensor, metric: str) -> torch.Tensor:
    """Rows of the K nearest, with nothing checked and nothing made exact."""
    if metric == "cosine":
        bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    halves = bank.square().sum(1) / 2
    indices = []
    for part in queries.split(500):
        similarity = part @ bank.T if metric == "cosine" else torch.addmm(-halves, part, bank.T)
        indices.append(similarity.topk(K).indices)
    return torch.cat(indices)


def comparisons() -> list[Comparison]:
    """Ours beside lightly's and beside plain lines."""
    rows = []
    for cloud in CLOUDS:
        by_name = classifiers(cloud)
        theirs = by_name.pop("lightly")
        for name, call in by_name.items():
            aim = AIM if name == "ours" else None
            rows.append(Comparison(f"kNN, {cloud}, {name}", "lightly knn_predict", call, theirs, True, aim))
    bank, _, queries, _ = features(CLOUDS[0])
    rounded, rounded_queries = bank.bfloat16(), queries.bfloat16()

    def product_alone() -> float:
        return float(sum(product(rounded_queries, tile)[0, 0] for tile in rounded.split(TILE)))

    theirs = classifiers(CLOUDS[0])["lightly"]
    name = "product of bfloat16 alone, which finds nothing"
    rows.append(Comparison(name, "lightly knn_predict", product_alone, theirs, False, None))
    for metric in ("cosine", "euclidean"):

        def ours(metric=metric) -> float:
            return float(nearest_neighbours(bank, queries, k=K, metric=metric)[1].sum())

        def theirs(metric=metric) -> float:
            return float(plain_lines(bank, queries, metric).sum())

        rows.append(Comparison(f"nearest neighbours, {metric}", "plain product and topk", ours, theirs, True, None))
    return rows


def peak_of(name: str) -> float:
    """Megabytes that one call needs beyond the features (Linux)."""

    def resident(field: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith(field)))

    call = classifiers(CLOUDS[0])[name]
    torch.mm(torch.ones(8, 8), torch.ones(8, 8))  # libraries are loaded before, not during
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak counts from now on
    call()
    return (resident("VmHWM") - before) / 1000


def main() -> None:
    """Run all comparisons and write the JSON."""
    flags = parser(__doc__, 9)
    flags.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = flags.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak_of:
        print(peak_of(args.peak_of))
        return
    measured, memory = compare(comparisons(), args.rounds, clock=time.process_time), []
    if os.path.exists("/proc/self/clear_refs"):
        for name in ("lightly", "ours"):
            command = [sys.executable, __file__, "--peak-of", name]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            memory.append({"what": name, "extra_mb": float(output)})
            print(f"{name:<12} {memory[-1]['extra_mb']:>6.0f} MB beyond the features")
    RESULTS.parent.mkdir(exist_ok=True)
    samples = {"rounds": args.rounds, "queries": QUERIES, "bank": ROWS, "columns": COLUMNS, "k": K}
    metrics = {"comparisons": measured, "memory": memory}
    write_results(RESULTS, metrics, dataset="random numbers", seed=0, samples=samples)


if __name__ == "__main__":
    main()
