"""What the report says of its measures as forecasts: the shipped numbers are the study's, and intervals decide."""

import json
import re
import sys

import numpy as np
import pytest
from launches import REPOSITORY

from hf_dpssl.autoencoder.forecast import decisive, firsts, forecast_lines, read_forecast, verdict
from hf_dpssl.evaluation.student_interval import student_interval

sys.path.insert(0, str(REPOSITORY / "training" / "evidence"))
import claim_forecast
import shipped_forecast

RESULT = REPOSITORY / "training" / "evidence" / "results" / "claims" / "quick" / "weakness.json"
ENTRIES = {
    "one": {"metrics": {"psnr": 20.0, "pfid_small": 3.0}, "about": {"quality": {"extractor": "small"}}},
    "two": {"metrics": {"pfid": 2.0, "pfid_a": 9.0, "psnr": 25.0}, "about": {"quality": {"extractor": "inception"}}},
    "three": {"metrics": {"psnr": 25.0}, "about": {}},
}  # fmt: skip


def planted(**of_all: list[float]) -> dict:
    """A forecast.json of two targets, where measures have these [correlation, low, high] over all for the first."""
    rows = {"psnr": [0.1, -0.5, 0.7], "pfid": [0.3, -0.1, 0.9], "forecast": [0.2, -1.2, 1.4]}
    return {
        "claim": 13, "dataset": "mnist", "image_size": 16, "scale": "quick", "seeds": 5,
        "targets": {
            "dit": {"says": "distance, DiT", "autoencoders": 40},
            "step": {"says": "distance, one step", "autoencoders": 30},
        },
        "measures": {
            "psnr": {"key": "psnr", "better": "higher"},
            "pfid": {"key": "pfid_extractor", "better": "lower"},
        },
        "correlations": {"dit": {"all": rows | of_all, "worse_half": rows}, "step": {"all": rows, "worse_half": rows}},
    }  # fmt: skip


def test_the_shipped_numbers_are_those_of_the_study_and_of_the_page_of_claim_13():
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    shipped, now = read_forecast(), shipped_forecast.shipped_forecast(result)
    for target, halves in now["correlations"].items():
        for half, rows in halves.items():
            for name, row in rows.items():
                assert shipped["correlations"][target][half].pop(name) == pytest.approx(row, abs=1e-4)
    now["correlations"] = {target: {half: {} for half in halves} for target, halves in now["correlations"].items()}
    assert shipped == now, "run python training/evidence/readme.py"
    shipped = read_forecast()
    assert shipped_forecast.SHIPPED.stat().st_size < 10_000
    page = (REPOSITORY / "training" / "evidence" / "claims.md").read_text(encoding="utf-8")
    section = page.split("### 13. forecast")[1].split("###")[0]
    metrics = result["stated"]["study"]["metrics"]
    says = {name: metrics[name]["says"] for name in shipped["measures"]} | {"forecast": "from all measures"}
    for name, title in says.items():
        cells = re.search(rf"^\| {re.escape(title)} \| (.*) \|$", section, re.MULTILINE)[1].split(" | ")
        rows = [halves[half][name] for halves in shipped["correlations"].values() for half in ("all", "worse_half")]
        assert [f"{value:.2f} ({low:.2f} to {high:.2f})" for value, low, high in rows] == cells
    for target, metric in result["stated"]["study"]["forecast"]["targets"].items():
        count = sum(len(row.get(metric, [])) for row in result["metrics"]["cells"].values())
        assert shipped["targets"][target] == {"says": metrics[metric]["says"], "autoencoders": count}


def test_a_study_of_two_seeds_gives_nothing_to_ship():
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    for row in result["metrics"]["cells"].values():
        row["seeds"] = row["seeds"][:2]
    with pytest.raises(ValueError, match="fewer than 3 seeds"):
        shipped_forecast.shipped_forecast(result)


def test_without_an_interval_above_0_nothing_decides_and_nothing_is_ranked():
    forecast = planted(psnr=[-0.8, -1.1, -0.2])
    lines = forecast_lines(forecast, ENTRIES)
    assert firsts(forecast, ENTRIES) == {}
    assert lines[1] == (
        "  distance, DiT, 40 autoencoders: pfid 0.30 (-0.10 to 0.90), psnr -0.80 (-1.10 to -0.20), the largest of 2; "
        "a regression on all 0.20 (-1.20 to 1.40)"
    )
    assert verdict(forecast).startswith(
        "none decides the order: no interval lies above 0; below 0, the wrong way round, for psnr (distance, DiT). "
        "By chance some 1 of 12 "
    )
    assert lines[-1] == "so the 3 autoencoders of this report are not ranked"
    assert not forecast_lines(forecast, {"one": ENTRIES["one"]})[-1].startswith("so the")


def test_a_measure_whose_interval_lies_above_0_puts_its_best_autoencoders_first():
    forecast = planted(psnr=[0.6, 0.1, 1.1], pfid=[0.6, 0.01, 1.2], forecast=[0.9, 0.7, 1.0])
    assert firsts(forecast, ENTRIES) == {"dit": {"psnr": ["two", "three"], "pfid": ["two"]}}
    assert verdict(forecast).startswith(
        "the interval lies above 0 for a regression on all, pfid, psnr (distance, DiT). "
    )
    lines = forecast_lines(forecast, ENTRIES)
    assert lines[-2:] == [
        "of this report, pfid for distance, DiT puts first: two",
        "of this report, psnr for distance, DiT puts first: two and three",
    ]
    assert firsts(forecast, {"one": ENTRIES["one"]}) == {}


def test_the_worse_half_is_told_of_and_ranks_nothing():
    forecast = planted()
    forecast["correlations"]["step"]["worse_half"] = {"psnr": [0.3, 0.003, 2.8], "pfid": [-0.7, -1.9, -0.4]}
    assert firsts(forecast, ENTRIES) == {}
    assert decisive(forecast, "worse_half") == {"step": ["psnr"]}
    said = verdict(forecast)
    assert said.startswith("none decides the order") and "over the worse half above 0 for psnr (distance, one" in said
    assert "over the worse half below 0, the wrong way round, for pfid (distance, one step)" in said


def test_intervals_of_the_jackknife_cover_less_over_the_worse_half():
    """Of a measure and a result that have nothing to do with each other, in 8 ways of training that differ."""

    def correlation(values: np.ndarray, wanted: np.ndarray, half: str) -> float:
        kept = wanted <= (np.median(wanted) if half == "worse" else np.inf)
        return claim_forecast.rank_correlation(values[kept], wanted[kept])

    draw = np.random.default_rng(7)
    covered = {"all": 0, "worse": 0}
    for _ in range(200):
        ways = draw.normal(size=(2, 8, 1)) / 2
        many, study = (ways + draw.normal(size=(2, 8, seeds)) for seeds in (100, 5))
        for half in covered:
            without = [correlation(*np.delete(study, seed, axis=2), half) for seed in range(5)]
            found = student_interval([5 * correlation(*study, half) - 4 * value for value in without])
            covered[half] += found["low"] <= correlation(*many, half) <= found["high"]
    assert 0.9 < covered["all"] / 200 < 0.98 and 0.82 < covered["worse"] / 200 < 0.93, covered
