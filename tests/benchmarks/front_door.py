"""Processor time of the front door beside importing the libraries, each in fresh processes, in one run.

    make bench        # or: python tests/benchmarks/front_door.py [--rounds 5] [--checkout FOLDER --output FILE]

User seconds of a process and those it starts; rounds alternate over all commands, so that a machine that slows down
slows all. Ratios are to `python -c "import torch"`, of the training script to importing torch, transformers and
diffusers once. Its first line is written before its libraries are imported; what these cost is a row of its own.
Writes tests/benchmarks/results/front_door.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from hf_dpssl.runs.results import write_results

REPOSITORY = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results" / "front_door.json"
TORCH, LIBRARIES = "import torch", "import torch, transformers, diffusers"


class Row(NamedTuple):
    """What is run, as arguments of Python; `peer`: what it is divided by; `first_line`: it is ended after one."""

    what: str
    arguments: list[str]
    peer: str
    aim: float | None = None
    first_line: bool = False


CLI = ["-m", "hf_dpssl.cli"]
ROWS = [
    Row("hf-dpssl --help", [*CLI, "--help"], TORCH, 0.15),
    Row("hf-dpssl evaluate --help", [*CLI, "evaluate", "--help"], TORCH, 0.15),
    Row("hf-dpssl evaluate --wrong_flag", [*CLI, "evaluate", "--wrong_flag"], TORCH, 0.15),
    Row("hf-dpssl train dae_vq --help", [*CLI, "train", "dae_vq", "--help"], TORCH, 0.15),
    Row("python training/dae_vq.py --help", ["training/dae_vq.py", "--help"], TORCH),
    Row("import hf_dpssl", ["-c", "import hf_dpssl"], TORCH, 0.1),
    Row("from hf_dpssl import info_nce", ["-c", "from hf_dpssl import info_nce"], TORCH),
    Row("training/dae_vq.py, first line", ["training/dae_vq.py", "--output_dir"], LIBRARIES, 1.2, first_line=True),
    Row(
        "training/dae_vq.py, its libraries",
        ["-c", "import sys; sys.path[:0] = ['training']; import dae_vq"],
        LIBRARIES,
    ),
]


def user_seconds(arguments: list[str], checkout: Path, first_line: bool = False) -> float:
    """Of a fresh interpreter, to its end or to its first line of output."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    start = os.times().children_user
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *arguments, *([folder] if first_line else [])]
        how = {"cwd": checkout, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        with subprocess.Popen(command, text=True, **how) as process:
            if first_line:
                process.stdout.readline()
                process.kill()
            process.stdout.read()
    return os.times().children_user - start


def main() -> None:
    """Run all commands in alternating rounds, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds of all commands")
    parser.add_argument("--checkout", type=Path, default=REPOSITORY, help="whose front door, to compare two states")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file")
    args = parser.parse_args()
    peers = {peer: Row(peer, ["-c", peer], peer) for peer in (TORCH, LIBRARIES)}
    rows = [*peers.values(), *ROWS]
    for row in rows:  # files are read and compiled once before
        user_seconds(row.arguments, args.checkout, row.first_line)
    seconds: dict[str, list[float]] = {row.what: [] for row in rows}
    for _ in tqdm(range(args.rounds), "rounds"):
        for row in rows:
            seconds[row.what].append(user_seconds(row.arguments, args.checkout, row.first_line))
    metrics = {}
    for row in rows:
        own, peer = seconds[row.what], seconds[row.peer]
        metrics[row.what] = {
            "seconds_min": round(min(own), 3),
            "seconds_median": round(statistics.median(own), 3),
            "ratio_min": round(min(own) / min(peer), 3),
            "ratio_median": round(statistics.median(own) / statistics.median(peer), 3),
            "peer": row.peer,
            "aim": row.aim,
        }
        found = metrics[row.what]
        aim = f"(aim {row.aim})" if row.aim else ""
        print(f"{row.what:<40}{found['seconds_min']:>8.2f} s {found['ratio_min']:>8.3f} of {row.peer} {aim}")
    write_results(args.output, metrics, dataset="digits", seed=0, samples={"rounds": args.rounds})


if __name__ == "__main__":
    main()
