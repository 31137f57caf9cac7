"""The command line: from the checkout, and from a wheel in an empty folder."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from urllib.error import URLError

import contrastive
import pytest
import torch
import yaml
from forked_processes import run_forked
from huggingface_hub import constants
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled
from launches import forget_accelerator
from safetensors import SafetensorError
from tiny_checkpoints import save_checkpoints

from hf_dpssl.cli.commands import COMMANDS, main
from hf_dpssl.cli.errors import reported
from hf_dpssl.evaluation import MODULES
from hf_dpssl.hub.publishing import push
from hf_dpssl.runs.results import environment
from hf_dpssl.runs.shipped_folders import shipped_folder

REPOSITORY = Path(__file__).parents[2]
SHORT = ["--max_train_steps", "2", "--batch_size", "16", "--output_dir"]


def run(*argv, cwd: Path, python_path: Path | None = None, start=run_forked) -> str:
    """`hf-dpssl ARGV` in a process as good as fresh; its output, or an AssertionError with it."""
    paths = [] if python_path is None else [str(python_path)]
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables |= {"PYTHONPATH": os.pathsep.join(paths)} if paths else {}
    done = start(["-m", "hf_dpssl.cli", *map(str, argv)], cwd, variables)
    assert done.returncode == 0, f"exit code {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def run_fresh(argv: list[str], cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess:
    command = [sys.executable, *argv]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def test_help_names_every_subcommand(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n    {name} " in printed and command.help in printed for name, command in COMMANDS.items())


def test_help_of_a_command_explains_it_and_shows_an_example_of_its_flags(capsys):
    for name, command in COMMANDS.items():
        assert main([name, "--help"]) == 0
        usage, _, example = capsys.readouterr().out.partition("\nexample:\n")
        assert example == f"  hf-dpssl {name} {command.example}\n"
        flags = [word for word in example.split() if word.startswith("--")]
        assert name in ("train", "rehearse") or all(flag in usage for flag in flags), name
        sentences = [line for line in usage.partition("\n\n")[2].splitlines() if line[:1].isupper()]
        assert sentences, f"{name}: no line says what it does"


def test_env_prints_machine_and_versions_also_as_json(capsys):
    assert main(["env"]) == 0
    assert f"torch           {torch.__version__.partition('+')[0]}" in capsys.readouterr().out
    assert main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == environment()


def test_wrong_command_line_ends_with_status_2(capsys):
    lines = ["", "nonsense", "env --nonsense", "train nonsense", "export", "import x --z", "train dae_vq --arm x"]
    for line in lines:
        with pytest.raises(SystemExit) as ended:
            main(line.split())
        assert ended.value.code == 2 and "usage:" in capsys.readouterr().err, line


def test_train_without_script_and_with_unknown_config_say_what_there_is(capsys):
    assert main(["train"]) == 2
    assert "contrastive" in capsys.readouterr().err
    assert main(["train", "contrastive", "--accelerate_config", "tpu_512"]) == 2
    assert "cpu_2_processes" in capsys.readouterr().err


BAD_INPUT = [
    ("evaluate {missing}", "missing"),
    ("report {missing} --output_dir {new}", "missing"),
    ("sample {missing} --output_dir {new}", "missing"),
    ("embed {missing} digits --output_dir {new}", "missing"),
    ("search {missing} picture.png", "missing"),
    ("rank {missing} --zoo encoder --output_dir {new}", "missing"),
    ("import {missing} --output_dir {new}", "missing"),
    ("export {missing} --format timm --output_dir {new}", "missing is no folder"),
    ("export {empty} --format timm --output_dir {new}", "is no finished checkpoint"),
    ("push {missing} org/name", "missing is no finished checkpoint"),
    ("push {empty} org/name", "is no finished checkpoint"),
    ("pull not/an/id --output_dir {new}", "Repo id must be in the form"),
    ("card {missing}", "missing"),
    ("info {missing}", "missing"),
    ("space matching_lab --demo {missing}", "no folder"),
]


def test_bad_input_is_one_line_on_stderr_and_status_2(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    places = {name: tmp_path / name for name in ("missing", "empty", "new")}
    for line, words in BAD_INPUT:
        argv = line.format(**places).split()
        assert main(argv) == 2, line
        printed = capsys.readouterr()
        assert printed.out == "" and len(printed.err.strip().splitlines()) == 1, line
        assert printed.err.startswith(f"hf-dpssl {argv[0]}: ") and words in printed.err, line
        assert not (tmp_path / "new").exists(), line


def test_a_hub_that_cannot_be_reached_is_a_failure_of_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for argv in (["pull", "org/model"], ["export", "org/model", "--format", "timm"]):
        assert main([*argv, "--output_dir", str(tmp_path / "new")]) == 1
        printed = capsys.readouterr().err.strip().splitlines()[-1]
        assert printed.startswith(
            f"hf-dpssl {argv[0]}: cannot pull org/model at revision 'main' from http://127.0.0.1:9"
        )
    assert not (tmp_path / "new").exists()


def test_pull_tells_what_it_did_as_json(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    push(save_checkpoints(tmp_path, ("gan",))["gan"], "org/gan")
    target = str(tmp_path / "pulled")
    capsys.readouterr()
    assert main(["pull", "org/gan", "--output_dir", target, "--json"]) == 0
    about = {"repo_id": "org/gan", "revision": "main", "output_dir": target, "difference": 0}
    assert json.loads(capsys.readouterr().out) == about and (tmp_path / "pulled/model.safetensors").is_file()


def test_debug_shows_the_traceback(tmp_path, monkeypatch):
    missing, new = str(tmp_path / "missing"), ["--output_dir", str(tmp_path / "new")]
    commands = [
        ["export", missing, "--format", "timm", *new],
        ["embed", missing, missing, *new],
        ["search", missing, missing],
        ["report", missing, *new],
    ]
    for argv in commands:
        monkeypatch.setenv("DPSSL_DEBUG", "1")
        with pytest.raises((FileNotFoundError, ValueError)):
            main(argv)
        monkeypatch.setenv("DPSSL_DEBUG", "0")
        assert main(argv) == 2
        with pytest.raises((FileNotFoundError, ValueError)):
            main([*argv, "--debug"])
        assert os.environ["DPSSL_DEBUG"] == "1"


def raise_it(error: Exception):
    raise error


def test_status_tells_bad_input_from_a_failure_and_a_bug_keeps_its_traceback(capsys, monkeypatch):
    monkeypatch.setenv("DPSSL_DEBUG", "0")
    bad = [ValueError("a"), FileNotFoundError("a"), ImportError("a"), SafetensorError("a")]
    failures = [HTTPError("a"), TimeoutError("a"), OfflineModeIsEnabled("a"), URLError("a")]
    for errors, status in ((bad, 2), (failures, 1), ([KeyboardInterrupt()], 130)):
        for error in errors:
            assert reported("program", lambda error=error: raise_it(error)) == status, error
            assert capsys.readouterr().err.count("\n") == 1
    for error in (KeyError("a"), TypeError("a"), RuntimeError("of another library")):
        with pytest.raises(type(error)):
            reported("program", lambda error=error: raise_it(error))


def test_a_training_script_reports_what_is_wrong_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DPSSL_DEBUG", "0")
    cases = {
        f"--dataset {tmp_path}/nowhere": (2, "nowhere"),
        "--num_processes 2": (1, "2 processes were asked for, but this run has 1"),
    }
    for line, (status, words) in cases.items():
        argv = [*line.split(), *SHORT, str(tmp_path / "run")]
        assert reported("contrastive.py", lambda argv=argv: contrastive.main(argv)) == status
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("contrastive.py: ") and words in last
        assert not (tmp_path / "run" / "encoder").exists()
        forget_accelerator()


def test_map_takes_a_data_set_before_its_flags(monkeypatch, capsys):
    started = []
    monkeypatch.setattr("hf_dpssl.cli.map.run_script", lambda name, argv: started.append((name, argv)) or 0)
    assert main(["map", "digitz", "--stage_1_epochs", "1"]) == 0 and main(["map", "--seed", "1"]) == 0
    first = ["--dataset", "digitz", "--stage_1_epochs", "1"]
    assert started == [("map", first), ("map", ["--seed", "1"])]
    with pytest.raises(SystemExit):
        main(["map", "--stage_1_epochs", "0"])
    assert "--stage_1_epochs must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.extended
def test_shipped_cpu_config_really_starts_two_processes(tmp_path):
    argv = ["train", "contrastive", "--accelerate_config", "cpu_2_processes", "--num_processes", 2]
    run(*argv, *SHORT, tmp_path / "two", cwd=tmp_path, start=run_fresh)
    assert json.loads((tmp_path / "two/encoder/config.json").read_text())["dpssl"]["steps"] == 2


def test_accelerate_reads_the_shipped_configs_and_keeps_what_they_say():
    from accelerate.commands.config.config_args import load_config_from_file

    paths = sorted((shipped_folder("training") / "accelerate").glob("*.yaml"))
    assert paths
    for path in paths:
        written, read = yaml.safe_load(path.read_text(encoding="utf-8")), load_config_from_file(str(path))
        assert {name: str(getattr(read, name)).split(".")[-1] for name in written} == {
            name: str(value) for name, value in written.items()
        }
        assert f"{written['num_processes']}" in path.stem and path.name in path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_wheel_holds_scripts_recipes_card_templates_and_spaces_and_no_tests(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for folder in ("training", "model_cards", "spaces"):
        packed = f"_{folder}"
        tracked = [p for p in (REPOSITORY / folder).rglob("*.*") if p.suffix in (".py", ".yaml", ".md", ".txt")]
        expected = {f"hf_dpssl/{packed}/{p.relative_to(REPOSITORY / folder).as_posix()}" for p in tracked}
        assert expected and expected <= set(names)
    assert not [name for name in names if "test" in name or "__pycache__" in name]
    assert {
        "hf_dpssl/py.typed",
        "hf_dpssl/autoencoder/forecast.json",
        *(f"hf_dpssl/evaluation/modules/{name}.py" for name in MODULES),
    } <= set(names)


def test_wheel_trains_writes_a_card_and_names_its_spaces_from_an_empty_folder(wheel, tmp_path):
    site, empty = tmp_path / "site", tmp_path / "empty"
    zipfile.ZipFile(wheel).extractall(site)
    empty.mkdir()
    located = subprocess.run(
        [sys.executable, "-c", "import hf_dpssl; print(hf_dpssl.__file__)"],
        cwd=empty, env=os.environ | {"PYTHONPATH": str(site)}, capture_output=True, text=True,
    )  # fmt: skip
    assert located.stdout.startswith(str(site)), "another copy of the package was imported"
    printed = run("train", "contrastive", "--recipe", "digits", "--quiet", *SHORT, "run", cwd=empty, python_path=site)
    assert not re.search(r"\d%|contrastive|encoder", printed), printed  # neither bars nor lines of progress
    assert "t-SimCLR on digits" in (empty / "run/encoder/README.md").read_text(encoding="utf-8")
    printed = run("space", "--help", cwd=empty, python_path=site)
    for name in ("matching_lab", "image_generator", "latent_lab", "encoder_explorer"):
        assert name in printed
        assert (site / f"hf_dpssl/_spaces/{name}/requirements.txt").is_file()
    assert [path.name for path in empty.iterdir()] == ["run"]


@pytest.mark.extended
def test_a_reader_that_stops_early_ends_a_command_quietly(tmp_path):
    """As `hf-dpssl env | head -1`: nothing on stderr, and no broken status."""
    command = f"{sys.executable} -m hf_dpssl.cli env --json | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["{", "0"] and done.stderr == ""
