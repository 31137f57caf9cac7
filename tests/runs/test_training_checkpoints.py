"""Files, folders and checkpoints that appear whole or not at all."""

import os
import re
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

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


def test_killed_process_loses_no_folder_and_leaves_nothing_for_long(tmp_path):
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    leftover = tmp_path / f".model.{socket.gethostname()}-{gone.stdout.strip()}.tmp"
    other = tmp_path / f".model.{socket.gethostname()}-{os.getpid()}0.of-another"
    for folder in (leftover, other, tmp_path / ".model.old"):
        folder.mkdir()
        (folder / "weights").write_text("before")
    with pytest.raises(KeyError), atomic_folder(tmp_path / "model"):
        raise KeyError  # the folder that a kill between the renames had moved away is back before anything else
    assert (tmp_path / "model" / "weights").read_text() == "before"
    with atomic_folder(tmp_path / "model") as folder:
        (folder / "weights").write_text("new")
    assert (tmp_path / "model" / "weights").read_text() == "new"
    assert names(tmp_path) == sorted([other.name, "model"])


def test_failed_rename_leaves_the_old_folder(tmp_path, monkeypatch):
    target = tmp_path / "model"
    with atomic_folder(target) as folder:
        (folder / "weights").write_text("old")
    rename = os.rename

    def fail_second(source, goal):
        if str(source).endswith(".tmp"):
            raise PermissionError(13, "no")
        rename(source, goal)

    monkeypatch.setattr(os, "rename", fail_second)
    with pytest.raises(PermissionError), atomic_folder(target) as folder:
        (folder / "weights").write_text("new")
    assert (target / "weights").read_text() == "old" and names(tmp_path) == ["model"]


def test_files_are_for_whom_umask_says(tmp_path):
    before = os.umask(0o022)
    try:
        with atomic_folder(tmp_path / "model") as folder:
            save_file({"weight": torch.zeros(3)}, folder / "model.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model/model.safetensors").stat().st_mode) == 0o644


def test_full_disk_is_named_with_the_checkpoint_that_is_whole(tmp_path):
    """On a real full file system, where this process may make one."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a small file system")
    try:
        checkpoints = CheckpointFolder(small / "run")
        checkpoints.save(1, {"weight": torch.zeros(200_000)}, {})
        with pytest.raises(OSError, match="disk is full at step 2; the last whole checkpoint is .*step-00000001"):
            checkpoints.save(2, {"weight": torch.zeros(900_000)}, {})
        assert checkpoints.steps() == [1]
        with pytest.raises(OSError, match="disk is full"), atomic_folder(small / "model") as folder:
            save_file({"weight": torch.zeros(900_000)}, folder / "model.safetensors")
        with pytest.raises(OSError, match="disk is full"), atomic_file(small / "file") as file:
            file.write("x" * 4_000_000)
        assert names(small) == ["run"]
    finally:
        subprocess.run(["umount", str(small)], check=True)


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


def test_a_checkpoint_is_read_from_its_file_and_not_into_memory(tmp_path):
    """Of a state of 64 MiB, which every process of a machine loads."""

    def held() -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])

    checkpoints = CheckpointFolder(tmp_path)
    checkpoints.save(1, {"model": {"weight": torch.ones(2**24)}}, {})
    before = held()
    state, _ = checkpoints.load("latest")
    total = state["model"]["weight"].double().sum()  # reads all of it
    assert held() - before < 2**23 and total == 2**24
