"""The plan of claims for 15 minutes of a GPU: it fits by formula, and its trial ends in a valid page."""

import json
import sys
from types import SimpleNamespace

import pytest
import yaml
from launches import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "training" / "evidence"))
import claim_statements
import gpu_plan
import reproduce


@pytest.fixture(scope="module")
def whole() -> tuple[dict, dict[str, dict]]:
    stated = gpu_plan.read_plan()
    return stated, gpu_plan.statements(stated)


def test_every_cell_of_the_plan_ends_within_fifteen_minutes_by_its_estimated_seconds(whole):
    stated, contents = whole
    found = {name: part["estimated"] for name, part in stated["studies"].items()}
    total = sum(part["shared"] + part["cells"] for part in found.values())
    assert total <= stated["seconds"]
    assert stated["seconds"] + max(part["longest"] for part in found.values()) <= 15 * 60
    for name, content in contents.items():
        minutes = content["study"]["numbers"]["minutes"]
        assert abs(60 * minutes - found[name]["shared"] - found[name]["cells"]) < 60, name
        assert content["seeds"] == 5 and len(content["claims"]) == len(claim_statements.claims_of(name, "gpu"))


@pytest.mark.slow
def test_estimated_seconds_are_those_of_the_formula_for_every_cell_of_the_plan(whole):
    stated, contents = whole
    found = {name: gpu_plan.estimate(content) for name, content in contents.items()}
    for name, part in stated["studies"].items():
        assert part["estimated"] == pytest.approx({key: found[name][key] for key in part["estimated"]}, rel=0.1, abs=1)
    cells = found["dimensions"]
    arms = contents["dimensions"]["study"]["arms"]
    assert cells["count"] == len(arms) * (5 + 3)  # the seeds, and a grid of three points
    measured = gpu_plan.MEASURING["evaluate"] * 5 * len(arms)  # cells of grids read no test image
    trained = [cells["cells"] - measured, cells["count"] * (cells["longest"] - gpu_plan.MEASURING["evaluate"])]
    assert 0.7 * trained[1] < trained[0] <= trained[1]


def test_every_study_is_planned_or_left_out_with_the_reason(whole):
    stated, contents = whole
    studies = {path.stem for path in (claim_statements.CLAIMS / "studies").glob("*.yaml")}
    assert contents.keys() | stated["left_out"].keys() == studies and not contents.keys() & stated["left_out"].keys()
    assert all(stated["left_out"].values())


def test_seconds_of_a_step_are_those_of_operations_or_launches_whichever_last_longer(whole, monkeypatch):
    study = whole[1]["dimensions"]["study"]
    fill = study["numbers"] | study["data"] | {"fit": "cifar10", "seed": 0, "arm": "--projection_dim 2"}
    steps = fill["epochs"] * (fill["train"] // fill["batch_size"])
    for operations, launches, step in [(99e12, 10, 1.0), (1e9, 3000, 0.03)]:
        monkeypatch.setattr(
            gpu_plan, "memory_of", lambda *_, o=operations, n=launches: {"operations": o, "launches": n}
        )
        gpu_plan.script_seconds.cache_clear()
        found = gpu_plan.seconds_of_step(study["steps"][0], fill, "H100")
        assert found == pytest.approx(gpu_plan.START + steps * step, rel=0.01)  # 989 / 2 * .2 = 99 teraflops
    gpu_plan.script_seconds.cache_clear()
    assert gpu_plan.seconds_of_step(study["steps"][1], fill, "H100") == gpu_plan.MEASURING["evaluate"]


def test_a_trial_is_small_and_a_plan_with_unknown_numbers_or_without_a_gpu_is_refused(tmp_path, capsys, monkeypatch):
    for name, content in gpu_plan.statements(gpu_plan.read_plan(), 0.001).items():
        numbers, arms = content["study"]["numbers"], content["study"]["arms"]
        assert numbers["train"] == 256 and numbers["test"] == 64 and content["seeds"] == 1, name
        assert content["study"]["data"]["name"] == "digits"
        assert all(len(arm.get("grid", [""])) == 1 for arm in arms.values())
        assert max(value for key, value in numbers.items() if "steps" in key or "epochs" in key) <= 1
        assert {key: value for key, value in numbers.items() if key.endswith("channels")}
        assert not any("64" in value for key, value in numbers.items() if key.endswith("channels"))
    path = tmp_path / "plan.yaml"
    content = yaml.safe_load(gpu_plan.PLAN.read_text())
    content["studies"]["dimensions"]["numbers"]["steps"] = 3
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match="dimensions has no steps at scale gpu"):
        gpu_plan.read_plan(path)
    monkeypatch.setattr(gpu_plan.torch.cuda, "is_available", lambda: False)
    for argv, message in [([], "--size 0.001 tries on a CPU"), (["--size", "0"], r"lies in (0, 1], got 0.0")]:
        with pytest.raises(SystemExit):
            gpu_plan.main([*argv, "--output_dir", str(tmp_path / "out")])
        assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.extended
def test_a_plan_whose_time_is_over_has_whole_cells_and_a_valid_page_and_goes_on(tmp_path, monkeypatch, capsys):
    """The cells are written by a stand-in for their scripts: what is tested is when they begin."""
    import claim_cells

    contents = gpu_plan.statements(gpu_plan.read_plan(), 0.001)
    clock = iter(range(10_000))
    monkeypatch.setattr(reproduce, "time", SimpleNamespace(monotonic=lambda: next(clock)))  # other threads read time's

    def measured(study, cell, point, places, folder):
        content = {"arm": cell.arm, "seed": cell.seed, "flags": "", "cpu_seconds": 1.0}
        more = {"tuning": 1.0} if cell.point is not None else {"metrics": {"knn": 50.0}, "curve": [[0, 1.0], [1, 0.5]]}
        return content | more

    monkeypatch.setattr(claim_cells, "run_cell", measured)
    folder = tmp_path / "gpu"
    claim_cells.state(contents["dimensions"], folder / "dimensions")
    arms = contents["dimensions"]["study"]["arms"]
    for end, done in [(0, 0), (4, 3), (10_000, 2 * len(arms))]:
        reproduce.run("dimensions", contents["dimensions"], folder, end)
        assert len(list((folder / "dimensions" / "cells").glob("*.json"))) == done
        if done:
            entries = reproduce.refresh_page(folder)
            assert entries["fewer_dimensions"]["verdict"] == "undecided"
            assert (folder / "claims.md").read_text().startswith("# Claims")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:64 images for features")  # a thousandth of the images of a study
def test_the_trial_of_the_whole_plan_leaves_a_page_of_all_its_claims(tmp_path, capsys):
    assert gpu_plan.main(["--size", "0.001", "--output_dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for name in ("fewer_dimensions", "reconstruction", "code_cost", "lipschitz", "collapse"):
        assert f"{name}: undecided (" in printed and "1 of 5 seeds" in printed
    for study in ("dimensions", "autoencoders"):
        result = json.loads((tmp_path / "gpu" / f"{study}.json").read_text())
        assert all(row["seeds"] == [0] for row in result["metrics"]["cells"].values())
        assert result["stated"]["trial"] == 0.001
    gpu_plan.main(["--size", "0.001", "--output_dir", str(tmp_path)])
    assert "is finished" not in capsys.readouterr().out  # nothing is run twice
