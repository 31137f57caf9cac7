"""Trackers: all runs lie in one project, and a run that goes on does so in its own place."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hf_dpssl.runs.trackers import PROJECT

TINY = ["--dataset", "digits", "--model_args", '{"channels": [8, 8, 16, 16]}', "--evaluation_images", 16]
TINY += ["--batch_size", 8, "--logging_steps", 1, "--checkpointing_steps", 1, "--lr_scheduler", "constant"]


def train(run_script, folder, tracker: str, steps: int, *more) -> str:
    run_script("contrastive", [*TINY, "--output_dir", folder, "--log_with", tracker, "--max_train_steps", steps, *more])
    return json.loads((folder / "logs/name-of-encoder.json").read_text())["name"]


@pytest.mark.extended
def test_resumed_run_goes_on_in_its_place_of_the_one_project_and_a_fresh_one_begins_another(run_script, tmp_path):
    resume = ["--resume_from_checkpoint", "latest"]
    first = train(run_script, tmp_path, "tensorboard", 1)
    assert first.startswith(tmp_path.name) and train(run_script, tmp_path, "tensorboard", 2, *resume) == first
    events = EventAccumulator(str(tmp_path / "logs" / PROJECT)).Reload()
    assert [event.step for event in events.Scalars("encoder/loss")] == [1, 2]
    with pytest.raises(FileExistsError):
        train(run_script, tmp_path, "tensorboard", 1)
    assert train(run_script, tmp_path, "tensorboard", 2, *resume) == first
    assert train(run_script, tmp_path, "tensorboard", 1, "--overwrite") != first


@pytest.mark.extended
def test_trackio_has_one_project_and_one_run_of_a_resumed_one(run_script, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    name = train(run_script, tmp_path / "run", "trackio", 1)
    train(run_script, tmp_path / "run", "trackio", 2, "--resume_from_checkpoint", "latest")
    runs = trackio.Api().runs(PROJECT)
    assert [run.name for run in runs] == [name]
