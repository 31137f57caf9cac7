"""More processes on this machine for work that divides by itself, each with its share of the threads."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing import ProcessContext, spawn
from torch.multiprocessing.spawn import ProcessException


def divide_work(share: Callable[..., None], job: Any, *, num_processes: int, overwrite: bool) -> None:
    """Run share(job, rank, world, start_others) in every process: those of a launcher, or `num_processes` started here.

    Args:
        share: of a module; does part `rank` of `world` and calls start_others() once what can be refused is checked.
        job: what can be pickled, with its `folder`.
        num_processes: to use on this machine; 1 under a launcher.
        overwrite: remove what an earlier job left in the folder.

    Raises:
        ValueError: numbers that do not go together.
        RuntimeError: a process started here ended with an error, which the message names; the others were ended.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if num_processes < 1 or (world > 1 and (num_processes not in (1, world) or overwrite)):
        raise ValueError(
            f"num_processes={num_processes} and overwrite={overwrite} do not go with {world} launched process(es): "
            "give at least 1, and under a launcher the launcher's number and an empty folder."
        )
    if overwrite and Path(job.folder, "plan.json").exists():
        shutil.rmtree(job.folder)
    count = 1 if world > 1 else num_processes
    threads = torch.get_num_threads()
    started: list[ProcessContext] = []

    def start_others() -> None:
        if count > 1:
            arguments = (share, job, count, max(1, threads // count))
            started.append(spawn(_other_share, arguments, nprocs=count - 1, join=False))

    torch.set_num_threads(max(1, threads // count))
    try:
        share(job, rank, max(world, num_processes), start_others)
        for others in started:
            while not others.join():
                pass
    except ProcessException as error:
        reason = str(error).strip().splitlines()[-1]
        raise RuntimeError(f"process {error.error_index + 1} of {count}: {reason} Run the command again.") from error
    finally:
        torch.set_num_threads(threads)
        for process in (process for others in started for process in others.processes):
            if process.is_alive():
                process.terminate()


def stop_without_parent() -> None:
    """End a process that `divide_work` has started when the one that started it is gone.

    torch has Linux send an interrupt then, which a command in the background of a shell script does not hear.
    """
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        raise SystemExit("the process that started this one is gone")


def _other_share(number: int, share: Callable[..., None], job: Any, world: int, threads: int) -> None:
    torch.set_num_threads(threads)
    share(job, number + 1, world, lambda: None)
