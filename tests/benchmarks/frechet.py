"""Speed of the Frechet distance beside torch-fidelity's algebra, on the same covariances, in one run.

    make bench        # or: python tests/benchmarks/frechet.py [--rounds 5] [--threads 1]

2,048 dimensions. Full rank: covariances of 8,000 features, independent or like pooled activations (correlated, of
very different variance, not negative). Rank-deficient: of 1,500 features. Seconds are those of the processor, as other
programs' share of it must not count. Writes tests/benchmarks/results/frechet.json.
"""

from __future__ import annotations

import argparse
import os

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--rounds", type=int, default=5, help="alternating rounds of each comparison")
parser.add_argument("--threads", type=int, default=1, help="threads of numpy, scipy and torch")
ARGS = parser.parse_args()
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = str(ARGS.threads)  # read when numpy is imported

# ruff: noqa: E402
import time
from functools import partial
from pathlib import Path

import torch
from timing import Comparison, compare
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

from hf_dpssl.evaluation import frechet_distance, frechet_distance_of_features
from hf_dpssl.runs.results import write_results

RESULTS = Path(__file__).parent / "results" / "frechet.json"
COLUMNS, MANY, FEW = 2048, 8000, 1500
AIM = 0.5  # of its time


def features(number: int, seed: int, like_activations: bool) -> torch.Tensor:
    """(number, COLUMNS) float64."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(number, COLUMNS, generator=generator, dtype=torch.float64)
    if not like_activations:
        return rows + 0.05 * seed
    mixing = torch.randn(COLUMNS, COLUMNS, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    spread = torch.logspace(0, -2, COLUMNS, dtype=torch.float64)
    return (rows @ mixing * spread / COLUMNS**0.5 + 0.1 * seed).relu()


def moments(rows: torch.Tensor) -> dict:
    """As torch-fidelity keeps them."""
    return {"mu": rows.mean(0).numpy(), "sigma": torch.cov(rows.T).numpy()}


def comparisons() -> list[Comparison]:
    """Ours beside torch-fidelity's for each kind of covariance."""
    rows = []
    for what, number, like in (
        ("full rank, independent", MANY, False), ("full rank, like activations", MANY, True), ("rank 1,499", FEW, False)
    ):  # fmt: skip
        first, second = (moments(features(number, seed, like)) for seed in (1, 2))

        def theirs(first=first, second=second) -> float:
            return fid_statistics_to_metric(first, second, False)[KEY_METRIC_FID]

        ours = partial(frechet_distance, first["mu"], first["sigma"], second["mu"], second["sigma"])
        rows.append(Comparison(what, "torch-fidelity", ours, theirs, same_value=True, aim=AIM))
    few = [features(1000, seed, False) for seed in (1, 2)]

    def from_features() -> float:
        first, second = map(moments, few)
        return fid_statistics_to_metric(first, second, False)[KEY_METRIC_FID]

    ours = partial(frechet_distance_of_features, *few)
    rows.append(Comparison("from 1,000 features", "torch-fidelity", ours, from_features, same_value=True, aim=AIM))
    return rows


def main() -> None:
    """Run all comparisons and write the JSON."""
    torch.set_num_threads(ARGS.threads)
    measured = compare(comparisons(), ARGS.rounds, clock=time.process_time)
    for row in measured:
        row["times_faster"] = round(1 / row["ratio"], 2)
        print(f"{row['what']:<32} {row['times_faster']:>6.2f} times as fast as {row['peer']}")
    RESULTS.parent.mkdir(exist_ok=True)
    samples = {"rounds": ARGS.rounds, "columns": COLUMNS, "features": MANY, "few_features": FEW}
    write_results(RESULTS, {"comparisons": measured}, dataset="random numbers", seed=1, samples=samples)


if __name__ == "__main__":
    main()
