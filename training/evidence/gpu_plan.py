"""One run of claims for 15 minutes of a GPU, as claims/plans/gpu.yaml states it; a trial of it on a CPU.

    make gpu-plan                                              # the trial: a thousandth of it all, minutes of a CPU
    python training/evidence/gpu_plan.py                       # on a GPU
    python training/evidence/gpu_plan.py --estimate            # seconds by formula, and nothing is run

The run is that of reproduce.py, cell by cell with the same files: whatever of it is done when its time is over is a
valid page, and the same command goes on later. A trial has embedded digits, one seed and one point of each grid; its
figures mean nothing, and it decides nothing.
"""

from __future__ import annotations

import argparse
import functools
import re
import shlex
import sys
import time
from pathlib import Path

import yaml

if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    print(__doc__)
    sys.exit()

import torch
from claim_cells import TUNING_SEED, check_data, filled, plan, state, steps_of_arm
from claim_statements import CLAIMS, claims_of
from rehearse import memory_of, process_of, stage_names
from reproduce import refresh_page, run, statement
from run_times import PEAK_TERAFLOPS, SHARES_OF_PEAK, steps_of

from hf_dpssl.cli.errors import reported
from hf_dpssl.cli.rehearse import Asked
from hf_dpssl.cli.train import SCRIPTS
from hf_dpssl.runs.console import say
from hf_dpssl.runs.recipe import parse

PLAN = CLAIMS / "plans" / "gpu.yaml"
LARGEST_TRIAL = 0.01  # size up to which a CPU is enough
_FEWEST = {"train": 256, "validation": 64, "test": 64, "batch_size": 16, "num_codes": 16}  # of a trial, else 1
_TRIAL_DATA = {"name": "digits", "augmentation": "digits", "image_size": 16, "from": "scikit-learn, for a trial"}
# Assumed, in seconds: what the host needs for an operation that it launches; what a script needs before and after its
# steps; what the commands need that measure.
LAUNCH = 1e-5
START = 4.0
MEASURING = {"evaluate": 3.0, "report": 15.0}  # of which most is a small prior of 1,000 steps
PARAMETRIC_TSNE = 0.02  # a step: P by bisection in float64, and a small network


def read_plan(path: Path = PLAN) -> dict:
    """{"scale", "seconds", "studies": {study: {"estimated", "numbers"}}, "left_out"} as stated.

    Raises:
        ValueError: it has a number that its study has not.
    """
    stated = yaml.safe_load(path.read_text(encoding="utf-8"))
    for name, part in stated["studies"].items():
        numbers = statement(name, stated["scale"], None, CLAIMS)["study"]["numbers"]
        if unknown := sorted(part["numbers"].keys() - numbers.keys()):
            raise ValueError(f"{path}: {name} has no {', '.join(unknown)} at scale {stated['scale']}.")
    return stated


def statements(stated: dict, size: float = 1.0) -> dict[str, dict]:
    """{study: what is stated of it before its first cell}, with the plan's numbers; a trial's below size 1."""
    found = {}
    for name, part in stated["studies"].items():
        content = statement(name, stated["scale"], None, CLAIMS)
        study = content["study"]
        study["numbers"] = study["numbers"] | part["numbers"]
        if size < 1:
            content |= {"seeds": 1, "trial": size}
            study["data"] = study["data"] | _TRIAL_DATA
            study["numbers"] = {key: made_small(key, value, size) for key, value in study["numbers"].items()}
            study["arms"] = {
                arm: about | ({"grid": about["grid"][:1]} if "grid" in about else {})
                for arm, about in study["arms"].items()
            }
        found[name] = content
    return found


def made_small(key: str, value, size: float):
    """A number of a study at a size; widths become the smallest, what is no count stays."""
    if key.endswith("channels"):
        return re.sub(r"\d+", "8", value)
    if not isinstance(value, int):
        return value
    return min(value, max(_FEWEST.get(key, 1), round(value * size)))


def estimate(content: dict, gpu: str = "H100") -> dict:
    """Seconds of a study by formula: {"shared", "cells", "count", "longest"}.

    A step takes the larger of its operations at the lower assumed share of the GPU's peak in TF32, and of the launches
    of what it consists of. Encoders of losses, which are small beside what is trained, are left out.
    """
    study = content["study"]
    own = {"fit": "cifar10", "measured": "cifar10", "shared": "shared", "cell": "cell", "trained": "cell"}
    fill = study["numbers"] | study["data"] | own | {"seed": 0}
    shared = sum(seconds_of_step(step, fill, gpu) for step in study.get("shared", {}).values())
    seconds = {}
    cells = plan(study, content["seeds"])
    for arm in study["arms"]:
        _, with_arm = filled(study, arm, 0, own | {"seed": 0})
        steps = steps_of_arm(study, arm)
        for final in (False, True):
            wanted = [step for step in steps if final or not step.get("final")]
            seconds[arm, final] = sum(seconds_of_step(step, with_arm, gpu) for step in wanted)
    each = [seconds[cell.arm, cell.seed != TUNING_SEED] for cell in cells]
    return {"shared": shared, "cells": sum(each), "count": len(cells), "longest": max(each)}


def seconds_of_step(step: dict, fill: dict, gpu: str) -> float:
    """Of a script or command of a study."""
    if step["run"] == "parametric_tsne":
        return START + PARAMETRIC_TSNE * fill["epochs"] * (fill["train"] // fill["batch_size"])
    if step["run"] not in SCRIPTS:
        return MEASURING[step["run"]]
    return script_seconds(step["run"], step["flags"].format_map(fill), fill["train"], gpu)


@functools.cache
def script_seconds(script: str, flags: str, images: int, gpu: str) -> float:
    """Of a training script on so many images."""
    argv = shlex.split(flags)
    if "--perceptual" in argv:
        place = argv.index("--perceptual")
        del argv[place : place + 2]
    asked = Asked(script, parse(SCRIPTS[script], argv, ""), None, 80, True, None)
    counts = steps_of(asked, 1, images)
    speed = PEAK_TERAFLOPS[gpu] * 1e12 / 2 * SHARES_OF_PEAK[0]
    total = START
    for number, stage in enumerate(stage_names(asked)):
        found = memory_of(asked, number, process_of(asked))
        total += counts[stage] * max(found["operations"] / speed, found["launches"] * LAUNCH)
    return total


def main(argv: list[str] | None = None) -> int:
    """Run the plan, or say how long it takes; returns the exit status."""
    asked = argparse.ArgumentParser("gpu_plan.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    asked.add_argument("--size", type=float, default=1.0, help="of everything; up to 0.01: a trial, on a CPU too")
    asked.add_argument("--seconds", type=float, help="no cell begins later; default: the plan's")
    asked.add_argument("--estimate", action="store_true", help="print seconds by formula, and end")
    asked.add_argument("--output_dir", help="default: outputs/gpu_plan, or outputs/gpu_plan_trial")
    args = asked.parse_args(argv)
    if not 0 < args.size <= 1:
        asked.error(f"--size lies in (0, 1], got {args.size}")
    stated = read_plan()
    contents = statements(stated, args.size)
    if args.estimate:
        print_estimate(stated, contents)
        return 0
    if not torch.cuda.is_available() and args.size > LARGEST_TRIAL:
        asked.error(f"no CUDA device here; --size {LARGEST_TRIAL / 10} tries on a CPU whether the plan runs")
    output = args.output_dir or ("outputs/gpu_plan" if args.size == 1 else "outputs/gpu_plan_trial")
    folder = Path(output) / stated["scale"]
    end = time.monotonic() + (stated["seconds"] if args.seconds is None else args.seconds)
    for content in contents.values():  # whatever would be refused is refused before the first cell
        check_data(content["study"])
    for name, content in contents.items():
        state(content, folder / name)
    for name, content in contents.items():
        run(name, content, folder, end)
    for name, entry in refresh_page(folder).items():
        print(f"{name}: {entry['verdict']} ({entry['reason']})")
    say(f"written to {folder / 'claims.md'}")
    return 0


def print_estimate(stated: dict, contents: dict[str, dict]) -> None:
    """A line for each study in its order, and the sum beside the plan's seconds."""
    total = 0.0
    for name, content in contents.items():
        found = estimate(content)
        total += found["shared"] + found["cells"]
        numbers = ", ".join(str(claim["number"]) for claim in claims_of(name, stated["scale"]).values())
        print(
            f"{name} (claims {numbers}): {found['count']} cells {found['cells']:.0f} s, the longest "
            f"{found['longest']:.0f} s; what they share {found['shared']:.0f} s"
        )
    print(f"in all {total:.0f} s of {stated['seconds']}, on an H100 at {SHARES_OF_PEAK[0]:g} of its peak in TF32")
    for name, reason in stated["left_out"].items():
        print(f"left out: {name} ({reason})")


if __name__ == "__main__":
    sys.exit(reported("gpu_plan.py", main))
