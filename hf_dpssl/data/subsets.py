"""Random subsets of rows: seeded, of exactly the asked-for size, of each class its share; and of streams.

A constant stride would alias with ordered data (ten interleaved classes, every tenth row: one class), and the first
rows of a set that is sorted by class are of few classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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


def reservoir(rows: Iterable[dict], limit: int, *, seed: int = 0) -> list[dict]:
    """`limit` of the rows of a stream, each as likely as any other, in the stream's order; all where it has no more.

    The whole stream is read once, and `limit` rows are held (algorithm R: Vitter, "Random sampling with a reservoir",
    1985).
    """
    random = np.random.default_rng(derive_seed(seed, "reservoir"))
    kept: list[tuple[int, dict]] = []
    for number, row in enumerate(rows):
        if number < limit:
            kept.append((number, row))
        elif (place := int(random.integers(number + 1))) < limit:
            kept[place] = (number, row)
    return [row for _, row in sorted(kept, key=lambda pair: pair[0])]
