"""The command line: from the checkout, and from a wheel in an empty folder."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

from hf_dpssl.cli import main
from hf_dpssl.evaluation import MODULES
from hf_dpssl.recipe import training_folder
from hf_dpssl.results import environment

REPOSITORY = Path(__file__).parent.parent
SHORT = ["--max_train_steps", "2", "--batch_size", "16", "--output_dir"]


def run(*argv, cwd: Path, python_path: Path | None = None) -> str:
    """`hf-dpssl ARGV` in a fresh process; its output, or an AssertionError with it."""
    paths = [] if python_path is None else [str(python_path)]
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables |= {"PYTHONPATH": os.pathsep.join(paths)} if paths else {}
    command = [sys.executable, "-m", "hf_dpssl.cli", *map(str, argv)]
    done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"exit code {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def test_help_names_every_subcommand(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    commands = ("demo", "train", "evaluate", "sample", "map", "embed", "search", "import", "env")
    assert all(f"\n    {command} " in printed for command in commands)


def test_env_prints_machine_and_versions_also_as_json(capsys):
    assert main(["env"]) == 0
    assert f"torch           {torch.__version__.partition('+')[0]}" in capsys.readouterr().out
    assert main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == environment()


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["env", "--nonsense"], ["train", "nonsense"]])
def test_wrong_command_line_ends_with_status_2(argv, capsys):
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2 and "usage:" in capsys.readouterr().err


def test_train_without_script_and_with_unknown_config_say_what_there_is(capsys):
    assert main(["train"]) == 2
    assert "contrastive" in capsys.readouterr().out
    assert main(["train", "contrastive", "--accelerate_config", "tpu_512"]) == 2
    assert "cpu_2_processes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--stage_1_epochs", "0"], "--stage_1_epochs must be at least 1, got 0"),
        pytest.param(["digitz", "--stage_1_epochs", "1"], "Did you mean digits?", marks=pytest.mark.slow),
    ],
)
def test_map_takes_a_data_set_or_none_before_its_flags(argv, message, capfd):
    assert main(["map", *argv]) != 0
    assert message in capfd.readouterr().err


def test_shipped_cpu_config_really_starts_two_processes(tmp_path):
    argv = ["train", "contrastive", "--accelerate_config", "cpu_2_processes", "--num_processes", 2]
    run(*argv, *SHORT, tmp_path / "two", cwd=tmp_path)
    assert json.loads((tmp_path / "two/encoder/config.json").read_text())["dpssl"]["steps"] == 2


def test_one_process_where_two_were_asked_for_is_an_error(tmp_path):
    with pytest.raises(AssertionError, match="2 processes were asked for, but this run has 1"):
        run("train", "contrastive", "--num_processes", 2, *SHORT, tmp_path / "one", cwd=tmp_path)
    assert not (tmp_path / "one/encoder").exists()


@pytest.mark.parametrize("path", sorted((training_folder() / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_the_shipped_config_and_keeps_what_it_says(path):
    from accelerate.commands.config.config_args import load_config_from_file

    written, read = yaml.safe_load(path.read_text(encoding="utf-8")), load_config_from_file(str(path))
    assert {name: str(getattr(read, name)).split(".")[-1] for name in written} == {
        name: str(value) for name, value in written.items()
    }
    assert f"{written['num_processes']}" in path.stem and str(path.name) in path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_wheel_holds_scripts_recipes_and_card_templates_and_no_tests(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for folder, packed in (("training", "_training"), ("model_cards", "_model_cards")):
        tracked = [p for p in (REPOSITORY / folder).rglob("*.*") if p.suffix in (".py", ".yaml", ".md")]
        expected = {f"hf_dpssl/{packed}/{p.relative_to(REPOSITORY / folder).as_posix()}" for p in tracked}
        assert expected and expected <= set(names)
    assert not [name for name in names if "test" in name or "__pycache__" in name]
    assert {"hf_dpssl/py.typed", *(f"hf_dpssl/evaluation/modules/{name}.py" for name in MODULES)} <= set(names)


def test_wheel_trains_and_writes_a_card_from_an_empty_folder(wheel, tmp_path):
    site, empty = tmp_path / "site", tmp_path / "empty"
    zipfile.ZipFile(wheel).extractall(site)
    empty.mkdir()
    located = subprocess.run(
        [sys.executable, "-c", "import hf_dpssl; print(hf_dpssl.__file__)"],
        cwd=empty, env=os.environ | {"PYTHONPATH": str(site)}, capture_output=True, text=True,
    )  # fmt: skip
    assert located.stdout.startswith(str(site)), "another copy of the package was imported"
    assert '"torch"' in run("env", "--json", cwd=empty, python_path=site)
    run("train", "contrastive", "--recipe", "digits", *SHORT, "run", cwd=empty, python_path=site)
    assert "t-SimCLR on digits" in (empty / "run/encoder/README.md").read_text(encoding="utf-8")
    assert [path.name for path in empty.iterdir()] == ["run"]
