"""What `hf-dpssl report` says of its measures as forecasts of generators, taken from the study of claim 13."""

from __future__ import annotations

import json
from pathlib import Path

from claim_forecast import Cells, correlations, forecast_cells
from claim_page import cells_of
from claim_statements import forecasts

from hf_dpssl.evaluation.student_interval import student_interval

SHIPPED = Path(__file__).parent.parent.parent / "hf_dpssl" / "autoencoder" / "forecast.json"
CLAIM = "forecast"


def shipped_forecast(result: dict) -> dict:
    """The content of forecast.json, which `hf_dpssl.autoencoder.forecast.read_forecast` describes.

    Raises:
        ValueError: fewer than three seeds that every arm has.
    """
    stated = result["stated"]
    study = stated["study"]
    found = cells_of(result)
    pseudo_values = forecast_cells(found, study)
    if not pseudo_values:
        raise ValueError(
            f"the study of claim {CLAIM} at scale {study['scale']} has fewer than 3 seeds that every arm has: "
            "go on with its run, or keep the results that were there."
        )
    seeds = list(pseudo_values["forecast"])
    whole = correlations(found, study, seeds)
    rows = {
        target: {
            half: {name: _row(whole, pseudo_values, name, f"{half}_{target}") for name in forecasts(study)}
            for half in ("all", "worse_half")
        }
        for target in study["forecast"]["targets"]
    }
    return {
        "claim": stated["claims"][CLAIM]["number"],
        "dataset": result["dataset"],
        "image_size": study["data"]["image_size"],
        "scale": study["scale"],
        "seeds": len(seeds),
        "interval": "Student's t, 95 %, of the jackknife over seeds",
        "targets": {
            name: _target(metric, study, found, seeds) for name, metric in study["forecast"]["targets"].items()
        },
        "measures": {name: _measure(study["metrics"][name]) for name in study["forecast"]["measures"]},
        "correlations": rows,
        "source": {"fingerprint": result["fingerprint"], "command": result["command"]},
    }


def write_shipped_forecast(result: dict) -> None:
    """Write forecast.json of the package; errors as above."""
    SHIPPED.write_text(f"{json.dumps(shipped_forecast(result), separators=(',', ':'))}\n", encoding="utf-8")


def _row(whole: dict, pseudo_values: dict, name: str, metric: str) -> list[float]:
    """[correlation of all autoencoders, low, high]."""
    interval = student_interval([cell["metrics"][metric] for cell in pseudo_values[name].values()])
    return [round(value, 6) for value in (whole[name][metric], interval["low"], interval["high"])]


def _target(metric: str, study: dict, found: Cells, seeds: list[int]) -> dict:
    """What is foretold, and of how many autoencoders there is one."""
    there = [metric in found[arm][seed]["metrics"] for arm in study["arms"] for seed in seeds]
    return {"says": study["metrics"][metric]["says"], "autoencoders": sum(there)}


def _measure(about: dict) -> dict:
    """A measure's key in a report; one in features of the study's extractor ends with that name."""
    return {"key": about["at"][-1], "better": about["better"]}
