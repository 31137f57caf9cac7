"""The Spaces without a browser: what is shipped, their functions, bad input, and starting one from the command line."""

import os
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml
from cases import for_each
from forked_processes import run_forked
from load_space import load_app
from PIL import Image

from hf_dpssl.cli.space import main, space_names
from hf_dpssl.pages.demo_outputs import MODELS, find_models, source_arguments
from hf_dpssl.runs.shipped_folders import shipped_folder

gradio = pytest.importorskip("gradio", minversion="6.0")


@pytest.fixture(scope="module")
def matching():
    return load_app("matching_lab")


@for_each("name", space_names())
def test_a_space_has_a_readme_that_the_hub_can_read_requirements_and_a_picture(name):
    folder = shipped_folder("spaces") / name
    front = yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert front["sdk"] == "gradio" and (folder / front["app_file"]).is_file()
    assert tuple(map(int, front["sdk_version"].split("."))) >= (6, 0)
    assert len(front["short_description"]) <= 60 and front["license"] == "apache-2.0"
    assert "hf_dpssl" in (folder / "requirements.txt").read_text(encoding="utf-8")
    assert Image.open(folder / "screenshot.png").width >= 1000


def test_each_control_of_the_matching_lab_has_a_label_that_a_screen_reader_reads(matching):
    page = matching.build()
    kinds = (gradio.Slider, gradio.Radio, gradio.Dropdown, gradio.Number)
    controls = [block for block in page.blocks.values() if isinstance(block, kinds)]
    assert len(controls) == 11 and all(block.label for block in controls)


@pytest.mark.extended
def test_sliders_that_do_not_change_the_divergence_are_off_with_what_they_are_for(matching):
    """In every state: a step with another value of a slider is another one where it is on, and only there."""
    others = {"perplexity": 40, "dof": 4.0, "alpha": 0.9}
    places = {"perplexity": 1, "dof": 5, "alpha": 7}
    session, *_ = matching.restart("digits", 0, *matching.apply_preset("t-SNE"))
    one = session.maps[1]

    def divergence(values) -> float:
        one.embeddings.data.copy_(torch.randn(256, 2, generator=torch.Generator().manual_seed(0)))
        return one.advance(matching.MapSettings(*values))

    for similarities in ("neighbours", "classes", "pairs"):
        for kernel in matching.TITLES:
            for name in ("kl", "alpha", "jensen_shannon"):
                start = [similarities, 20, kernel, "joint", 1, 1.0, name, 0.5]
                sliders = matching.show_what_counts(similarities, kernel, name)
                for (slider, value), shown in zip(others.items(), sliders, strict=True):
                    values = [value if i == places[slider] else old for i, old in enumerate(start)]
                    assert shown.interactive == (divergence(values) != divergence(start)), (start, slider)
                    assert shown.interactive or shown.info.startswith("only for")


def test_update_moves_the_map_and_pauses_by_itself(matching):
    session, left, right, numbers, *_ = matching.restart("digits", 0, *matching.apply_preset("t-SNE"))
    settings = matching.apply_preset("t-SNE")
    moved_left, moved_right, moved_numbers, timer, button = matching.update(session, *settings)
    assert left != moved_left and right != moved_right and f"step <b>{matching.STEPS}</b>" in moved_numbers
    assert timer == button == gradio.skip()
    session.maps[1].losses *= matching.LAST_STEP // matching.STEPS - 1
    *_, timer, button = matching.update(session, *settings)
    assert timer.active is False and button.value == "Go on"


def test_update_without_a_session_changes_nothing(matching):
    assert matching.update(None, *matching.apply_preset("SNE")) == (gradio.skip(),) * 5


def test_an_overflow_pauses_the_map_with_a_warning(matching, monkeypatch):
    said = []
    monkeypatch.setattr(gradio, "Warning", lambda message, **options: said.append(message))
    session, *_ = matching.restart("digits", 0, *matching.apply_preset("t-SNE"))
    for one in session.maps:
        one.embeddings.data *= 1e5
    settings = list(matching.apply_preset("SNE"))
    settings[6] = "chi_square"
    *_, timer, _ = matching.update(session, *settings)
    assert timer.active is False and "too large" in said[0]


def test_presets_cover_the_named_losses_and_take_steps(matching):
    for name in matching.PRESETS:
        settings = matching.apply_preset(name)
        session, *_ = matching.restart("clusters", 1, *settings)
        *_, timer, _ = matching.update(session, *settings)
        assert len(session.maps[1].losses) == matching.STEPS, name


def test_an_error_of_a_function_becomes_a_toast_that_says_the_same():
    from hf_dpssl.pages.space_page import readable_errors

    def refuse(value):
        raise ValueError(f"no {value}")

    def refuse_late(value):
        yield 1
        raise ValueError(f"no {value}")

    with pytest.raises(gradio.Error, match="no sense"):
        readable_errors(refuse)("sense")
    parts = readable_errors(refuse_late)("sense")
    assert next(parts) == 1
    with pytest.raises(gradio.Error, match="no sense"):
        next(parts)


def test_zero_gpu_decorates_what_computes_where_its_package_is_and_nothing_elsewhere(monkeypatch):
    from hf_dpssl.pages.space_page import on_gpu

    monkeypatch.setitem(sys.modules, "spaces", None)  # as if it were not installed
    assert on_gpu(load_app) is load_app
    granted = []
    package = types.ModuleType("spaces")
    package.GPU = lambda duration: lambda function: granted.append((duration, function)) or function
    monkeypatch.setitem(sys.modules, "spaces", package)
    assert on_gpu(load_app, 30) is load_app and granted == [(30, load_app)]


def test_models_come_from_the_variable_then_from_the_demo_and_else_the_message_says_how(tmp_path, monkeypatch):
    for variable, _ in MODELS.values():
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("DPSSL_DEMO", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="run `hf-dpssl demo`.*DPSSL_DIT or DPSSL_TOKENS"):
        find_models("dit", "token transformer")
    (tmp_path / "dit").mkdir()
    assert find_models("dit", "token transformer") == {"dit": str(tmp_path / "dit")}
    monkeypatch.setenv("DPSSL_DIT", "org/dit@v1")
    assert find_models("dit") == {"dit": "org/dit@v1"}
    assert source_arguments("org/dit@v1") == {"pretrained_model_name_or_path": "org/dit", "revision": "v1"}
    assert source_arguments(str(tmp_path)) == {"pretrained_model_name_or_path": str(tmp_path)}


@for_each(
    "argv, said",
    [
        (["matching_lab", "--demo", "nowhere"], "hf-dpssl demo"),
        (["matching_lab", "--model", "dit"], "NAME=FOLDER_OR_ID"),
        (["matching_lab", "--model", "cat=org/cat"], "'dit'"),
    ],
)
def test_wrong_values_of_the_command_are_one_line_and_status_2(argv, said, capsys):
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@for_each("argv", [["nonsense"], ["matching_lab", "--port", "70000"], []])
def test_unknown_space_or_port_ends_with_usage_and_status_2(argv, capsys):
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2 and "usage:" in capsys.readouterr().err


@pytest.mark.extended
def test_a_space_without_its_models_ends_with_one_line_and_status_2(tmp_path):
    variables = {name: value for name, value in os.environ.items() if not name.startswith("DPSSL_")}
    variables |= {"PYTHONPATH": str(Path(__file__).parents[2]), "TMPDIR": str(tmp_path)}
    done = run_forked(["-m", "hf_dpssl.cli", "space", "image_generator"], tmp_path, variables)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert (
        done.stderr.strip().splitlines()[-1].startswith("image_generator: no model (dit, one step, token transformer)")
    )
    assert not list(tmp_path.glob("space-*")) and not list(tmp_path.glob("digits-*"))  # no temporary folder
