"""Pictures of runs: training curves, image grids, embedding maps."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

# Names of classes and runs are no formulas, whatever they hold.
plain_text = matplotlib.rc_context({"text.parse_math": False})


@plain_text
def plot_curves(history: list[dict], path: Path, *, title: str) -> None:
    """One panel per logged value over optimiser steps; `history` as in `TrainingLoop.history`."""
    names = list(dict.fromkeys(name for entry in history for name, value in entry.items() if _is_curve(name, value)))
    columns = max(1, min(4, len(names)))
    rows = max(1, -(-len(names) // columns))
    figure = Figure(figsize=(4 * columns, 2.8 * rows), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns)).flatten()
    for axis, name in zip(axes, names, strict=False):
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        axis.plot(*zip(*points, strict=True), linewidth=1)
        axis.set(title=name, xlabel="step")
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    figure.suptitle(title)
    figure.savefig(path, dpi=100)


def _is_curve(name: str, value) -> bool:
    return name != "step" and not isinstance(value, str)


def save_grid(images: Tensor, path: Path, *, columns: int, min_side: int = 32) -> None:
    """Write images (N, 3, H, W) in [-1, 1] as a grid, row by row; small ones are enlarged without smoothing."""
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    count, height, width, _ = pixels.shape
    rows = -(-count // columns)
    canvas = np.full((rows * (height + 1) + 1, columns * (width + 1) + 1, 3), 255, np.uint8)
    for i, picture in enumerate(pixels):
        top = i // columns * (height + 1) + 1
        left = i % columns * (width + 1) + 1
        canvas[top : top + height, left : left + width] = picture
    scale = max(1, -(-min_side // height))
    image = Image.fromarray(canvas)
    image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(path)


@plain_text
def plot_map(maps: dict[str, tuple[np.ndarray, np.ndarray]], class_names: list[str], path: Path) -> None:
    """Scatter plots of 2-D embeddings side by side; `maps`: title -> (points (N, 2), classes (N,), -1: none)."""
    figure = Figure(figsize=(5.5 * len(maps), 5.2), layout="constrained")
    for axis, (title, (points, classes)) in zip(
        np.atleast_1d(figure.subplots(1, len(maps))), maps.items(), strict=True
    ):
        axis.scatter(*points[classes < 0].T, s=min(8, 15_000 / len(points)), linewidths=0, color="lightgrey")
        for class_id, name in enumerate(class_names):
            chosen = points[classes == class_id]
            size = min(8, 15_000 / len(points))
            axis.scatter(chosen[:, 0], chosen[:, 1], s=size, linewidths=0, color=f"C{class_id % 10}", label=name)
            if len(chosen):
                middle = np.median(chosen, axis=0)
                box = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1}
                axis.text(*middle, name, ha="center", va="center", weight="bold", bbox=box)
        axis.set(title=title, xticks=[], yticks=[])
        axis.set_aspect("equal", adjustable="datalim")  # distances mean something
    figure.savefig(path, dpi=110)
