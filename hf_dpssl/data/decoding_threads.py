"""Pictures decoded by several threads of a process, in their order: Pillow decodes and resizes beside other threads."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from .shared_images import local_process

Item = TypeVar("Item")
Result = TypeVar("Result")
_AT_A_TIME = 4  # items of one task: to hand over a task costs some 20 us, to decode a small picture 100
_MOST = 16  # threads: opening pictures and reading rows is done by one at a time


def in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int | None = None
) -> Iterator[Result]:
    """function(item) of each, in their order, computed ahead by threads.

    Items are taken by the caller's thread, and what waits for it is 4 (threads + 3) results at most.

    Args:
        function: of one item, without a memory; what it raises comes out, at most 3 items early.
        items: read as they are needed.
        threads: default: as many as `usable_cores`; with one the caller's does all.
    """
    threads = usable_cores() if threads is None else threads
    if threads == 1:
        yield from map(function, items)
        return
    waiting: deque = deque()
    items = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        try:
            while part := list(itertools.islice(items, _AT_A_TIME)):
                waiting.append(pool.submit(_results, function, part))
                if len(waiting) > threads + 2:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:  # an error, or nobody asks for more
            for task in waiting:
                task.cancel()


def _results(function: Callable[[Item], Result], items: list[Item]) -> list[Result]:
    return [function(item) for item in items]


def usable_cores() -> int:
    """Cores for each process of a launch on this machine, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(_MOST, cores // local_process()[1]))
