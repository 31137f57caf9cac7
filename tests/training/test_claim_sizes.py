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
    assert claim_sizes.parameters_for(curve, 4.5) == (1e5, "smaller")
    assert claim_sizes.parameters_for(curve, 4.0) == (1e5, "")
    assert claim_sizes.parameters_for(curve, 1.0) == (4e5, "larger")
    half_way, beyond = claim_sizes.parameters_for(curve, math.sqrt(8.0))
    assert half_way == pytest.approx(math.sqrt(1e5 * 4e5)) and not beyond  # from the smallest, not from the bump
    assert claim_sizes.parameters_for(curve[::-1], 2.0) == (pytest.approx(4e5), "")
    for wrong in ([(1e5, 4.0)], [(1e5, 4.0), (1e5, 3.0)], [(1e5, 4.0), (2e5, 0.0)], [(1e5, 4.0), (2e5, math.nan)]):
        with pytest.raises(ValueError, match="two sizes with positive distances"):
            claim_sizes.parameters_for(wrong, 3.0)


def decided(factor: float, exponent: float, spread: float, draw, first: str = "new", corrected_for: int = 60) -> dict:
    """Entry of the comparison of parameters, of five seeds whose distances are `factor` times the reference's."""
    seeds = range(5)
    cells = {
        arm: {seed: {"metrics": power_law(50.0 * times, exponent, spread * draw.normal(size=3))} for seed in seeds}
        for arm, times in (("joint", 1.0), ("new", factor))
    }
    cells = claim_sizes.with_parameters(cells, STUDY)
    second = "joint" if first == "new" else "new"
    claim = {"seeds": 5, "comparisons": [{"first": first, "second": second, "metric": "parameters", "margin": 0.1}]}
    return claim_decision.decide({"c": claim}, {"c": claim_statements.metrics_of(STUDY)}, {"c": cells}, corrected_for)[
        "c"
    ]


def test_effects_that_lead_beyond_the_sizes_are_decided_and_their_differences_called_bounds():
    draw = np.random.default_rng(2)
    wanted = {("new", 0.5): "supported", ("new", 2.0): "contradicted", ("joint", 2.0): "supported"}
    wanted[("joint", 0.5)] = "contradicted"
    for (first, factor), verdict in wanted.items():  # at exponent .3 a tenth or ten times the parameters
        entry = decided(factor, 0.3, 0.02, draw, first)
        (found,) = entry["comparisons"]
        assert entry["verdict"] == verdict, (first, factor, found)
        which = "at least" if verdict == "supported" else "at most"
        assert found["bounds"] == {which: 5}
        ends = SIZES[0] if factor < 1 else SIZES[2]
        size = abs(math.log(SIZES[1] / ends))
        assert [abs(value) for value in found["differences"]] == pytest.approx([size] * 5, rel=0.2)
        metric = claim_statements.metrics_of(STUDY)["parameters"]
        assert claim_page._interval(found, metric).endswith(f"), {which} that in 5 seeds")


def test_verdicts_on_parameters_are_rarely_false_where_many_seeds_lie_beyond_the_sizes():
    draw = np.random.default_rng(3)
    verdicts = {}
    for truth in ("equal", "at the margin"):
        factor = 1.0 if truth == "equal" else 1.1**-0.1
        entries = [decided(factor, 0.1, 0.05, draw, corrected_for=1) for _ in range(200)]
        assert sum(bool(entry["comparisons"][0]["bounds"]) for entry in entries) > 70
        verdicts[truth] = [entry["verdict"] for entry in entries]
    assert verdicts["equal"].count("supported") <= 10  # 5 % are twice what is expected
    assert 200 - verdicts["at the margin"].count("undecided") <= 20


def test_equal_arms_need_equally_many_parameters_and_two_without_the_reference_are_not_compared():
    draw = np.random.default_rng(4)
    cells = {"joint": {s: {"metrics": power_law(50.0, 0.4, 0.01 * draw.normal(size=3))} for s in range(5)}}
    cells |= {arm: {s: {"metrics": dict(cell["metrics"])} for s, cell in cells["joint"].items()} for arm in ("a", "b")}
    cells = claim_sizes.with_parameters(cells, STUDY)
    metrics = {"c": claim_statements.metrics_of(STUDY)}
    for pair, verdict in ((("a", "joint"), "contradicted"), (("a", "b"), "undecided")):
        comparison = dict(zip(("first", "second"), pair, strict=True)) | {"metric": "parameters", "margin": 0.1}
        claims = {"c": {"seeds": 5, "comparisons": [comparison]}}
        entry = claim_decision.decide(claims, metrics, {"c": cells}, 1)["c"]
        assert entry["verdict"] == verdict
    assert "one must be joint" in entry["reason"]
    comparison |= {"second": "joint", "margin": 4}
    entry = claim_decision.decide({"c": {"seeds": 5, "comparisons": [comparison]}}, metrics, {"c": cells}, 1)["c"]
    assert entry["verdict"] == "undecided" and "60000 lies beyond the sizes" in entry["reason"]


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
        "equal_quality": STUDY["equal_quality"]["parameters"],
    }
