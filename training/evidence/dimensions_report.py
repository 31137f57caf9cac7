"""Rows, comparisons and plot of the dimension study; `dimensions.py --stage report` and readme.py call it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from paired_seeds import by_seed, difference

MARGIN = 2.0  # points of accuracy that matter, fixed before the study
FLAT = 0.5  # points gained in the last 20 % of the epochs by a curve that counts as converged
CANDIDATES = 1023  # other views of a batch of 512 images
TITLES = {
    "simclr": "SimCLR (cosine)",
    "t_anchor": "t-SimCLR, per anchor",
    "t_joint": "t-SimCLR, joint",
    "gaussian_anchor": "Gaussian, per anchor",
}
CONTROLS = (3, 9)  # dimensions of SimCLR(d + 1) only
Cell = tuple[str, int]


def best_metric(reports: list[dict]) -> tuple[str, float]:
    """(metric, mean accuracy): cosine or Euclidean, whichever has the higher mean 20-NN validation accuracy."""
    means = {m: float(np.mean([r["validation"][f"{m}_20nn"] for r in reports])) for m in ("euclidean", "cosine")}
    return max(means.items(), key=lambda item: item[1])


def point_row(report: dict) -> list[float]:
    """A grid point: temperature, learning rate, 20-NN validation accuracy, perplexity of Q as a share."""
    share = round(report["history"][-1]["perplexity"] / CANDIDATES, 4)
    return [report["temperature"], report["learning_rate"], best_metric([report])[1], share]


def row(reports: list[dict]) -> dict:
    """One line of the table: test accuracies of all seeds under the metric chosen on validation, and the circumstances.

    `gain_in_last_fifth` is that of the 20-NN validation accuracy, in points; `share` the perplexity of Q at the end.
    """
    metric = best_metric(reports)[0]
    other = "cosine" if metric == "euclidean" else "euclidean"
    key = f"{metric}_20nn"
    middle = [next(entry[key] for entry in report["history"] if key in entry) for report in reports]
    gain = float(np.mean([report["validation"][key] - value for report, value in zip(reports, middle, strict=True)]))
    accuracy = [report["test"][key] for report in reports]
    return {
        "temperature": reports[0]["temperature"],
        "learning_rate": reports[0]["learning_rate"],
        "metric": metric,
        "seeds": [report["seed"] for report in reports],
        "test_20nn": accuracy,
        "test_1nn": [report["test"][f"{metric}_1nn"] for report in reports],
        "test_20nn_of_other_metric": [report["test"][f"{other}_20nn"] for report in reports],
        "mean_20nn": round(float(np.mean(accuracy)), 2),
        "sd_20nn": round(float(np.std(accuracy, ddof=1)), 2) if len(accuracy) > 1 else None,
        "gain_in_last_fifth": round(gain, 2),
        "converged": gain < FLAT,
        "temperature_at_end": [report["history"][-1]["t"] for report in reports],
        "share": [round(report["history"][-1]["perplexity"] / CANDIDATES, 4) for report in reports],
    }


def comparisons(accuracy: dict[str, dict]) -> dict[str, dict]:
    """Every pair of arms that the claim is about, at each dimension that both have; also SimCLR's next dimension.

    `accuracy` is {"ARM, D-d": row}, as results/dimensions.json has it; an entry is that of `paired_seeds.difference`.
    """
    pairs = [("t_anchor", "simclr"), ("t_joint", "simclr"), ("t_anchor", "t_joint"), ("t_anchor", "gaussian_anchor")]
    found = {}
    for dimension in sorted({int(name.split(", ")[1].removesuffix("-d")) for name in accuracy}):
        cells = {f"{a} - {b}, {dimension}-d": (f"{a}, {dimension}-d", f"{b}, {dimension}-d") for a, b in pairs}
        for arm in ("t_anchor", "t_joint"):
            higher = f"simclr, {dimension + 1}-d"
            cells[f"{arm} {dimension}-d - simclr {dimension + 1}-d"] = (f"{arm}, {dimension}-d", higher)
        for name, (first, second) in cells.items():
            if {first, second} <= accuracy.keys():
                found[name] = difference(accuracy[first], accuracy[second], "test_20nn")
    return found


def area(final: dict[Cell, list[dict]], arm: str) -> float | None:
    """Mean 20-NN test accuracy over log d between d = 2 and 128 (trapezoids); None without both ends."""
    points = sorted((dimension, row(reports)["mean_20nn"]) for (a, dimension), reports in final.items() if a == arm)
    points = [point for point in points if point[0] in (2, 8, 128)]
    if [dimension for dimension, _ in points] != [2, 8, 128]:
        return None
    x, y = np.log([point[0] for point in points]), np.array([point[1] for point in points])
    return round(float(((y[1:] + y[:-1]) / 2 * np.diff(x)).sum() / (x[-1] - x[0])), 2)


def plot(final: dict[Cell, list[dict]], path: Path) -> None:
    """20-NN test accuracy over the dimension, and its paired difference from SimCLR; a dot for each seed."""
    figure = Figure(figsize=(9.6, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    dimensions = sorted({dimension for _, dimension in final} - set(CONTROLS))
    for place, (arm, title) in enumerate(TITLES.items()):
        shift, style = 1.06 ** (place - 1.5), {"color": f"C{place}", "label": title}  # so that dots do not hide others
        lines = {d: final[arm, d] for d in dimensions if (arm, d) in final}
        accuracies = {d * shift: row(reports)["test_20nn"] for d, reports in lines.items()}
        _line(left, accuracies, style)
        if arm != "simclr":
            paired = {
                d: (row(reports), row(final["simclr", d])) for d, reports in lines.items() if ("simclr", d) in final
            }
            _line(right, {d * shift: by_seed(*rows, "test_20nn") for d, rows in paired.items()}, style)
    controls = {d - 1: np.mean(row(final["simclr", d])["test_20nn"]) for d in CONTROLS if ("simclr", d) in final}
    if controls:
        left.plot(list(controls), list(controls.values()), "x", color="C0", label="SimCLR with d + 1")
    right.axhspan(-MARGIN, MARGIN, color="0.9", zorder=0, label=f"less than {MARGIN:g} points")
    left.set(title="20-NN on 10,000 test images", ylabel="accuracy, percent")
    right.set(title="minus SimCLR of the same seed", ylabel="points")
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xticks(dimensions, [str(dimension) for dimension in dimensions])
        axis.set_xlabel("dimension d of the embedding")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _line(axis, values: dict[float, list[float]], style: dict) -> None:
    if values:
        axis.plot(list(values), [np.mean(seeds) for seeds in values.values()], marker="_", markersize=10, **style)
        for x, seeds in values.items():
            axis.plot([x] * len(seeds), seeds, ".", color=style["color"], markersize=5, alpha=0.7)
