"""What a study measured of a model, in its folder: `.eval_results/<org>--<name>.yaml`, which a push takes along.

A metric is of one model where the study says so: where the step of test images that writes its file (`--output` or
`--output_dir`) has one folder as its first argument, or where a training script measures what it has trained. What
compares several models (a zoo, means, forecasts) is of none, and what a network costs is no measure of images.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import NamedTuple

from claim_cells import Cell, of_arm, place_of, steps_of_arm
from claim_statements import fingerprint
from huggingface_hub import EvalResult
from runs import alone

from hf_dpssl.cli.train import SCRIPTS
from hf_dpssl.data.image_data import TABLE, load_images
from hf_dpssl.hub.card_data import figures
from hf_dpssl.hub.eval_files import eval_files_of_folder
from hf_dpssl.runs.atomic_files import atomic_file
from hf_dpssl.runs.recipe import parse

_COST = re.compile(r"(.+_)?(parameters|operations|seconds|per_second)")  # units of a network and a clock


class Measured(NamedTuple):
    """A step that measures one model: the file or folder that it writes, the model's folder, --dataset, and itself."""

    output: Path
    model: Path
    dataset: str
    command: str


class HubData(NamedTuple):
    """A data set of the Hub: its id, how it calls "train" and "evaluation", and how many images these have."""

    id: str
    splits: dict[str, str]
    images: dict[str, int]


def measured_models(study: dict, arm: str, fill: dict) -> dict[str, Measured]:
    """{metric: the step that measured it} of an arm's metrics that are of one model.

    Args:
        study: at a scale.
        arm: of the study.
        fill: what fills its steps, as `claim_cells.filled` gives it.
    """
    steps = [measured for step in steps_of_arm(study, arm) if (measured := _measured(step, fill))]
    found = {}
    for name, metric in study["metrics"].items():
        where = metric.get("where", {}).get(arm, metric)
        if not of_arm(metric, arm) or "file" not in where:
            continue
        file, keys = place_of(fill["cell"], where, fill)
        writer = next((step for step in steps if file.is_relative_to(step.output)), None)
        if writer is not None and not _COST.fullmatch(keys[-1]):
            found[name] = writer
    return found


def _measured(step: dict, fill: dict) -> Measured | None:
    """What a step of a verdict's cell measures; None where that is no model or several."""
    run, flags = step["run"].format_map(fill), step["flags"].format_map(fill)
    argv = shlex.split(flags)
    if run in SCRIPTS:
        args = parse(SCRIPTS[run], argv, "")
        if not hasattr(args, "name") or step.get("grid"):
            return None
        trained = _normal(fill["cell"] / args.name)
        return Measured(trained, trained, args.dataset, run)  # whose flags stand in recipe.yaml beside it
    values = dict(zip(argv, argv[1:], strict=False))
    output = values.get("--output") or values.get("--output_dir")
    if not step.get("final") or output is None or "--dataset" not in values:
        return None
    if argv[0].startswith("-") or not argv[1].startswith("-"):  # no model, or several
        return None
    command = f"{run} {' '.join(flags.split())}"
    for place in ("cell", "trained", "shared", "fit", "measured"):  # as stated, whatever the machine
        command = command.replace(str(fill[place]), f"{{{place}}}")
    return Measured(_normal(Path(output)), _normal(Path(argv[0])), values["--dataset"], command)


@cache
def hub_data(name: str) -> HubData | None:
    """A data set of the table by its name, None where it is not on the Hub; errors of `load_images`."""
    entry = TABLE.get(name)
    if entry is None or entry.hub_id is None:
        return None
    data = load_images(name)
    return HubData(entry.hub_id, data.splits, {"train": len(data.train), "evaluation": len(data.evaluation)})


def write_eval_files(stated: dict, cell: Cell, fill: dict, values: dict[str, float]) -> None:
    """Put a cell's figures into the folders of the models that they are of, beside entries of other measurements.

    An entry's notes say which part of the data set was measured, at which size, how, and in which cell of which
    statement. No entry has what was measured on a data set that is not on the Hub, what is not finite, what does not
    say beside it of how many held-out images it is, and what is of a folder that holds no checkpoint (any more).

    Args:
        stated: of the study.
        cell: of a verdict's seed.
        fill: as of `measured_models`.
        values: the cell's metrics.

    Raises:
        ValueError: a file that is there and is no list of entries.
    """
    found = defaultdict(list)
    for name, step in measured_models(stated["study"], cell.arm, fill).items():
        is_checkpoint = any((step.model / file).is_file() for file in ("config.json", "model_index.json"))
        if is_checkpoint and math.isfinite(values[name]):
            found[step.model] += _results(stated, cell, fill, step, name, values[name])
    for model, results in found.items():
        with alone(model.with_name(f"{model.name}_eval_results.json")):  # arms that share a model may end at once
            for path, text in eval_files_of_folder(results, model).items():
                with atomic_file(model / path) as file:
                    file.write(text)


def _results(stated: dict, cell: Cell, fill: dict, step: Measured, name: str, value: float) -> list[EvalResult]:
    """A figure with what it depends on; an empty list where it gets no entry."""
    study = stated["study"]
    metric = study["metrics"][name]
    file, keys = place_of(fill["cell"], metric.get("where", {}).get(cell.arm, metric), fill)
    own = {str(fill["fit"]): "train", str(fill["measured"]): "evaluation"}  # validation images are training images
    split = own.get(step.dataset, "evaluation")
    dataset = study["data"]["name"] if step.dataset in own else step.dataset
    samples = _samples(json.loads(file.read_text(encoding="utf-8")), keys)
    count, data = samples.get("evaluation", samples.get("held_out")), hub_data(dataset)
    if data is None or count is None:
        return []
    which = f"{count} of {data.images[split]} {data.splits[split]} images"
    which += ", held out from training" if split == "train" else ""
    about = {
        "data": f"{which}, resized to {study['data']['image_size']} px",
        "samples": samples,
        "by": step.command,
        "study": next(iter(stated["claims"].values()))["study"],
        "scale": study["scale"],
        "arm": f"{cell.arm} ({study['arms'][cell.arm]['says']})",
        "seed": cell.seed,
        "statement": fingerprint(stated)[:16],
    }
    return [
        EvalResult(
            task_type="any",  # of model-index, which these are no part of
            dataset_type=data.id,
            dataset_name=dataset,
            dataset_split=data.splits[split],
            metric_type=figures("", {keys[-1]: value})[0].type,
            metric_value=float(f"{value:.6g}"),  # as in the study's values
            metric_name=metric["says"],
            metric_args=about,
        )
    ]


def _samples(content: dict | list, keys: list) -> dict[str, int]:
    """Of how many images a figure is: "samples" of the mapping nearest to it that has them, else an empty mapping."""
    found = {}
    for key in keys:
        found = content.get("samples", found) if isinstance(content, dict) else found
        content = content[key]
    return found


def _normal(path: Path) -> Path:
    return Path(os.path.normpath(path))
