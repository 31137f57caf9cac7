"""Command-line arguments and recipes."""

from dataclasses import dataclass

import contrastive
import dae_ar
import dae_dit
import dae_gan
import dae_vq
import map as map_script
import pytest
import yaml

from hf_dpssl.runs.recipe import RunArguments, find_recipe, option, parse, save_recipe
from hf_dpssl.runs.shipped_folders import shipped_folder


@dataclass
class Arguments(RunArguments):
    learning_rate: float = option(1e-3, "rate")
    widths: list[int] = option([1, 2], "widths")
    flag: bool = option(True, "a flag")


def write(folder, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_yaml_number_with_exponent_becomes_a_float_and_flags_override_the_file(tmp_path):
    recipe = write(tmp_path, "learning_rate: 1e-4\nbatch_size: 7\nwidths: [3, 4, 5]\nflag: false\n")
    args = parse(Arguments, ["--recipe", recipe, "--batch_size", "9"], "")
    assert args.learning_rate == 1e-4 and isinstance(args.learning_rate, float)
    assert (args.batch_size, args.widths, args.flag) == (9, [3, 4, 5], False)


def test_defaults_without_recipe_and_lists_are_not_shared():
    first, second = parse(Arguments, [], ""), parse(Arguments, [], "")
    first.widths.append(3)
    assert second.widths == [1, 2] and second.dataset == "digits"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learnin_rate: 1", "unknown key 'learnin_rate'. Did you mean learning_rate?"),
        ("- a list", "must be a mapping"),
        ("batch_size: many", "invalid int value: 'many'"),
        ("batch_size: 0", "--batch_size must be at least 1, got 0"),
        ("a: [", "expected the node content"),
    ],
)
def test_bad_recipe_ends_with_a_message_that_names_the_key(tmp_path, capsys, text, message):
    with pytest.raises(SystemExit) as error:
        parse(Arguments, ["--recipe", write(tmp_path, text)], "")
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_unknown_flag_abbreviation_and_recipe_are_errors(capsys):
    for argv in (["--nonsense", "1"], ["--learning", "0.1"], ["--recipe", "no-such-recipe"]):
        with pytest.raises(SystemExit):
            parse(Arguments, argv, "")
    assert "no recipe 'no-such-recipe'" in capsys.readouterr().err


def test_saved_recipe_reads_back_to_the_same_arguments(tmp_path):
    args = parse(Arguments, ["--learning_rate", "3e-5", "--widths", "8", "--log_with", "tensorboard", "wandb"], "")
    save_recipe(args, tmp_path / "saved.yaml")
    assert parse(Arguments, ["--recipe", str(tmp_path / "saved.yaml")], "") == args


SCRIPTS = {
    "contrastive": contrastive.ContrastiveArguments,
    "dae_vq": dae_vq.VQArguments,
    "dae_gan": dae_gan.GANArguments,
    "dae_dit": dae_dit.DiTArguments,
    "dae_ar": dae_ar.ARArguments,
    "map": map_script.MapArguments,
}


def script_of(name: str) -> str:
    if name.startswith(("map", "ar-")):
        return "map" if name.startswith("map") else "dae_ar"
    if name.startswith("gan-"):
        return "dae_gan"
    return "dae_vq" if name.startswith("vq") else "dae_dit" if name.startswith("dit") else "contrastive"


@pytest.mark.parametrize(
    "path", sorted((shipped_folder("training") / "recipes").glob("*.yaml")), ids=lambda path: path.stem
)
def test_shipped_recipe_parses_and_names_its_command(path):
    if path.stem == "demo":
        assert set(yaml.safe_load(path.read_text())) == {
            "encoder_32d_epochs", "encoder_2d_epochs", "stage_1", "stage_2", "classifier_epochs", "dit"
        }  # fmt: skip
        return
    script = script_of(path.stem)
    args = parse(SCRIPTS[script], ["--recipe", path.stem], "")
    assert args.output_dir == f"outputs/{path.stem}"
    assert f"{script}" in path.read_text(encoding="utf-8") and path.stem in path.read_text(encoding="utf-8")


def test_recipes_are_found_by_name_with_and_without_ending():
    assert find_recipe("digits") == find_recipe("digits.yaml") == shipped_folder("training") / "recipes" / "digits.yaml"


def test_contrastive_script_refuses_accumulation_and_says_why(capsys):
    with pytest.raises(SystemExit):
        parse(contrastive.ContrastiveArguments, ["--gradient_accumulation_steps", "2"], "")
    assert "would change the loss" in " ".join(capsys.readouterr().err.split())
