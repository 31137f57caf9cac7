"""Model cards say what the run's files say."""

import contrastive
import dae_ar
import dae_dit
import dae_gan
import dae_vq
import pytest
import yaml
from huggingface_hub import ModelCard
from jinja2 import UndefinedError

from hf_dpssl.autoencoder_training import Stage, curve_summary
from hf_dpssl.model_card import templates_folder, write_card
from hf_dpssl.recipe import save_recipe
from hf_dpssl.results import write_results

RUNS = {
    "encoder": (contrastive.ContrastiveArguments, {"knn_top1": 91.25}, "91.25"),
    "autoencoder": (dae_vq.VQArguments, {"psnr": 31.4159, "code_usage": 77.0, "code_perplexity": 101.5}, "31.42"),
    "dit": (dae_dit.DiTArguments, {}, "360"),
    "token": (dae_ar.ARArguments, {"nats_per_image": 61.9234, "nats_per_image_uniform": 88.7}, "61.92"),
    "gan": (dae_gan.GANArguments, {"copies": 1.234}, "1.234"),
}
STAGES = [Stage("stage-1", 3, True), Stage("stage-2", 4, False, "fresh")]
# What only this kind of run says about itself.
ABOUT = {
    "autoencoder": {"arm": "dae", "quantizer": "vq", "codes": 256}
    | dae_vq.VQArguments().summary(STAGES, processes=1)
    | curve_summary([], STAGES),
    "gan": {"latent": "dae", "sampled_from": "prior", "densities": {"held_out": {"copies": 5.5}}},
}


def finished_run(folder, kind: str, license_of_data: str = "CC BY 4.0") -> ModelCard:
    """A folder with the files of a run of this kind, and the card written into it."""
    arguments, metrics, _ = RUNS[kind]
    save_recipe(arguments(seed=7), folder / "recipe.yaml")
    (folder / "curves.png").write_bytes(b"")
    samples = {"train": 360, "bank": 360, "evaluation": 90, "latent_statistics": 360, "generated": 500}
    about = ABOUT.get(kind, {})
    write_results(folder / "results.json", metrics, dataset="digits", seed=7, samples=samples, **about)
    write_card(folder, kind, title=f"A {kind}", license_of_data=license_of_data)
    return ModelCard.load(folder / "README.md")


@pytest.mark.parametrize("kind", RUNS)
def test_card_has_metadata_that_the_hub_client_reads_and_the_figures_of_the_run(kind, tmp_path):
    card = finished_run(tmp_path, kind)
    assert card.data.license == "apache-2.0" and "hf_dpssl" in card.data.tags
    for stated in (RUNS[kind][2], "seed 7", "digits", "CC BY 4.0", "![curves.png](curves.png)", f"# A {kind}\n"):
        assert stated in card.text
    assert "{{" not in card.text and "{%" not in card.text


def test_value_that_was_not_measured_says_so(tmp_path):
    assert "not measured" in finished_run(tmp_path, "encoder").text  # no accuracy of the embeddings


@pytest.mark.parametrize("restriction", ["ImageNet terms, non-commercial research", "unknown"])
def test_model_of_restricted_data_is_not_called_apache(restriction, tmp_path):
    card = finished_run(tmp_path, "dit", restriction)
    assert card.data.license == "other"
    assert f"{restriction}. Check that it allows your use." in card.text


def test_missing_entry_of_the_recipe_is_an_error_and_writes_no_card(tmp_path):
    finished_run(tmp_path, "encoder")
    (tmp_path / "README.md").unlink()
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text(encoding="utf-8"))
    del recipe["kernel"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    with pytest.raises(UndefinedError, match="kernel"):
        write_card(tmp_path, "encoder", title="A card", license_of_data="CC BY 4.0")
    assert not (tmp_path / "README.md").exists()


def test_unknown_kind_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="'encoder', 'autoencoder', 'dit'"):
        write_card(tmp_path, "poster", title="A card", license_of_data="CC BY 4.0")


def test_every_template_has_a_kind():
    assert {path.stem for path in templates_folder().glob("*.md")} == set(RUNS)
