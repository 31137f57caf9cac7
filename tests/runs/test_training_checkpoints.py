"""Files, folders and checkpoints that appear whole or not at all."""

import os

import pytest
import torch

from hf_dpssl.runs.atomic_files import atomic_file, atomic_folder
from hf_dpssl.runs.training_checkpoints import CheckpointFolder


def names(folder) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_file_appears_only_when_the_block_ends_well(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with atomic_file(path) as file:
        file.write("new")
        assert not path.exists()
    assert path.read_text() == "new"
    with pytest.raises(KeyError), atomic_file(path) as file:
        file.write("half")
        raise KeyError
    assert path.read_text() == "new" and names(path.parent) == ["file.txt"]


def test_folder_replaces_the_old_one_whole_or_not_at_all(tmp_path):
    target = tmp_path / "model"
    for content in ("one", "two"):
        with atomic_folder(target) as folder:
            (folder / "weights").write_text(content)
    assert (target / "weights").read_text() == "two"
    with pytest.raises(RuntimeError), atomic_folder(target) as folder:
        (folder / "weights").write_text("three")
        raise RuntimeError
    assert (target / "weights").read_text() == "two" and names(tmp_path) == ["model"]


def test_folder_ignores_what_a_killed_process_left(tmp_path):
    leftover = tmp_path / ".model.tmp"
    leftover.mkdir()
    (leftover / "stale").write_text("x")
    with atomic_folder(tmp_path / "model") as folder:
        (folder / "weights").write_text("new")
    assert names(tmp_path / "model") == ["weights"]


def test_checkpoints_round_trip_rotate_and_latest_is_the_newest(tmp_path):
    checkpoints = CheckpointFolder(tmp_path / "run", keep=2)
    assert checkpoints.load("latest") is None
    for step in (5, 10, 100):
        checkpoints.save(step, {"model": {"w": torch.full((3,), float(step))}, "list": [1, "a"]}, {"step": step})
    assert checkpoints.steps() == [10, 100]
    state, meta = checkpoints.load("latest")
    assert meta == {"step": 100} and torch.equal(state["model"]["w"], torch.full((3,), 100.0))
    _, older = checkpoints.load(str(tmp_path / "run" / "step-00000010"))
    assert older == {"step": 10}


def test_half_written_checkpoint_is_not_seen(tmp_path):
    checkpoints = CheckpointFolder(tmp_path)
    checkpoints.save(1, {}, {"step": 1})
    (tmp_path / ".step-00000002.tmp").mkdir()
    assert checkpoints.steps() == [1]
    with pytest.raises(FileNotFoundError, match="is no checkpoint"):
        checkpoints.load(str(tmp_path / ".step-00000002.tmp"))


def test_old_checkpoint_survives_until_the_new_one_is_in_place(tmp_path, monkeypatch):
    checkpoints = CheckpointFolder(tmp_path, keep=1)
    checkpoints.save(1, {}, {"step": 1})
    monkeypatch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        checkpoints.save(2, {}, {"step": 2})
    monkeypatch.undo()
    assert checkpoints.steps() == [1]


def test_state_is_read_without_running_foreign_code(tmp_path):
    class Foreign:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    checkpoints = CheckpointFolder(tmp_path / "run")
    checkpoints.save(1, {"evil": Foreign()}, {"step": 1})
    with pytest.raises(Exception, match="[Ww]eights"):
        checkpoints.load("latest")
    assert not (tmp_path / "owned").exists()
