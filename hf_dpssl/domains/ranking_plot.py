"""A ranking as a picture: each encoder's score, domain by domain, with the mean and its interval."""

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
    axis.set_yticks(range(len(done)), [entry["encoder"][-48:] for entry in done])
    axis.invert_yaxis()
    axis.set(title=title, xlabel=unit)
    axis.legend(fontsize=8)
    figure.savefig(file, dpi=100, format="png")
