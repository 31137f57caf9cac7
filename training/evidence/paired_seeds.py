"""Differences between two arms of a study, seed by seed: mean, 95 % interval and verdict.

Results files hold the value of every seed; these functions are called when a page is written, so that no interval is
stored. A row is {"seeds": [...], measure: [one value per seed], ...}.
"""

from __future__ import annotations

from hf_dpssl.evaluation.student_interval import student_interval

FEWEST_SEEDS = 5  # of a verdict, fixed for all studies


def by_seed(first: dict, second: dict, name: str) -> list[float]:
    """A measure, first - second, of each seed that both rows have."""
    values = [dict(zip(row["seeds"], row[name], strict=True)) for row in (first, second)]
    return [values[0][seed] - values[1][seed] for seed in sorted(values[0].keys() & values[1].keys())]


def difference(first: dict, second: dict, name: str) -> dict:
    """{"seeds": how many both have, "mean", "interval": (low, high)}; one seed has no interval."""
    values = by_seed(first, second, name)
    if not values:
        raise ValueError(f"no seed has {name} in both rows: {first['seeds']} and {second['seeds']}.")
    if len(values) == 1:
        return {"seeds": 1, "mean": values[0], "interval": None}
    found = student_interval(values)
    return {"seeds": len(values), "mean": found["mean"], "interval": (found["low"], found["high"])}


def contains_zero(entry: dict) -> bool:
    """Whether the seeds leave the sign of the difference open; always with one seed."""
    return entry["interval"] is None or entry["interval"][0] <= 0 <= entry["interval"][1]


def verdict(entry: dict, margin: float) -> str:
    """On "first is larger by the margin": supported or contradicted by the whole interval, of five seeds or more."""
    if entry["seeds"] < FEWEST_SEEDS:
        return f"undecided ({entry['seeds']} seed{'s' * (entry['seeds'] > 1)})"
    low, high = entry["interval"]
    return "supported" if low > margin else "contradicted" if high < margin else "undecided"
