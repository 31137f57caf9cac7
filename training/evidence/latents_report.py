"""Table, comparisons and plots of the latents study; `latents.py --stage report` and readme.py call it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from paired_seeds import difference

from hf_dpssl.runs.results import write_results

# Metric (an extractor's name is filled in): title, format, whether higher is better (None: neither).
ROWS = {
    "psnr": ("PSNR, dB", "{:.2f}", True),
    "ssim": ("SSIM", "{:.3f}", True),
    "rfid": ("rFID", "{:.3g}", False),
    "gfid": ("gFID, token model", "{:.3g}", False),
    "g_to_reconstructions_fid": ("FID of samples to reconstructions", "{:.3g}", False),
    "class_consistency": ("class consistency, %", "{:.1f}", True),
    "prior_nats": ("nats per image, small prior", "{:.1f}", False),
    "latent_linear_top1": ("linear probe of latents, %", "{:.1f}", True),
    "latent_knn_top1": ("20-NN of latents, %", "{:.1f}", True),
    "histogram_linear_top1": ("linear probe of code histograms, %", "{:.1f}", True),
    "effective_rank": ("effective rank", "{:.1f}", None),
    "code_perplexity": ("code perplexity", "{:.0f}", None),
    "trustworthiness": ("trustworthiness", "{:.3f}", True),
    "continuity": ("continuity", "{:.3f}", True),
    "lipschitz_local_median_encoder": ("local Lipschitz of encoder, median", "{:.2f}", None),
    "lipschitz_local_median_decoder": ("local Lipschitz of decoder, median", "{:.2f}", None),
    "lipschitz_product_median": ("their product, median", "{:.2f}", None),
    "log_ratio_sd_encoder": ("sd of log distance ratios", "{:.3f}", False),
    "gromov_wasserstein": ("Gromov-Wasserstein, upper bound", "{:.3f}", False),
    "cai_lim_projection": ("Cai-Lim, upper bound", "{:.3f}", False),
}
COMPARED = ("psnr", "rfid", "gfid", "prior_nats", "latent_linear_top1", "log_ratio_sd_encoder")
WEAK = ("weak_dropout", "weak_width")
MARGIN = 0.05  # relative difference of a FID that matters, fixed before the study


def find(metrics: dict[str, float], name: str) -> float:
    """A metric by its name, or by its name without the extractor's."""
    return metrics[name] if name in metrics else next(v for k, v in metrics.items() if k.startswith(f"{name}_"))


def collect(folder: Path, runs: list) -> dict[str, dict[int, dict]]:
    """{cell: {seed: what --stage measure and --stage train wrote}} of the runs that are finished."""
    cells: dict[str, dict[int, dict]] = {}
    for run in runs:
        path = folder / f"measure-{run.name}.json"
        if path.exists():
            entry = json.loads(path.read_text(encoding="utf-8"))
            entry["training"] = json.loads((folder / f"train-{run.name}.json").read_text(encoding="utf-8"))
            cells.setdefault(run.cell, {})[run.seed] = entry
    return cells


def comparisons(cells: dict[str, dict]) -> dict[str, dict[str, dict]]:
    """{pair of cells: {measure: paired difference}}; `cells` as results/latents.json has them.

    "joint, encoder - joint, total" shows what an encoder that learns for half the steps brings by itself.
    """
    pairs = [("joint, encoder", "joint, total")]
    pairs += [(arm, f"joint, {budget}") for arm in ("decoupled", *WEAK) for budget in ("total", "encoder")]
    return {
        f"{first} - {second}": {name: difference(cells[first], cells[second], name) for name in COMPARED}
        for first, second in pairs
        if {first, second} <= cells.keys()
    }


def write_report(folder: Path, runs: list, flags: dict[str, str]) -> None:
    """Write results/latents.json (with the stages' flags) and latents.png beside this file from the runs there are."""
    cells = collect(folder, runs)
    if not cells:
        raise FileNotFoundError(f"{folder} holds no measured run: run the stages train, tokens and measure first.")
    table = {}
    for cell, seeds in cells.items():
        values = {name: [find(entry["metrics"], name) for entry in seeds.values()] for name in ROWS}
        trainings = [entry["training"] for entry in seeds.values()]
        table[cell] = {
            "seeds": list(seeds),
            "stages": trainings[0]["stages"],
            "converged": [all(p and p["converged"] for p in t["plateau"].values()) for t in trainings],
            "fingerprints": [entry["fingerprint"] for entry in seeds.values()],
        } | {name: [float(f"{value:.5g}") for value in found] for name, found in values.items()}
    done, all_runs = sum(map(len, cells.values())), len(runs)
    settings = {
        "complete": done == all_runs, "runs": f"{done} of {all_runs}", "margin_of_fid": MARGIN,
        "flags": flags,
    }  # fmt: skip
    samples = {"train": 10_000, "validation": 2_000, "test": 5_000, "generated": 2_000}
    here = Path(__file__).parent
    metrics = {"cells": table}
    write_results(
        here / "results" / "latents.json", metrics, dataset="mnist", seed=0, samples=samples, settings=settings
    )
    plot(cells, here / "latents.png")
    print(f"{done} of {all_runs} runs")


def plot(cells: dict[str, dict[int, dict]], path: Path) -> None:
    """Lipschitz constants as in the slides, and generation against reconstruction; one line or mark per cell."""
    figure = Figure(figsize=(14, 4.4), layout="constrained")
    panels = figure.subplots(1, 3)
    sides = {"local_encoder": "(a) encoder", "local_decoder": "(b) decoder"}
    for axis, (name, title) in zip(panels, sides.items(), strict=False):
        for place, (cell, seeds) in enumerate(cells.items()):
            values = np.sort(next(iter(seeds.values()))["curves"][name])
            axis.plot(np.linspace(0, 100, len(values)), values, color=f"C{place}", label=cell)
        axis.axhline(1, color="0.6", linestyle="--", linewidth=0.8)
        label = "largest singular value, latent scale fixed"
        axis.set(title=f"{title}: local Lipschitz constants", xlabel="images, sorted, percent", ylabel=label)
    for place, (cell, seeds) in enumerate(cells.items()):
        points = [[find(entry["metrics"], name) for entry in seeds.values()] for name in ("rfid", "gfid")]
        panels[2].plot(*points, "o", color=f"C{place}", label=cell)
    panels[2].set(title="generation and reconstruction", xlabel="rFID", ylabel="gFID of the token model")
    panels[0].legend(fontsize=7, loc="upper left")
    for axis in panels:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=90)
