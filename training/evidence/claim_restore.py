"""A study goes on from its results file: whole seeds that were run elsewhere or earlier are taken over.

Put STUDY.json into OUTPUT_DIR/SCALE/ before the first cell. Pairs stay within one machine, since a seed is taken over
with all its arms or run again.
"""

from __future__ import annotations

from pathlib import Path

from claim_cells import TUNING_SEED, Cell, digests
from runs import alone

from hf_dpssl.runs.atomic_files import atomic_folder, write_json
from hf_dpssl.runs.console import say
from hf_dpssl.runs.lineage import read_json

RECORD = "restored.json"


def restore(study: dict, folder: Path, results: Path) -> None:
    """Write the cells of a results file into a study's folder that has none yet; nothing where there is no such file.

    Args:
        folder: OUTPUT_DIR/SCALE/STUDY, with images and shared networks (`claim_cells.ready`).
        results: STUDY.json, whose statement is that of this study (`claim_cells.state`).

    Raises:
        ValueError: the shared networks or the images are others than those of the results.
    """
    cells = folder / "cells"
    with alone(folder / RECORD):
        if not results.exists() or any(cells.glob("*.json")):
            return
        stored = read_json(results)
        for what, given in digests(study, folder).items():
            if stored[what] != given:
                raise ValueError(
                    f"{results} was measured with other {what} ({stored[what]}, now {given}), as another processor or "
                    "other versions of libraries give: its seeds would not compare with new ones. Continue it where "
                    "it was begun, or start afresh in another --output_dir."
                )
        table = stored["metrics"]["cells"]
        seeds, left = whole_seeds(study, table)
        found = _grids(study, stored) | {
            Cell(arm, seed): _cell(arm, columns, columns["seeds"].index(seed))
            for arm, columns in table.items()
            for seed in seeds
        }
        record = {"seeds": seeds, "command": stored["command"], "environment": stored["environment"]}
        if found:
            write_json(folder / RECORD, {"before": [*stored.get("before", []), record]})
            with atomic_folder(cells) as made:  # all or none, so that a kill leaves no pair in two halves
                for cell, content in found.items():
                    write_json(made / f"{cell.name}.json", content)
        again = f"; run again, as not all of their arms are there: {', '.join(left)}" if left else ""
        say(f"{results.stem}: {len(found)} cells are those of {results}{again}")


def whole_seeds(study: dict, table: dict) -> tuple[list[int], list[str]]:
    """The seeds that every arm of a study has, and the names of cells of other seeds."""
    of_arms = [set(table[arm]["seeds"]) if arm in table else set() for arm in study["arms"]]
    whole = set.intersection(*of_arms)
    left = [Cell(arm, seed).name for arm, columns in table.items() for seed in columns["seeds"] if seed not in whole]
    return sorted(whole), left


def _cell(arm: str, columns: dict, row: int) -> dict:
    """What a cell wrote, from its row of an arm's columns."""
    own = {"seeds", "flags", "operations", "cpu_seconds", "curve", "curves"}
    found = {"arm": arm, "seed": columns["seeds"][row], "flags": columns["flags"]}
    found |= {"cpu_seconds": columns["cpu_seconds"][row]}
    found |= {"metrics": {name: values[row] for name, values in columns.items() if name not in own}}
    found |= {name: columns[name] for name in ("operations",) if name in columns}
    found |= {"curve": columns["curve"][row]} if "curve" in columns else {}
    if "curves" in columns:
        found["curves"] = {name: curves[row] for name, curves in columns["curves"].items()}
    return found


def _grids(study: dict, stored: dict) -> dict[Cell, dict]:
    """Cells of grids, of which a results file has the scores and the seconds of all together."""
    points = {
        Cell(arm, TUNING_SEED, point).name: Cell(arm, TUNING_SEED, point)
        for arm, content in study["arms"].items()
        for point in range(len(content.get("grid", [])))
    }
    seconds = stored["cpu_seconds"]["grids"] / max(1, len(stored["tuning"]))
    return {
        points[name]: {"arm": points[name].arm, "seed": TUNING_SEED, "cpu_seconds": seconds, "tuning": score}
        for name, score in stored["tuning"].items()
    }
