"""How much better one arm is than another along a setting, as pages of claims print and draw it."""

import io
import math
import sys
from typing import ClassVar

import numpy as np
import pytest
from launches import REPOSITORY
from PIL import Image
from scipy.stats import t

sys.path.insert(0, str(REPOSITORY / "training" / "evidence"))
import claim_gains
import claim_page
import claim_statements

STUDY = {
    "arms": dict.fromkeys(["a_1", "b_1", "a_2", "b_2"]),
    "metrics": {
        "cost": {"says": "cost", "better": "lower", "relative": True},
        "score": {"says": "score", "better": "higher"},
    },
    "gains": {
        "says": "A better than B by",
        "metrics": ["cost", "score"],
        "along": [{"says": "width", "pairs": {"1": ["a_1", "b_1"], "2": ["a_2", "b_2"]}}],
    },
}


def cells_of(values: dict[str, list[float]]) -> dict:
    """Cells whose cost and score are the same number."""
    return {
        arm: {seed: {"metrics": {"cost": value, "score": value}} for seed, value in enumerate(of_arm)}
        for arm, of_arm in values.items()
    }


def test_a_gain_is_the_paired_difference_of_the_two_arms_of_its_setting_with_students_interval():
    values = {"a_1": [1.0, 2.0, 4.0], "b_1": [2.0, 2.0, 2.0], "a_2": [5.0, 7.0], "b_2": [5.0, 5.0, 5.0]}
    cells = cells_of(values)
    setting = STUDY["gains"]["along"][0]
    assert claim_gains.gains_along(setting, "score", STUDY, cells) == {
        1.0: {0: -1.0, 1: 0.0, 2: 2.0},
        2.0: {0: 0.0, 1: 2.0},
    }
    found = claim_gains.gains_along(setting, "cost", STUDY, cells)
    assert found[1.0] == pytest.approx({0: math.log(2), 1: 0, 2: -math.log(2)})  # a lower cost is better
    lines = claim_gains.gains_tables(STUDY, cells, claim_page._interval)
    assert lines[1] == "| A better than B by, by width | cost | score |"
    half = t.ppf(0.975, 2) * np.std([-1, 0, 2], ddof=1) / 3**0.5
    assert lines[3].startswith("| 1 | +0.0 % (") and lines[3].endswith(
        f"| +0.333 ({1 / 3 - half:+.3g} to {1 / 3 + half:+.3g}) |"
    )
    assert lines[4].endswith("| +1 (-11.7 to +13.7) |")  # of the two seeds that both arms have
    assert lines[6].startswith("Above 0 the first is better") and "4 intervals of 95 %" in lines[6]
    cells["a_1"][0]["metrics"]["score"] = math.nan  # as a failed measure has it
    assert claim_gains.gains_along(setting, "score", STUDY, cells) == {1.0: {}, 2.0: {0: 0.0, 1: 2.0}}
    assert claim_gains.gains_tables(STUDY, cells, claim_page._interval)[3].endswith("|  |")


def test_gains_are_drawn_for_every_setting_and_metric_also_before_there_are_any():
    sizes = []
    for values in ({"a_1": [1.0, 2.0], "b_1": [2.0, 3.0]}, {}):
        drawn = io.BytesIO()
        claim_gains.draw_gains(STUDY, cells_of(values), drawn)
        sizes.append(np.asarray(Image.open(drawn).convert("L")) < 128)
    assert sizes[0].shape == sizes[1].shape and sizes[0].sum() > sizes[1].sum()


def test_a_thin_line_is_of_one_seed_that_every_value_has():
    class Panel:
        lines: ClassVar = []

        def plot(self, places, values, style, **_):
            if style == "-" and len(values) == 3:
                self.lines.append(list(values))

        def __getattr__(self, name):
            return lambda *_, **__: None

    gains = {0.5: {0: 1.0, 1: 2.0}, 1.0: {1: 3.0, 2: 9.0}, 2.0: {0: 5.0, 1: 4.0}}
    claim_gains._draw_along(Panel(), gains)
    assert Panel.lines == [[2.0, 3.0, 4.0]]


def test_gains_of_shipped_studies_pair_arms_and_metrics_that_there_are():
    for path in (claim_statements.CLAIMS / "studies").glob("*.yaml"):
        study = claim_statements.read_study(path.stem, "quick")
        for setting in study.get("gains", {"along": []})["along"]:
            assert {arm for pair in setting["pairs"].values() for arm in pair} <= study["arms"].keys()
            assert all(float(value) > 0 and isinstance(value, str) for value in setting["pairs"])  # keys of JSON
            assert set(study["gains"]["metrics"]) <= study["metrics"].keys()
    assert "gains" in claim_statements.read_study("budgets", "quick")
