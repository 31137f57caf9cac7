"""Shared fixtures: tiny real models, and scripts run in fresh processes that have torch imported already."""

from __future__ import annotations

import copy
import functools
import gc
import importlib
import multiprocessing.forkserver
import os
import random
import signal
import sys
import traceback
import warnings
from pathlib import Path

import pytest
from launches import REPOSITORY, Launched, forget_accelerator

sys.path.insert(0, str(REPOSITORY / "training"))

gc.disable()  # until all tests and what they import are read: there is no garbage in it, and much to walk
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: more threads are several times slower
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs in its background
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption("--sample", type=int, help="run so many of the tests that are selected")
    parser.addoption("--sample_seed", type=int, default=0, help="which of them")


@pytest.hookimpl(trylast=True)  # after those are left out that marks and words leave out
def pytest_collection_modifyitems(config, items):
    """Leave all but a sample out, where one is asked for."""
    size = config.getoption("sample")
    if size is not None and size < len(items):
        chosen = set(random.Random(config.getoption("sample_seed")).sample(range(len(items)), size))
        config.hook.pytest_deselected(items=[item for number, item in enumerate(items) if number not in chosen])
        items[:] = [item for number, item in enumerate(items) if number in chosen]


def pytest_collection_finish():
    """Digits are decoded once; modules stay to the end, and no later collection of garbage walks them."""
    from repeated_work import keep_decoded_digits

    keep_decoded_digits()
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True, scope="module")
def seeded_module():
    """What a module's fixtures draw does not depend on the modules before."""
    from cases import seed_generators

    seed_generators()


@pytest.fixture(autouse=True)
def seeded_test(seeded_module):
    """Draws without a seed of their own are the same in every run, so that a test does not fail by chance."""
    from cases import seed_generators

    seed_generators()


@pytest.fixture(scope="session")
def fork_server():
    """A multiprocessing context whose children start with libraries and data imported but nothing run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    with pytest.MonkeyPatch.context() as patched:  # where it finds that module: it does not get our sys.path
        patched.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        multiprocessing.forkserver.ensure_running()
    return context


@pytest.fixture
def launch(fork_server, tmp_path):
    """launch(script, argv, num_processes=1, **environment) -> Launched, for a script of training/."""
    started = []

    def start(script: str, argv: list[str], num_processes: int = 1, **environment: str) -> Launched:
        log = tmp_path / f"{script}-{len(started)}.log"
        started.append(Launched(fork_server, script, [str(a) for a in argv], num_processes, log, environment))
        return started[-1]

    yield start
    for launched in started:
        launched.kill()


def _run_case(case, log: Path) -> None:
    try:
        case()
        log.write_text("passed", encoding="utf-8")
    except BaseException:
        log.write_text(traceback.format_exc(), encoding="utf-8")
    os._exit(0)


@pytest.fixture
def rehearse(fork_server, tmp_path):
    """rehearse(case): run it in a process that ends with it, since autograd is told of devices that are not there."""

    def run(case):
        log = tmp_path / "log"
        process = fork_server.Process(target=_run_case, args=(case, log))
        process.start()
        process.join(300)
        process.kill()
        assert log.is_file(), f"the process ended with {process.exitcode}"
        if (said := log.read_text(encoding="utf-8")) != "passed":
            pytest.fail(said)

    return run


@pytest.fixture(scope="session")
def spawn_forked(fork_server):
    """`torch.multiprocessing.spawn` whose processes are forks with the libraries imported."""
    from torch.multiprocessing import start_processes

    return functools.partial(start_processes, start_method="forkserver")


@pytest.fixture
def forked_shares(spawn_forked, monkeypatch):
    """What `divide_work` starts are forks; that it starts fresh processes is tested with it."""
    from hf_dpssl.runs import local_processes

    monkeypatch.setattr(local_processes, "spawn", spawn_forked)


@pytest.fixture
def drawn():
    """Training curves are rendered in this test."""


@pytest.fixture
def run_script(monkeypatch, capsys, request):
    """run_script(script, argv) -> what it printed, of a script of training/ run to its end; its errors are raised."""
    from repeated_work import Unrendered, keep_counted_operations

    from hf_dpssl.runs import plots

    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(plots, "Figure", Unrendered)

    def run(script: str, argv: list) -> str:
        argv = [str(item) for item in argv]
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *argv])
        capsys.readouterr()
        forget_accelerator()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("default")  # here warnings of ours are errors, for a user they are not
                module = importlib.import_module(script)
                if script == "dae_vq":
                    monkeypatch.setattr(module, "step_flops", keep_counted_operations())
                module.main(argv)
        finally:
            forget_accelerator()
        printed = capsys.readouterr()
        return printed.out + printed.err

    return run


@pytest.fixture
def refusal(run_script, capsys):
    """refusal(script, argv) -> the message with which a script ends; AssertionError when it does not."""

    def run(script: str, argv: list) -> str:
        try:
            run_script(script, argv)
        except SystemExit as error:
            assert error.code, f"{script} {argv} ended without an error"
            return " ".join(f"{error} {capsys.readouterr().err}".split())
        except (ValueError, RuntimeError, OSError, ImportError, ArithmeticError) as error:
            return str(error)
        raise AssertionError(f"{script} {argv} was not refused")

    return run


@pytest.fixture
def starts(monkeypatch):
    """By name of a training loop: copies of the modules it trains, by name, as they were before its first step."""
    import torch

    from hf_dpssl.runs.training_loop import TrainingLoop

    found: dict[str, dict] = {}
    keep = TrainingLoop.keep

    def copy_and_keep(loop, **objects):
        modules = {name: value for name, value in objects.items() if isinstance(value, torch.nn.Module)}
        found[loop.name] = {name: copy.deepcopy(loop.accelerator.unwrap_model(m)) for name, m in modules.items()}
        keep(loop, **objects)

    monkeypatch.setattr(TrainingLoop, "keep", copy_and_keep)
    return found


@pytest.fixture
def hub(monkeypatch):
    """A local Hub that is this process's Hub, by Git LFS, with the token of somebody who may write."""
    from hub_server_write import TOKEN, WritableHub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with WritableHub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)  # made of ENDPOINT on import
        yield server


@pytest.fixture
def data_folder() -> Path:
    """The folder of real local data sets; the test is skipped where DPSSL_DATA is not set."""
    folder = os.environ.get("DPSSL_DATA")
    if not folder:
        pytest.skip("DPSSL_DATA is not set")
    return Path(folder)


def _run_as_one_of_two(rank: int, case, arguments: tuple, folder: str) -> None:
    """In a child process: join a gloo group of two, run one case, and save what it returns."""
    import torch

    try:
        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
        result = {"world_size": torch.tensor(torch.distributed.get_world_size())} | case(*arguments)
        torch.save(result, os.path.join(folder, f"{rank}.pt"))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except BaseException:
        Path(folder, f"{rank}.error").write_text(traceback.format_exc(), encoding="utf-8")
        os._exit(1)


@pytest.fixture(scope="session")
def run_in_two(fork_server, tmp_path_factory):
    """run_in_two(case, *arguments) -> tensors by name of both processes, after checking that there were two."""
    import torch

    def run(case, *arguments) -> list[dict]:
        folder = tmp_path_factory.mktemp("two_processes")
        processes = [
            fork_server.Process(target=_run_as_one_of_two, args=(rank, case, arguments, str(folder)))
            for rank in range(2)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
        for process in processes:
            process.kill()
        errors = [path.read_text() for path in folder.glob("*.error")]
        assert not errors, "\n".join(errors)
        assert [process.exitcode for process in processes] == [0, 0]
        results = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
        assert [int(result.pop("world_size")) for result in results] == [2, 2]
        return results

    return run
