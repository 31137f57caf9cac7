"""Command-line arguments and recipes."""

from dataclasses import dataclass

import pytest
import yaml

from hf_dpssl.cli.train import SCRIPTS
from hf_dpssl.runs.contrastive_arguments import ContrastiveArguments, MapArguments
from hf_dpssl.runs.flags import option
from hf_dpssl.runs.recipe import RunArguments, find_recipe, parse, save_recipe
from hf_dpssl.runs.shipped_folders import shipped_folder


@dataclass
class Arguments(RunArguments):
    learning_rate: float = option(1e-3, "rate")
    widths: list[int] = option([1, 2], "widths")
    flag: bool = option(True, "a flag")
    share: float | None = option(None, "50 % of it", group="evaluation", choices=[0.5, 1.0])


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
    assert second.widths == [1, 2] and second.dataset == "digits" and second.share is None


def test_flags_take_the_values_of_their_fields_types():
    args = parse(Arguments, "--widths 3 --flag no --streaming --share 0.5 --log_with a b --image_size 8".split(), "")
    assert (args.widths, args.flag, args.streaming, args.share) == ([3], False, True, 0.5)
    assert (args.log_with, args.image_size) == (["a", "b"], 8)
    assert parse(Arguments, ["--flag"], "").flag is True


def test_help_states_defaults_groups_and_what_is_a_percent_sign(capsys):
    with pytest.raises(SystemExit):
        parse(Arguments, ["--help"], "First line.\n\n    a command\n    another\n")
    printed = capsys.readouterr().out
    assert "\n    a command\n    another\n" in printed and "50 % of it" in printed
    assert "widths (default: 1 2)" in printed and "(default: None)" not in printed
    data, rest = printed.split("\noptimiser:\n")
    optimiser, rest = rest.split("\nevaluation:\n")
    evaluation, run = rest.split("\nrun:\n")
    assert "--dataset " in data and "--batch_size" in optimiser and "--share" in evaluation and "--widths" in run


def test_a_wrong_recipe_or_flag_ends_with_a_message_that_names_it(tmp_path, capsys):
    recipes = {
        "learnin_rate: 1": "unknown key 'learnin_rate'. Did you mean learning_rate?",
        "- a list": "must be a mapping",
        "batch_size: many": "invalid int value: 'many'",
        "batch_size: 0": "--batch_size must be at least 1, got 0",
        "flag: perhaps": "invalid boolean value: 'perhaps'",
        "share: 0.7": "invalid choice: 0.7",
        "a: [": "expected the node content",
    }
    flags = {
        "--nonsense 1": "unrecognized arguments: --nonsense 1",
        "--learning 0.1": "unrecognized arguments: --learning 0.1. Did you mean --learning_rate?",
        "--recipe no-such-recipe": "no recipe 'no-such-recipe'",
    }
    cases = [(["--recipe", write(tmp_path, text)], text, message) for text, message in recipes.items()]
    cases += [(line.split(), None, message) for line, message in flags.items()]
    for argv, text, message in cases:
        if text is not None:
            write(tmp_path, text)
        with pytest.raises(SystemExit) as error:
            parse(Arguments, argv, "")
        assert error.value.code == 2 and message in capsys.readouterr().err, message


def test_saved_recipe_reads_back_to_the_same_arguments(tmp_path):
    args = parse(Arguments, ["--learning_rate", "3e-5", "--widths", "8", "--log_with", "tensorboard", "wandb"], "")
    save_recipe(args, tmp_path / "saved.yaml")
    assert parse(Arguments, ["--recipe", str(tmp_path / "saved.yaml")], "") == args


def test_shipped_recipes_parse_and_name_their_command():
    recipes = sorted((shipped_folder("training") / "recipes").glob("*.yaml"))
    kinds = {"map": "map", "ar": "dae_ar", "gan": "dae_gan", "vq": "dae_vq", "dit": "dae_dit", "domains": "domains"}
    for path in recipes:
        text = path.read_text(encoding="utf-8")
        if path.stem == "demo":  # numbers of steps, for training/demo.py
            assert all(isinstance(value, int) for value in yaml.safe_load(text).values())
            continue
        script = kinds.get(path.stem.partition("-")[0], "contrastive")
        args = parse(SCRIPTS[script], ["--recipe", path.stem], "")
        assert args.output_dir == f"outputs/{path.stem}" and script in text and path.stem in text
    assert len(recipes) > 10


def test_recipes_are_found_by_name_with_and_without_ending():
    assert find_recipe("digits") == find_recipe("digits.yaml") == shipped_folder("training") / "recipes" / "digits.yaml"


def test_contrastive_script_refuses_accumulation_and_says_why(capsys):
    with pytest.raises(SystemExit):
        parse(ContrastiveArguments, ["--gradient_accumulation_steps", "2"], "")
    assert "would change the loss" in " ".join(capsys.readouterr().err.split())


def test_defaults_of_a_contrastive_run_follow_kernel_negatives_and_dimension():
    """Those that training/evidence/defaults.py chose; what is given stays."""

    def settings(*argv: str):
        args = parse(ContrastiveArguments, list(argv), "")
        return args.normalization, args.feature_norm, args.temperature

    assert settings() == ("joint", "l2", "auto")
    assert settings("--projection_dim", "16") == settings("--projection_dim", "2") == ("joint", "batch", "auto")
    assert settings("--kernel", "cosine") == ("anchor", "l2", 0.2)
    assert settings("--kernel", "cosine", "--projection_dim", "2") == ("anchor", "l2", 0.2)
    assert settings("--negatives", "queue") == ("anchor", "l2", "auto")
    given = ["--normalization", "anchor", "--feature_norm", "none", "--temperature", "3"]
    assert settings(*given) == ("anchor", "none", 3.0)
    zero = [parse(kind, ["--temperature", "0"], "").temperature for kind in (ContrastiveArguments, MapArguments)]
    assert zero == [0, 0]  # not taken for the default: the model refuses it
