"""Work divided among processes of this machine: shares, threads, errors and deaths."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from hf_dpssl.runs.local_processes import divide_work, stop_without_parent


@dataclass
class Job:
    """What a share of the work shall do."""

    folder: str
    fails: int | None = None


def count(job: Job, rank: int, world: int, start_others) -> None:
    """Note which share this is, and the threads it has; process `fails` ends with an error."""
    start_others()
    if rank == job.fails:
        raise OSError(28, "No space left on device")
    Path(job.folder, f"{rank}.json").write_text(json.dumps([world, torch.get_num_threads(), os.getpid()]))


def wait_for_ever(job: Job, rank: int, world: int, start_others) -> None:
    """Work that ends only when somebody ends it."""
    start_others()
    Path(job.folder, f"{rank}.pid").write_text(str(os.getpid()))
    while True:
        time.sleep(0.05)
        stop_without_parent()


@pytest.mark.extended
def test_every_process_has_its_share_and_of_the_threads_and_an_error_of_one_is_named(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        divide_work(count, Job(str(tmp_path)), num_processes=2, overwrite=False)
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(threads)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first[:2] == second[:2] == [2, 2] and first[2] == os.getpid() != second[2]
    with pytest.raises(RuntimeError, match=r"process 1 of 2: OSError: \[Errno 28\] No space left on device"):
        divide_work(count, Job(str(tmp_path), fails=1), num_processes=2, overwrite=False)
    with pytest.raises(OSError, match="No space left"):  # of this process: as it is
        divide_work(count, Job(str(tmp_path), fails=0), num_processes=2, overwrite=False)


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


@pytest.mark.extended
@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
def test_others_die_with_the_process_that_started_them_though_interrupts_are_ignored(tmp_path):
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); import test_local_processes as t; "
        "t.divide_work(t.wait_for_ever, t.Job(sys.argv[1]), num_processes=2, overwrite=False)"
    )
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": path},
        stderr=subprocess.DEVNULL,
    )
    written = tmp_path / "1.pid"
    try:
        deadline = time.monotonic() + 300
        while not (written.exists() and written.read_text()):
            assert parent.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    pid, deadline = int(written.read_text()), time.monotonic() + 60
    while is_alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)
