"""Plant each defect in a copy of the tree, and see whether the tests named for it fail.

    python tests/mutants/run.py                          # all of them
    python tests/mutants/run.py --sample 8 --seed 3      # some, as CI does
    python tests/mutants/run.py --only momentum          # those whose room or description holds the word

This process imports the libraries and none of our modules; every run is a fork of it, with a copy of the tree of its
own, which imports the defect. The named tests also run once without any defect: a test that fails or is skipped then
proves nothing, and is an error. Exits with 1 unless every defect is noticed.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import ModuleType

from planted import REPOSITORY, Mutant, load

OURS = {"hf_dpssl", *(path.stem for path in (REPOSITORY / "training").glob("*.py"))}
LEFT_OUT = shutil.ignore_patterns(".git", ".venv*", "outputs", "__pycache__", ".*_cache", "results", "*.egg-info")
SECONDS = 300  # for one defect; one that hangs is an error


def import_libraries(tree: Path) -> None:
    """What the package and the scripts of a tree import at their top, our own modules aside."""
    for path in sorted([*tree.glob("hf_dpssl/*/*.py"), *tree.glob("training/*.py")]):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else names
            if names and not {name.split(".")[0] for name in names} & OURS:
                try:
                    exec(ast.unparse(node), {})
                except ImportError:  # a library that is optional, or not yet installed
                    pass
    import pytest  # noqa: F401
    import sklearn.linear_model  # noqa: F401


class Outcomes:
    """A pytest plugin that writes {node id: "passed", "failed" or "skipped"} into a file."""

    def __init__(self, path: Path):
        self.path, self.found = path, {}

    def pytest_runtest_logreport(self, report):
        if report.outcome != "passed" or report.when == "call":
            if self.found.get(report.nodeid) != "failed":
                self.found[report.nodeid] = report.outcome

    def pytest_sessionfinish(self):
        self.path.write_text(json.dumps(self.found), encoding="utf-8")


class Job:
    """Tests in one tree: with a defect until the first fails, or all of them without."""

    def __init__(self, name: str, tests: list[str], mutant: Mutant | None = None):
        self.name, self.tests, self.mutant = name, tests, mutant

    def start(self, tree: Path, log: Path, number: int) -> None:
        self.log, self.outcomes = log, log.with_suffix(".json")
        self.path, self.text, self.started = None, None, time.monotonic()
        if self.mutant is not None:
            self.path = tree / self.mutant.file
            self.text = self.path.read_text(encoding="utf-8")
            self._write(self.mutant.planted(self.text), number)
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(tree)

    def _write(self, text: str, number: int) -> None:
        self.path.write_text(text, encoding="utf-8")
        os.utime(self.path, (number, number))  # a time of its own, so that no compiled file of another text is taken

    def _run(self, tree: Path) -> None:
        code = 70
        try:
            os.setsid()
            file = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            os.chdir(tree)
            sys.path[0] = str(tree)  # it was the folder of this file
            os.environ["PYTHONPATH"] = str(tree)  # for processes that tests start
            sys.modules["__main__"] = ModuleType("__main__")  # which they would import: not this file
            import pytest

            options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--rootdir={tree}"]
            options += ["-m", "not browser and not mixins"]  # slow ones, too
            options += ["-x"] if self.mutant is not None else []
            code = int(pytest.main([*options, *self.tests], plugins=[Outcomes(self.outcomes)]))
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def overdue(self) -> bool:
        return time.monotonic() - self.started > SECONDS * (1 if self.mutant is not None else 4)

    def finish(self, code: int, number: int) -> None:
        """Note how it ended, stop what it left behind, and put the file back."""
        self.code, self.seconds = code, time.monotonic() - self.started
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        if self.text is not None:
            self._write(self.text, number)
        self.found = json.loads(self.outcomes.read_text()) if self.outcomes.exists() else {}

    def of(self, test: str) -> list[str]:
        """Outcomes of a node id, of all its parameters where it names none."""
        return [outcome for name, outcome in self.found.items() if name == test or name.startswith(f"{test}[")]


def run_all(jobs: list[Job], trees: list[Path], logs: Path, report) -> None:
    """Run jobs, one in each tree at a time."""
    waiting, running, number = list(reversed(jobs)), {}, 10**9
    while waiting or running:
        for place, tree in enumerate(trees):
            if place not in running and waiting:
                job, number = waiting.pop(), number + 2
                try:
                    job.start(tree, logs / f"{number}.log", number)
                    running[place] = job
                except (ValueError, OSError) as error:
                    job.code, job.seconds, job.found, job.error = None, 0.0, {}, str(error)
                    report(job)
        for place, job in list(running.items()):
            if job.overdue():
                os.killpg(job.pid, signal.SIGKILL)
            pid, status = os.waitpid(job.pid, os.WNOHANG)
            if pid:
                number += 2
                job.finish(os.waitstatus_to_exitcode(status), number)
                del running[place]
                report(job)
        time.sleep(0.05)


def verdict(job: Job, sound: dict[str, str]) -> tuple[str, str]:
    """("killed", "survived" or "error", by which test or why)."""
    if job.code is None:
        return "error", job.error
    if unsound := [f"{test} {sound[test]} without the defect" for test in job.tests if sound[test] != "passed"]:
        return "error", "; ".join(unsound)
    failed = [name for name, outcome in job.found.items() if outcome == "failed"]
    if job.code == 1 and failed:
        return "killed", failed[0]
    if job.code == 0:
        return "survived", ", ".join(job.tests)
    return "error", f"pytest ended with {job.code}: {job.log.read_text(encoding='utf-8')[-800:]}"


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 when every defect is noticed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, help="so many defects, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of --sample")
    parser.add_argument("--only", default="", help="defects whose room or description holds this")
    parser.add_argument("--jobs", type=int, default=2, help="defects at a time")
    args = parser.parse_args(argv)
    mutants = [m for m in load() if args.only in f"{m.room}: {m.defect}"]
    if args.sample is not None:
        mutants = random.Random(args.seed).sample(mutants, min(args.sample, len(mutants)))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["TQDM_DISABLE"] = "1"
    began = time.monotonic()
    verdicts: dict[Mutant, str] = {}
    sound: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        logs, trees = Path(folder), [Path(folder) / f"tree-{i}" for i in range(args.jobs)]
        for tree in trees:
            shutil.copytree(REPOSITORY, tree, ignore=LEFT_OUT, symlinks=True)
        import_libraries(trees[0])

        def report_sound(job: Job) -> None:
            for test in job.tests:
                outcomes = set(job.of(test)) or {"was not found"}
                sound[test] = "passed" if outcomes == {"passed"} else " and ".join(sorted(outcomes - {"passed"}))
            print(f"{job.name}: {len(job.tests)} tests without a defect, {job.seconds:.0f} s", flush=True)

        def report(job: Job) -> None:
            verdicts[job.mutant], why = verdict(job, sound)
            print(f"{verdicts[job.mutant]:8} {job.seconds:5.1f} s  {job.name}\n{'':18}{why}", flush=True)

        rooms = {m.room: sorted({test for n in mutants if n.room == m.room for test in n.tests}) for m in mutants}
        run_all([Job(room, tests) for room, tests in rooms.items()], trees, logs, report_sound)
        jobs = [Job(f"{m.room}: {m.defect}", list(m.tests), m) for m in mutants]
        run_all(jobs, trees, logs, report)

    print()
    for room in rooms:
        counts = Counter(verdicts[m] for m in mutants if m.room == room)
        print(f"{room}: {counts.total()} planted, " + ", ".join(f"{n} {name}" for name, n in sorted(counts.items())))
    killed = sum(found == "killed" for found in verdicts.values())
    print(f"{killed} of {len(mutants)} planted defects were noticed, {time.monotonic() - began:.0f} s")
    return int(killed < len(mutants))


if __name__ == "__main__":
    sys.exit(main())
