"""Parameters for equal quality, on planted curves of distance against size."""

import math
import sys

import numpy as np
import pytest
from launches import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "training" / "evidence"))
import claim_decision
import claim_page
import claim_sizes
import claim_statements

SIZES = (1e5, 3e5, 2e6)
STUDY = {
    "metrics": {
        f"{kind}_{place}": {"says": f"{kind} {place}", "better": "lower"} for place in range(3) for kind in ("n", "fd")
    },
    "arms": {"joint": {"says": "joint"}, "new": {"says": "new"}},
    "equal_quality": {
        "parameters": {
            "says": "parameters for as good images",
            "reference": "joint",
            "at": "fd_1",
            "sizes": [{"parameters": f"n_{place}", "distance": f"fd_{place}"} for place in range(3)],
        }
    },
}


def power_law(at_one: float, exponent: float, noise: list[float] = (0, 0, 0)) -> dict[str, float]:
    """Metrics of a cell: distance = at_one * parameters^-exponent, times the noise."""
    found = {}
    for place, (size, error) in enumerate(zip(SIZES, noise, strict=True)):
        found |= {f"n_{place}": size, f"fd_{place}": at_one * size**-exponent * math.exp(error)}
    return found


def test_planted_power_laws_are_equal_at_the_parameters_of_the_closed_form():
    draw = np.random.default_rng(0)
    ratios = []
    for seed in range(40):
        exponent = draw.uniform(0.2, 0.6)
        factor = draw.uniform(0.75, 1.2)  # of the distance, at every size
        cells = {"joint": {seed: {"metrics": power_law(50.0, exponent)}}}
        cells["new"] = {seed: {"metrics": power_law(50.0 * factor, exponent)}}
        found = claim_sizes.with_parameters(cells, STUDY)
        assert found["joint"][seed]["metrics"]["parameters"] == pytest.approx(SIZES[1])
        wanted = SIZES[1] * factor ** (1 / exponent)
        wanted = min(max(wanted, SIZES[0]), SIZES[2])  # nothing is extrapolated
        ratios.append(wanted / SIZES[1])
        assert found["new"][seed]["metrics"]["parameters"] == pytest.approx(wanted)
    assert min(ratios) < 0.5 and max(ratios) > 1.3
    lonely = claim_sizes.with_parameters({"joint": {}, "new": {0: {"metrics": power_law(50.0, 0.4)}}}, STUDY)
    assert "parameters" not in lonely["new"][0]["metrics"]  # of a seed that the reference arm has not


def test_outside_of_the_sizes_the_nearest_one_stands_and_a_larger_one_that_is_worse_counts_as_the_smaller():
    curve = [(1e5, 4.0), (2e5, 5.0), (4e5, 2.0)]
    assert claim_sizes.parameters_for(curve, 4.5) == claim_sizes.parameters_for(curve, 4.0) == 1e5
    assert claim_sizes.parameters_for(curve, 1.0) == 4e5
    half_way = claim_sizes.parameters_for(curve, math.sqrt(8.0))
    assert half_way == pytest.approx(math.sqrt(1e5 * 4e5))  # from the smallest, not from the bump
    assert claim_sizes.parameters_for(curve[::-1], 2.0) == pytest.approx(4e5)
    for wrong in ([(1e5, 4.0)], [(1e5, 4.0), (1e5, 3.0)], [(1e5, 4.0), (2e5, 0.0)], [(1e5, 4.0), (2e5, math.nan)]):
        with pytest.raises(ValueError, match="two sizes with positive distances"):
            claim_sizes.parameters_for(wrong, 3.0)


def test_a_verdict_on_parameters_has_its_interval_over_the_seeds_and_covers_the_planted_ratio():
    draw = np.random.default_rng(1)
    covered, supported = 0, 0
    for _ in range(60):
        rows = {}
        for arm, factor in (("joint", 1.0), ("new", 0.8)):
            cells = [power_law(50.0 * factor, 0.4, 0.01 * draw.normal(size=3)) for _ in range(5)]
            rows[arm] = {name: [cell[name] for cell in cells] for name in cells[0]} | {"seeds": list(range(5))}
        comparison = {"first": "new", "second": "joint", "metric": "parameters", "margin": 0.1}
        cells = claim_page.cells_of({"stated": {"study": STUDY}, "metrics": {"cells": rows}})
        claims = {"c": {"seeds": 5, "comparisons": [comparison]}}
        entry = claim_decision.decide(claims, {"c": claim_statements.metrics_of(STUDY)}, {"c": cells}, 1)["c"]
        (found,) = entry["comparisons"]
        covered += found["low"] <= math.log(0.8 ** (-1 / 0.4)) <= found["high"]
        supported += entry["verdict"] == "supported"
    assert covered >= 54 and supported == 60
    assert claim_statements.metrics_of(STUDY)["parameters"] == {
        "says": "parameters for as good images",
        "better": "lower",
        "relative": True,
    }
