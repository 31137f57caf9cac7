"""Scripts of training/ in processes of their own, and what accelerate keeps between two in one."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
import traceback
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent


def _run_script(script: str, argv: list[str], environment: dict[str, str], log: str) -> None:
    """In a child process: run `script.main(argv)` with its output in a file."""
    from repeated_work import Unrendered

    from hf_dpssl.runs import plots

    os.environ.update(environment)
    # As in a script that a user starts; loader workers of a forkserver would outlive a killed run.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    with open(log, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.path.insert(0, str(REPOSITORY / "training"))
        sys.argv = [f"{script}.py", *argv]
        try:
            if script != "demo":
                plots.Figure = Unrendered
            module = __import__(script)
            module.main(argv)
        except BaseException as error:
            traceback.print_exc()
            code = error.code if isinstance(error, SystemExit) else 1
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code or 0)
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(0)


class Launched:
    """One or several processes that run a training script; `wait` returns the output, `kill` is SIGKILL."""

    def __init__(
        self, context, script: str, argv: list[str], num_processes: int, log: Path, environment: dict | None = None
    ):
        self.log = log
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.processes = []
        for rank in range(num_processes):
            of_rank = {}
            if num_processes > 1 or "ACCELERATE_USE_FSDP" in (environment or {}):  # as torchrun does for one, too
                of_rank = {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes),
                    "LOCAL_WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                    "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
                }  # fmt: skip
            process = context.Process(target=_run_script, args=(script, argv, (environment or {}) | of_rank, str(log)))
            process.start()
            self.processes.append(process)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def is_alive(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def wait(self, timeout: float = 300) -> str:
        """Join all processes; the combined output. AssertionError with the output when one failed."""
        deadline = time.time() + timeout
        while self.is_alive() and time.time() < deadline:
            if any(process.exitcode not in (None, 0) for process in self.processes):
                time.sleep(2)
                self.kill()
                break
            time.sleep(0.05)
        output = self.log.read_text(encoding="utf-8")
        codes = [process.exitcode for process in self.processes]
        if self.is_alive():
            self.kill()
            raise AssertionError(f"timed out after {timeout} s:\n{output}")
        assert codes == [0] * len(codes), f"exit codes {codes}:\n{output}"
        return output


def variables(config: str, *overrides) -> dict[str, str]:
    """What accelerate's launcher tells the processes of a configuration in training/accelerate, beside their ranks."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    argv = ["--config_file", REPOSITORY / "training/accelerate" / config, *overrides, "script.py"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(list(map(str, argv))))
    given = prepare_multi_gpu_env(args)
    return {name: value for name, value in given.items() if os.environ.get(name) != value}


def forget_accelerator() -> None:
    """accelerate keeps precision and accumulation of the first run of a process."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
