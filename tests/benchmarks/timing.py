"""Fair timing of two functions in one run: they alternate, and the minimum of each counts."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tqdm import tqdm


def parser(description: str, rounds: int) -> argparse.ArgumentParser:
    """--rounds and --threads, which benchmarks have in common."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=rounds, help="alternating rounds of each comparison")
    made.add_argument("--threads", type=int, default=1, help="threads of torch")
    return made


@dataclass
class Comparison:
    """Ours beside a peer's: `ratio` in the results is ours / theirs, below 1 when ours is faster.

    ours, theirs return a number; with `same_value` the two must agree to 1e-5 before they are timed.
    aim: largest ratio aimed at, None where none was set.
    """

    what: str
    peer: str
    ours: Callable[[], float]
    theirs: Callable[[], float]
    same_value: bool = False
    aim: float | None = None


def compare(comparisons: list[Comparison], rounds: int, clock: Callable[[], float] = time.perf_counter) -> list[dict]:
    """One row per comparison: what, peer, same_value, aim, ours_ms, theirs_ms, ratio; `clock` gives seconds."""
    rows = []
    for row in tqdm(comparisons, desc="comparisons"):
        values = row.ours(), row.theirs()  # also the warm-up
        if row.same_value:
            torch.testing.assert_close(*values, rtol=1e-5, atol=1e-5)
        seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
        for _ in range(rounds):
            for name, call in (("ours", row.ours), ("theirs", row.theirs)):
                start = clock()
                call()
                seconds[name].append(clock() - start)
        best = {f"{name}_ms": round(1e3 * min(values), 3) for name, values in seconds.items()}
        found = {"what": row.what, "peer": row.peer, "same_value": row.same_value, "aim": row.aim} | best
        rows.append(found | {"ratio": round(best["ours_ms"] / best["theirs_ms"], 3)})
        aim = f"(aim {row.aim})" if row.aim else ""
        tqdm.write(f"{row.what:<44} {best['ours_ms']:>9.2f} ms  {rows[-1]['ratio']:>6.3f} of {row.peer} {aim}")
    return rows
