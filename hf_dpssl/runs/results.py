"""The numbers of a finished run: measures that are taken one after another, and the file that states them.

Every results file says how, on what and where it was made.
"""

from __future__ import annotations

import math
import os
import platform
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch

from .atomic_files import write_json
from .console import say
from .redaction import command_text

_LIBRARIES = [
    "hf_dpssl",
    "torch",
    "torchvision",
    "transformers",
    "diffusers",
    "accelerate",
    "datasets",
    "huggingface-hub",
    "timm",
    "evaluate",
    "safetensors",
    "scikit-learn",
    "numpy",
    "pillow",
]


class Measures:
    """Metrics that are taken one after another; one that cannot be is left out and named, and the run is kept.

    Attributes:
        metrics: {name: value} of those that could be taken.
        left_out: {measure: why} of those that could not.
    """

    def __init__(self):
        self.metrics: dict[str, float] = {}
        self.left_out: dict[str, str] = {}

    def take(self, name: str, measure: Callable[..., dict[str, float]], *arguments) -> None:
        """Add the metrics that `measure(*arguments)` returns, or note that there are none and why."""
        try:
            self.metrics |= measure(*arguments)
        except (ValueError, OSError, ImportError, RuntimeError) as error:
            self.left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            say(f"{name} is not measured: {error}")

    def results(self) -> dict:
        """What goes into results.json beside the metrics."""
        return {"not_measured": self.left_out} if self.left_out else {}


def logged_curve(history: list[dict], name: str) -> list[list[float]]:
    """[last step, mean] of at most 40 parts of a run's log entries that have `name`, each of as many entries."""
    values = [(entry["step"], float(entry[name])) for entry in history if name in entry]
    size = max(1, math.ceil(len(values) / 40))
    parts = [values[first : first + size] for first in range(0, len(values), size)]
    return [[part[-1][0], round(sum(value for _, value in part) / len(part), 4)] for part in parts]


def environment() -> dict:
    """Machine and library versions.

    {"python", "platform", "processor", "instructions" (AVX2, AVX512, ...), "cpu_count", "threads", "accelerator", ...}
    """
    versions = {}
    for library in _LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            versions[library] = "not installed"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),  # which decide the last bits of sums
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "libraries": versions,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def command_line() -> str:
    """The command that started this process, for a shell, without folders of the machine."""
    return command_text([Path(sys.argv[0]).name, *sys.argv[1:]])


def write_results(path: str | os.PathLike, metrics: dict, *, dataset: str, seed: int, samples: dict, **more) -> None:
    """Write metrics with command, data set, seed, sample counts, machine and versions beside them."""
    content = {"metrics": metrics, "dataset": dataset, "seed": seed, "samples": samples, **more}
    write_json(path, content | {"command": command_line(), "environment": environment()})
