"""More processes on this machine for work that divides by itself, each with its share of the threads."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
