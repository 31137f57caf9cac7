"""Verdicts on claims: paired differences over seeds, Student's t, and Holm's correction over all claims.

A comparison says "first is better than second by more than the margin". Its p value is that of the two-sided t test of
the paired differences at the margin; Holm's step-down method (Holm 1979) corrects it for the comparisons of all claims
of the scale, those that were not run counting as 1. A claim is supported when all its comparisons are, contradicted
when one is, else undecided.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from claim_sizes import nearer_at_margin
from claim_statements import FEWEST_SEEDS
from scipy.stats import ttest_1samp

from hf_dpssl.evaluation.student_interval import student_interval

LEVEL = 0.05
FLAT_SHARE = 0.05  # of a curve's whole change, by which its last quarter may move it

Cells = dict[str, dict[int, dict]]  # arm: {seed: what its cell wrote}


def paired(cells: Cells, comparison: dict, metric: dict) -> dict[int, float]:
    """{seed: how much better first is than second}, of the seeds for which both have the metric.

    In the metric's unit; for a `relative` one the logarithm of the ratio. ValueError where a value is no number.
    """
    arms = [
        {
            seed: cell
            for seed, cell in cells.get(comparison[side], {}).items()
            if comparison["metric"] in cell["metrics"]
        }
        for side in ("first", "second")
    ]
    sign = {"higher": 1.0, "lower": -1.0}[metric["better"]]
    found = {}
    for seed in sorted(arms[0].keys() & arms[1].keys()):
        values = [arm[seed]["metrics"][comparison["metric"]] for arm in arms]
        if not all(map(math.isfinite, values)) or metric.get("relative") and min(values) <= 0:
            raise ValueError(f"{comparison['metric']} of seed {seed} is {values[0]} and {values[1]}")
        if metric.get("relative"):
            values = [math.log(value) for value in values]
        found[seed] = sign * (values[0] - values[1])
    return found


def margin_of(comparison: dict, metric: dict) -> float:
    """The margin in the unit of `paired`: a relative one of 0.05 is a ratio of 1.05."""
    return math.log1p(comparison["margin"]) if metric.get("relative") else comparison["margin"]


def judge(differences: list[float], margin: float) -> dict:
    """{"mean", "low", "high", "p", "side"} of one comparison before correction; p of 1 where nothing can be said."""
    if len(differences) < 2:
        return {"mean": float(np.mean(differences)) if differences else None, "low": None, "high": None, "p": 1.0}
    found = student_interval(differences)
    side = "supported" if found["mean"] > margin else "contradicted"
    if _all_equal(differences):  # no noise to judge by; equal arms differ by exactly 0
        return found | {"p": 1.0 if any(differences) else 0.0, "side": side}
    return found | {"p": float(ttest_1samp(differences, margin).pvalue), "side": side}


def holm(p_values: list[float], size: int) -> list[float]:
    """Holm's adjusted p values of `size` comparisons, of which those that are not given have p = 1."""
    order = np.argsort(p_values, kind="stable")
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (size - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def decide(claims: dict[str, dict], metrics: dict[str, dict], cells: dict[str, Cells], size: int) -> dict[str, dict]:
    """The verdicts on claims, whose p values are corrected together.

    Args:
        claims: {name: claim} of all claims whose studies were run.
        metrics: {name: the metrics of its study}.
        cells: {name: the cells of its study}.
        size: comparisons of all claims, also those that were not run.

    Returns:
        {name: {"verdict", "reason", "comparisons": [{"first", "second", "metric", "margin", "seeds", "differences",
        "mean", "low", "high", "p", "verdict", "reason"}]}}; the interval is 95 % and not corrected, p is. Those of
        equal quality have {"bounds": {"at least" or "at most": seeds whose difference is no more than that}} too.
    """
    entries = {
        name: [_compare(claim, comparison, metrics[name][comparison["metric"]], cells[name])
               for comparison in claim["comparisons"]]
        for name, claim in claims.items()
    }  # fmt: skip
    flat = [entry for of_claim in entries.values() for entry in of_claim]
    for entry, p in zip(flat, holm([entry["p"] for entry in flat], size), strict=True):
        entry["p"] = p
        entry["verdict"] = entry.pop("side", None) if p <= LEVEL else "undecided"
        entry.pop("side", None)
        if entry["verdict"] == "undecided" and not entry["reason"]:
            entry["reason"] = f"p = {p:.2g} after correction"
    return {name: _whole(claims[name], of_claim) | {"comparisons": of_claim} for name, of_claim in entries.items()}


def _all_equal(differences: list[float]) -> bool:
    """Up to rounding."""
    return float(np.ptp(differences)) <= 1e-9 * float(np.max(np.abs(differences)))


def _compare(claim: dict, comparison: dict, metric: dict, cells: Cells) -> dict:
    margin = margin_of(comparison, metric)
    about = comparison | {"reason": ""}
    try:
        differences = paired(cells, comparison, metric)
        bounds = _bounds(cells, comparison, differences)
        tested = nearer_at_margin(cells, comparison, metric["equal_quality"]) if "equal_quality" in metric else {}
    except ValueError as error:
        nothing = {"seeds": [], "differences": [], "mean": None, "low": None, "high": None, "p": 1.0}
        return about | nothing | {"reason": str(error)}
    entry = about | {"seeds": list(differences), "differences": list(differences.values())}
    entry |= judge(entry["differences"], margin)
    equal = not any(entry["differences"]) and not bounds
    if tested and not equal:
        about_sizes = judge(list(tested.values()), 0.0)
        entry |= {"bounds": bounds, "p": about_sizes["p"], "side": about_sizes.get("side")}
    needed = max(claim["seeds"], FEWEST_SEEDS)
    if len(differences) < needed:
        entry |= {"p": 1.0, "reason": f"{len(differences)} of {needed} seeds"}
    elif _all_equal(list(tested.values()) or entry["differences"]) and not equal:
        entry["reason"] = "every seed has the same difference: do the seeds reach the runs?"
    return entry


def _bounds(cells: Cells, comparison: dict, differences: dict[int, float]) -> dict[str, int]:
    """{"at least" or "at most": seeds} of the differences that are bounds, as parameters lie beyond the sizes."""
    found: dict[str, int] = {}
    for seed in differences:
        beyond = [cells[comparison[side]][seed].get("beyond", {}) for side in ("first", "second")]
        sides = [of_arm.get(comparison["metric"]) for of_arm in beyond]
        for which, signs in (("at least", ("smaller", "larger")), ("at most", ("larger", "smaller"))):
            if any(side == sign for side, sign in zip(sides, signs, strict=True)):
                found[which] = found.get(which, 0) + 1
    return found


def _whole(claim: dict, comparisons: list[dict]) -> dict:
    """Verdict and reason of a claim."""
    verdicts = [entry["verdict"] for entry in comparisons]
    if "contradicted" in verdicts:
        wrong = [
            f"{e['first']} against {e['second']}, {e['metric']}" for e in comparisons if e["verdict"] == "contradicted"
        ]
        return {"verdict": "contradicted", "reason": f"not better by the margin: {'; '.join(wrong)}"}
    if "undecided" in verdicts:
        open_ones = {entry["reason"] for entry in comparisons if entry["verdict"] == "undecided"}
        return {"verdict": "undecided", "reason": "; ".join(sorted(open_ones))}
    return {"verdict": "supported", "reason": "every comparison is better by more than its margin"}


def judged_curve(curve: list[list[float]], about: dict) -> list[list[float]]:
    """[step, value] as its flatness is judged: of a `relative` curve the logarithms, as of a relative metric.

    A distance that falls from 20 to 2 and then to 1.5 has lost a quarter at the end, which is a small share of 20.

    Raises:
        ValueError: a relative curve with a value that has no logarithm.
    """
    if not about.get("relative"):
        return curve
    if bad := [value for _, value in curve if not value > 0]:
        raise ValueError(f"the curve of {about['says']} is relative and has the value {bad[0]}: it must be above 0.")
    return [[step, math.log(value)] for step, value in curve]


def last_quarter(curve: list[list[float]]) -> float | None:
    """Share of a curve's whole change by which its last quarter of steps moves it; None with fewer than four points.

    `curve`: [step, value] in order. The whole change is that from the first to the farthest value; 0 for a curve that
    is constant, negative where it goes back.
    """
    if len(curve) < 4:
        return None
    steps, values = np.array(curve, dtype=float).T
    before = values[steps <= steps[0] + 0.75 * (steps[-1] - steps[0])][-1]
    whole = max(values - values[0], key=abs)
    return float((values[-1] - before) / whole) if whole else 0.0


def not_converged(cells: Cells, read: Iterable[str] = ()) -> dict[str, list[str]]:
    """{arm: its curves whose mean over the seeds of `last_quarter` is farther from 0 than FLAT_SHARE, or too short}.

    Also one that goes back: a curve that is getting worse is not flat. The arm's own curve has the name "", of its
    others, `curves`, those named `read` count.
    """
    found: dict[str, list[str]] = {}
    for arm, seeds in cells.items():
        for name in ("", *read):
            curves = [cell.get("curves", {}).get(name) if name else cell.get("curve") for cell in seeds.values()]
            if None in curves:
                continue  # nothing was trained
            shares = [last_quarter(curve) for curve in curves]
            if None in shares or abs(np.mean(shares)) > FLAT_SHARE:
                found.setdefault(arm, []).append(name)
    return found
