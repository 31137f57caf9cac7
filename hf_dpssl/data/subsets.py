"""Random subsets of rows: seeded, of exactly the asked-for size, of each class its share; and of streams.

A constant stride would alias with ordered data (ten interleaved classes, every tenth row: one class), and the first
rows of a set that is sorted by class are of few classes.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import itemgetter

import numpy as np
from torch import Tensor

from .keyed_random import derive_seed, permutation


def random_rows(
    size: int, limit: int | None = None, *, labels: Tensor | Sequence[int] | None = None, seed: int = 0
) -> Sequence[int]:
    """`limit` rows of `size`, in ascending order; all of them where there are no more, or without a limit.

    Args:
        size: of the table.
        limit: rows wanted, at least 0.
        labels: class of each row, -1 for those without: each class then has its share of the rows, rounded to numbers
            that sum to `limit` (by the method of Sainte-Lague: a class of n rows has its k-th when (k - 1/2) / n of
            all are taken).
        seed: random seed; the same call gives the same rows.
    """
    if limit is None or limit >= size:
        return range(size)
    order = permutation(size, seed=seed, epoch=0).numpy()
    if labels is not None:
        order = order[_by_share(np.asarray(labels)[order])]
    return np.sort(order[:limit]).tolist()


def _by_share(labels: np.ndarray) -> np.ndarray:
    """Places of rows in an order of which every first part holds of each class its share."""
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    by_class = np.argsort(classes, kind="stable")
    rank = np.empty(len(labels))
    rank[by_class] = np.concatenate([np.arange(count) for count in counts])
    return np.argsort((rank + 0.5) / counts[classes], kind="stable")


def sample_of_parts(
    parts: Iterable[tuple[int, Iterable[dict]]],
    limit: int,
    *,
    seed: int = 0,
    gather: Callable[[object], list] = lambda own: [own],
) -> list[dict]:
    """`limit` of the rows of all parts, each as likely as any other, in the order of parts and rows; all if no more.

    Each row draws a number by its part and its place there, and those with the smallest are held. So several processes
    read a part each, exchange numbers and then the rows chosen, and find what one process would that reads everything.

    Args:
        parts: (number of the part, its rows) of what this process reads: once, `limit` rows in memory.
        limit: rows wanted.
        seed: random seed.
        gather: the objects of all processes, which all call this; by default there is one.
    """
    held = heapq.nsmallest(limit, _drawn(parts, seed), key=itemgetter(0))
    numbers = heapq.nsmallest(limit, itertools.chain(*gather([where for where, _ in held])))
    last = numbers[-1] if numbers else ()
    chosen = itertools.chain(*gather([(where[1:], row) for where, row in held if where <= last]))
    return [row for _, row in sorted(chosen, key=itemgetter(0))]


def _drawn(parts: Iterable[tuple[int, Iterable[dict]]], seed: int) -> Iterator[tuple[tuple[float, int, int], dict]]:
    """((random number, part, place), row) of each row."""
    for part, rows in parts:
        random = np.random.default_rng(derive_seed(seed, "sample", part))
        for place, row in enumerate(rows):
            yield (random.random(), part, place), row
