"""Everything that needs a GPU, in one run for 15 minutes of one: correctness, host synchronisations, memory, speed.

    make bench-gpu    # or: python tests/benchmarks/gpu.py [--parts correctness drift] [--output FILE]

Parts run in a process of their own, which ends with a part that fails, hangs or takes too long; the error stands in the
results beside what the part had measured, and the next one goes on. Results are written after every figure, so that a
killed run keeps what it has. After --seconds all is over. On a CPU `--scale 0.001` tries the script itself at a
thousandth of the size, by a backend of torch.compile that needs no compiler: its figures mean nothing.

Writes tests/benchmarks/results/gpu.json, or where --output says; a trial writes outputs/gpu-trial.json.
"""

from __future__ import annotations

import argparse
import multiprocessing
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from multiprocessing.connection import Connection
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
GRACE = 10  # seconds for a part to end by itself when its time is over
UNFINISHED = {"passed": False, "error": "not finished", "figures": {}}
Part = Callable[[torch.device, float], Iterator[dict]]  # yields figures as they are measured; "passed" is one
# In this order: what is worth most comes first.
PARTS: dict[str, Part] = {
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


def run_part(part: Part, device: torch.device, scale: float, seconds: float, tell: Callable[[dict], None]) -> None:
    """Tell {"passed", "seconds", "figures", "error" where there is one} after each figure and at the end."""
    start = time.perf_counter()
    figures: dict = {}
    error: dict = {}
    try:
        with at_most(seconds):
            for more in part(device, scale):
                figures |= more
                tell(UNFINISHED | {"figures": figures})
    except Exception as problem:
        lines = traceback.format_exc().splitlines()
        error = {"error": f"{type(problem).__name__}: {problem}", "traceback": lines[-12:]}
    passed = figures.pop("passed", True) and not error
    tell({"passed": passed, "figures": figures, "seconds": round(time.perf_counter() - start, 1)} | error)


def work(pipe: Connection, parts: dict[str, Part], device: torch.device, scale: float, end: float, most: float) -> None:
    """In a process of its own: send (part, seconds that it may take) and (part, what is known of it) until one fails.

    A part gets at most `most` seconds, and none beyond `end` (by time.monotonic, the same for all processes).
    """
    found: dict = {}

    def tell(news: dict) -> None:
        found.update({name: news})
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})  # no half of a message is sent
        try:
            pipe.send((name, news))
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})

    for name, part in parts.items():
        seconds = min(most, end - time.monotonic())
        if seconds <= 0:
            return
        pipe.send((name, seconds))
        run_part(part, device, scale, seconds, tell)
        if "error" in found[name]:  # the GPU may be in no state to go on
            return
        torch._dynamo.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def run_parts(names: list[str], device: torch.device, scale: float, end: float, most: float) -> Iterator[dict]:
    """{part: what is known of it}, one part at a time, whenever more is known; nothing of parts that are not begun."""
    left = list(names)
    while left and time.monotonic() < end:
        pipe, sender = multiprocessing.Pipe(duplex=False)
        given = sender, {name: PARTS[name] for name in left}, device, scale, end, most
        process = multiprocessing.get_context("spawn").Process(target=work, args=given)
        process.start()
        sender.close()
        name, found = left[0], UNFINISHED
        begun, until = time.monotonic(), end
        why = f"TimeoutError: killed after {GRACE} s more than it had"
        try:
            while pipe.poll(max(0, until + GRACE - time.monotonic())):
                name, news = pipe.recv()
                found = UNFINISHED
                if isinstance(news, dict):
                    found = news
                else:
                    begun, until = time.monotonic(), time.monotonic() + news
                yield {name: found}
        except EOFError:
            process.join(GRACE)
            why = f"the process ended with {process.exitcode}"
        finally:
            process.kill()
            process.join()
        if "seconds" not in found:  # it did not end by itself
            yield {name: found | {"error": why, "seconds": round(time.monotonic() - begun, 1)}}
        left = left[left.index(name) + 1 :]


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
    """Run the parts and write the JSON after every figure; returns {part: what `run_part` gave}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="some of the parts")
    parser.add_argument("--scale", type=float, default=1.0, help="1: for a GPU; up to 0.01: a trial, on a CPU too")
    parser.add_argument("--seconds", type=float, default=840, help="of the whole: a part that is not done is ended")
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
    start = time.monotonic()
    asked = [part for part in PARTS if part in args.parts]
    found = {part: {"passed": False, "error": f"not begun within {args.seconds:.0f} s"} for part in asked}

    def write() -> None:
        more = {"seconds": round(time.monotonic() - start, 1), "about": about(device), "aims": gpu_speed.AIMS}
        samples = {"scale": args.scale, "device": device.type}
        write_results(output, {"parts": found}, dataset="random numbers, digits", seed=0, samples=samples, **more)

    write()
    for news in run_parts(asked, device, args.scale, start + args.seconds, args.part_seconds):
        found |= news
        write()
        for name, part in news.items():
            if "seconds" in part:
                state = "passed" if part["passed"] else part.get("error", "failed, see the figures")
                print(f"{name}: {state} ({part['seconds']} s)", flush=True)
    return found


if __name__ == "__main__":
    sys.exit(0 if all(part["passed"] for part in main().values()) else 1)
