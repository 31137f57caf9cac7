"""How far the report's measures foretell what a generator makes of a latent: what was found over many autoencoders.

forecast.json holds the rank correlations of claim 13 (training/evidence/claims.md), by training/evidence/readme.py.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..evaluation.image_measures import metric_key

REGRESSION = "forecast"  # on all measures; its coefficients are not shipped, as it learns from other autoencoders
EXTRACTOR = "_extractor"  # end of a key that in a report ends with the name of the extractor it was given
_SHOWN = 3  # single measures in a line
_COVERED = {"all": 0.95, "worse_half": 0.89}  # by intervals of 95 %, see `forecast_lines`


def read_forecast() -> dict:
    """What ships with the package.

    Returns:
        {"claim", "dataset", "image_size", "scale", "seeds", "interval", "targets": {name: {"says", "autoencoders": how
        many have it}}, "measures": {name: {"key" in a report, "better": "higher" or "lower"}}, "correlations": {target:
        {"all" or "worse_half": {measure, or "forecast": a regression on all of them: [correlation, low, high]}}},
        "source"}; correlations are Spearman's with a generator's result, 1 where the better autoencoder by the measure
        is always the generator's better one. A measure is judged over the autoencoders that have it.
    """
    return json.loads(Path(__file__).with_name("forecast.json").read_text(encoding="utf-8"))


def decisive(forecast: dict, half: str, *, above: bool = True) -> dict[str, list[str]]:
    """{target: measures whose interval lies above 0, or below} over "all" autoencoders or the "worse_half"; sorted."""
    found = {}
    for target, halves in forecast["correlations"].items():
        rows = halves[half].items()
        found[target] = sorted(name for name, (_, low, high) in rows if (low > 0 if above else high < 0))
    return {target: names for target, names in found.items() if names}


def firsts(forecast: dict, entries: dict[str, dict]) -> dict[str, dict[str, list[str]]]:
    """{target: {measure: autoencoders that it puts first}} of a report of several autoencoders.

    Only measures whose interval over all autoencoders lies above 0 put anything first: whether a latent is of the
    worse half is known once its generator has been trained. A measure that fewer than two of them have says nothing.

    Args:
        forecast: of `read_forecast`.
        entries: {name: {"metrics", "about"}} of `measure_autoencoder`.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for target, names in decisive(forecast, "all").items():
        for name in names:
            values = {} if name == REGRESSION else _values(forecast["measures"][name]["key"], entries)
            if len(values) > 1:
                best = (max if forecast["measures"][name]["better"] == "higher" else min)(values.values())
                found.setdefault(target, {})[name] = [own for own, value in values.items() if value == best]
    return found


def forecast_lines(forecast: dict, entries: dict[str, dict]) -> list[str]:
    """What is to be said of a report's measures, line by line: correlations, which of them decide, what they put first.

    Measures are named as a report names them. Intervals of the jackknife over seeds may leave [-1, 1]. In simulated
    studies of 8 ways of training and 5 seeds (six settings like that of tests/training/test_shipped_forecast.py, 1,500
    studies each) those over all autoencoders cover 94 to 96 %, but those over the worse half, which is another one
    when a seed is left out, 88 to 90 %; the lines say so.
    """
    about = (
        f"claim {forecast['claim']}, {forecast['dataset']} at {forecast['image_size']} px, scale {forecast['scale']}"
    )
    lines = [
        f"how far these measures foretell a generator ({about}, {forecast['seeds']} seeds): rank correlation over "
        "autoencoders (95 % interval), 1 where they order rightly"
    ]
    for target, halves in forecast["correlations"].items():
        rows = halves["all"]
        single = sorted((name for name in rows if name != REGRESSION), key=lambda name: -rows[name][0])
        amounts = [_amount(forecast, rows, name) for name in single[:_SHOWN]]
        regression = _amount(forecast, rows, REGRESSION)
        wanted = f"{_says(forecast, target)}, {forecast['targets'][target]['autoencoders']} autoencoders"
        lines.append(f"  {wanted}: {', '.join(amounts)}, the largest of {len(single)}; {regression}")
    lines.append(verdict(forecast))
    ranked = firsts(forecast, entries)
    for target, of_measure in ranked.items():
        for name, best in of_measure.items():
            what = f"{_key(forecast, name)} for {_says(forecast, target)}"
            lines.append(f"of this report, {what} puts first: {' and '.join(best)}")
    if len(entries) > 1 and not ranked:
        lines.append(f"so the {len(entries)} autoencoders of this report are not ranked")
    return lines


def verdict(forecast: dict) -> str:
    """The sentence on which measures decide the order of autoencoders, from the intervals alone."""
    over_all = decisive(forecast, "all")
    if over_all:
        parts = [f"the interval lies above 0 for {_listed(forecast, over_all)}"]
    else:
        parts = ["none decides the order: no interval lies above 0"]
    if wrong := decisive(forecast, "all", above=False):
        parts.append(f"below 0, the wrong way round, for {_listed(forecast, wrong)}")
    if worse := decisive(forecast, "worse_half"):
        parts.append(f"over the worse half above 0 for {_listed(forecast, worse)}")
    if wrong := decisive(forecast, "worse_half", above=False):
        parts.append(f"over the worse half below 0, the wrong way round, for {_listed(forecast, wrong)}")
    counts = {
        half: sum(len(halves[half]) for halves in forecast["correlations"].values()) for half in ("all", "worse_half")
    }
    by_chance = round(sum((1 - _COVERED[half]) * count for half, count in counts.items()))
    return (
        f"{'; '.join(parts)}. By chance some {by_chance} of {sum(counts.values())} such intervals leave 0 out: those "
        f"over the worse half cover {100 * _COVERED['worse_half']:.0f} % in a simulation. Any may leave [-1, 1]"
    )


def _values(key: str, entries: dict[str, dict]) -> dict[str, float]:
    """{autoencoder: value of a measure}, of those that have it."""
    found = {}
    for name, entry in entries.items():
        own = key
        if key.endswith(EXTRACTOR):
            extractor = entry["about"].get("quality", {}).get("extractor", "")
            own = metric_key("", key.removesuffix(EXTRACTOR), extractor)
        if own in entry["metrics"]:
            found[name] = entry["metrics"][own]
    return found


def _amount(forecast: dict, rows: dict[str, list[float]], name: str) -> str:
    value, low, high = rows[name]
    return f"{_key(forecast, name)} {value:.2f} ({low:.2f} to {high:.2f})"


def _listed(forecast: dict, found: dict[str, list[str]]) -> str:
    """Measures of each target."""
    parts = []
    for target, names in found.items():
        keys = ", ".join(_key(forecast, name) for name in names)
        parts.append(f"{keys} ({_says(forecast, target)})")
    return " and ".join(parts)


def _key(forecast: dict, name: str) -> str:
    """A measure as a report names it, without the extractor."""
    return "a regression on all" if name == REGRESSION else forecast["measures"][name]["key"].removesuffix(EXTRACTOR)


def _says(forecast: dict, target: str) -> str:
    return forecast["targets"][target]["says"]
