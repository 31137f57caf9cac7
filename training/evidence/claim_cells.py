"""Runs a study cell by cell: one cell is one arm with one seed, and leaves one JSON file when it is finished.

OUTPUT_DIR/SCALE/STUDY/ holds stated.json (what was stated before the first cell), data/, shared/ (encoders that losses
and measures need), runs/CELL/ and cells/CELL.json. Several processes may share the work; a cell without its file is run
again, by scripts that continue their own checkpoints.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from claim_statements import differences, fingerprint
from runs import alone, claimed

from hf_dpssl.cli.commands import command_module
from hf_dpssl.cli.train import SCRIPTS
from hf_dpssl.runs.atomic_files import write_json
from hf_dpssl.runs.console import say
from hf_dpssl.runs.lineage import read_json
from hf_dpssl.runs.results import write_results
from hf_dpssl.runs.shipped_folders import shipped_folder

TUNING_SEED = 1000  # none of a verdict's
_OWN = ("judge_network", "one_step", "parametric_tsne")  # scripts of this folder that are steps of studies


@dataclass(frozen=True)
class Cell:
    """One arm with one seed; `point` is a point of the arm's grid, tried on validation images, or None."""

    arm: str
    seed: int
    point: int | None = None

    @property
    def name(self) -> str:
        """Of its folder and file."""
        return f"{self.arm}-s{self.seed}" if self.point is None else f"tune-{self.arm}-{self.point}"


def plan(study: dict, seeds: int) -> list[Cell]:
    """All cells: first the grids, then seed by seed, so that whatever is done holds whole seeds of every arm."""
    arms = study["arms"]
    tuning = [Cell(arm, TUNING_SEED, point) for arm in arms for point in range(len(arms[arm].get("grid", [])))]
    return tuning + [Cell(arm, seed) for seed in range(seeds) for arm in arms]


def state(now: dict, folder: Path) -> None:
    """Store what is stated before the first cell, or check that it is what was stored.

    Args:
        now: {"study", "claims", "families", "seeds"}.
        folder: of the study at its scale.

    Raises:
        ValueError: the folder holds results of another statement; names each difference.
    """
    path = folder / "stated.json"
    results = folder.with_suffix(".json")  # those of another machine, which go on here (claim_restore.py)
    with alone(path):
        for place, stored in ((folder, read_json(path)), (results, (read_json(results) or {}).get("stated"))):
            if stored is not None and (found := differences(stored, now)):
                raise ValueError(
                    f"{place} holds results of another statement ({'; '.join(found)}): results decide what was stated "
                    "before them. Put the files back, or start afresh in another --output_dir."
                )
        if not path.exists():
            write_json(path, now)


def check_data(study: dict) -> None:
    """FileNotFoundError where the study reads local files that are not there: which, and where they are from."""
    from hf_dpssl.data.image_data import TABLE, load_images

    data = study["data"]
    for name in (data["name"], *data.get("also", [])):
        entry = TABLE.get(name)
        if entry is None or not entry.local or entry.hub_id is not None:
            continue
        try:
            load_images(name)
        except FileNotFoundError as error:
            stem = entry.local
            raise FileNotFoundError(
                f"{error} Files: {stem}-train.parquet and {stem}-test.parquet, with columns image and label, "
                f"from: {data['from']}."
            ) from None


def prepare(study: dict, folder: Path) -> dict[str, Path]:
    """{"fit", "measured"}: folders of parquet files with training + validation and with training + test images."""
    from hf_dpssl.data import keyed_random, load_images

    numbers = study["numbers"]
    folders = {name: folder / "data" / name for name in ("fit", "measured")}
    done = folder / "data" / "content.json"
    with alone(done):
        if done.exists():
            return folders
        data = load_images(study["data"]["name"])
        wanted = numbers["train"] + numbers["validation"]
        for split, rows, need in (("training", data.train, wanted), ("test", data.evaluation, numbers["test"])):
            if len(rows) < need:
                raise ValueError(f"{data.name} has {len(rows)} {split} images: scale {study['scale']} needs {need}.")
        order = keyed_random.permutation(len(data.train), seed=0, epoch=0)[:wanted].tolist()
        parts = {
            "train": data.train.select(order[: numbers["train"]]),
            "validation": data.train.select(order[numbers["train"] :]),
            "test": data.evaluation.select(data.random_rows(data.evaluation, numbers["test"])),
        }
        for name, held_out in (("fit", "validation"), ("measured", "test")):
            folders[name].mkdir(parents=True, exist_ok=True)
            for part in ("train", held_out):
                parts[part].to_parquet(folders[name] / f"{part}.parquet")
        loaded = {name: load_images(str(path)) for name, path in folders.items()}
        write_json(done, {name: found.content for name, found in loaded.items()})
    return folders


def ready(study: dict, folder: Path) -> dict[str, Path]:
    """Prepare what all cells read, images and shared networks; returns the folders of both."""
    places = {"shared": folder / "shared"} | prepare(study, folder)
    shared(study, places, folder)
    return places


def run_study(stated: dict, folder: Path, places: dict[str, Path]) -> Iterator[Cell]:
    """Run the cells that have no file yet, once `places` are `ready`; yields each after it is finished."""
    from claim_eval_files import hub_data, write_eval_files  # which imports this module

    study = stated["study"]
    for cell in plan(study, stated["seeds"]):
        path = folder / "cells" / f"{cell.name}.json"
        with claimed(path) as free:
            if not free:
                continue
            if cell.point is None and (chosen := chosen_point(study, cell.arm, folder)) is None:
                say(f"{cell.name} is left out: another process has not finished the grid of {cell.arm}.")
                continue
            if missing := unfinished(study, cell, folder):
                say(f"{cell.name} is left out: another process has not finished {', '.join(missing)}.")
                continue
            point = cell.point if cell.point is not None else chosen
            if cell.point is None:
                hub_data(study["data"]["name"])  # data that are no longer there are missed before the work
            found = run_cell(study, cell, point, places, folder)
            if cell.point is None:
                fill = filled(study, cell.arm, point, places_of(study, cell, places, folder))[1]
                write_eval_files(stated, cell, fill, found["metrics"])
            write_json(path, found)
        yield cell


def unfinished(study: dict, cell: Cell, folder: Path) -> list[str]:
    """The cells of the same seed that this one needs and that have no file yet."""
    arm = study["arms"][cell.arm]
    needed = [*arm.get("needs", []), *([arm["trained_as"]] if "trained_as" in arm else [])]
    names = [Cell(other, cell.seed, cell.point).name for other in needed]
    return [name for name in names if not (folder / "cells" / f"{name}.json").exists()]


def shared(study: dict, places: dict[str, Path], folder: Path) -> None:
    """Train what all cells share, once; ValueError where its weights are no longer those of the first cell."""
    for name, step in study.get("shared", {}).items():
        record = folder / "shared" / f"{name}.json"
        with alone(record):
            if not record.exists():
                start = time.process_time()
                run_step(step, {"seed": 0, **study["numbers"], **study["data"], **places}, folder / "shared", name)
                seconds = round(time.process_time() - start, 1)
                write_json(record, {"weights": weights_of(folder / "shared" / name), "cpu_seconds": seconds})
        stored, now = json.loads(record.read_text(encoding="utf-8"))["weights"], weights_of(folder / "shared" / name)
        if stored != now:
            raise ValueError(
                f"{folder / 'shared' / name} has other weights than when the cells were run ({stored[:12]}, now "
                f"{now[:12]}): figures would not compare. Start afresh in another --output_dir."
            )


def weights_of(folder: Path) -> str:
    """Digest of a checkpoint's weights."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def chosen_point(study: dict, arm: str, folder: Path) -> int | None:
    """The grid point of the best validation score; -1 without a grid, None while a point is missing."""
    count = len(study["arms"][arm].get("grid", []))
    if not count:
        return -1
    paths = [folder / "cells" / f"{Cell(arm, TUNING_SEED, point).name}.json" for point in range(count)]
    if not all(path.exists() for path in paths):
        return None
    scores = [json.loads(path.read_text(encoding="utf-8"))["tuning"] for path in paths]
    sign = {"higher": 1, "lower": -1}[study["tuning"]["better"]]
    return max(range(count), key=lambda point: sign * scores[point])


def run_cell(study: dict, cell: Cell, point: int, places: dict[str, Path], folder: Path) -> dict:
    """Run the steps of a cell and read what it found; a cell of a grid stops before steps that read test images."""
    here = places_of(study, cell, places, folder)
    own, trained = here["cell"], here["trained"]
    flags, fill = filled(study, cell.arm, point, here)
    start = time.process_time()
    for step in steps_of_arm(study, cell.arm):
        due = trained == own
        if step.get("final") or step.get("grid"):
            due = (cell.point is None) == bool(step.get("final"))
        if due:
            run_step(step, fill, own)
    found = {"arm": cell.arm, "seed": cell.seed, "flags": flags, "cpu_seconds": round(time.process_time() - start, 1)}
    if cell.point is not None:
        return found | {"tuning": finite(read_at(own, study["tuning"], fill), cell.name)}
    metrics = {name: metric for name, metric in study["metrics"].items() if of_arm(metric, cell.arm)}
    found["metrics"] = {}
    for name, metric in metrics.items():
        if "mean_of" not in metric:
            found["metrics"][name] = read_at(own, metric.get("where", {}).get(cell.arm, metric), fill)
    for name, metric in metrics.items():
        if "mean_of" in metric:
            found["metrics"][name] = mean(found["metrics"][part] for part in metric["mean_of"])
    if of_arm(study["curve"], cell.arm):
        found["curve"] = read_at(trained, study["curve"], fill)
    if "curves" in study:
        curves = {name: curve for name, curve in study["curves"].items() if of_arm(curve, cell.arm)}
        found["curves"] = {name: read_at(trained, curve, fill) for name, curve in curves.items()}
    if "measured_budget" in study:
        found["operations"] = read_at(own, study["measured_budget"], fill)
    return found


def places_of(study: dict, cell: Cell, places: dict[str, Path], folder: Path) -> dict:
    """`places` with those of a cell: its own folder, that of the arm whose run it draws from, and its seed."""
    trained = Cell(study["arms"][cell.arm].get("trained_as", cell.arm), cell.seed, cell.point)
    return {**places, "seed": cell.seed, "cell": folder / "runs" / cell.name, "trained": folder / "runs" / trained.name}


def of_arm(part: dict, arm: str) -> bool:
    """Whether a step, a metric or the curve is of an arm: of those that it names, or of all."""
    return arm in part.get("arms", [arm])


def filled(study: dict, arm: str, point: int, places: dict) -> tuple[str, dict]:
    """An arm's flags with a point of its grid, and what fills steps: numbers, data, `places` and the arm's own."""
    about = study["arms"][arm]
    flags = about["flags"] + (f" {about['grid'][point]}" if about.get("grid") else "")
    fill = {**study["numbers"], **study["data"], **places, **about.get("with", {})}
    return flags, fill | {"arm": flags.format_map(fill)}


def steps_of_arm(study: dict, arm: str) -> list[dict]:
    """The steps of an arm's cells: those that name it, and those of all arms but what it has under `without`."""
    without = study["arms"][arm].get("without", [])
    return [step for step in study["steps"] if of_arm(step, arm) and ("arms" in step or step["run"] not in without)]


def finite(value: float, cell: str) -> float:
    """The score of a grid point; minus infinity has no meaning for both directions, so a NaN is an error."""
    if not math.isfinite(value):
        raise ValueError(f"the validation score of {cell} is {value}: leave this point out of the grid.")
    return value


def run_step(step: dict, fill: dict, folder: Path, name: str | None = None) -> None:
    """Run a training script, one of this folder or a command of hf-dpssl; what it prints goes into log.txt.

    Raises:
        RuntimeError: the command failed.
    """
    run = step["run"].format_map(fill)
    argv = shlex.split(step["flags"].format_map(fill))
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "a", encoding="utf-8") as log, redirect_stdout(log):
        if run not in (*SCRIPTS, *_OWN):
            if status := command_module(run).main(argv):
                raise RuntimeError(f"hf-dpssl {shlex.join([run, *argv])} ended with {status}.")
            return
        scripts = str(shipped_folder("training"))
        if scripts not in sys.path:
            sys.path.insert(0, scripts)
        if run in SCRIPTS:
            argv += ["--output_dir", str(folder)]
            argv += ["--resume_from_checkpoint", "latest"] if run != "domains" else []  # which goes on by itself
            argv += ["--name", name] if name else []
        importlib.import_module(run).main(argv)


def place_of(folder: Path, where: dict, fill: dict) -> tuple[Path, list]:
    """A JSON file of a cell, and the keys that lead to a value in it: names are filled in."""
    path = Path(os.path.normpath(folder / where["file"].format_map(fill)))  # a cell that runs nothing has no folder
    return path, [key.format_map(fill) if isinstance(key, str) else key for key in where["at"]]


def read_at(folder: Path, where: dict, fill: dict):
    """A value in a cell's JSON file; ValueError where it is not there, with what is."""
    path, keys = place_of(folder, where, fill)
    value = json.loads(path.read_text(encoding="utf-8"))
    for key in keys:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            known = sorted(value) if isinstance(value, dict) else type(value).__name__
            raise ValueError(f"{path} has no {'.'.join(map(str, keys))}: {known}.") from None
    return value


def write_study(stated: dict, folder: Path, path: Path) -> dict:
    """Write the values of every seed of the cells that are finished; no verdict, which the page takes from them.

    The fingerprint is of what was stated, the weights of the shared encoders and the images together.
    """
    study = stated["study"]
    cells = read_cells(study, stated["seeds"], folder)
    found = digests(study, folder)
    table = {arm: _columns(list(seeds.values())) for arm, seeds in cells.items() if seeds}
    grids = {path.stem: read_json(path) for path in sorted((folder / "cells").glob("tune-*.json"))}
    tuning = {name: cell["tuning"] for name, cell in grids.items()}
    common = [read_json(folder / "shared" / f"{name}.json") for name in study.get("shared", {})]
    seconds = {
        "cells": sum(sum(row["cpu_seconds"]) for row in table.values()),
        "grids": sum(cell["cpu_seconds"] for cell in grids.values()),
        "shared": sum(entry.get("cpu_seconds", 0) for entry in common),
    }
    samples = {name: study["numbers"][name] for name in ("train", "validation", "test")}
    more = {"stated": stated, **found, "tuning": tuning}
    more["cpu_seconds"] = {name: round(value, 1) for name, value in seconds.items()}
    more["fingerprint"] = fingerprint({"stated": stated, **found})
    more |= read_json(folder / "restored.json") or {}  # {"before": ...}, of claim_restore.py
    write_results(path, {"cells": table}, dataset=study["data"]["name"], seed=0, samples=samples, **more)
    return json.loads(path.read_text(encoding="utf-8"))


def digests(study: dict, folder: Path) -> dict[str, dict]:
    """{"weights": of the shared networks, "content": of the images}, by their names."""
    weights = {name: weights_of(folder / "shared" / name) for name in study.get("shared", {})}
    return {"weights": weights, "content": read_json(folder / "data" / "content.json")}


def _columns(cells: list[dict]) -> dict:
    """Cells of one arm as lists over their seeds."""
    found = {"seeds": [cell["seed"] for cell in cells], "flags": cells[0]["flags"]}
    found |= {name: [float(f"{cell['metrics'][name]:.6g}") for cell in cells] for name in cells[0]["metrics"]}
    found |= {"operations": cells[0]["operations"]} if "operations" in cells[0] else {}
    found["cpu_seconds"] = [cell["cpu_seconds"] for cell in cells]
    if "curve" in cells[0]:
        found["curve"] = [_rounded(cell["curve"]) for cell in cells]
    if "curves" in cells[0]:
        found["curves"] = {name: [_rounded(cell["curves"][name]) for cell in cells] for name in cells[0]["curves"]}
    return found


def _rounded(curve: list[list[float]]) -> list[list[float]]:
    return [[step, float(f"{value:.4g}")] for step, value in curve]


def read_cells(study: dict, seeds: int, folder: Path) -> dict[str, dict[int, dict]]:
    """{arm: {seed: what its cell wrote}} of the cells that are finished."""
    found: dict[str, dict[int, dict]] = {arm: {} for arm in study["arms"]}
    for cell in plan(study, seeds):
        path = folder / "cells" / f"{cell.name}.json"
        if cell.point is None and path.exists():
            found[cell.arm][cell.seed] = json.loads(path.read_text(encoding="utf-8"))
    return found
