"""How commands end, by themselves, an error, Ctrl-C or SIGTERM: no temporary folder stays; and without a reader."""

import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

import dae_dit
import pytest
from cases import for_each
from hub_server_write import TOKEN, refused
from huggingface_hub import constants
from pictures import encoded, noise
from tiny_checkpoints import save_checkpoints

from hf_dpssl.cli.commands import main
from hf_dpssl.hub.publishing import push
from hf_dpssl.runs.recipe import save_recipe


def run_command(argv: list[str], temporary: str, endpoint: str | None = None) -> None:
    """In a child process: a command, with its own temporary folder and the local Hub."""
    os.environ |= {"TMPDIR": temporary, "HF_TOKEN": TOKEN}
    tempfile.tempdir = temporary
    if endpoint is not None:
        constants.ENDPOINT, constants.HF_HUB_DISABLE_XET = endpoint, True
        constants.HUGGINGFACE_CO_URL_TEMPLATE = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        constants.HF_HUB_CACHE = f"{Path(temporary).parent}/cache"
    sys.exit(main(argv))


@pytest.fixture
def start(fork_server, tmp_path):
    """start(argv, endpoint=None) -> the process of a command, and its temporary folder."""
    started = []

    def run(argv: list, endpoint: str | None = None):
        temporary = tmp_path / f"temporary-{len(started)}"
        temporary.mkdir()
        process = fork_server.Process(target=run_command, args=([str(a) for a in argv], str(temporary), endpoint))
        process.start()
        started.append(process)
        return process, temporary

    yield run
    for process in started:
        process.kill()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = save_checkpoints(tmp_path_factory.mktemp("finished"), ("dit",))["dit"]
    save_recipe(dae_dit.DiTArguments(), folder / "recipe.yaml")
    return folder


ENDINGS = {
    "SIGTERM": 143,
    "Ctrl-C": 130,
    "error": 1,
    "by itself": 0,
}  # after the last one there is nothing left to push
SIGNALS = {"Ctrl-C": signal.SIGINT, "SIGTERM": signal.SIGTERM}


def folders_in(temporary: Path) -> list[Path]:
    return [path for path in temporary.iterdir() if path.is_dir()]


def wait_for(condition, process) -> None:
    """Until the condition holds or the process has ended."""
    while not condition() and process.is_alive():
        time.sleep(0.01)


@pytest.mark.extended
@for_each("command", ["push", "pull"])
def test_push_and_pull_leave_no_temporary_folder_however_they_end(hub, start, checkpoint, tmp_path, command):
    push(checkpoint, "org/there")
    pulled = tmp_path / "pulled"
    argv, route = {
        "push": (["push", checkpoint, "org/new"], "_commit"),
        "pull": (["pull", "org/there", "--output_dir", pulled], "_resolve"),
    }[command]
    for ending, status in ENDINGS.items():
        reached = []

        def never_answered(handler, proceed, reached=reached) -> None:
            reached.append(True)
            time.sleep(1)
            handler.hang_up()

        fault = {"by itself": None, "error": refused(501)}.get(ending, never_answered)
        hub.faults = {route: [fault] * 50} if fault else {}
        process, temporary = start(argv, hub.endpoint)
        if ending in SIGNALS:
            wait_for(lambda reached=reached: reached, process)
            os.kill(process.pid, SIGNALS[ending])
        process.join(120)
        assert process.exitcode == status, ending
        assert folders_in(temporary) == [], ending
        assert pulled.exists() == (command == "pull" and ending == "by itself")
        assert not list(tmp_path.glob("*.tmp*")) and not list(tmp_path.glob(".*")), ending
        hub.faults = {}


def test_card_leaves_no_temporary_folder_whether_it_is_written_or_not(start, checkpoint, tmp_path):
    for folder, status in ((checkpoint, 0), (tmp_path / "missing", 2)):
        process, temporary = start(["card", folder])
        process.join(120)
        assert process.exitcode == status and folders_in(temporary) == []


def run_without_reader(folder: str, commands: list[list[str]]) -> None:
    """In a child process: commands whose standard output nobody reads, one after the other; what they say of it."""
    os.dup2(os.open(f"{folder}/stderr", os.O_WRONLY | os.O_CREAT), 2)
    for argv in commands:
        read, write = os.pipe()
        os.close(read)
        os.dup2(write, 1)
        sys.stdout = open(1, "w", closefd=False)
        try:
            status = main(argv)
        except SystemExit as ended:
            status = ended.code
        os.write(2, f"{argv[0]}: {status}\n".encode())


@pytest.mark.extended
def test_a_reader_that_has_gone_ends_every_command_that_prints_much_quietly(fork_server, checkpoint, tmp_path):
    (tmp_path / "pictures").mkdir()
    for i in range(4):
        (tmp_path / "pictures" / f"{i}.png").write_bytes(encoded(noise(i, 16, 16)))
    encoder = save_checkpoints(tmp_path, ("encoder",))["encoder"]
    embeddings = str(tmp_path / "embeddings")
    assert main(["embed", str(encoder), str(tmp_path / "pictures"), "--output_dir", embeddings]) == 0
    commands = [
        ["env"],
        ["env", "--json"],
        ["info", str(checkpoint)],
        ["info", str(checkpoint), "--json"],
        ["push", str(checkpoint), "org/new", "--dry_run"],
        ["push", str(checkpoint), "org/new", "--dry_run", "--json"],
        ["search", embeddings, str(tmp_path / "pictures" / "0.png"), "--k", "2"],
        ["search", embeddings, str(tmp_path / "pictures" / "0.png"), "--k", "2", "--json"],
        ["train", "dae_dit", "--help"],
        ["--help"],
    ]
    process = fork_server.Process(target=run_without_reader, args=(str(tmp_path), commands))
    process.start()
    process.join(120)
    said = (tmp_path / "stderr").read_text()
    assert "Broken" not in said and "Traceback" not in said
    assert [line for line in said.splitlines() if re.fullmatch(r"[\w-]+: \d+", line)] == [
        f"{c[0]}: 0" for c in commands
    ]
