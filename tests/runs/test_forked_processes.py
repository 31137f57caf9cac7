"""Forks that the tests take for fresh interpreters have what those have, and end as they do."""

import json
import os
import signal
import subprocess
import sys

import pytest
from cases import for_each
from forked_processes import NEVER, Forked, run_forked

SHOW = """
import json, os, sys, tempfile
known = dict(os.environ)
from huggingface_hub import constants
import __main__
found = [known, sys.argv[1:], sys.path[1:], os.path.abspath(sys.path[0]), os.getcwd(), tempfile.gettempdir()]
found += [__name__, __main__.__name__, vars(__main__) is globals(), constants.ENDPOINT, constants.HF_HOME]
found += [constants.is_offline_mode() if hasattr(constants, "is_offline_mode") else constants.HF_HUB_OFFLINE]
print(json.dumps(found))
print("to the other", file=sys.stderr)
"""


@for_each("kind", ["-c", "-m", "script"])
def test_a_fork_has_environment_folder_arguments_and_paths_of_a_fresh_interpreter(kind, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / "shown.py").write_text(SHOW)
    (tmp_path / "there" / "shown.py").write_text(SHOW)
    argv = {"-c": ["-c", SHOW], "-m": ["-m", "shown"], "script": [str(tmp_path / "place" / "shown.py")]}[kind]
    more = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": "http://127.0.0.1:9", "TMPDIR": str(tmp_path)}
    more |= {"PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1", "ORT_DISABLE_TELEMETRY": "1"}
    environment = {name: value for name, value in os.environ.items() if name != "HOME"} | more
    options = {"cwd": tmp_path / "there", "env": environment}
    command = [sys.executable, *argv, "a", "--b"]
    fresh = subprocess.run(command, **options, capture_output=True, text=True, timeout=100)
    forked = run_forked([*argv, "a", "--b"], **options)
    assert fresh.returncode == 0, fresh.stderr
    assert json.loads(forked.stdout) == json.loads(fresh.stdout)
    assert forked.stderr == fresh.stderr == "to the other\n"
    assert "HOME" not in json.loads(forked.stdout)[0] and json.loads(forked.stdout)[-3:-1] == [
        "http://127.0.0.1:9",
        str(tmp_path / "home"),
    ]


@for_each(
    "code",
    [
        "raise SystemExit",
        "raise SystemExit(3)",
        "raise SystemExit('a reason')",
        "import atexit, threading; atexit.register(print, 'at the end'); threading.Timer(0.1, print, ['late']).start()",
        "import os, sys; print('lost', end=''); os._exit(5)",
        "import os; os.kill(os.getpid(), 9)",
    ],
)
def test_a_fork_ends_as_a_fresh_interpreter(code, tmp_path):
    fresh = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    forked = run_forked(["-c", code], tmp_path)
    assert (forked.returncode, forked.stdout, forked.stderr) == (fresh.returncode, fresh.stdout, fresh.stderr)


def test_an_error_of_a_fork_is_its_traceback_and_status(tmp_path):
    forked = run_forked(["-c", "import no_such_module"], tmp_path)
    assert forked.returncode == 1 and forked.stderr.endswith("ModuleNotFoundError: No module named 'no_such_module'\n")


def test_a_fork_holds_other_libraries_and_nothing_of_an_earlier_fork(tmp_path):
    found = "import sys, json; print(json.dumps([hasattr(sys, 'left'), 'torch' in sys.modules, sorted(sys.modules)]))"
    run_forked(["-c", "import sys, huggingface_hub; sys.left = 1"], tmp_path)
    left, torch, modules = json.loads(run_forked(["-c", found], tmp_path).stdout)
    assert not left and torch and not NEVER & {name.partition(".")[0] for name in modules}


def test_forks_take_signals_beside_each_other_and_variables_that_were_read_already_are_refused(tmp_path):
    code = "import time; open('begun', 'w').close(); time.sleep(100)"
    one, two = (
        Forked(["-c", code], tmp_path, dict(os.environ), tmp_path / f"{name}-out", tmp_path / f"{name}-err")
        for name in ("one", "two")
    )
    assert one.poll() is None and two.poll() is None
    two.kill()
    assert two.wait(60) == -signal.SIGKILL and one.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        one.wait(0.01)
    one.send_signal(signal.SIGTERM)
    assert one.wait(60) == -signal.SIGTERM
    with pytest.raises(AssertionError, match="OMP_NUM_THREADS"):
        run_forked(["-c", ""], tmp_path, os.environ | {"OMP_NUM_THREADS": "7"})


def of_a_launch(queue) -> None:
    """In a child process: which modules are there."""
    queue.put([name in sys.modules for name in ("preloaded", "torchmetrics.image", "hf_dpssl.runs.training_loop")])


def test_training_scripts_fork_with_the_libraries_imported(fork_server):
    queue = fork_server.Queue()
    process = fork_server.Process(target=of_a_launch, args=(queue,))
    process.start()
    assert queue.get(timeout=100) == [True, True, True]
    process.join()
