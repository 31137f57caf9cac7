"""Runs that SIGKILL ends, at a chosen rename (a parent that watches files appear may see the last of them when the run
is over) or after a random number of checkpoints, and weights compared once they have been resumed."""

import fnmatch
import os
import random
import signal
import time
from pathlib import Path

from safetensors.torch import load_file


def die_at_rename(count: int, pattern: str) -> None:
    """Let SIGKILL end this process at its `count`-th rename to a path of that pattern: written, not yet named."""
    seen, rename = [], os.replace

    def replace(source, target, **options):
        if fnmatch.fnmatch(os.fspath(target), pattern):
            seen.append(target)
            if len(seen) == count:
                os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target, **options)

    os.replace = replace


def weights(folder: Path) -> dict:
    """All tensors of all safetensors files below a folder."""
    files = sorted(folder.rglob("*.safetensors"))
    assert files, f"no weights in {folder}"
    return {f"{file.relative_to(folder)}/{k}": v for file in files for k, v in load_file(file).items()}


def assert_identical(found: Path, expected: Path) -> None:
    found, expected = weights(found), weights(expected)
    assert found.keys() == expected.keys()
    different = [name for name in expected if not found[name].equal(expected[name])]
    assert not different, f"{len(different)} of {len(expected)} tensors differ: {different[:3]}"


def wait_for_checkpoint(launched, folder: Path, count: int) -> None:
    """Until `count` checkpoints have been seen in any loop of the run, or it has ended."""
    seen = set()
    while launched.is_alive() and len(seen) < count:
        for parent, names, _ in os.walk(folder):  # unlike rglob, at peace with folders that vanish meanwhile
            seen |= {f"{parent}/{name}" for name in names if name.startswith("step-")}
        time.sleep(0.002)


def run_with_kills(launch, script, flags, processes, folder, kills: int, generator: random.Random) -> int:
    """Start, kill after a random number of checkpoints and milliseconds, resume, ...; returns the kills that struck."""
    struck = 0
    argv = [*flags, "--output_dir", folder, "--resume_from_checkpoint", "latest"]
    for _ in range(kills):
        launched = launch(script, argv, processes)
        wait_for_checkpoint(launched, folder / "checkpoints", generator.randint(1, 3))
        time.sleep(generator.random() * 0.1)
        struck += launched.is_alive()
        launched.kill()
    output = launch(script, argv, processes).wait()
    assert struck == 0 or "resumed at" in output
    return struck
