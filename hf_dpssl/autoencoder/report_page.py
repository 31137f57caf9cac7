"""One page of plots for autoencoders side by side: what `hf-dpssl report` draws of its numbers."""

from __future__ import annotations

from pathlib import Path
from typing import IO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..runs.plots import plain_text

# Rows of the table: key (an extractor's name is filled in), title, format.
_ROWS = (
    ("psnr", "PSNR, dB", "{:.2f}"),
    ("ssim", "SSIM", "{:.3f}"),
    ("rfid", "reconstruction FID", "{:.3g}"),
    ("ifid", "FID between neighbours (iFID)", "{:.3g}"),
    ("pfid", "FID of near codes (pFID)", "{:.3g}"),
    ("latent_linear_top1", "linear probe of latents, %", "{:.1f}"),
    ("latent_knn_top1", "20-NN of latents, %", "{:.1f}"),
    ("histogram_linear_top1", "linear probe of code histograms, %", "{:.1f}"),
    ("prior_nats", "nats per image, small prior", "{:.1f}"),
    ("nats_per_pixel", "nats per pixel value, codes and residuals", "{:.3f}"),
    ("effective_rank", "effective rank of latents", "{:.1f}"),
    ("code_usage", "codes in use, %", "{:.0f}"),
    ("code_perplexity", "code perplexity", "{:.0f}"),
    ("trustworthiness", "trustworthiness", "{:.3f}"),
    ("continuity", "continuity", "{:.3f}"),
    ("lipschitz_encoder", "Lipschitz of encoder, lower bound", "{:.2f}"),
    ("lipschitz_decoder", "Lipschitz of decoder, lower bound", "{:.2f}"),
    ("lipschitz_product", "their product", "{:.2f}"),
    ("log_ratio_sd_encoder", "sd of log distance ratios, encoder", "{:.3f}"),
    ("gromov_wasserstein", "Gromov-Wasserstein, upper bound", "{:.3f}"),
    ("cai_lim_projection", "Cai-Lim, upper bound", "{:.3f}"),
)


@plain_text
def draw_page(entries: dict[str, dict], path: Path | IO[bytes], *, title: str) -> None:
    """Write the page.

    Args:
        entries: {name: {"metrics": {...}, "curves": {...}}} as `measure_autoencoder` gives them; a line each.
        path: PNG file, or an open one.
        title: of the page.
    """
    generators = any("generator_widths" in entry["curves"] for entry in entries.values())
    figure = Figure(figsize=(20 if generators else 15, 8.4), layout="constrained")
    panels = figure.subplots(2, 3 + generators)
    _sorted_lines(panels[0, 0], entries, "local_encoder", "(a) encoder: local Lipschitz constants")
    _sorted_lines(panels[0, 1], entries, "local_decoder", "(b) decoder: local Lipschitz constants")
    _spread(panels[0, 2], entries)
    _decay(panels[1, 0], entries, "spectrum", "spectrum of the latents", "share of variance")
    _decay(panels[1, 1], entries, "code_shares", "use of the codes", "share of all codes")
    _table(panels[1, 2], entries)
    if generators:
        _capacity(panels[0, 3], entries)
        panels[1, 3].set_axis_off()
    figure.suptitle(title)
    figure.savefig(path, dpi=90, format="png")


def _sorted_lines(axis: Axes, entries: dict[str, dict], name: str, title: str) -> None:
    for entry_name, entry in entries.items():
        values = np.sort(entry["curves"].get(name, []))
        if len(values):
            axis.plot(np.linspace(0, 100, len(values)), values, label=entry_name, linewidth=1.5)
    axis.axhline(1, color="0.6", linewidth=0.8, linestyle="--")
    axis.set(title=title, xlabel="images, sorted, percent", ylabel="largest singular value")
    _legend(axis)


def _spread(axis: Axes, entries: dict[str, dict]) -> None:
    for entry_name, entry in entries.items():
        ratios = np.asarray(entry["curves"].get("ratios_encoder", []))
        if len(ratios):
            logs = np.log(ratios[ratios > 0])
            logs = logs - np.median(logs)
            spread = f"{entry_name} (sd {logs.std():.3f})"
            axis.hist(logs, bins=60, density=True, histtype="step", label=spread, linewidth=1.3)
    axis.set(title="log ratio of latent to image distance", xlabel="log ratio, median at 0", ylabel="density")
    _legend(axis)


def _decay(axis: Axes, entries: dict[str, dict], name: str, title: str, label: str) -> None:
    for entry_name, entry in entries.items():
        values = np.asarray(entry["curves"].get(name, []), dtype=float)
        if len(values):
            values = values / values.sum()
            axis.plot(np.arange(1, len(values) + 1), values, label=entry_name)
    axis.set(title=title, xlabel="rank", ylabel=label)
    if axis.lines:
        axis.set_yscale("log")
        _legend(axis)
    else:
        axis.set_axis_off()


def _capacity(axis: Axes, entries: dict[str, dict]) -> None:
    for place, (entry_name, entry) in enumerate(entries.items()):
        for latent, style in (("encoded", "-o"), ("gaussian", ":s")):
            gaps = entry["curves"].get(f"generator_{latent}")
            widths = entry["curves"].get("generator_widths")
            if gaps:
                axis.plot(widths, gaps, style, color=f"C{place}", label=f"{entry_name}, {latent}")
    axis.axhline(np.log(2), color="0.6", linewidth=0.8, linestyle="--")
    axis.set(title="D^G: what fresh critics tell apart", xlabel="width of the generator", ylabel="nats (log 2: all)")
    axis.set_xscale("log", base=2)
    _legend(axis)


def _table(axis: Axes, entries: dict[str, dict]) -> None:
    axis.set_axis_off()
    rows = []
    for key, title, form in _ROWS:
        values = [_find(entry["metrics"], key) for entry in entries.values()]
        if any(value is not None for value in values):
            rows.append([title, *("" if value is None else form.format(value) for value in values)])
    if not rows:
        return
    widths = [0.55] + [0.45 / len(entries)] * len(entries)
    names = [name if len(name) <= 14 else f"{name[:13]}…" for name in entries]
    options = {"loc": "center", "cellLoc": "right", "edges": "horizontal"}
    table = axis.table(rows, colLabels=["", *names], colWidths=widths, **options)
    table.auto_set_font_size(False)
    table.set_fontsize(8)
    table.scale(1, 1.15)
    for (_, column), cell in table.get_celld().items():
        if column == 0:
            cell.get_text().set_ha("left")


def _find(metrics: dict[str, float], key: str) -> float | None:
    """The metric, or the first whose key begins with it and an extractor's name."""
    if key in metrics:
        return metrics[key]
    return next((value for name, value in metrics.items() if name.startswith(f"{key}_")), None)


def _legend(axis: Axes) -> None:
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8)
