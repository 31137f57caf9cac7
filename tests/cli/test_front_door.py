"""Help, wrong flags and tab completion are answered before a library is imported; `--quiet`; groups of flags."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_dpssl.cli.commands import COMMANDS, main
from hf_dpssl.cli.train import SCRIPTS
from hf_dpssl.runs import console
from hf_dpssl.runs.flags import GROUPS
from hf_dpssl.runs.shipped_folders import shipped_folder

REPOSITORY = Path(__file__).parents[2]
LIBRARIES = [
    "PIL", "accelerate", "datasets", "diffusers", "evaluate", "gradio", "huggingface_hub", "matplotlib", "numpy",
    "safetensors", "scipy", "sklearn", "timm", "torch", "torchvision", "transformers",
]  # fmt: skip
# Runs in a fresh process, which has imported nothing: prints for each case its exit status and the libraries that are
# in sys.modules after it.
ASK = """
import contextlib, io, json, runpy, sys
libraries, commands, scripts = json.loads(sys.argv[1])

def answer(call):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            status = call()
        except SystemExit as ended:
            status = ended.code or 0
    return status, sorted(set(libraries) & set(sys.modules))

def script(path, flag):
    sys.argv = [path, flag]
    runpy.run_path(path, run_name="__main__")

found = {}
import hf_dpssl
found["import"] = answer(lambda: 0)
from hf_dpssl.cli.commands import main
for argv in commands:
    found[" ".join(argv)] = answer(lambda: main(argv))
for path in scripts:
    for flag in ("--help", "--wrong_flag"):
        found[f"{path} {flag}"] = answer(lambda: script(path, flag))
from hf_dpssl import info_nce
found["from hf_dpssl import info_nce"] = answer(lambda: 0)
print(json.dumps(found))
"""


def test_help_and_wrong_flags_are_answered_before_a_library_is_imported():
    commands = [["--help"], ["--version"], ["nonsense"], ["--nonsense"], []]
    commands += [[name, flag] for name in COMMANDS for flag in ("--help", "--wrong_flag")]
    commands += [["train", name, flag] for name in SCRIPTS for flag in ("--help", "--wrong_flag")]
    scripts = sorted(str(path) for path in (REPOSITORY / "training").glob("*.py"))
    asked = json.dumps([LIBRARIES, commands, scripts])
    done = subprocess.run([sys.executable, "-c", ASK, asked], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    status, loaded = found.pop("from hf_dpssl import info_nce")
    assert set(loaded) <= {"torch", "numpy"} and "torch" in loaded
    assert len(found) == 1 + len(commands) + 2 * len(scripts)
    for case, (status, loaded) in found.items():
        assert not loaded, f"{case}: {loaded}"
        assert status == (0 if case.endswith(("--help", "--version", "import")) else 2), case


def test_every_script_of_training_is_a_choice_of_train():
    shipped = {path.stem for path in shipped_folder("training").glob("*.py")}
    assert set(SCRIPTS) == shipped - {"demo"}


def test_help_of_a_script_lists_every_flag_once_in_titled_groups(capsys):
    for name, arguments_class in SCRIPTS.items():
        assert main(["train", name, "--help"]) == 0
        printed = capsys.readouterr().out
        titles = re.findall(r"^(\w+):$", printed, re.MULTILINE)
        assert titles[0] == "options" and titles[1:] == list(GROUPS), name
        flags = re.findall(r"^  --(\w+)", printed, re.MULTILINE)
        assert len(flags) == len(set(flags)) and set(arguments_class.__dataclass_fields__) <= set(flags)
        assert "\n    python training/" in printed  # the commands of its docstring, a line each


def test_an_unknown_flag_is_answered_with_the_closest_one(capsys):
    cases = {
        "train dae_vq --learning_rat 1": "Did you mean --learning_rate?",
        "evaluate x --datset digits": "Did you mean --dataset?",
        "map --stage_1_epoch 3": "Did you mean --stage_1_epochs?",
        "demo --sed 1": "Did you mean --seed?",
        "report a --output b": "Did you mean --output_dir?",
    }
    for line, hint in cases.items():
        with pytest.raises(SystemExit) as ended:
            main(line.split())
        printed = capsys.readouterr().err
        assert ended.value.code == 2 and hint in printed, line


def test_version_is_that_of_the_package(capsys):
    import hf_dpssl

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"hf-dpssl {hf_dpssl.__version__}\n"


def complete(line: str, tmp_path: Path) -> list[str]:
    """What the shell is told that may follow a line."""
    answer = tmp_path / "answer"
    variables = {
        "_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "COMP_LINE": line, "COMP_POINT": str(len(line)),
    }  # fmt: skip
    subprocess.run([sys.executable, "-m", "hf_dpssl.cli"], env=os.environ | variables, check=True, timeout=60)
    return [word.strip() for word in answer.read_text().splitlines()]


def test_tab_completes_commands_scripts_flags_and_choices(tmp_path):
    pytest.importorskip("argcomplete")
    assert complete("hf-dpssl ev", tmp_path) == ["evaluate"]
    assert set(complete("hf-dpssl train dae_", tmp_path)) == {"dae_ar", "dae_dit", "dae_drift", "dae_gan", "dae_vq"}
    assert complete("hf-dpssl train dae_vq --learn", tmp_path) == ["--learning_rate"]
    assert set(complete("hf-dpssl embed --features ", tmp_path)) == {"features", "embeddings"}


def test_quiet_leaves_results_and_errors_and_no_lines_of_progress(tmp_path, monkeypatch, capsys):
    for name, value in console._QUIET.items():  # so that they are as before after this test
        monkeypatch.setenv(name, os.environ.get(name, "0") if value == "1" else os.environ.get(name, "warning"))
    console.say("heard")
    assert main(["env", "--json", "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("heard\n{") and json.loads(printed.partition("\n")[2])["libraries"]
    console.say("not heard")
    assert main(["--quiet", "card", str(tmp_path / "missing")]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "missing does not exist" in printed.err
    assert os.environ["TQDM_DISABLE"] == "1"
