"""Speed of the ranking over domains beside LogME's, on the same features, in one run.

    python tests/benchmarks/ranking.py [--rounds 3] [--threads 1]

10,000 samples of 7 classes in 4 domains, 2,048 features. LogME stands as You et al. (2021) compute it: singular vectors
of X'X, then a fixed point for each class; and as `zoo.log_me` does, by eigenvectors. The ranking leaves each of the
four domains out, for labels and for features. Seconds are those of the processor. Writes
tests/benchmarks/results/ranking.json.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from timing import Comparison, compare

from hf_dpssl.runs.results import write_results
from hf_dpssl.zoo import leave_one_domain_out, log_me

RESULTS = Path(__file__).parent / "results" / "ranking.json"
SAMPLES, FEATURES, DOMAINS, CLASSES = 10_000, 2_048, 4, 7
AIM = 1.0  # of LogME's time, for each encoder


def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features (N, D) of unequal variances, classes (N,) and domains (N,)."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (SAMPLES,), generator=draw)
    means = 0.1 * torch.randn(CLASSES, FEATURES, generator=draw)
    spread = torch.randn(SAMPLES, FEATURES, generator=draw) * torch.logspace(0, -2, FEATURES)
    return means[labels] + spread, labels, torch.arange(SAMPLES) % DOMAINS


def log_me_by_fixed_point(features: torch.Tensor, labels: torch.Tensor) -> float:
    """LogME by its authors' algorithm: at most 11 rounds, until alpha / beta changes by less than a hundredth."""
    x = features.double().numpy()
    count, dimension = x.shape
    left, values, right = np.linalg.svd(x.T @ x, full_matrices=True)
    evidences = []
    for column in np.eye(CLASSES)[labels.numpy()].T:
        alpha = beta = ratio = 1.0
        turned = right @ (x.T @ column)
        for _ in range(11):
            gamma = (values / (values + ratio)).sum()
            mean = left @ (turned * beta / (alpha + beta * values))
            squares = (mean**2).sum()
            misfit = ((column - x @ mean) ** 2).sum()
            alpha, beta = gamma / squares, (count - gamma) / misfit
            before, ratio = ratio, alpha / beta
            if abs(ratio - before) / before < 0.01:
                break
        evidence = dimension * np.log(alpha) + count * np.log(beta / (2 * np.pi)) - np.log(alpha + beta * values).sum()
        evidences.append(0.5 * (evidence - beta * misfit - alpha * squares))
    return float(np.mean(evidences) / count)


def main() -> None:
    """Run both comparisons and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="alternating rounds of each comparison")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch and of the linear algebra")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    features, labels, domains = data()
    values = log_me(features, labels), log_me_by_fixed_point(features, labels)
    if abs(values[0] / values[1] - 1) > 1e-3:
        raise RuntimeError(f"the two forms of LogME disagree: {values[0]} and {values[1]}.")

    def ranking() -> float:
        return sum(parts["score"] for parts in leave_one_domain_out(features, labels, domains))

    name = f"{DOMAINS} domains left out, labels and features"
    rows = [
        Comparison(
            name, "LogME by its authors' algorithm", ranking, lambda: log_me_by_fixed_point(features, labels), aim=AIM
        ),
        Comparison(name, "zoo.log_me", ranking, lambda: log_me(features, labels)),
    ]
    with threadpool_limits(args.threads):
        measured = compare(rows, args.rounds, clock=time.process_time)
    samples = {"rounds": args.rounds, "samples": SAMPLES, "features": FEATURES, "domains": DOMAINS, "classes": CLASSES}
    write_results(RESULTS, {"comparisons": measured}, dataset="random numbers", seed=0, samples=samples)


if __name__ == "__main__":
    main()
