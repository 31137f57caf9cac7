"""training/domains.py on pictures of three domains: what it writes, that it goes on, and what it refuses."""

import json
import re
from importlib import import_module

import pytest
import torch
from cases import for_each
from domain_pictures import CLASSES, DOMAINS, PLACES, write_pictures
from launches import forget_accelerator
from PIL import Image
from tiny_encoders import save_ours

from hf_dpssl.cli import dg_suite
from hf_dpssl.cli.commands import main as command
from hf_dpssl.domains.choices import ALGORITHMS
from hf_dpssl.domains.encoded_domains import PretrainedEncoder
from hf_dpssl.embedding.embedder import ImageEmbedder

TINY = ["--steps", 5, "--evaluation_steps", 2]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    save_ours(folder)
    return folder


def read(folder):
    """The rows of the results, and the records of the runs without their seconds."""
    cells = {path.name: json.loads(path.read_text()) | {"seconds": 0} for path in (folder / "cells").iterdir()}
    return json.loads((folder / "results.json").read_text()), cells


@pytest.mark.extended
def test_a_killed_search_goes_on_with_the_runs_that_lack(pictures, encoder, tmp_path, run_script):
    frozen = [*TINY, "--dataset", pictures, "--encoder", encoder, "--frozen", "--output_dir", tmp_path]
    frozen += ["--algorithms", "erm", "arm", "swad", "uniform_soup", "greedy_soup", "--draws", 2, "--seeds", 2]
    frozen += ["--selection", "training_domains", "oracle", "leave_one_domain_out"]
    printed = run_script("domains", frozen)
    results, cells = read(tmp_path)
    assert len(cells) == 2 * (2 * 3 * (3 + 3) + 2 * 3)  # seeds x (draws x algorithms x targets and pairs, and soups)
    by_rule = {}
    for row in results["rows"]:
        by_rule.setdefault(row["selection"], []).append(row["algorithm"])
        assert set(row["domains"]) == set(DOMAINS) and row["worst"] <= row["mean"] and row["seeds"] == 2
        assert row["draws"] == 2 and row["interval"] is None  # of two seeds
        assert row["adapts"] == (row["algorithm"] == "arm")
    learned = ["erm", "arm", "swad"]
    assert by_rule["training_domains"] == by_rule["oracle"] == [*learned, "uniform_soup", "greedy_soup"]
    assert by_rule["leave_one_domain_out"] == learned  # soups have no runs with two domains held out
    table = (tmp_path / "table.md").read_text()
    assert table in printed and "| arm * |" in table and "Each algorithm: 2 of hyper-parameters" in table
    assert str(pictures.parent) not in json.dumps(results) + table  # no folder of the machine
    assert results["samples"] == {name: 14 for name in DOMAINS} and "results.json" in printed

    names = sorted(cells)
    for name in names[::3]:
        (tmp_path / "cells" / name).unlink()
    remade = next(name for name in names if name.startswith("erm-0-") and name not in names[::3])
    (tmp_path / "weights" / remade.replace(".json", ".safetensors")).unlink()  # soups need it again
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir() if path.name != remade}
    run_script("domains", frozen)
    again, cells_again = read(tmp_path)
    assert cells_again == cells and again["rows"] == results["rows"]
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())

    with pytest.raises(ValueError, match="swad-.* was made with other --tolerance_ratio: give another --output_dir"):
        run_script("domains", [*frozen, "--tolerance_ratio", 0.2])
    run_script("domains", [*frozen[:-4], "--steps", 4, "--overwrite", "--algorithms", "erm"])
    assert read(tmp_path)[0]["arguments"]["steps"] == 4


def test_a_killed_search_has_a_table_and_goes_on_with_other_flags_that_do_not_decide_its_runs(
    pictures, encoder, tmp_path, run_script, monkeypatch
):
    flags = ["--steps", 2, "--dataset", pictures, "--encoder", encoder, "--frozen", "--output_dir", tmp_path]
    flags += ["--draws", 3, "--targets", "light", "dark", "--algorithms", "erm"]
    script = import_module("domains")
    run = script.run

    def killed(cell, *rest):
        if (cell.draw, cell.targets) == (2, (0,)):
            raise KeyboardInterrupt
        run(cell, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(script, "run", killed)
        run_script("domains", flags)
    forget_accelerator()
    results, cells = read(tmp_path)
    assert len(cells) == 5 and [(row["seeds"], row["draws"]) for row in results["rows"]] == [(1, 2)] * 2
    assert "Not finished: 4 of 6 runs" in (tmp_path / "table.md").read_text()
    run_script("domains", [*flags, "--tolerance_ratio", 0.2])  # of swad, which is not among them
    results, again = read(tmp_path)
    assert cells.items() <= again.items() and [row["draws"] for row in results["rows"]] == [3, 3]
    assert "Not finished" not in (tmp_path / "table.md").read_text()
    for more, message in {
        ("--steps", 3): "was made with other --steps: give another --output_dir, or --overwrite",
        ("--selection", "oracle", "leave_one_domain_out"): "was made with other --selection (leave_one_domain_out)",
        ("--images", 30): "was made with other pictures",
    }.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            run_script("domains", [*flags, *more])


def test_an_encoder_is_fine_tuned_from_its_own_weights(pictures, encoder, tmp_path, run_script):
    flags = ["--dataset", pictures, "--encoder", encoder, "--algorithms", "erm", "arm", "--targets", "light"]
    run_script("domains", [*flags, "--steps", 2, "--evaluation_steps", 1, "--output_dir", tmp_path])
    results, cells = read(tmp_path)
    assert [row["domains"].keys() for row in results["rows"]] == [{"light"}] * 4 and len(cells) == 2
    embedder = ImageEmbedder(str(encoder), device="cpu")
    pretrained = PretrainedEncoder(embedder)
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    pixel_values = pretrained.normalized(images)
    as_pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    assert torch.allclose(pixel_values, embedder.preprocess(as_pictures), atol=1e-5)
    for extra in (0, 1):
        tuned, width = pretrained.tuned(extra)
        given = torch.cat([pixel_values, torch.randn(4, extra, 16, 16)], 1)
        features = tuned.train()(given)
        assert width == features.shape[1] and torch.allclose(features.detach(), embedder(pixel_values), atol=1e-5)
        features.sum().backward()
        assert all(parameter.grad is not None for parameter in tuned.parameters())
    assert not any(parameter.requires_grad for parameter in embedder.model.parameters())  # the copies learn
    rows = torch.arange(4)
    views = pretrained.augmented(images, rows, 3, seed=0, domain=1)
    assert torch.equal(views, pretrained.augmented(images, rows, 3, seed=0, domain=1))
    assert views.shape == pixel_values.shape
    for step, seed, domain in [(4, 0, 1), (3, 1, 1), (3, 0, 2), (3, 1, 0)]:
        assert not torch.equal(views, pretrained.augmented(images, rows, step, seed=seed, domain=domain))


def test_a_fine_tuned_run_is_a_function_of_its_own_seed(pictures, encoder, tmp_path, run_script):
    flags = ["--dataset", pictures, "--encoder", encoder, "--algorithms", "erm", "--targets", "light", "--steps", 2]
    flags += ["--evaluation_steps", 1, "--output_dir"]
    run_script("domains", [*flags, tmp_path / "two", "--seeds", 2])
    run_script("domains", [*flags, tmp_path / "second", "--seed", 1])
    (_, two), (_, second) = read(tmp_path / "two"), read(tmp_path / "second")
    (name,) = second
    assert len(two) == 2 and second[name] == two[name]
    file = tmp_path / "second" / "cells" / name
    cell = json.loads(file.read_text())
    assert cell["decided"].pop("views")  # as of runs whose views were by the first seed of their command
    file.write_text(json.dumps(cell))
    with pytest.raises(ValueError, match="was made with other random views: give another --output_dir"):
        run_script("domains", [*flags, tmp_path / "second", "--seed", 1])


def test_without_arguments_digits_are_learned_from_scratch(tmp_path, run_script):
    run_script("domains", ["--steps", 2, "--algorithms", "erm", "--targets", "30", "--output_dir", tmp_path])
    results, _ = read(tmp_path)
    assert results["samples"] == {"0": 599, "30": 599, "60": 599} and results["dataset"] == "rotated_digits"


REFUSED = [
    (["--algorithms", "uniform_soup", "--draws", 2], "of erm's runs with two or more draws"),
    (["--algorithms", "erm", "greedy_soup"], "of erm's runs with two or more draws"),
    (["--algorithms", "erm", "erm"], "--algorithms names one twice"),
    (["--frozen"], "--frozen is of an --encoder"),
    (["--seeds", 0], "--seeds must be at least 1"),
    (["--seed", -1], "--seed must not be negative, got -1"),
    (["--algorithms", "swad", "--tolerance_ratio", -0.2], "--tolerance_ratio must not be negative, got -0.2"),
    (["--encoder", "outputs/none"], "rotated_digits is learned from scratch"),
    (["--targets", "45"], "--targets ['45'] are no domains of 'rotated_digits', which has ['0', '30', '60']"),
    (["--images", 9], "--images is not for rotated_digits"),
    (["--dataset", "x", "--encoder", "y", "--frozen", "--image_size", 9], "--image_size is not for --frozen"),
    (["--dataset", "vlcs"], "'vlcs' has no Hub id that we know of: download it (4 domains, 5 classes, 10,729 images"),
]


@for_each("flags, message", REFUSED)
def test_what_cannot_be_done_is_refused_before_anything_is_written(flags, message, tmp_path, refusal):
    assert message in refusal("domains", [*flags, "--output_dir", tmp_path / "out"])
    assert not (tmp_path / "out").exists()


def test_domains_of_too_few_pictures_are_refused(encoder, tmp_path, refusal):
    """A class in one domain only; domains of which no fifth can be held out; one domain."""
    lonely = write_pictures(tmp_path / "lonely", [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 0, 1)])
    assert f"class '{CLASSES[1]}' is found in domain 'dark' only" in refusal("domains", ["--dataset", lonely])
    few = write_pictures(tmp_path / "few", [(domain, label, number) for domain, label, number in PLACES if number < 2])
    for flags in ([], ["--encoder", encoder, "--frozen"]):
        found = refusal("domains", ["--dataset", few, *flags, "--output_dir", tmp_path / "out"])
        assert "domain 'dark' has 4 samples for 2 classes: give at least 5, of which a fifth is held out" in found
    single = write_pictures(tmp_path / "single", [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)])
    assert "no folders of domains" in refusal("domains", ["--dataset", single])


@pytest.mark.extended
def test_evaluate_suite_dg_is_the_frozen_protocol_of_all_algorithms(pictures, encoder, tmp_path, monkeypatch, capsys):
    """In this process, where the command starts one of its own."""

    def run(name: str, flags: list[str]) -> int:
        assert flags[-1] == "--quiet"  # which would be for all that follows here
        import_module(name).main(flags[:-1])
        return 0

    monkeypatch.setattr(dg_suite, "run_script", run)
    monkeypatch.setenv("DPSSL_QUIET", "1")
    flags = ["evaluate", encoder, "--suite", "dg", "--dataset", pictures, "--steps", 2, "--output_dir", tmp_path]
    assert command(list(map(str, [*flags, "--json"]))) == 0
    forget_accelerator()
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["algorithm"] for row in rows if row["selection"] == "training_domains"] == list(ALGORITHMS)
    assert all(row["seeds"] == 5 and row["draws"] == 1 for row in rows)
    for wrong, message in [
        (["--suite", "dg", "--shots", "2"], "--shots is not for --suite dg"),
        (["--suite", "dg"], "give --dataset FOLDER, sorted as DOMAIN/CLASS/image, or another set of pictures; digits"),
        (["--suite", "dg", "--dataset", "rotated_digits"], "give --dataset FOLDER, sorted as DOMAIN/CLASS/image"),
        (["--suite", "dg", "--sets", "dtd"], "--sets is not for --suite dg"),
        (["--domain_column", "style"], "--domain_column is for --suite dg"),
    ]:
        assert command(["evaluate", str(encoder), *wrong]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_share_the_runs_and_change_none(pictures, encoder, tmp_path, launch):
    flags = [*TINY, "--dataset", pictures, "--encoder", encoder, "--frozen", "--algorithms", "erm", "vrex"]
    for number in (1, 2):
        launch("domains", [*flags, "--output_dir", tmp_path / str(number)], number).wait()
    assert read(tmp_path / "1")[1] == read(tmp_path / "2")[1]
