"""How much better one arm is than another along a setting, such as the width of a decoder: a table and a plot.

What a study has under `gains`: {"says", "metrics", "along": [{"says", "pairs": {value: [first, second]}}]}.
"""

from __future__ import annotations

import io

from claim_decision import Cells, not_converged, paired
from matplotlib.figure import Figure
from PIL import Image

from hf_dpssl.evaluation.student_interval import student_interval


def gains_along(setting: dict, metric: str, study: dict, cells: Cells) -> dict[float, dict[int, float]]:
    """{value: {seed: by how much `first` is better, as `paired` has it}}; no seed where a value is no number."""
    found = {}
    for value, (first, second) in setting["pairs"].items():
        comparison = {"first": first, "second": second, "metric": metric}
        try:
            found[float(value)] = paired(cells, comparison, study["metrics"][metric])
        except ValueError:
            found[float(value)] = {}
    return found


def gains_tables(study: dict, cells: Cells, interval) -> list[str]:
    """Lines of a table for each setting, and what its figures are.

    Args:
        interval: writes {"mean", "low", "high"} of a metric.
    """
    gains = study["gains"]
    lines = []
    count = 0
    for setting in gains["along"]:
        heads = [study["metrics"][name]["says"] for name in gains["metrics"]]
        lines += [
            "",
            f"| {gains['says']}, by {setting['says']} | {' | '.join(heads)} |",
            "|---" * (len(heads) + 1) + "|",
        ]
        columns = [gains_along(setting, name, study, cells) for name in gains["metrics"]]
        for value in map(float, setting["pairs"]):
            parts = []
            for name, column in zip(gains["metrics"], columns, strict=True):
                differences = list(column[value].values())
                count += len(differences) > 1
                found = student_interval(differences) if len(differences) > 1 else None
                parts.append(interval(found, study["metrics"][name]) if found else "")
            lines.append(f"| {value:g} | {' | '.join(parts)} |")
    about = (
        "Above 0 the first is better, whichever way the metric goes; in percent: second / first - 1 of what is better "
    )
    about += f"when lower. {count} intervals of 95 %, Student's t over paired seeds, not corrected for their number."
    about += " Empty: fewer than two seeds have a number in both arms."
    if slow := not_converged(cells):
        about += f" Not converged: {', '.join(slow)}."
    return [*lines, "", about]


def draw_gains(study: dict, cells: Cells, file) -> None:
    """Plot of the gains: a row for each setting, a column for each metric; seeds are thin lines; a PNG.

    The horizontal line is no gain; of relative metrics the logarithm of the ratio is drawn.
    """
    gains = study["gains"]
    rows, names = gains["along"], gains["metrics"]
    figure = Figure(figsize=(2.3 * len(names), 2.4 * len(rows)), layout="constrained")
    figure.suptitle(gains["says"], fontsize=9)
    for setting, panels in zip(rows, figure.subplots(len(rows), len(names), squeeze=False), strict=True):
        for name, panel in zip(names, panels, strict=True):
            _draw_along(panel, gains_along(setting, name, study, cells))
            relative = study["metrics"][name].get("relative")
            panel.set_title(study["metrics"][name]["says"] + (", log ratio" if relative else ""), fontsize=7)
            panel.set_xlabel(setting["says"], fontsize=7)
            panel.tick_params(labelsize=7)
    save_small(figure, file)


def _draw_along(panel, found: dict[float, dict[int, float]]) -> None:
    """A thin line for each seed that every value has, and means with their intervals."""
    places = range(len(found))  # evenly spaced, whatever their values
    for seed in sorted(set.intersection(*(set(gains) for gains in found.values()))):
        panel.plot(places, [gains[seed] for gains in found.values()], "-", color="tab:blue", alpha=0.3, linewidth=0.8)
    for place, gains in zip(places, found.values(), strict=True):
        if len(gains) > 1:
            interval = student_interval(list(gains.values()))
            panel.plot([place] * 2, [interval["low"], interval["high"]], "-", color="black")
            panel.plot([place], [interval["mean"]], "o", color="black", markersize=4)
    panel.axhline(0, color="tab:red", linewidth=0.8)
    panel.set_xticks(places, [f"{value:g}" for value in found])


def save_small(figure: Figure, file) -> None:
    """A figure as a PNG of 48 colours, a third of the size."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=75, format="png")
    Image.open(drawn).convert("RGB").quantize(48).save(file, "PNG", optimize=True)
