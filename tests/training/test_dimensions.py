"""The dimension study: choice on validation only, paired differences and verdicts, one process per run."""

import json
import multiprocessing
import sys

import pytest
import torch
from launches import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "training" / "evidence"))
import dimensions
import dimensions_report


def finished(run: dimensions.Run, validation: float, test: float = 0.0, gain: float = 0.0) -> dict:
    """What a run of these 20-NN accuracies writes; its cosine accuracies are 1 point lower on validation."""
    accuracies = {
        name: {"euclidean_20nn": value, "euclidean_1nn": value, "cosine_20nn": value - 1, "cosine_1nn": value - 1}
        for name, value in {"validation": validation, "test": test}.items()
    }
    middle = {f"{metric}_20nn": accuracies["validation"][f"{metric}_20nn"] - gain for metric in ("euclidean", "cosine")}
    history = [{"loss": 1.0, "t": 0.5, "perplexity": 102.3, "spread": 1.0} | middle]
    return dimensions.asdict(run) | accuracies | {"history": history, "cpu_seconds": 1.0}


def final(arm: str, tests: list[float]) -> list[dict]:
    runs = [dimensions.Run("final", arm, 2, 0.5, 0.01, 15, seed) for seed in range(len(tests))]
    return [finished(run, 50.0, value) for run, value in zip(runs, tests, strict=True)]


def write(folder, run, report) -> None:
    (folder / run.file).write_text(json.dumps(report))


def test_best_grid_point_is_that_of_validation_and_waits_for_the_whole_grid(tmp_path):
    points = dimensions.grid("t_joint", 8)
    for i, point in enumerate(points[:-1]):
        write(tmp_path, point, finished(point, validation=50.0 - abs(i - 2), test=i))
    assert dimensions.best("t_joint", 8, tmp_path) is None
    write(tmp_path, points[-1], finished(points[-1], validation=10.0, test=99.0))
    assert dimensions.best("t_joint", 8, tmp_path) == points[2]


def test_every_arm_has_as_many_grid_points():
    assert {len(dimensions.grid(arm, 2)) for arm in dimensions.ARMS} == {6}


def test_final_runs_take_the_tuned_point_and_seeds_are_paired(tmp_path):
    for point in dimensions.grid("simclr", 8):
        write(tmp_path, point, finished(point, validation=point.temperature))
    runs = list(dimensions.planned("final", tmp_path, [("simclr", 8), ("t_joint", 8)]))
    assert [run.seed for run in runs] == [0, 1, 2] and {run.temperature for run in runs} == {0.5}
    assert {run.temperature for run in dimensions.planned("auto", tmp_path, [("simclr", 8)])} == {"auto"}


def test_metric_is_chosen_on_validation_and_convergence_is_that_of_validation():
    reports = final("simclr", [40.0, 44.0])
    for report in reports:
        report["test"]["cosine_20nn"] = 99.0
    row = dimensions_report.row(reports)
    assert row["metric"] == "euclidean" and row["mean_20nn"] == 42 and row["converged"] and row["share"] == [0.1, 0.1]
    run = dimensions.Run("final", "simclr", 2, 0.5, 0.01, 15, 0)
    assert not dimensions_report.row([finished(run, 50.0, 40.0, gain=0.6)])["converged"]


def test_a_run_is_done_by_one_process_and_free_again_when_it_dies(tmp_path):
    path = tmp_path / "run.json"
    context = multiprocessing.get_context("fork")
    with dimensions.claimed(path) as first:
        results = context.SimpleQueue()
        child = context.Process(target=lambda: results.put(dimensions.claimed(path).__enter__()))
        child.start(), child.join()
        assert first and results.get() is False
    with dimensions.claimed(path) as again:
        assert again
        path.write_text("{}")
    with dimensions.claimed(path) as done:
        assert not done


@pytest.mark.extended
def test_training_is_a_function_of_its_seed_and_reads_test_images_only_in_final_runs(monkeypatch):
    monkeypatch.setattr(dimensions, "BATCH_SIZE", 32)
    generator = torch.Generator().manual_seed(0)
    splits = {
        name: (torch.randint(0, 256, (64, 1, 28, 28), generator=generator).byte(), torch.arange(64) % 10)
        for name in ("train", "validation", "test")
    }
    run = dimensions.Run("final", "t_anchor", 2, "auto", 1e-2, 2, 0)
    first, second = dimensions.train(run, splits), dimensions.train(run, splits)
    assert first["history"] == second["history"] and first["test"] == second["test"]
    assert dimensions.train(dimensions.replace(run, seed=1), splits)["history"] != first["history"]
    del splits["test"]
    assert "test" not in dimensions.train(dimensions.replace(run, stage="tune", temperature=0.5), splits)
