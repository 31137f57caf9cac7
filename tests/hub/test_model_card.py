"""Model cards say what the run's files say, and the Hub's client reads the same out of them."""

import json
import re
import shutil
from pathlib import Path

import contrastive
import dae_ar
import dae_dit
import dae_drift
import dae_gan
import dae_vq
import pytest
import yaml
from cases import for_each
from huggingface_hub import ModelCard, parse_eval_result_entries
from tiny_checkpoints import save_checkpoints

from hf_dpssl.autoencoder.training import Stage, curve_summary
from hf_dpssl.cli.commands import main
from hf_dpssl.data.image_data import TABLE
from hf_dpssl.hub.card_data import energy, eval_results
from hf_dpssl.hub.checkpoint_facts import KINDS, facts_of
from hf_dpssl.hub.licences import is_restricted
from hf_dpssl.hub.model_card import write_card
from hf_dpssl.runs.atomic_files import write_json
from hf_dpssl.runs.recipe import save_recipe
from hf_dpssl.runs.results import write_results
from hf_dpssl.runs.shipped_folders import shipped_folder

RUNS = {
    "encoder": (contrastive.ContrastiveArguments, {"knn_top1": 91.25, "effective_rank": 5.5}, "91.25"),
    "autoencoder": (dae_vq.VQArguments, {"psnr": 31.4159, "code_usage": 77.0, "code_perplexity": 101.5}, "31.42"),
    "dit": (dae_dit.DiTArguments, {"fid_resnet56-cifar10": 12.345, "class_consistency": 88.0}, "12.35"),
    "drift": (dae_drift.DriftArguments, {"fid_resnet56-cifar10": 9.8765, "class_consistency": 99.0}, "9.877"),
    "token": (dae_ar.ARArguments, {"nats_per_image": 61.9234, "nats_per_image_uniform": 88.7}, "61.92"),
    "gan": (dae_gan.GANArguments, {"copies": 1.234, "ceiling_fid_x": 3.0}, "1.234"),
}
STAGES = [Stage("stage-1", 3, True), Stage("stage-2", 4, False, "fresh")]
ABOUT = {  # what only this kind of run says about itself
    "autoencoder": {"arm": "dae", "quantizer": "vq", "codes": 16}
    | dae_vq.VQArguments(arm="dae").summary(STAGES, processes=1)
    | curve_summary([], STAGES),
    "gan": {"latent": "dae", "sampled_from": "prior", "densities": {"held_out": {"copies": 5.5}}},
}
LINEAGE = [
    {
        "part": "autoencoder", "name": "org/vq", "revision": "a" * 40, "fingerprint": "b" * 64,
        "dataset": "faces", "licence_of_data": "CC BY 4.0",
        "lineage": [{"part": "encoder and codebook", "name": "old", "dataset": "flowers"}],
    }
]  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """A checkpoint of every kind."""
    return save_checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def finished(checkpoints, tmp_path):
    """finished(kind, **about) -> a folder of this kind with the files of a run; `about`: entries of results.json."""

    def finish(kind: str, **about) -> Path:
        folder = shutil.copytree(checkpoints[kind], tmp_path / kind, dirs_exist_ok=True)
        (folder / "README.md").unlink()
        arguments, metrics, _ = RUNS[kind]
        save_recipe(arguments(seed=7), folder / "recipe.yaml")
        samples = {"train": 360, "bank": 360, "evaluation": 90, "latent_statistics": 360, "generated": 500}
        about = {"licence_of_data": "CC BY 4.0", "metrics": metrics} | ABOUT.get(kind, {}) | about
        metrics, dataset = about.pop("metrics"), about.pop("dataset", "digits")
        command = about.pop("command", "x.py")
        write_results(folder / "results.json", metrics, dataset=dataset, seed=7, samples=samples, **about)
        results = json.loads((folder / "results.json").read_text())
        write_json(folder / "results.json", results | {"command": command})
        return folder

    return finish


def card_of(folder: Path, **options) -> ModelCard:
    return ModelCard.load(write_card(folder, **options))


@for_each("kind", RUNS)
def test_card_says_what_the_files_say_and_the_client_reads_the_results_back_equal(kind, finished):
    folder = finished(kind)
    card = card_of(folder)
    for stated in (RUNS[kind][2], "| 7 |", "`digits`, 360 of them", "CC BY 4.0", "![Training curves.](curves.png)"):
        assert stated in card.text
    assert card.data.license is None and "hf_dpssl" in card.data.tags and card.data.base_model is None
    library = {"encoder": "timm", "dit": "hf_dpssl", "drift": "hf_dpssl", "token": "hf_dpssl"}.get(kind, "transformers")
    assert card.data.to_dict()["library_name"] == library
    facts, results = facts_of(folder), json.loads((folder / "results.json").read_text())
    expected = eval_results(facts, results)
    assert card.data.eval_results == expected and expected
    measured = {name: value for name, value in RUNS[kind][1].items() if not re.search("ceiling|uniform", name)}
    assert [result.metric_value for result in expected] == [float(f"{value:.4g}") for value in measured.values()]
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()


@for_each("kind", RUNS)
def test_card_is_clean_markdown_without_folders_of_the_machine(kind, finished):
    text = card_of(finished(kind, command="x.py --output_dir /home/me/run --dataset ~/digits")).text
    assert not re.search(r"\{\{|\{%|\{#|Undefined|\n\n\n|/home|~/", text)
    assert not re.search(r"\bNone\b", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    assert "`x.py --output_dir run --dataset digits`" in text
    assert text.count("```") % 2 == 0 and "output_dir:" not in text
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        rows = table.strip().splitlines()
        assert len(rows) > 2 and len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1, table
    entries = re.findall(r"^@\w+\{(\w+),$", text, re.MULTILINE)
    assert len(entries) == len(set(entries)) >= 2 and text.count("{") == text.count("}")


@for_each(
    "arm, budget, said", [("dae", None, "Decoupled"), ("joint", "encoder", "were frozen"), ("joint", "total", "")]
)
def test_only_a_decoupled_autoencoder_bears_the_tag_and_citation_of_dae(arm, budget, said, finished):
    card = card_of(finished("autoencoder", arm=arm, budget=budget))
    is_dae = arm == "dae"
    assert ("decoupled-autoencoder" in card.data.tags) is is_dae and ("hu2023complexity" in card.text) is is_dae
    assert said in card.text and ("were trained together" in card.text) is not is_dae


@for_each("kind", RUNS)
def test_what_was_not_measured_says_so(kind, finished):
    expected = {"encoder": 2, "autoencoder": 2, "dit": 2, "drift": 2, "token": 2, "gan": 2}[kind]
    card = card_of(finished(kind, metrics={"psnr": float("nan")} if kind == "autoencoder" else {}))
    table = card.text.split("## Results")[1].split("\n\n")[1]
    assert table.count("| not measured |") == expected and card.data.eval_results is None
    assert card.text.count("| not measured |") == expected + 2, "time and energy of the training too"


def test_what_an_evaluation_measured_later_is_not_called_not_measured(finished):
    folder = finished("dit", metrics={})
    results = json.loads((folder / "results.json").read_text())
    entry = {"kind": "dit", "metrics": {"fid_encoder": 8.5}, "dataset": "digits", "seed": 0, "samples": {}}
    results["evaluations"] = [entry | {"options": {}, "fingerprint": {"sha256": "a" * 64}}]
    write_json(folder / "results.json", results)
    first, later = (part.split("\n\n") for part in card_of(folder).text.split("## Results")[1].split("Measured later"))
    assert "Fréchet" not in first[1] and first[1].count("| not measured |") == 1 and "| 8.5 |" in later[1]


def test_time_hardware_and_energy_are_those_of_the_run(finished):
    training = {"seconds": 7200.0, "processes": 2, "device": "cpu", "precision": "no"}
    folder = finished("encoder", training=training)
    results = json.loads((folder / "results.json").read_text())
    results["environment"] |= {"threads": 4, "processor": "A CPU"}
    write_json(folder / "results.json", results)
    text = card_of(folder).text
    assert "| 2 h 00 min |" in text and "2 x (A CPU, 4 thread(s))" in text
    assert "about 80 Wh, an estimate: 40 W for that time" in text  # 2 x 4 x 5 W
    gpu = {"training": training | {"device": "cuda"}, "environment": {"accelerator": "NVIDIA H100 80GB HBM3"}}
    assert energy(gpu)["kwh"] == pytest.approx(2 * 0.7 * 2) and "700 W" in energy(gpu)["assumption"]
    assert energy(gpu | {"environment": {"accelerator": "Unheard of"}}) is None


# Texts of licences that were once taken for free ones, and what the Hub's client knows of them.
@for_each(
    "restriction",
    [
        "ImageNet terms, non-commercial research",
        "CC BY-NC-SA 4.0",
        "MIT terms",
        "proprietary",
        "academic use only",
        "GPL-3.0",
    ],
)
def test_model_of_data_that_is_not_known_to_be_free_is_not_called_free(restriction, finished):
    card = card_of(finished("dit", licence_of_data=restriction))
    assert card.data.license == "other" and card.data.license_name == re.sub("[^a-z0-9.]+", "-", restriction.lower())
    assert f"> `digits`: {restriction}." in card.text


def test_a_licence_is_stated_by_its_maker_and_kept(finished, capsys):
    folder = finished("dit", licence_of_data="unknown")
    assert card_of(folder).data.license is None, "of unknown terms nothing is stated"
    assert "> `digits`: unknown." in card_of(folder).text
    flags = {
        ("--license", "Apache-2.0"): ("apache-2.0", None, None),
        ("--license", "The Lab Terms", "--license_link", "LICENSE"): ("other", "the-lab-terms", "LICENSE"),
        ("--license", "cc by sa 4.0"): ("cc-by-sa-4.0", None, None),
    }
    for given, expected in flags.items():
        assert main(["card", str(folder), *given]) == 0
        for _ in range(2):  # what was said stays, also when the card is written anew
            data = ModelCard.load(folder / "README.md").data
            assert (data.license, data.license_name, data.get("license_link")) == expected
            write_card(folder)
    before = (folder / "README.md").read_text()
    for given, words in (
        (["--license", "mit", "--license_link", "LICENSE"], "mit needs no --license_link"),
        (["--license_link", "LICENSE"], "name that with --license"),
        (["--license", " "], "must name a licence"),
    ):
        assert main(["card", str(folder), *given]) == 2 and words in capsys.readouterr().err
    assert (folder / "README.md").read_text() == before


def test_figures_on_a_data_set_of_the_hub_stand_in_its_results_file_under_its_splits(finished):
    folder = finished("encoder", dataset="mnist", splits={"train": "train", "evaluation": "test"})
    results = card_of(folder).data.eval_results
    assert {result.dataset_split for result in results} == {"test"}
    entries = parse_eval_result_entries(yaml.safe_load((folder / ".eval_results/ylecun--mnist.yaml").read_text()))
    assert [(e.dataset_id, e.task_id, e.value) for e in entries] == [
        ("ylecun/mnist", r.metric_type, r.metric_value) for r in results
    ]
    assert "split test" in entries[0].notes and not list(finished("gan").glob(".eval_results/*"))


def test_a_generators_distance_to_training_images_stands_under_their_split_and_its_consistency_is_no_accuracy(finished):
    about = {"dataset": "mnist", "splits": {"train": "train", "evaluation": "test"}}
    path = ".eval_results/ylecun--mnist.yaml"
    for kind, reference, split in (("dit", "train", "train"), ("drift", None, "train"), ("token", None, "test")):
        about["metrics"] = {"fid_inception": 3.25} | ({} if kind == "token" else {"class_consistency": 90.0})
        folder = finished(kind, **about, **({"reference": reference} if reference else {}))
        assert {result.dataset_split for result in card_of(folder).data.eval_results} == {split}
        entries = parse_eval_result_entries(yaml.safe_load((folder / path).read_text()))
        assert [entry.task_id for entry in entries] == ["fid", "class_consistency"][: len(entries)]
        assert all(f"split {split}" in entry.notes for entry in entries)
    samples = {"train": 360, "generated": 1000, "reference": 500}
    folder = finished("dit")
    results = json.loads((folder / "results.json").read_text())
    write_json(folder / "results.json", results | {"samples": samples, "reference": "train"})
    assert "1000 generated images against 500 training images." in card_of(folder).text


def test_a_card_written_anew_keeps_figures_of_other_measurements_and_replaces_its_own(finished):
    folder = finished("encoder", dataset="mnist", splits={"train": "train", "evaluation": "test"})
    path = folder / ".eval_results/ylecun--mnist.yaml"
    write_card(folder)
    own = yaml.safe_load(path.read_text())
    other = {"dataset": {"id": "ylecun/mnist", "task_id": "accuracy"}, "value": 5.0, "notes": "of a claim"}
    path.write_text(yaml.safe_dump([other, own[0] | {"value": -1.0}, *own[1:]]))
    write_card(folder)
    assert yaml.safe_load(path.read_text()) == [other, *own]
    path.write_text("no list")
    card = (folder / "README.md").read_text()
    with pytest.raises(ValueError, match="must be a list of evaluation results"):
        write_card(folder, title="Another")
    assert (folder / "README.md").read_text() == card


def test_emissions_follow_from_the_energy_and_are_not_stated_without_it(finished):
    training = {"seconds": 7200.0, "processes": 2, "device": "cpu", "precision": "no"}
    folder = finished("encoder", training=training)
    results = json.loads((folder / "results.json").read_text())
    write_json(folder / "results.json", results | {"environment": results["environment"] | {"threads": 4}})
    found = card_of(folder).data.co2_eq_emissions
    assert found["emissions"] == pytest.approx(0.080 * 480) and "5 W per processor thread" in found["source"]
    assert card_of(finished("gan")).data.get("co2_eq_emissions") is None


def test_a_teacher_is_no_base_and_the_relation_to_a_base_is_named(finished):
    parts = ["perceptual loss", "features that tokens were aligned with"]
    lineage = [{"part": part, "name": f"org/{i}"} for i, part in enumerate(parts)]
    assert card_of(finished("dit", lineage=lineage)).data.base_model is None
    for part, relation in (("autoencoder", "adapter"), ("initial encoder", "finetune")):
        data = card_of(finished("dit", lineage=[*lineage, {"part": part, "name": "org/base"}])).data
        assert data.base_model == ["org/base"] and data.get("base_model_relation") == relation


def test_a_restriction_of_an_ancestors_data_is_one_of_the_model(finished):
    card = card_of(finished("dit", lineage=LINEAGE))
    assert card.data.license is None and "> `flowers`: unknown;" in card.text
    assert card.data.base_model == ["org/vq"]
    assert f"- autoencoder: [org/vq](https://huggingface.co/org/vq), commit `{'a' * 12}`, fingerprint" in card.text
    assert "\n  - encoder and codebook: local folder `old`" in card.text


def test_every_licence_of_the_table_of_data_sets_is_judged():
    free = {name for name, entry in TABLE.items() if not is_restricted(entry.licence)}
    assert free == {"digits", "mnist", "caltech101-20c", "orl-faces"}


def test_data_set_of_the_hub_is_linked_and_a_local_one_is_not(finished):
    assert card_of(finished("gan", dataset="mnist")).data.datasets == ["ylecun/mnist"]
    own = card_of(finished("token", dataset="org/faces", hub_datasets=["org/faces"])).data
    assert own.datasets == ["org/faces"] and own.eval_results[0].dataset_type == "org/faces"
    assert card_of(finished("encoder", dataset="/home/me/My faces")).data.datasets is None


def test_card_gives_the_account_of_the_images_and_classes_in_the_order_of_their_ids(finished):
    account = "11 images in 2 classes (train); left out: 3 hidden files"
    folder = finished("dit", images=account)
    index = json.loads((folder / "model_index.json").read_text())
    index["id2label"] = {str(i): f"name{i}" for i in sorted(range(12), key=str)}  # as diffusers' sorted JSON has them
    (folder / "model_index.json").write_text(json.dumps(index))
    card = card_of(folder)
    assert facts_of(folder)["classes"] == [f"name{i}" for i in range(12)]
    assert "name0, name1, name2, name3" in card.text and f"| what the data set holds | {account} |" in card.text


def test_a_person_keeps_his_words_and_changes(finished):
    folder = finished("encoder")
    text = write_card(folder).read_text()
    (folder / "README.md").write_text(text.replace("---\n", "---\nlicense: mit\n", 1) + "\nAsk me about it.\n")
    card = card_of(folder, title="Another title", license_of_data="research only")
    assert card.data.license == "mit" and card.text.endswith("\nAsk me about it.\n")
    assert "# Another title\n" in card.text and "> `digits`: research only." in card.text


def test_damaged_card_is_left_as_it_is(finished):
    folder = finished("encoder")
    damaged = write_card(folder).read_text().replace("hf_dpssl:generated:end", "hf_dpssl:generated")
    (folder / "README.md").write_text(damaged)
    with pytest.raises(ValueError, match="put them back"):
        write_card(folder)
    assert (folder / "README.md").read_text() == damaged


def test_missing_entry_of_the_recipe_is_an_error_and_writes_no_card(finished):
    folder = finished("encoder")
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    del recipe["kernel"]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    with pytest.raises(ValueError, match="no attribute 'kernel'"):
        write_card(folder)
    assert not (folder / "README.md").exists()


@for_each(
    "name, content, message",
    [
        ("results.json", None, "no results.json"),
        ("recipe.yaml", None, "no recipe.yaml"),
        ("results.json", "{", "results.json is no JSON"),
        ("config.json", "[]", "config.json must hold a JSON object"),
        ("recipe.yaml", "a: [", "recipe.yaml is no YAML"),
        ("recipe.yaml", "- a", "recipe.yaml must be flags with values"),
        ("model.safetensors", "no weights", "model.safetensors is damaged"),
        ("config.json", '{"model_type": "bert"}', "no card: known are"),
        ("config.json", None, "no finished checkpoint"),
    ],
)
def test_bad_files_are_named_and_no_card_is_written(name, content, message, finished):
    folder = finished("gan")
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        write_card(folder)
    assert not (folder / "README.md").exists()


def test_every_template_has_a_kind():
    assert {path.stem for path in shipped_folder("model_cards").glob("*.md")} == set(RUNS) == set(KINDS)
