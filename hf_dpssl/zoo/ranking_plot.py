"""Rankings and accuracies as pictures: values domain by domain, with the mean and its interval."""

from __future__ import annotations

from typing import IO

from matplotlib.figure import Figure

from ..runs.plots import plain_text


@plain_text
def draw_ranking(entries: list[dict], file: IO[bytes], *, title: str, unit: str) -> None:
    """Write a PNG; `entries` as `rank_zoo` returns them, those that failed are left out, `unit` is the score's."""
    done = [entry for entry in entries if "score" in entry]
    figure = Figure(figsize=(8, 1.6 + 0.4 * len(done)), layout="constrained")
    axis = figure.subplots()
    for place, name in enumerate(done[0]["domains"]):
        scores = [entry["domains"][name]["score"] for entry in done]
        axis.scatter(scores, range(len(done)), s=18, color=f"C{place % 10}", label=f"{name} left out", zorder=3)
    means = [entry["score"]["mean"] for entry in done]
    ends = [[entry["score"]["mean"] - entry["score"]["low"] for entry in done]]
    ends += [[entry["score"]["high"] - entry["score"]["mean"] for entry in done]]
    axis.errorbar(means, range(len(done)), xerr=ends, fmt="k|", capsize=3, linewidth=1, label="mean, 95 % interval")
    axis.set_yticks(range(len(done)), [entry["name"][-48:] for entry in done])
    axis.invert_yaxis()
    axis.set(title=title, xlabel=unit)
    axis.legend(fontsize=8)
    figure.savefig(file, dpi=100, format="png")


@plain_text
def draw_zood(found: dict, file: IO[bytes], *, title: str) -> None:
    """Write a PNG of accuracies of all encoders and methods; `found` as `zood` returns it."""
    targets = found["targets"]
    rows = {name: [target["encoders"][name]["accuracy"] for target in targets.values()] for name in _measured(found)}
    rows = dict(sorted(rows.items(), key=lambda item: -sum(item[1])))
    rows |= {method: [target[method]["accuracy"] for target in targets.values()] for method in found["methods"]}
    figure = Figure(figsize=(8, 1.6 + 0.35 * len(rows)), layout="constrained")
    axis = figure.subplots()
    for place, name in enumerate(targets):
        values = [row[place] for row in rows.values()]
        axis.scatter(values, range(len(rows)), s=18, color=f"C{place % 10}", label=f"{name} left out")
    axis.plot([sum(row) / len(row) for row in rows.values()], range(len(rows)), "k|", markersize=12, label="mean")
    axis.axhline(len(rows) - len(found["methods"]) - 0.5, color="0.7", linewidth=1)
    axis.set_yticks(range(len(rows)), [name[-48:] for name in rows])
    axis.invert_yaxis()
    axis.set(title=title, xlabel="percent right in the domain that was left out")
    axis.legend(fontsize=8)
    figure.savefig(file, dpi=100, format="png")


def _measured(found: dict) -> list[str]:
    return [entry["name"] for entry in found["encoders"] if "error" not in entry]
