"""Table, comparisons, plots and samples of the DiT study; `dit.py --stage report` and readme.py call it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from latents_report import find
from matplotlib.figure import Figure
from paired_seeds import difference
from PIL import Image, ImageDraw

from hf_dpssl.runs.results import write_results

# Metric (an extractor's name is filled in): title, format.
ROWS = {
    "gfid": ("gFID", "{:.3f}"),
    "g_to_reconstructions_fid": ("FID to reconstructions", "{:.3f}"),
    "rfid": ("rFID", "{:.4f}"),
    "class_consistency": ("class consistency, %", "{:.1f}"),
    "gprecision": ("precision", "{:.2f}"),
    "grecall": ("recall", "{:.2f}"),
}
COMPARED = ("gfid", "g_to_reconstructions_fid", "class_consistency")


def collect(folder: Path, runs: list) -> dict[tuple[str, str], dict[int, dict]]:
    """{(latent, size): {seed: what the stages train and measure wrote}} of the runs that are finished."""
    cells: dict[tuple[str, str], dict[int, dict]] = {}
    for run in runs:
        files = [folder / f"{stage}-{run.name}.json" for stage in ("measure", "train")]
        if all(file.exists() for file in files):
            metrics, training = (json.loads(file.read_text(encoding="utf-8")) for file in files)
            cells.setdefault((run.latent, run.size), {})[run.seed] = {"metrics": metrics, **training}
    return cells


def comparisons(cells: dict[str, dict]) -> dict[str, dict[str, dict]]:
    """{pair of cells: {measure: paired difference}} at each size; `cells` as results/dit.json has them.

    "DAE - decoupled" is the comparison of equal encoder steps: both encoders stopped after stage 1 and were frozen.
    """
    sizes = dict.fromkeys(name.split(", ")[1] for name in cells)
    pairs = [("decoupled", "joint"), ("DAE", "joint"), ("DAE", "decoupled")]
    found = {}
    for size in sizes:
        for first, second in pairs:
            if {f"{first}, {size}", f"{second}, {size}"} <= cells.keys():
                rows = cells[f"{first}, {size}"], cells[f"{second}, {size}"]
                found[f"{first} - {second}, {size}"] = {name: difference(*rows, name) for name in COMPARED}
    return found


def write_report(folder: Path, runs: list, settings: dict, generated: int) -> None:
    """Write results/dit.json, dit.png and dit_samples.png beside this file from the runs there are."""
    cells = collect(folder, runs)
    if not cells:
        raise FileNotFoundError(f"{folder} holds no measured run: run the stages train and measure first.")
    table = {}
    for (latent, size), seeds in cells.items():
        values = {name: [float(f"{find(entry['metrics'], name):.5g}") for entry in seeds.values()] for name in ROWS}
        about = {"seeds": list(seeds), "parameters": next(iter(seeds.values()))["parameters"]}
        curves = [[float(f"{value:.4g}") for value in entry["curve"].values()] for entry in seeds.values()]
        steps = [int(step) for step in next(iter(seeds.values()))["curve"]]
        table[f"{latent}, {size}"] = about | values | {"curve_steps": steps, "curves": curves}
    done = sum(map(len, cells.values()))
    samples = {"train": 10_000, "test": 5_000, "generated": generated}
    here, settings = Path(__file__).parent, {"runs": f"{done} of {len(runs)}"} | settings
    metrics = {"cells": table}
    write_results(here / "results" / "dit.json", metrics, dataset="mnist", seed=0, samples=samples, settings=settings)
    plot(cells, here / "dit.png")
    pictures(folder, cells).save(here / "dit_samples.png", optimize=True)
    print(f"{done} of {len(runs)} runs")


def plot(cells: dict[tuple[str, str], dict[int, dict]], path: Path) -> None:
    """Generation by the size of the transformer, its curve over training, and class consistency."""
    latents = list(dict.fromkeys(latent for latent, _ in cells))
    sizes = list(dict.fromkeys(size for _, size in cells))
    figure = Figure(figsize=(14, 4.2), layout="constrained")
    panels = figure.subplots(1, 3)
    for place, latent in enumerate(latents):
        style = {"color": f"C{place}", "label": latent}
        for axis, name in ((panels[0], "gfid"), (panels[2], "class_consistency")):
            rows = [[find(e["metrics"], name) for e in cells.get((latent, size), {}).values()] for size in sizes]
            known = [i for i, row in enumerate(rows) if row]
            axis.plot(known, [np.mean(rows[i]) for i in known], "-", **style)
            for i in known:
                axis.plot([i + 0.06 * (place - 1)] * len(rows[i]), rows[i], "o", markersize=4, color=f"C{place}")
        for size, line in zip(sizes, (":", "--", "-"), strict=False):
            curves = [entry["curve"] for entry in cells.get((latent, size), {}).values()]
            if curves:
                steps = [int(step) for step in curves[0]]
                means = np.mean([list(curve.values()) for curve in curves], axis=0)
                panels[1].plot(steps, means, line, color=f"C{place}", label=f"{latent}, {size}")
    panels[0].set(title="generation FID (marks: seeds)", ylabel="gFID", xlabel="width x depth of the transformer")
    panels[1].set(title="over training, 1,000 images to training images", xlabel="step", ylabel="FID", yscale="log")
    panels[2].set(title="class consistency without guidance", ylabel="percent", xlabel="width x depth")
    for axis in (panels[0], panels[2]):
        axis.set_xticks(range(len(sizes)), sizes)
    for axis in panels:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=90)


def pictures(folder: Path, cells: dict[tuple[str, str], dict[int, dict]]) -> Image.Image:
    """The first images of seed 0, unguided, of the largest transformer on each latent, side by side."""
    largest = list(dict.fromkeys(size for _, size in cells))[-1]
    found = {
        latent: folder / f"{latent}-s0" / largest / "samples-unguided.png" for latent, size in cells if size == largest
    }
    grids = {latent: Image.open(path).convert("L") for latent, path in found.items()}
    width, height = next(iter(grids.values())).size
    scale = min(1.0, 300 / width)
    size = (round(width * scale), round(height * scale))
    sheet = Image.new("L", ((size[0] + 16) * len(grids) - 16, size[1] + 18), 255)
    for place, (latent, grid) in enumerate(grids.items()):
        sheet.paste(grid.resize(size, Image.Resampling.BOX), (place * (size[0] + 16), 18))
        ImageDraw.Draw(sheet).text((place * (size[0] + 16), 2), f"{latent}, {largest}", fill=0)
    return sheet
