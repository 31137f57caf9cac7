"""More processes on this machine for work that divides by itself, each with its share of the threads."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


@contextmanager
def more_processes(work: Callable[..., None], arguments: tuple, count: int) -> Iterator[Callable[[], None]]:
    """Gives a function that starts the other count - 1 processes; waits for them, or ends them with an error here.

    Args:
        work: of a module, called as work(*arguments, rank, count) in process `rank`; this one is process 0.
        arguments: what can be pickled.
        count: processes in all.

    Raises:
        RuntimeError: a process started here ended with an error, which it has printed.
    """
    context, threads = multiprocessing.get_context("spawn"), torch.get_num_threads()
    share = max(1, threads // count)
    others = [context.Process(target=_run, args=(work, arguments, rank, count, share)) for rank in range(1, count)]
    torch.set_num_threads(share)
    try:
        yield lambda: [process.start() for process in others]
        for process in others:
            if process.pid is not None:
                process.join()
        failed = {f"process {i}": process.exitcode for i, process in enumerate(others, 1) if process.exitcode}
        if failed:
            raise RuntimeError(f"exit codes of processes that ended with an error: {failed}. Run the command again.")
    finally:
        torch.set_num_threads(threads)
        for process in others:
            if process.is_alive():
                process.terminate()


def divide_work(share: Callable[..., None], job: Any, *, num_processes: int, overwrite: bool) -> None:
    """Run share(job, rank, world, start_others) in every process: those of a launcher, or `num_processes` started here.

    Args:
        share: of a module; does part `rank` of `world` and calls start_others() once what can be refused is checked.
        job: what can be pickled, with its `folder`.
        num_processes: to use on this machine; 1 under a launcher.
        overwrite: remove what an earlier job left in the folder.

    Raises:
        ValueError: numbers that do not go together.
        RuntimeError: a process started here ended with an error.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if num_processes < 1 or (world > 1 and (num_processes not in (1, world) or overwrite)):
        raise ValueError(
            f"num_processes={num_processes} and overwrite={overwrite} do not go with {world} launched process(es): "
            "give at least 1, and under a launcher the launcher's number and an empty folder."
        )
    if overwrite and Path(job.folder, "plan.json").exists():
        shutil.rmtree(job.folder)
    with more_processes(_other_share, (share, job), 1 if world > 1 else num_processes) as start:
        share(job, rank, max(world, num_processes), start)


def _other_share(share: Callable[..., None], job: Any, rank: int, world: int) -> None:
    share(job, rank, world, lambda: None)


def stop_without_parent() -> None:
    """End a process that `more_processes` has started when the one that started it is gone."""
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        raise SystemExit("the process that started this one is gone")


def _run(work: Callable[..., None], arguments: tuple, rank: int, count: int, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        work(*arguments, rank, count)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"process {rank}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
