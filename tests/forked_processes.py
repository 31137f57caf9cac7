"""Interpreters as good as fresh, in a tenth of a second: forks of a process that has imported other libraries only.

That process has one thread and nothing but libraries that read no variable of a Hub, a cache or a proxy when they are
imported; it never imports hf_dpssl. A child gets its own environment, folder, arguments, module search path and
output, and ends as an interpreter does. Truly fresh processes remain where a test's claim is about starting one.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

PRELOADED = [
    "torch", "torch._dynamo", "torchvision", "sklearn.datasets", "sklearn.metrics", "scipy.stats", "pandas",
    "safetensors.torch", "PIL.Image", "yaml", "jinja2", "requests", "httpx", "pyarrow.parquet", "fastapi", "uvicorn",
    "onnxruntime",
]  # fmt: skip
# What reads the Hub's variables when it is imported, and what a test is about.
NEVER = {"hf_dpssl", "huggingface_hub", "transformers", "diffusers", "timm", "datasets", "gradio", "accelerate"}
# What the preloaded libraries and the interpreter have read already: a child cannot have its own.
READ = re.compile("OMP_|MKL_|OPENBLAS_|KMP_|(PY)?TORCH_|CUDA_|LD_|ORT_|TQDM_|PYTHON(?!PATH$)")


class Forks:
    """The process that forks, started with the first child and ended with this one."""

    def __init__(self):
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.environment = environment | {"ORT_DISABLE_TELEMETRY": "1"}
        command, pipe = [sys.executable, "-s", __file__], subprocess.PIPE
        self.process = subprocess.Popen(
            command, env=self.environment, stdin=pipe, stdout=pipe, text=True, cwd=tempfile.gettempdir()
        )
        atexit.register(self.close)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(30)

    def ask(self, **job):
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the process that forks has ended"
        return json.loads(line)


class Forked:
    """A child, with the few methods of `subprocess.Popen` that the tests use; its output goes to a file each."""

    def __init__(self, argv: list, cwd, env: dict[str, str], out: Path, err: Path):
        env = env | {"ORT_DISABLE_TELEMETRY": "1"}
        before = forks().environment
        read = [name for name in {*env, *before} if env.get(name) != before.get(name) and READ.match(name)]
        assert not read, f"a fresh process is needed for other values of {read}"
        argv = [str(word) for word in argv]
        self.pid = forks().ask(argv=argv, cwd=str(cwd), env=env, outputs=[str(out), str(err)])
        self.returncode = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = forks().ask(poll=self.pid)
        return self.returncode

    def wait(self, timeout: float) -> int:
        end, pause = time.monotonic() + timeout, 0.002
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("a forked process", timeout)
            time.sleep(pause)
            pause = min(0.05, 1.3 * pause)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@functools.cache
def forks() -> Forks:
    return Forks()


def run_forked(argv: list, cwd=None, env: dict | None = None, timeout: float = 300) -> subprocess.CompletedProcess:
    """What `subprocess.run([sys.executable, *argv])` gives, its output as text; argv begins with -c, -m or a script."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = (Path(folder, name) for name in ("out", "err"))
        process = Forked(argv, cwd or os.getcwd(), dict(os.environ if env is None else env), out, err)
        try:
            status = process.wait(timeout)
        finally:
            process.kill()
        return subprocess.CompletedProcess(argv, status, *(file.read_text(errors="replace") for file in (out, err)))


def serve() -> dict | None:
    """In the process that forks: a fork for each job. In a child: its job; None at the end of the jobs."""
    import gc
    import importlib

    gc.disable()
    for name in PRELOADED:
        try:
            importlib.import_module(name)
        except ImportError:  # an optional one
            pass
    imported = {name.partition(".")[0] for name in sys.modules} & NEVER
    assert not imported, f"imported before the fork: {imported}"
    assert threading.active_count() == 1, threading.enumerate()
    gc.collect()
    gc.freeze()
    gc.enable()
    replies = os.dup(1)
    os.set_inheritable(replies, False)
    os.dup2(2, 1)
    for line in sys.stdin:
        job = json.loads(line)
        if "poll" in job:
            child, status = os.waitpid(job["poll"], os.WNOHANG)
            reply = os.waitstatus_to_exitcode(status) if child else None
        else:
            reply = os.fork()
            if not reply:
                os.close(replies)
                return job
        os.write(replies, f"{json.dumps(reply)}\n".encode())
    return None


def become(job: dict):
    """In a child: what an interpreter that is started so has before its first line; what runs that line."""
    import importlib
    import runpy
    import types

    import numpy

    for number, place in enumerate([os.devnull, *job["outputs"]]):
        file = os.open(place, os.O_RDWR | os.O_CREAT | os.O_TRUNC if number else os.O_RDONLY, 0o600)
        os.dup2(file, number)
        os.close(file)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    tempfile.tempdir = None
    numpy.random.seed()
    first, *rest = job["argv"]
    place = {"-c": "", "-m": os.getcwd()}.get(first, os.path.dirname(os.path.abspath(first)))
    found = os.environ.get("PYTHONPATH")
    sys.path[:] = [place, *(found.split(os.pathsep) if found else []), *sys.path[1:]]  # this script's folder was first
    importlib.invalidate_caches()
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__builtins__ = __builtins__
    if first == "-c":
        code, *words = rest
        sys.argv = ["-c", *words]
        return functools.partial(exec, compile(code, "<string>", "exec"), main.__dict__)
    if first == "-m":
        module, *words = rest
        sys.argv = [module, *words]
        return functools.partial(runpy.run_module, module, run_name="__main__", alter_sys=True)
    sys.argv = job["argv"]
    return functools.partial(runpy.run_path, first, run_name="__main__")


def end(run) -> int:
    """In a child: its status once its code has run, and what interpreters do at their end but tearing modules down."""
    status = 0
    try:
        run()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if not isinstance(error.code, int | None):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return status & 255


if __name__ == "__main__" and (job := serve()):
    os._exit(end(become(job)))
