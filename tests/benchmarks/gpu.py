"""Everything that needs a GPU, in one run for 15 minutes of one: correctness, host synchronisations, memory, speed.

    make bench-gpu    # or: python tests/benchmarks/gpu.py [--parts correctness drift] [--output FILE]

A part that fails leaves its error in the results and the next one goes on; they are written after every part, so that
a killed run keeps what it has. On a CPU `--scale 0.001` tries the script itself at a thousandth of the size, by a
backend of torch.compile that needs no compiler: its figures mean nothing.

Writes tests/benchmarks/results/gpu.json, or where --output says; a trial writes outputs/gpu-trial.json.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import torch

from hf_dpssl.runs.results import write_results
from hf_dpssl.runs.shipped_folders import shipped_folder

# Scripts, tiny models and training steps; before this folder, which has files of the scripts' names.
TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(shipped_folder("training")), str(TESTS), str(TESTS / "rehearsal")]

import gpu_correctness
import gpu_speed
import gpu_training

RESULTS = Path(__file__).parent / "results" / "gpu.json"
TRIAL = Path("outputs/gpu-trial.json")
LARGEST_TRIAL = 0.01  # scale up to which a CPU is enough
# In this order: what is worth most comes first.
PARTS: dict[str, Callable[[torch.device, float], dict]] = {
    "correctness": gpu_correctness.measure,
    "training": gpu_training.measure,
    "loss": gpu_speed.loss,
    "simclr": gpu_speed.simclr,
    "dit": gpu_speed.dit,
    "drift": gpu_speed.drift,
}


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """TimeoutError inside after so many seconds, as soon as Python gets to it."""

    def stop(*_):
        raise TimeoutError(f"not finished after {seconds:.0f} s")

    handler = signal.signal(signal.SIGALRM, stop)
    before = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *before)
        signal.signal(signal.SIGALRM, handler)


def run_part(name: str, device: torch.device, scale: float, seconds: float) -> dict:
    """{"passed", "seconds", "figures" or "error"} of a part; no error leaves it."""
    start = time.perf_counter()
    try:
        with at_most(seconds):
            figures = PARTS[name](device, scale)
        found = {"passed": figures.pop("passed", True), "figures": figures}
    except Exception as error:
        lines = traceback.format_exc().splitlines()
        found = {"passed": False, "error": f"{type(error).__name__}: {error}", "traceback": lines[-12:]}
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found | {"seconds": round(time.perf_counter() - start, 1)}


def about(device: torch.device) -> dict:
    """Versions and sizes that `write_results` does not state."""
    found = {}
    for library in ("open_clip_torch", "triton"):
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            found[library] = "not installed"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpu_gib": round(properties.total_memory / 2**30, 1)}
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return found


def main(argv: list[str] | None = None) -> dict:
    """Run the parts and write the JSON after each; returns {part: what `run_part` gave}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="some of the parts")
    parser.add_argument("--scale", type=float, default=1.0, help="1: for a GPU; up to 0.01: a trial, on a CPU too")
    parser.add_argument("--seconds", type=float, default=840, help="no part begins after so many seconds")
    parser.add_argument("--part_seconds", type=float, default=300, help="a part that takes longer has failed")
    parser.add_argument("--output", type=Path, default=None, help="the JSON file")
    args = parser.parse_args(argv)
    if not 0 < args.scale <= 1:
        parser.error(f"--scale lies in (0, 1], got {args.scale}")
    if not torch.cuda.is_available() and args.scale > LARGEST_TRIAL:
        parser.error(f"no CUDA device here; --scale {LARGEST_TRIAL / 10} tries on a CPU whether the script runs")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    output = args.output or (RESULTS if args.scale == 1 else TRIAL)
    output.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    found: dict[str, dict] = {}
    for name in (part for part in PARTS if part in args.parts):
        if time.perf_counter() - start > args.seconds:
            found[name] = {"passed": False, "error": f"not begun: {args.seconds:.0f} s were over", "seconds": 0.0}
        else:
            found[name] = run_part(name, device, args.scale, args.part_seconds)
        state = "passed" if found[name]["passed"] else found[name].get("error", "failed, see the figures")
        print(f"{name}: {state} ({found[name]['seconds']} s)", flush=True)
        samples = {"scale": args.scale, "device": device.type}
        seconds = round(time.perf_counter() - start, 1)
        more = {"seconds": seconds, "about": about(device), "aims": gpu_speed.AIMS}
        write_results(output, {"parts": found}, dataset="random numbers, digits", seed=0, samples=samples, **more)
    return found


if __name__ == "__main__":
    sys.exit(0 if all(part["passed"] for part in main().values()) else 1)
