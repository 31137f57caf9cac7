"""The verdict machine: planted effects are found, methods that do nothing are not, and bad input is refused."""

import importlib
import json
import os
import shlex
import shutil
import signal
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from cases import for_each
from launches import REPOSITORY
from scipy.stats import ttest_1samp
from tiny_pipelines import make_tokens

from hf_dpssl.autoencoder.measures import load_pictures
from hf_dpssl.cli import reproduce as reproduce_command
from hf_dpssl.cli.commands import command_module
from hf_dpssl.cli.errors import BAD_INPUT, reported
from hf_dpssl.cli.train import SCRIPTS
from hf_dpssl.data import keyed_random
from hf_dpssl.data.image_data import TABLE
from hf_dpssl.domains.known_sets import KNOWN_SETS
from hf_dpssl.runs.recipe import parse

sys.path.insert(0, str(REPOSITORY / "training" / "evidence"))
import claim_cells
import claim_decision
import claim_forecast
import claim_page
import claim_restore
import claim_sizes
import claim_statements
import judge_network
import one_step
import reproduce

EVIDENCE = REPOSITORY / "training" / "evidence"
NOISES = {
    "normal": lambda draw, shape: draw.normal(size=shape),
    "student t, 3 degrees of freedom": lambda draw, shape: draw.standard_t(3, size=shape),
    "Laplace": lambda draw, shape: draw.laplace(size=shape),
    "uniform": lambda draw, shape: draw.uniform(-1, 1, size=shape),
}


def simulated(effects: dict[str, float], noise, draw, seeds: int, scale: float = 1.0) -> claim_decision.Cells:
    """Cells of a metric x: what all arms of a seed share, ten times as large as each cell's own noise; the effect."""
    common = 10 * scale * draw.normal(size=seeds)
    return {
        arm: {seed: {"metrics": {"x": float(value)}, "curve": [[0, 0.0]]} for seed, value in enumerate(values)}
        for arm, effect in effects.items()
        for values in [common + effect + scale * noise(draw, seeds)]
    }


def test_of_400_simulated_studies_intervals_cover_the_truth_and_verdicts_are_rarely_false():
    draw = np.random.default_rng(0)
    truths = {"true": 6.0, "large": 4.0, "false": 0.0, "worse": -3.0, "null": 1.0, "at_margin": 1.0}
    covered, wrong, found, studies = [], 0, [], 400
    for number in range(studies):
        noise = list(NOISES.values())[number % len(NOISES)]
        seeds, scale = (5, 8)[number // 4 % 2], (0.3, 1.0)[number // 8 % 2]
        cells = simulated({"base": 0.0} | truths, noise, draw, seeds, scale)
        comparisons = [{"first": arm, "second": "base", "metric": "x", "margin": 1.0} for arm in truths]
        claims = {c["first"]: {"seeds": 5, "comparisons": [c]} for c in comparisons}
        metrics = dict.fromkeys(claims, {"x": {"better": "higher"}})
        entries = claim_decision.decide(claims, metrics, dict.fromkeys(claims, cells), len(claims))
        sides = {arm: "supported" if effect > 1 else "contradicted" for arm, effect in truths.items()}
        rightly = sides | {"null": "undecided", "at_margin": "undecided"}
        wrong += any(entries[arm]["verdict"] not in (rightly[arm], "undecided") for arm in truths)
        for arm, effect in truths.items():
            (entry,) = entries[arm]["comparisons"]
            covered.append(entry["low"] <= effect <= entry["high"])
            found += [entry["verdict"] == rightly[arm]] if effect in (6.0, -3.0) else []
    assert 0.93 <= np.mean(covered) <= 0.97
    assert wrong / studies <= 0.05
    assert np.mean(found) > 0.5  # and the machine does decide
    print(f"coverage {np.mean(covered):.4f}, false {wrong / studies:.4f}, found {np.mean(found):.3f}")


def cells_without_effect(study: dict, seeds: int, spread: float, draw, forecast: bool) -> claim_decision.Cells:
    """Cells of a study's own metrics, equal arms but for noise; what is judged of them comes from the claims' own code.

    All arms share what a seed adds. For a forecast arms differ instead, in each metric by another number, so that no
    measure tells a target. Distances fall with the sizes of generators, which are no random numbers.
    """
    cells = {arm: {seed: {"metrics": {}} for seed in range(seeds)} for arm in study["arms"]}
    sizes = [size for about in study.get("equal_quality", {}).values() for size in about["sizes"]]
    places = {size[key]: place for place, size in enumerate(sizes) for key in ("parameters", "distance")}
    counts = {size["parameters"] for size in sizes}
    for metric, about in study["metrics"].items():
        own = {arm: 5 * spread * draw.normal() if forecast else 0.0 for arm in cells}
        for seed in range(seeds):
            shared = 0.0 if forecast else draw.normal()
            for arm in cells:
                value = shared + own[arm] + spread * draw.standard_t(4) - 0.3 * places.get(metric, 0)
                value = np.exp(value) if about.get("relative") else 50 + 10 * value
                cells[arm][seed]["metrics"][metric] = 1e5 * 3 ** places[metric] if metric in counts else float(value)
    return claim_sizes.with_parameters(cells, study)


def test_a_method_that_does_nothing_is_supported_in_no_claim():
    draw = np.random.default_rng(1)
    sizes = {scale: sum(claim_statements.counts(scale).values()) for scale in ("quick", "cpu")}
    for name, scale in [(name, scale) for name in claim_statements.claim_names() for scale in sizes]:
        claim = claim_statements.read_claim(name, scale)
        if scale == "cpu" and claim == claim_statements.read_claim(name, "quick"):
            continue
        study = claim_statements.read_study(claim["study"], scale)
        compared = {comparison[side] for comparison in claim["comparisons"] for side in ("first", "second")}
        of_forecasts = not compared <= study["arms"].keys()
        given = {name: claim}, {name: claim_statements.metrics_of(study)}
        for spread in (0.0, 0.3) if of_forecasts else (0.0, 0.01, 0.05, 0.3):  # shares of a metric, or ten points
            for _ in range((1 if of_forecasts else 15) if spread else 1):
                cells = cells_without_effect(study, claim["seeds"], spread, draw, of_forecasts)
                cells = claim_forecast.forecast_cells(cells, study) if of_forecasts else cells
                entry = claim_decision.decide(*given, {name: cells}, sizes[scale])[name]
                assert entry["verdict"] in (("contradicted", "undecided") if spread else ("contradicted",)), name
                assert all(len(comparison["seeds"]) == claim["seeds"] for comparison in entry["comparisons"])


def test_corrected_p_values_are_those_of_the_definition_of_holm():
    p_values = [0.01, 0.04, 0.03, 0.005]
    assert claim_decision.holm(p_values, 4) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # by hand: 3, 1, 2 and 4 times
    assert claim_decision.holm([0.01], 6) == pytest.approx([0.06])  # five that were not run count as 1
    draw = np.random.default_rng(2)
    values = draw.normal(1.5, 1.0, size=8).tolist()
    assert claim_decision.judge(values, 1.0)["p"] == pytest.approx(ttest_1samp(np.array(values) - 1.0, 0).pvalue)


def drawn_result(study: str, draw) -> dict:
    """A result of a shipped study at scale quick, of random numbers; curves that do not flatten."""
    stated = reproduce.statement(study, "quick", None, claim_statements.CLAIMS)
    about, seeds = stated["study"], list(range(stated["seeds"]))
    rows = {}
    for arm in about["arms"]:
        names = [name for name, metric in about["metrics"].items() if claim_cells.of_arm(metric, arm)]
        rows[arm] = {name: draw.lognormal(0.1, 0.1, len(seeds)).tolist() for name in names} | {"seeds": seeds}
        rows[arm]["cpu_seconds"] = [2.0 for _ in seeds]
        if claim_cells.of_arm(about["curve"], arm):
            rows[arm]["curve"] = [[[step, step] for step in range(9)] for _ in seeds]
    return {"stated": stated, "metrics": {"cells": rows}}


def test_comparisons_of_all_claims_are_corrected_together_whatever_was_run():
    files = [yaml.safe_load(path.read_text()) for path in (EVIDENCE / "claims").glob("*.yaml")]
    size = sum(len(claim["comparisons"]) for claim in files)  # at scale quick: without what others add
    draw = np.random.default_rng(6)
    results = [drawn_result(study, draw) for study in ("gan", "maps", "encoders")]
    for given in (results, results[:2]):
        entries = claim_page.verdicts(given)
        families = {claim["family"] for result in given for claim in result["stated"]["claims"].values()}
        assert len(families) > 1 and claim_page.compared_in_all(given) == size
        found = []
        for result in given:
            metrics = claim_statements.metrics_of(result["stated"]["study"])
            for comparison in (part for name in result["stated"]["claims"] for part in entries[name]["comparisons"]):
                margin = claim_decision.margin_of(comparison, metrics[comparison["metric"]])
                found.append((ttest_1samp(np.array(comparison["differences"]) - margin, 0).pvalue, comparison["p"]))
        largest = 0.0
        for rank, (raw, corrected) in enumerate(sorted(found)):
            largest = max(largest, (size - rank) * raw)
            assert corrected == pytest.approx(min(1.0, largest))
        assert min(found)[1] < 1


def test_arms_that_read_those_of_others_are_as_converged_as_these():
    arms = {"a": {}, "b": {"trained_as": "a"}, "c": {"needs": ["b", "d"]}, "d": {"needs": ["a"]}, "e": {}}
    assert [sorted(claim_page.behind(arms, arm)) for arm in arms] == [[], ["a"], ["a", "b", "d"], ["a"], []]
    result = drawn_result("encoders", np.random.default_rng(7))
    entries = claim_page.verdicts([result])
    encoders = {"simclr", "t_simclr", "moco", "moco_batch", "t_moco"}
    assert entries["transfer"]["not_converged"].keys() == encoders
    for name in ("zoo_ranking", "zoo_selection"):  # whose arms have no curves: measures, read from a zoo of encoders
        assert entries[name]["not_converged"].keys() == encoders | {"simclr_short", "simclr_wide"}
    ranked = claim_page._arms(entries["zoo_ranking"], result)
    assert [line.count("| 2 + 14 of 7 arms | not what it reads |") for line in ranked] == [0, 0, 1, 0, 0, 0, 0, 0]
    assert [line.count("| 2 + 16 of 8 arms | not what it reads |") for line in ranked] == [0, 0, 0, 1, 1, 1, 1, 1]


def test_heads_of_tables_say_how_their_figures_are_computed():
    for better in ("higher", "lower"):
        for relative in (True, False):
            metric = {"better": better, "relative": relative}
            comparison = {"first": "a", "second": "b", "metric": "x", "margin": 0.05}
            cells = {arm: {0: {"metrics": {"x": value}}} for arm, value in (("a", 2.0), ("b", 5.0))}
            shown = claim_page._amount(claim_decision.paired(cells, comparison, metric)[0], metric)
            formula = claim_page._difference(metric).removesuffix(" (lower is better)")
            computed = eval(formula, {"first": 2.0, "second": 5.0})
            assert float(shown.removesuffix(" %")) == pytest.approx(computed * (100 if relative else 1), rel=1e-3)


def test_a_verdict_says_why_it_is_open():
    metric = {"x": {"better": "lower", "relative": True}}
    claim = {"seeds": 5, "comparisons": [{"first": "new", "second": "old", "metric": "x", "margin": 0.05}]}

    def verdict(new: list[float], old: list[float]) -> tuple[str, str]:
        arms = {"new": new, "old": old}
        cells = {arm: {seed: {"metrics": {"x": v}} for seed, v in enumerate(values)} for arm, values in arms.items()}
        found = claim_decision.decide({"c": claim}, {"c": metric}, {"c": cells}, 1)["c"]
        return found["verdict"], found["reason"]

    old = [1.0, 2.0, 1.5, 0.5, 3.0]
    lower = [value * factor for value, factor in zip(old, [0.8, 0.82, 0.81, 0.79, 0.8], strict=True)]
    assert verdict(lower, old)[0] == "supported" and verdict(old, lower)[0] == "contradicted"
    assert verdict(lower[:4], old) == ("undecided", "4 of 5 seeds")
    assert verdict([], old) == ("undecided", "0 of 5 seeds")
    assert "same difference" in verdict([value / 2 for value in old], old)[1]
    assert "seed 4 is nan" in verdict([*lower[:4], float("nan")], old)[1]
    assert verdict(old, old)[0] == "contradicted"


def test_a_curve_is_flat_by_the_share_of_its_last_quarter():
    steps = range(0, 101, 5)
    cases = {0.5: [1 - step / 200 for step in steps], 0.0: [0.1] * 21, 0.25: [step / 100 for step in steps]}
    wanted = [0.25, 0.0, 0.25]
    for values, share in zip(cases.values(), wanted, strict=True):
        found = claim_decision.last_quarter([[s, v] for s, v in zip(steps, values, strict=True)])
        assert found == pytest.approx(share)
    exponential = [[step, 1 - np.exp(-step / 10)] for step in steps]
    assert claim_decision.last_quarter(exponential) == pytest.approx(np.exp(-7.5) - np.exp(-10), rel=1e-3)
    assert claim_decision.last_quarter(exponential[:3]) is None
    back = [[step, value] for step, value in zip(steps, [*np.linspace(1, 0, 15), *np.linspace(0, 0.5, 6)], strict=True)]
    curves = {"flat": exponential, "still better": [[s, 1 - s / 200] for s in steps], "getting worse": back}
    cells = {arm: {0: {"curve": curve}} for arm, curve in curves.items()}
    assert claim_decision.not_converged(cells) == {"still better": [""], "getting worse": [""]}
    for name, curve in (("still better", exponential), ("flat", curves["still better"])):
        cells[name][0]["curves"] = {"dit": curve, "tokens": curves["still better"]}
    expected = {"flat": ["dit"], "still better": [""], "getting worse": [""]}
    assert claim_decision.not_converged(cells, ["dit"]) == expected  # no claim reads the tokens


def test_of_a_relative_curve_the_logarithm_is_to_be_flat():
    result = drawn_result("gan", np.random.default_rng(9))
    study, rows = result["stated"]["study"], result["metrics"]["cells"]
    draw, steps = np.random.default_rng(10), range(1, 21)
    fallen = [*np.geomspace(64, 2, 15), *np.geomspace(1.95, 1.5, 5)]  # a quarter of what was left, in the last quarter
    noisy = [64.0, *(4 * np.exp(0.02 * draw.normal(size=19)))]
    rising = [*np.geomspace(64, 2, 15), *np.geomspace(2.05, 2.6, 5)]
    for arm, row in rows.items():
        values = {"noise": fallen, "dae": rising}.get(arm, noisy)
        row["curve"] = [[list(point) for point in zip(steps, values, strict=True)] for _ in row["seeds"]]
    assert not claim_page.verdicts([result])["gan_latents"]["not_converged"]  # beside 64 all of it is little
    study["curve"] = study["curve"] | {"relative": True}
    entry = claim_page.verdicts([result])["gan_latents"]
    assert set(entry["not_converged"]) == {"noise", "dae"}
    result |= {"environment": {"processor": "", "threads": 1, "libraries": {"torch": ""}}, "samples": {}}
    result |= {"cpu_seconds": {"cells": 1.0, "shared": 1.0}, "tuning": {}, "weights": {}, "fingerprint": ""}
    claim = result["stated"]["claims"]["gan_latents"]
    assert "of the change of the logarithm of the discriminator's loss: noise, dae" in claim_page._paragraph(
        claim, entry, result
    )
    rows["noise"]["curve"][2][3][1] = 0.0
    with pytest.raises(ValueError, match="the discriminator's loss is relative and has the value 0.0"):
        claim_page.verdicts([result])


def write_cell(folder, cell: claim_cells.Cell, value: float) -> None:
    content = {"arm": cell.arm, "seed": cell.seed, "flags": "", "cpu_seconds": 1.0}
    more = {"tuning": value} if cell.point is not None else {"metrics": {"knn": value}, "curve": [[0, 1.0], [1, 0.5]]}
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    (folder / "cells" / f"{cell.name}.json").write_text(json.dumps(content | more))


def test_whatever_of_a_plan_is_done_is_whole_seeds_and_a_valid_page(tmp_path):
    stated = reproduce.statement("dimensions", "quick", None, claim_statements.CLAIMS)
    study = stated["study"]
    folder = tmp_path / "dimensions"
    prepared(folder)
    cells = claim_cells.plan(study, 5)
    assert len(set(cells)) == len(cells) == 4 * 3 + 4 * 5
    for done, cell in enumerate(cells, 1):
        write_cell(folder, cell, 90.0 + cell.seed if cell.arm == "t_simclr_2" else 50.0 + 2.1 * cell.seed)
        result = claim_cells.write_study(stated, folder, tmp_path / "dimensions.json")
        entry = claim_page.verdicts([result])["fewer_dimensions"]
        whole = max(0, done - 12) // 4
        assert [len(comparison["seeds"]) >= whole for comparison in entry["comparisons"]] == [True] * 3
        assert entry["verdict"] == ("supported" if done == len(cells) else "undecided")
        assert f"| 1 fewer_dimensions | **{entry['verdict']}** |" in claim_page.table([result])
        assert done == len(cells) or "of 5 seeds" in entry["reason"]
    reproduce.refresh_page(tmp_path)
    assert (tmp_path / "fewer_dimensions.png").stat().st_size > 5000
    # No curve of two points says that it is flat.
    assert "Not converged" in (tmp_path / "claims.md").read_text()


def prepared(folder) -> None:
    """What `claim_cells.ready` leaves of a study without shared networks."""
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "content.json").write_text('{"fit": "a", "measured": "b"}')


def test_whole_seeds_of_a_results_file_go_on_in_another_folder(tmp_path, capsys):
    stated = reproduce.statement("dimensions", "quick", None, claim_statements.CLAIMS)
    study = stated["study"]
    first, second = tmp_path / "first" / "dimensions", tmp_path / "second" / "dimensions"
    for folder in (first, second):
        prepared(folder)
    cells = claim_cells.plan(study, 5)[: 12 + 2 * 4 + 1]  # the grids, two seeds and one arm of the third
    for number, cell in enumerate(cells):
        write_cell(first, cell, 0.1 * number)
    path = first.parent / "dimensions.json"
    stored = claim_cells.write_study(stated, first, path)
    moved = second.parent / path.name
    moved.write_bytes(path.read_bytes())
    claim_cells.state(stated, second)
    claim_restore.restore(study, second, moved)
    assert {found.stem for found in (second / "cells").glob("*.json")} == {cell.name for cell in cells[:-1]}
    assert f"run again, as not all of their arms are there: {cells[-1].name}" in capsys.readouterr().out
    again = claim_cells.write_study(stated, second, moved)
    for arm, row in again["metrics"]["cells"].items():
        assert row == {
            name: value[:2] if isinstance(value, list) else value
            for name, value in stored["metrics"]["cells"][arm].items()
        }
    for same in ("tuning", "fingerprint", "content", "weights"):
        assert again[same] == stored[same]
    assert again["cpu_seconds"]["grids"] == pytest.approx(stored["cpu_seconds"]["grids"])
    [before] = again["before"]
    assert before["seeds"] == [0, 1] and before["environment"] == stored["environment"]
    entry = claim_page.verdicts([again])["fewer_dimensions"]
    assert entry["verdict"] == "undecided" and "2 of 5 seeds" in entry["reason"]
    # A cell that is taken away afterwards is run again, not taken over again.
    (second / "cells" / f"{cells[-2].name}.json").unlink()
    claim_restore.restore(study, second, moved)
    assert not (second / "cells" / f"{cells[-2].name}.json").exists()


def test_a_restore_that_is_killed_leaves_no_cell_and_is_made_again(tmp_path, monkeypatch):
    stated = reproduce.statement("dimensions", "quick", None, claim_statements.CLAIMS)
    first, second = tmp_path / "first" / "dimensions", tmp_path / "second" / "dimensions"
    for folder in (first, second):
        prepared(folder)
    cells = claim_cells.plan(stated["study"], 5)[:20]
    for cell in cells:
        write_cell(first, cell, 50.0)
    claim_cells.write_study(stated, first, path := tmp_path / "second" / "dimensions.json")
    written, write = [], claim_restore.write_json

    def killed(place, content):
        written.append(place)
        if len(written) == 16:
            raise KeyboardInterrupt
        write(place, content)

    monkeypatch.setattr(claim_restore, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        claim_restore.restore(stated["study"], second, path)
    assert not (second / "cells").exists()
    monkeypatch.undo()
    claim_restore.restore(stated["study"], second, path)
    assert {found.stem for found in (second / "cells").glob("*.json")} == {cell.name for cell in cells}


@pytest.mark.parametrize("other", ["weights", "content"])
def test_seeds_that_would_not_compare_with_new_ones_are_not_taken_over(tmp_path, other):
    stated = reproduce.statement("dimensions", "quick", None, claim_statements.CLAIMS)
    folder = tmp_path / "dimensions"
    prepared(folder)
    for cell in claim_cells.plan(stated["study"], 5)[:16]:
        write_cell(folder, cell, 50.0)
    path = tmp_path / "dimensions.json"
    stored = claim_cells.write_study(stated, folder, path)
    path.write_text(json.dumps(stored | {other: {"extractor": "other"}}))
    for cell in (folder / "cells").iterdir():
        cell.unlink()
    with pytest.raises(ValueError, match=f"measured with other {other} .*would not compare"):
        claim_restore.restore(stated["study"], folder, path)
    assert not any((folder / "cells").iterdir()) and not (folder / "restored.json").exists()


def test_a_grid_is_chosen_on_validation_by_a_seed_of_its_own(tmp_path):
    study = claim_statements.read_study("dimensions", "quick")
    grid = [cell for cell in claim_cells.plan(study, 5) if cell.arm == "simclr_2" and cell.point is not None]
    for cell, score in zip(grid, [30.0, 60.0, 50.0], strict=True):
        assert claim_cells.chosen_point(study, "simclr_2", tmp_path) is None and cell.seed not in range(100)
        write_cell(tmp_path, cell, score)
    assert claim_cells.chosen_point(study, "simclr_2", tmp_path) == 1
    read_test = [step for step in study["steps"] if "{measured}" in step["flags"]]
    assert read_test and all(step["final"] for step in read_test)


def own_claims(folder, **scale) -> None:
    """The shipped claim 1 with its first comparison, and its study at a scale of embedded digits, seconds long."""
    (folder / "studies").mkdir(parents=True, exist_ok=True)
    study = yaml.safe_load((EVIDENCE / "claims" / "studies" / "dimensions.yaml").read_text())
    data = {"name": "digits", "image_size": 16, "from": "scikit-learn"}
    tiny = {"minutes": 1, "train": 256, "validation": 100, "test": 200, "channels": "[8, 8, 8, 8]"}
    study["scales"] = {"quick": tiny | {"batch_size": 64, "epochs": 1, "data": data} | scale}
    claim = yaml.safe_load((EVIDENCE / "claims" / "fewer_dimensions.yaml").read_text())
    claim["comparisons"] = claim["comparisons"][:1]
    arms = [claim["comparisons"][0][side] for side in ("second", "first")]
    del claim["added"], study["added"]
    study["arms"] = {name: study["arms"][name] for name in arms}
    for arm in study["arms"].values():
        arm["grid"] = arm["grid"][:1]
    (folder / "studies" / "dimensions.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    (folder / "fewer_dimensions.yaml").write_text(yaml.safe_dump(claim, sort_keys=False))


def test_bad_input_is_refused_before_any_work(tmp_path, monkeypatch):
    own_claims(tmp_path / "claims")
    output = tmp_path / "out"
    given = ["--claims_dir", str(tmp_path / "claims"), "--output_dir", str(output)]
    with pytest.raises(ValueError, match="no claim 'fewer_dimension'.*Did you mean fewer_dimensions?"):
        reproduce.main(["fewer_dimension", *given])
    with pytest.raises(ValueError, match="--seeds 4 decides nothing: the verdicts on fewer_dimensions need 5"):
        reproduce.main(["1", "--seeds", "4", *given])
    monkeypatch.delenv("DPSSL_DATA", raising=False)
    own_claims(tmp_path / "claims", data={"name": "cifar10-jpeg", "image_size": 32, "from": "https://where.example"})
    with pytest.raises(FileNotFoundError, match="cifar10-jpeg-train.parquet.*from: https://where.example"):
        reproduce.main(["1", *given])
    assert not output.exists()


@for_each(
    "change, named",
    [
        (lambda study, claim: claim["comparisons"][0].update(margin=1), "comparisons.0..margin: stored 2, now 1"),
        (lambda study, claim: study["scales"]["quick"].update(epochs=2), "numbers.epochs: stored 1, now 2"),
        (
            lambda study, claim: study["arms"]["simclr_2"].update(grid=["--dof 1"]),
            "grid.0.: stored '--temperature 0.05'",
        ),
    ],
)
def test_a_changed_statement_is_refused_with_the_difference(tmp_path, change, named):
    own_claims(tmp_path / "claims")
    stated = reproduce.statement("dimensions", "quick", None, tmp_path / "claims")
    claim_cells.state(stated, tmp_path / "out" / "quick" / "dimensions")
    claim_cells.state(stated, tmp_path / "out" / "quick" / "dimensions")
    files = [tmp_path / "claims" / name for name in ("studies/dimensions.yaml", "fewer_dimensions.yaml")]
    contents = [yaml.safe_load(path.read_text()) for path in files]
    change(*contents)
    for path, content in zip(files, contents, strict=True):
        path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=named):
        reproduce.main(["1", "--claims_dir", str(tmp_path / "claims"), "--output_dir", str(tmp_path / "out")])
    # So are the results alone, from which a study would go on elsewhere.
    moved = tmp_path / "moved" / "quick"
    moved.mkdir(parents=True)
    (moved / "dimensions.json").write_text(json.dumps({"stated": stated}))
    with pytest.raises(ValueError, match=named):
        reproduce.main(["1", "--claims_dir", str(tmp_path / "claims"), "--output_dir", str(tmp_path / "moved")])
    assert [path.name for path in moved.rglob("*") if path.is_file() and path.suffix != ".lock"] == ["dimensions.json"]


def test_a_refusal_is_one_line_that_hints_at_no_defect_of_ours(capsys):
    for argv in (["nonsense"], ["1", "--seeds", "3"]):
        assert reported("reproduce.py", lambda given=argv: reproduce.main(given)) == BAD_INPUT
        printed = capsys.readouterr().err
        assert printed.startswith("reproduce.py: ") and printed.count("\n") == 1 and "DPSSL_DEBUG" not in printed


def test_a_claim_that_a_method_without_effect_could_pass_is_refused(tmp_path):
    own_claims(tmp_path)
    path = tmp_path / "fewer_dimensions.yaml"
    claim = yaml.safe_load(path.read_text())
    cases = {
        "must be positive": claim | {"comparisons": [claim["comparisons"][0] | {"margin": 0}]},
        "states 3 seeds": claim | {"seeds": 3},
        "lacks no_op": {key: value for key, value in claim.items() if key != "no_op"},
    }
    for message, content in cases.items():
        path.write_text(yaml.safe_dump(content))
        with pytest.raises(ValueError, match=message):
            claim_statements.read_claim("fewer_dimensions", "quick", tmp_path)


def test_every_step_of_every_scale_is_a_command_that_its_program_understands(tmp_path, capsys):
    for name in sorted(path.stem for path in (EVIDENCE / "claims" / "studies").glob("*.yaml")):
        for scale in reproduce_command.SCALES:
            study = claim_statements.read_study(name, scale)
            fill = {**study["numbers"], **study["data"], "seed": 0, "arm": ""}
            fill |= dict.fromkeys(("fit", "measured", "shared", "cell", "trained"), tmp_path)
            steps = [(step, fill) for step in study.get("shared", {}).values()]
            for name_of_arm, arm in study["arms"].items():
                for point in arm.get("grid", [""]):
                    own = fill | arm.get("with", {})
                    own |= {"arm": f"{arm['flags']} {point}".format_map(own)}
                    steps += [(step, own) for step in claim_cells.steps_of_arm(study, name_of_arm)]
                assert {study["numbers"][key] for key in arm["budget"].values()}
                written = " ".join(step["flags"] for step in claim_cells.steps_of_arm(study, name_of_arm))
                for metric in study["metrics"].values():
                    path = metric.get("file", "")
                    if claim_cells.of_arm(metric, name_of_arm) and path.endswith(".json") and "/" not in path:
                        assert f"{{cell}}/{path}" in written, (name, scale, name_of_arm, path)
            for step, values in steps:
                argv, run = shlex.split(step["flags"].format_map(values)), step["run"].format_map(values)
                if run in SCRIPTS:
                    parse(SCRIPTS[run], argv, "")
                else:
                    own_script = (EVIDENCE / f"{run}.py").is_file()
                    module = importlib.import_module(run) if own_script else command_module(run)
                    module.parser().parse_args(argv)
                assert ("{fit}" in step["flags"]) != bool(step.get("final"))
    assert reproduce.main(["all", "--dry_run", "--scale", "paper", "--output_dir", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "imagenet-1k at 256 px" in printed and "open weak_dropout-s4" in printed and not (tmp_path / "out").exists()
    assert reproduce.main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert all(f" {name} (5 seeds; study " in printed for name in claim_statements.claim_names())


def test_a_claim_names_the_generators_that_had_not_converged_where_it_compares_them():
    result = drawn_result("weakness", np.random.default_rng(8))
    study, rows = result["stated"]["study"], result["metrics"]["cells"]
    study["curves"] = claim_statements.read_study("weakness", "cpu")["curves"]
    flat = [[step, 1 - np.exp(-step)] for step in range(9)]
    for arm, row in rows.items():
        row["curve"] = [flat for _ in row["seeds"]]
        still = [[step, step] for step in range(9)]
        row["curves"] = {name: [still if (arm, name) == ("decoupled", "dit_small") else flat for _ in row["seeds"]]
                         for name in ("dit_small", "dit_large", "one_step")}  # fmt: skip
    rows["dropout_05"]["curve"] = rows["decoupled"]["curves"]["dit_small"]
    entries = claim_page.verdicts([result])
    assert claim_page.summary(entries["dit_generation"]).endswith("; not converged: decoupled (dit_small), dropout_05")
    assert not entries["weakness"]["not_converged"]  # it compares the large DiT and one step, of other arms
    rows["decoupled"]["curve"] = rows["dropout_05"]["curve"]
    entries = claim_page.verdicts([result])
    assert "not converged: decoupled (itself, dit_small), dropout_05" in claim_page.summary(entries["dit_generation"])
    assert entries["dit_generation"]["curves"] == ["dit_small", "dit_large"]  # asked for, so said to be flat or not
    assert entries["weakness"]["curves"] == ["dit_large", "one_step"]
    rows_of_arms = claim_page._arms(entries["dit_generation"], result)
    assert sum(line.endswith("| **not converged** |") for line in rows_of_arms) == 2
    for scale in reproduce_command.SCALES:
        about = claim_statements.read_study("weakness", scale)
        for curve in about.get("curves", {}).values():
            assert set(curve["metrics"]) <= claim_statements.metrics_of(about).keys()


def test_what_a_scale_adds_changes_nothing_of_what_was_stated_and_decided_at_another(tmp_path):
    content = {"arms": {"a": 1}, "steps": [1], "says": "x", "kept": 0}
    whole = content | {"added": {"scales": ["cpu"], "arms": {"b": 2}, "steps": [2], "says": "y", "new": 3}}
    assert claim_statements.with_added(whole, "quick") == content
    expected = {"arms": {"a": 1, "b": 2}, "steps": [1, 2], "says": "y", "kept": 0, "new": 3}
    assert claim_statements.with_added(whole, "cpu") == expected
    assert "added" in whole and whole["arms"] == {"a": 1}
    for path in sorted((EVIDENCE / "results" / "claims").glob("*/*.json")):
        if (path.parent.name, path.stem) == ("quick", "autoencoders"):
            continue  # decided when an encoder's feature_norm was "none" by default, which is now written out
        stored = json.loads(path.read_text())["stated"]
        now = reproduce.statement(path.stem, stored["study"]["scale"], None, claim_statements.CLAIMS)
        assert not claim_statements.differences(stored, now), path.stem


def test_every_local_data_set_of_a_scale_is_looked_for_before_its_first_cell():
    for name in sorted(path.stem for path in (EVIDENCE / "claims" / "studies").glob("*.yaml")):
        for scale in reproduce_command.SCALES:
            study = claim_statements.read_study(name, scale)
            named = {value for value in study["numbers"].values() if isinstance(value, str)}
            local = {value for value in named if value in TABLE and TABLE[value].hub_id is None}
            assert local <= {study["data"]["name"], *study["data"].get("also", [])}, (name, scale)
            assert not named & set(KNOWN_SETS), (name, scale)  # which domains.py alone knows by these names


def reproduce_tiny(claims: str, output: str) -> None:
    """In a process of its own."""
    os.setpgid(0, 0)
    sys.path.insert(0, str(EVIDENCE))
    import reproduce

    reproduce.main(["1", "--claims_dir", claims, "--output_dir", output])


@pytest.mark.slow
def test_a_run_killed_in_mid_cell_goes_on_to_the_results_of_an_uninterrupted_one(tmp_path, fork_server, capsys):
    own_claims(tmp_path / "claims")
    process = fork_server.Process(target=reproduce_tiny, args=(str(tmp_path / "claims"), str(tmp_path / "killed")))
    process.start()
    runs = tmp_path / "killed" / "quick" / "dimensions" / "runs"
    while not (runs / "simclr_2-s0").exists():
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (runs.parent / "cells" / "simclr_2-s0.json").exists()
    results = []
    for name in ("killed", "whole"):
        given = ["--claims_dir", str(tmp_path / "claims"), "--output_dir", str(tmp_path / name)]
        assert reproduce.main(["fewer_dimensions", *given]) == 0
        results.append(json.loads((tmp_path / name / "quick" / "dimensions.json").read_text()))
    rows = [result["metrics"]["cells"] for result in results]
    for arm in rows[0]:
        assert rows[0][arm]["seeds"] == [0, 1, 2, 3, 4]
        assert rows[0][arm]["knn"] == rows[1][arm]["knn"] and rows[0][arm]["curve"] == rows[1][arm]["curve"]
        assert len(set(rows[0][arm]["knn"])) > 1  # the seeds reach the runs
    assert results[0]["fingerprint"] == results[1]["fingerprint"]
    assert "fewer_dimensions: " in capsys.readouterr().out
    # Of another machine's file the whole seeds stand, and the others are run again.
    moved = tmp_path / "moved" / "quick"
    moved.mkdir(parents=True)
    for arm, row in rows[1].items():
        kept = 3 if arm == "simclr_2" else 2
        for name in ("seeds", "knn", "cpu_seconds", "curve"):
            row[name] = row[name][:kept]
    (moved / "dimensions.json").write_text(json.dumps(results[1]))
    given = ["--claims_dir", str(tmp_path / "claims"), "--output_dir", str(tmp_path / "moved")]
    assert reproduce.main(["fewer_dimensions", *given]) == 0
    found = json.loads((moved / "dimensions.json").read_text())
    assert [part["seeds"] for part in found["before"]] == [[0, 1]] and found["fingerprint"] == results[0]["fingerprint"]
    assert {arm: row["knn"] for arm, row in found["metrics"]["cells"].items()} == {
        arm: row["knn"] for arm, row in rows[0].items()
    }
    assert sorted(path.name for path in (moved / "dimensions" / "runs").iterdir()) == [
        f"{arm}-s{seed}" for arm in ("simclr_2", "t_simclr_2") for seed in (2, 3, 4)
    ]


@pytest.mark.extended
def test_arms_share_a_generator_and_are_measured_with_the_same_noise(tmp_path):
    folder = tmp_path / "claims"
    (folder / "studies").mkdir(parents=True)
    study = yaml.safe_load((EVIDENCE / "claims" / "studies" / "one_step.yaml").read_text())
    data = {"name": "digits", "image_size": 16, "from": "scikit-learn"}
    tiny = {
        "minutes": 1,
        "train": 1000,
        "validation": 50,
        "test": 300,
        "generated": 40,
        "judge_epochs": 2,
        "data": data,
    }
    steps = {"stage_1_steps": 4, "stage_2_steps": 4, "mlp_steps": 3, "drift_dit_steps": 3, "dit_steps": 3}
    more = {
        "mlp": "--architecture mlp --num_layers 1 --width 32",
        "dit": "--num_layers 1 --width 16 --learning_rate 0.05 --ema_decay 0 --warmup_steps 0",
    }
    study["scales"] = {"quick": tiny | steps | more}
    arms = ("one_step", "dit_25", "dit_1", "dit_solver_8")
    study["arms"] = {name: study["arms"][name] for name in arms}
    del study["shared"]["joint"]
    (folder / "studies" / "one_step.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    claim = yaml.safe_load((EVIDENCE / "claims" / "one_step.yaml").read_text())
    claim["comparisons"] = [claim["comparisons"][0], claim["comparisons"][2]]
    (folder / "one_step.yaml").write_text(yaml.safe_dump(claim, sort_keys=False))
    stated = reproduce.statement("one_step", "quick", None, folder)
    done = []
    places = claim_cells.ready(stated["study"], tmp_path / "out")
    for cell in claim_cells.run_study(stated, tmp_path / "out", places):
        done.append(cell.name)
        if cell.name == "dit_solver_8-s0":
            break
    assert done == [f"{arm}-s0" for arm in arms]
    runs = tmp_path / "out" / "runs"
    assert (runs / "dit_25-s0" / "generator").is_dir() and not (runs / "dit_1-s0" / "generator").exists()
    cells = claim_cells.read_cells(stated["study"], 5, tmp_path / "out")
    assert cells["dit_1"][0]["curve"] == cells["dit_25"][0]["curve"]
    found = {arm: seeds[0]["metrics"] for arm, seeds in cells.items()}
    assert found["dit_1"]["frechet_distance"] != found["dit_25"]["frechet_distance"]
    measured = json.loads((runs / "one_step-s0" / "measured.json").read_text())
    assert measured["samples"] == {"generated": 40, "held_out": 300, "train": 1000}
    judge = json.loads((tmp_path / "out" / "shared" / "judge" / "judge.json").read_text())
    assert judge["classes"] == 10 and judge["held_out_accuracy"] > 70
    args = one_step.parser().parse_args(
        [str(runs / "dit_25-s0" / "generator"), "--judge", str(tmp_path / "out" / "shared" / "judge"),
         "--dataset", str(tmp_path / "out" / "data" / "measured"), "--output", str(tmp_path / "again.json")]
    )  # fmt: skip
    images, _ = one_step.draw(one_step.load_pipeline(args.pipeline, args), torch.arange(30) % 10, args)
    pictures = load_pictures(args.dataset, 16, None)
    real = pictures["evaluation"]
    trained_judge = judge_network.load_judge(args.judge)
    about = one_step.judged(trained_judge, images, torch.arange(30) % 10, real.pixel_values / 2 + 0.5, real.labels)
    again = one_step.judged(
        trained_judge, real.pixel_values / 2 + 0.5, real.labels, real.pixel_values / 2 + 0.5, real.labels
    )
    pipeline = one_step.load_pipeline(args.pipeline, args)
    reconstructed = (pipeline.vae(real.pixel_values).pixel_values / 2 + 0.5).clamp(0, 1).detach()
    beside = one_step.beside_reconstructions(trained_judge, pipeline.vae, reconstructed, real.pixel_values / 2 + 0.5)
    assert beside["frechet_distance_to_reconstructions"] == pytest.approx(0, abs=1e-4)
    assert measured["frechet_distance_of_reconstructions"] == pytest.approx(
        beside["frechet_distance_of_reconstructions"], rel=1e-3
    )
    assert again["frechet_distance"] == pytest.approx(0, abs=1e-4) and again["precision"] == again["recall"] == 1
    assert again["diversity"] == pytest.approx(1) and about["frechet_distance"] > 0.1


def test_a_token_model_is_measured_by_its_own_pipeline(tmp_path):
    make_tokens().save_pretrained(tmp_path)
    flags = ["--judge", "", "--dataset", "", "--output", ""]
    args = one_step.parser().parse_args([str(tmp_path), *flags])
    pipeline = one_step.load_pipeline(args.pipeline, args)
    assert one_step.network_of(pipeline) is pipeline.language_model
    ids = torch.tensor([2, 0, 1])
    images, _ = one_step.draw(pipeline, ids, args)
    seeds = [keyed_random.derive_seed(0, "one step", number) for number in range(3)]
    torch.testing.assert_close(images, make_tokens()([2, 0, 1], generator=seeds, output_type="pt").images)
    wrong = one_step.parser().parse_args([str(tmp_path), *flags, "--num_inference_steps", "4"])
    with pytest.raises(ValueError, match="--num_inference_steps and --dpm_solver are of a VQDiTPipeline"):
        one_step.load_pipeline(wrong.pipeline, wrong)


def test_an_arm_without_a_run_reads_what_others_of_its_seed_have_found(tmp_path):
    study = {
        "arms": {
            "trained": {"flags": "", "with": {"file": "own.json"}},
            "measure": {"flags": "", "needs": ["trained"], "with": {"key": "score"}},
        },
        "steps": [{"run": "no such program", "arms": ["neither"], "flags": ""}],
        "metrics": {
            "first": {"arms": ["trained"], "file": "{file}", "at": ["values", 0]},
            "second": {"arms": ["trained"], "where": {"trained": {"file": "own.json", "at": ["values", 1]}}},
            "both": {"arms": ["trained"], "mean_of": ["first", "second"]},
            "tau": {"arms": ["measure"], "file": "{cell}/../trained-s{seed}/own.json", "at": ["{key}"]},
        },
        "curve": {"arms": ["trained"], "file": "own.json", "at": ["curve"]},
        "curves": {"dit": {"arms": ["trained"], "file": "own.json", "at": ["losses"], "metrics": ["first"]}},
        "numbers": {},
        "data": {},
    }
    cells = {arm: claim_cells.Cell(arm, 3) for arm in study["arms"]}
    assert claim_cells.unfinished(study, cells["measure"], tmp_path) == ["trained-s3"]
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "trained-s3.json").write_text("{}")
    assert claim_cells.unfinished(study, cells["measure"], tmp_path) == []
    own = tmp_path / "runs" / "trained-s3"
    own.mkdir(parents=True)
    (own / "own.json").write_text(
        json.dumps({"values": [1.0, 4.0], "score": 0.5, "curve": [[0, 1.0]], "losses": [[5, 2.0]]})
    )
    found = {arm: claim_cells.run_cell(study, cell, -1, {}, tmp_path) for arm, cell in cells.items()}
    assert found["trained"]["metrics"] == {"first": 1.0, "second": 4.0, "both": 2.5}
    assert found["trained"]["curve"] == [[0, 1.0]] and found["trained"]["curves"] == {"dit": [[5, 2.0]]}
    assert claim_cells._columns([found["trained"] | {"cpu_seconds": 1.0}])["curves"] == {"dit": [[[5, 2.0]]]}
    assert found["measure"]["metrics"] == {"tau": 0.5} and "curve" not in found["measure"]
    assert not found["measure"]["curves"]
    assert not (tmp_path / "runs" / "measure-s3").exists()


def test_steps_of_a_grid_run_in_its_cells_alone_and_those_that_read_test_images_never_do(tmp_path, monkeypatch):
    study = claim_statements.read_study("encoders", "cpu")
    ran = []
    monkeypatch.setattr(claim_cells, "run_step", lambda step, fill, folder, name=None: ran.append(step))
    monkeypatch.setattr(claim_cells, "read_at", lambda *_: 1.0)
    claim_cells.run_cell(study, claim_cells.Cell("moco", 1000, 2), 2, {"fit": "f", "measured": "m"}, tmp_path)
    assert [step["run"] for step in ran] == ["contrastive", "evaluate"] and "{fit}" in ran[1]["flags"]
    ran.clear()
    claim_cells.run_cell(study, claim_cells.Cell("moco", 0), 2, {"fit": "f", "measured": "m"}, tmp_path)
    assert [step["run"] for step in ran] == ["contrastive", *["evaluate"] * 5, "zood"]
    assert not any("{fit}" in step["flags"] for step in ran[1:])


def test_gans_are_tuned_and_watched_beside_validation_images_and_measured_on_test_images_in_the_end(
    tmp_path, monkeypatch, capsys
):
    ran = []
    monkeypatch.setattr(claim_cells, "run_step", lambda step, fill, *_: ran.append((step, fill)))
    monkeypatch.setattr(claim_cells, "read_at", lambda *_: 1.0)
    for scale in ("cpu", "gpu", "paper"):
        study = claim_statements.read_study("gan", scale)
        rates = [study["numbers"][f"rate_{name}"] for name in ("low", "middle", "high")]
        for arm, about in study["arms"].items():
            for cell, point in ((claim_cells.Cell(arm, 1000, 2), 2), (claim_cells.Cell(arm, 0), 1)):
                ran.clear()
                claim_cells.run_cell(study, cell, point, {"fit": "FIT", "measured": "TEST", "shared": "s"}, tmp_path)
                commands = [f"{step['run']} {step['flags'].format_map(fill)}" for step, fill in ran]
                assert [command.split()[0] for command in commands] == ["dae_gan", "evaluate"][: 1 + (cell.seed == 0)]
                assert "--dataset FIT " in commands[0] and "TEST" not in commands[0]
                assert f"--learning_rate {rates[point]} " in commands[0]
                assert cell.seed or "--dataset TEST " in commands[1] and "FIT" not in commands[1]
            steps = [study["numbers"][key] for what, key in about["budget"].items() if what == "generator steps"]
            assert steps[0] >= 10 * study["numbers"]["validation_steps"]  # a curve of so many points
    assert reproduce.main(["5", "--scale", "cpu", "--dry_run", "--output_dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("  step: ") == 2 and "{measured}" not in printed.partition("  step: evaluate")[0]


@pytest.mark.extended
def test_a_gan_of_a_claim_has_the_curve_the_tuning_and_the_distance_of_its_own_runs(tmp_path):
    study = claim_statements.read_study("gan", "cpu")
    study["data"] |= {"name": "digits", "image_size": 16, "from": "scikit-learn"}
    study["numbers"] |= {"train": 200, "validation": 100, "test": 150, "generated": 100, "encoder_epochs": 1}
    study["numbers"] |= {"channels": "[8, 8, 8, 8]", "width": 8, "latent_dim": 8, "validated": 50}
    study["numbers"] |= {"stage_1_steps": 2, "stage_2_steps": 5, "both": 7, "validation_steps": 1}
    study["arms"] = {"dae": study["arms"]["dae"]}
    study["shared"]["extractor"]["flags"] = study["shared"]["extractor"]["flags"].replace("256", "64")
    done = []
    stated = reproduce.statement("gan", "cpu", None, claim_statements.CLAIMS) | {"study": study}
    places = claim_cells.ready(study, tmp_path)
    for cell in claim_cells.run_study(stated, tmp_path, places):
        done.append(cell.name)
        if cell.point is None:
            break
    assert done == ["tune-dae-0", "tune-dae-1", "tune-dae-2", "dae-s0"]
    cells = {name: json.loads((tmp_path / "cells" / f"{name}.json").read_text()) for name in done}
    results = {name: json.loads((tmp_path / "runs" / name / "gan/results.json").read_text()) for name in done}
    for name in done[:3]:
        assert cells[name]["tuning"] == results[name]["validations"][-1]["fid_extractor"]
        assert not (tmp_path / "runs" / name / "measured.json").exists()
    assert [step for step, _ in results["dae-s0"]["validation_fid"]] == [1, 2, 3, 4, 5]
    assert cells["dae-s0"]["curve"] == results["dae-s0"]["validation_fid"]
    [measured] = json.loads((tmp_path / "runs/dae-s0/measured.json").read_text())["evaluations"]
    assert cells["dae-s0"]["metrics"] == {"fid": measured["metrics"]["fid_extractor"]}
    assert measured["samples"] == {"generated": 100, "evaluation": 150}
    assert results["dae-s0"]["samples"] == {"train": 200, "evaluation": 100, "generated": 100}
    best = min(range(3), key=lambda point: cells[f"tune-dae-{point}"]["tuning"])
    assert cells["dae-s0"]["flags"].endswith(study["arms"]["dae"]["grid"][best])


def test_arms_that_a_claim_compares_have_as_many_grid_points(tmp_path):
    for study in (path.stem for path in (EVIDENCE / "claims" / "studies").glob("*.yaml")):
        for scale in reproduce_command.SCALES:
            claim_statements.claims_of(study, scale)
    shutil.copytree(EVIDENCE / "claims", tmp_path / "claims")
    path = tmp_path / "claims" / "studies" / "dimensions.yaml"
    path.write_text(path.read_text().replace(', "--temperature 0.5"]', "]", 1))
    with pytest.raises(ValueError, match=r"'simclr_2'.* grids have \[3, 2\] points, and need as many"):
        claim_statements.claims_of("dimensions", "quick", tmp_path / "claims")


def test_an_arm_may_not_be_without_a_script_that_no_step_runs(tmp_path):
    shutil.copytree(EVIDENCE / "claims", tmp_path / "claims")
    path = tmp_path / "claims" / "studies" / "dimensions.yaml"
    path.write_text(path.read_text().replace("without: [contrastive,", "without: [contrastiv,"))
    with pytest.raises(ValueError, match=r"parametric_tsne_2 is without \['contrastiv'\], which no step runs"):
        claim_statements.read_study("dimensions", "cpu", tmp_path / "claims")


def test_a_claim_may_not_compare_an_arm_by_a_metric_that_it_has_not(tmp_path):
    shutil.copytree(EVIDENCE / "claims", tmp_path / "claims")
    path = tmp_path / "claims" / "transfer.yaml"
    path.write_text(path.read_text().replace("second: moco,", "second: width,"))
    with pytest.raises(ValueError, match="transfer is of"):
        claim_statements.claims_of("encoders", "quick", tmp_path / "claims")
