"""Figures of a study in the folders of its models: whose they are, what is said of them, what a push takes along."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from cases import for_each
from huggingface_hub import parse_eval_result_entries
from launches import REPOSITORY

from hf_dpssl.cli.reproduce import SCALES
from hf_dpssl.data.image_data import TABLE
from hf_dpssl.hub.published_files import publishable_files, without_machine

sys.path.insert(0, str(REPOSITORY / "training" / "evidence"))
import claim_cells
import claim_eval_files
import claim_statements

STUDIES = sorted(path.stem for path in (claim_statements.CLAIMS / "studies").glob("*.yaml"))
FILE = ".eval_results/org--digits.yaml"
_IMAGES = "frechet_distance precision recall class_consistency"
_GENERATOR = {
    "generator": f"{_IMAGES} diversity copies_1 copies_5 copies_25",
    None: "images_per_second parameters",
}
_WITH_ENCODER = _GENERATOR | {"encoder": "encoder_knn encoder_rank encoder_uniformity"}
OF = {  # by hand: {study: {folder of the model: its metrics}}, None for metrics of no one model
    "alignment": {"generator": _IMAGES},
    "autoencoders": {
        "autoencoder": "psnr rfid prior_nats effective_rank code_perplexity distance_spread lipschitz_product"
    },
    "budgets": {"autoencoder": "psnr rfid prior_nats latent_probe latent_knn"},
    "dimensions": {"encoder": "knn"},
    "encoders": {"ARM": "set_1 set_2 set_3 set_4 set_5", None: "transfer domains tau regret accuracy"},
    "gan": {"gan": "fid"},
    "maps": {"direct": "knn"},  # of the other arms: of no one model
    "one_step": _GENERATOR,
    "one_step_features": _WITH_ENCODER,
    "one_step_joint": _WITH_ENCODER,
    "one_step_joint_photographs": _WITH_ENCODER,
    "one_step_photographs": _WITH_ENCODER,
    "tokens": {"tokens": "token_fd token_consistency nats precision recall", "autoencoder": "code_perplexity"},
    "weakness": {
        "dit_small": "dit_small_fd",
        "dit_medium": "dit_medium_fd",
        "dit_large": "dit_large_fd dit_large_consistency reconstruction_fd dit_large_to_reconstructions",
        "one_step": "one_step_fd one_step_consistency one_step_to_reconstructions",
        "tokens": "token_fd",
        "autoencoder": "psnr ssim rfid rkid rprecision rrecall ifid pfid latent_probe latent_knn histogram_probe "
        "prior_nats nats_per_pixel effective_rank code_perplexity distance_spread distance_spread_decoder "
        "lipschitz_encoder lipschitz_decoder lipschitz_product gromov_wasserstein cai_lim trustworthiness continuity",
        None: "dit_small_parameters dit_medium_parameters dit_large_parameters",
    },
}
VALIDATED = {"nats", "encoder_knn", "encoder_rank", "encoder_uniformity"}  # and the codes of the study tokens


def filled(study: dict, arm: str, folder: Path) -> dict:
    """What fills the steps of an arm's cell of seed 3, of a study in `folder`."""
    places = {name: folder / name for name in ("shared", "fit", "measured")}
    here = claim_cells.places_of(study, claim_cells.Cell(arm, 3), places, folder)
    return claim_cells.filled(study, arm, 0, here)[1]


@for_each("name", STUDIES)
def test_every_metric_of_every_scale_is_of_the_model_that_was_measured_or_of_none(name):
    owners = {metric: model for model, metrics in OF[name].items() for metric in metrics.split()}
    for scale in SCALES:
        study = claim_statements.read_study(name, scale)
        assert study["metrics"].keys() <= owners.keys()
        for arm, about in study["arms"].items():
            fill = filled(study, arm, Path("/study"))
            found = claim_eval_files.measured_models(study, arm, fill)
            for metric, content in study["metrics"].items():
                if not claim_cells.of_arm(content, arm):
                    assert metric not in found
                    continue
                model = owners[metric] if name != "maps" or arm == "direct" else None
                assert (metric in found) == (model is not None), (scale, arm, metric)
                if model is None:
                    continue
                folder = f"/study/runs/{about.get('trained_as', arm)}-s3/{arm if model == 'ARM' else model}"
                assert str(found[metric].model) == folder, (scale, arm, metric)
                of_validation = metric in VALIDATED or (name, metric) == ("tokens", "code_perplexity")
                data = study["numbers"].get(metric, "/study/fit" if of_validation else "/study/measured")
                assert found[metric].dataset == data and "/study" not in found[metric].command


@pytest.fixture
def digits_of_the_hub(monkeypatch):
    """As if the embedded digits were one of the Hub's data sets."""
    monkeypatch.setitem(TABLE, "digits", replace(TABLE["digits"], hub_id="org/digits"))
    claim_eval_files.hub_data.cache_clear()
    yield
    claim_eval_files.hub_data.cache_clear()


def tiny_study() -> dict:
    """What is stated of the shipped study of claim 1 with one arm and point, of embedded digits, seconds long."""
    study = claim_statements.read_study("dimensions", "quick")
    arm = study["arms"]["t_simclr_2"]
    study["arms"] = {"t_simclr_2": arm | {"grid": arm["grid"][:1]}}
    study["data"] = {"name": "digits", "augmentation": "digits", "image_size": 16, "from": "scikit-learn"}
    study["numbers"] |= {"train": 256, "validation": 100, "test": 200, "channels": "[8, 8, 8, 8]"}
    study["numbers"] |= {"batch_size": 64, "epochs": 1}
    return {"study": study, "claims": {"fewer_dimensions": {"study": "dimensions"}}, "seeds": 1}


def test_a_finished_cell_leaves_what_was_measured_beside_the_model_for_a_push_and_a_grid_cell_nothing(
    tmp_path, digits_of_the_hub
):
    stated, runs = tiny_study(), tmp_path / "runs"
    places = claim_cells.ready(stated["study"], tmp_path)
    assert [cell.name for cell in claim_cells.run_study(stated, tmp_path, places)] == [
        "tune-t_simclr_2-0",
        "t_simclr_2-s0",
    ]
    assert (runs / "tune-t_simclr_2-0/encoder").is_dir()
    assert [path.relative_to(runs).as_posix() for path in runs.glob("*/*/.eval_results/*")] == [
        f"t_simclr_2-s0/encoder/{FILE}"
    ]
    model = runs / "t_simclr_2-s0/encoder"
    [entry] = parse_eval_result_entries(yaml.safe_load((model / FILE).read_text()))
    value = json.loads((tmp_path / "cells/t_simclr_2-s0.json").read_text())["metrics"]["knn"]
    measured = json.loads((runs / "t_simclr_2-s0/measured.json").read_text())["evaluations"][0]
    assert (entry.dataset_id, entry.task_id) == ("org/digits", "accuracy")
    assert entry.value == pytest.approx(value, rel=1e-5) and value == measured["metrics"]["knn_top1"]
    assert entry.notes == (
        "20-NN of embeddings, %; split test; data 200 of 360 test images, resized to 16 px; "
        f"samples {measured['samples']}; by evaluate {{cell}}/encoder --features embeddings --protocol knn --knn_k 20 "
        "--knn_metric euclidean --dataset {measured} --output {cell}/measured.json; study dimensions; scale quick; "
        f"arm t_simclr_2 ({stated['study']['arms']['t_simclr_2']['says']}); seed 0; "
        f"statement {claim_statements.fingerprint(stated)[:16]}"
    )
    assert measured["samples"]["evaluation"] == 200 and FILE in publishable_files(model)[0]
    assert without_machine(FILE, model / FILE) == model / FILE  # no folder of the machine is in it


@pytest.mark.extended
def test_figures_of_validation_images_are_of_the_training_split_and_those_of_each_model_in_its_own_folder(
    tmp_path, digits_of_the_hub
):
    study = claim_statements.read_study("tokens", "quick")
    study["arms"] = {"weak_dropout": study["arms"]["weak_dropout"]}
    study["data"] = tiny_study()["study"]["data"]
    study["numbers"] |= {"train": 1000, "validation": 50, "test": 300, "generated": 40, "judge_epochs": 1}
    study["numbers"] |= {"stage_1_steps": 3, "stage_2_steps": 3, "token_steps": 3, "validation_steps": 3}
    study["numbers"] |= {"tokens": "--num_layers 1 --width 32"}
    stated = {"study": study, "claims": {"token_generation": {"study": "tokens"}}, "seeds": 1}
    places = claim_cells.ready(stated["study"], tmp_path)
    assert [cell.name for cell in claim_cells.run_study(stated, tmp_path, places)] == ["weak_dropout-s0"]
    values = json.loads((tmp_path / "cells/weak_dropout-s0.json").read_text())["metrics"]
    folder = tmp_path / "runs/weak_dropout-s0"
    found = {name: yaml.safe_load((folder / name / FILE).read_text()) for name in ("autoencoder", "tokens")}
    of_metrics = {"autoencoder": ["code_perplexity"]}
    of_metrics["tokens"] = ["token_fd", "token_consistency", "nats", "precision", "recall"]
    for name, entries in found.items():
        for metric, entry in zip(of_metrics[name], entries, strict=True):
            part = "test; data 300 of 360 test images"
            if metric in ("nats", "code_perplexity"):
                part = "train; data 50 of 1437 train images, held out from training"
            assert entry["value"] == pytest.approx(values[metric], rel=1e-5)
            assert entry["notes"].startswith(f"{study['metrics'][metric]['says']}; split {part}, resized to 16 px; ")


def planted(folder: Path) -> tuple[dict, dict, claim_cells.Cell]:
    """(what is stated, what fills steps, cell) of a study whose cell has left its files in `folder`."""
    arms = {"dit": {"says": "25 steps", "flags": ""}, "dit_1": {"says": "1 step", "flags": "", "trained_as": "dit"}}
    metric = {"says": "Frechet distance", "file": "measured.json", "at": ["frechet_distance"]}
    nats = {"says": "nats", "arms": ["dit"], "file": "generator/results.json", "at": ["metrics", "nats_per_image"]}
    study = {"data": {"name": "digits", "image_size": 12}, "numbers": {}, "scale": "quick", "arms": arms}
    study["metrics"] = {"frechet_distance": metric, "nats": nats}
    measuring = "{trained}/generator --dataset {measured} --output {cell}/measured.json"
    study["steps"] = [
        {"run": "dae_ar", "arms": ["dit"], "flags": "--dataset {fit} --name generator"},
        {"run": "one_step", "final": True, "flags": measuring},
    ]
    for arm in arms:
        (folder / f"runs/{arm}-s3").mkdir(parents=True)
        content = {"frechet_distance": 2.5, "samples": {"generated": 40, "held_out": 300, "train": 1000}}
        (folder / f"runs/{arm}-s3/measured.json").write_text(json.dumps(content))
    (folder / "runs/dit-s3/generator").mkdir()
    (folder / "runs/dit-s3/generator/model_index.json").write_text("{}")
    results = {"metrics": {"nats_per_image": 30.0}, "samples": {"train": 1000, "evaluation": 50}}
    (folder / "runs/dit-s3/generator/results.json").write_text(json.dumps(results))
    return {"study": study, "claims": {"c": {"study": "s"}}}


def write(stated: dict, folder: Path, arm: str, **values) -> list[dict]:
    """The entries beside the generator after an arm's figures were put there."""
    values = {"frechet_distance": 2.5, "nats": 30.0} | values
    fill = filled(stated["study"], arm, folder)
    claim_eval_files.write_eval_files(stated, claim_cells.Cell(arm, 3), fill, values)
    path = folder / "runs/dit-s3/generator" / FILE
    return yaml.safe_load(path.read_text()) if path.exists() else []


def test_arms_that_share_a_generator_and_other_measurements_stand_beside_each_other(tmp_path, digits_of_the_hub):
    stated = planted(tmp_path)
    other = {"dataset": {"id": "org/digits", "task_id": "fid"}, "value": 1.0, "notes": "somebody else's"}
    path = tmp_path / "runs/dit-s3/generator" / FILE
    path.parent.mkdir()
    path.write_text(yaml.safe_dump([other]))
    first = write(stated, tmp_path, "dit")
    both = write(stated, tmp_path, "dit_1", frechet_distance=4.5)
    assert first[0] == other and both == first + both[3:] and len(both) == 4
    assert [entry["value"] for entry in both] == [1.0, 2.5, 30.0, 4.5]
    assert write(stated, tmp_path, "dit_1", frechet_distance=4.5) == both  # a cell that is run again
    notes = [entry["notes"] for entry in both]
    assert "split test; data 300 of 360 test images, resized to 12 px; samples {'generated': 40" in notes[1]
    assert "split train; data 50 of 1437 train images, held out from training, resized to 12 px" in notes[2]
    assert "by one_step {trained}/generator" in notes[3] and "arm dit_1 (1 step); seed 3" in notes[3]


@for_each(
    "change, left",
    [
        (lambda stated, folder: stated["study"]["data"].update(name="orl-faces"), []),
        (lambda stated, folder: (folder / "runs/dit-s3/generator/model_index.json").unlink(), []),
        (lambda stated, folder: shutil.rmtree(folder / "runs/dit-s3/generator"), []),
        (lambda stated, folder: (folder / "runs/dit-s3/measured.json").write_text('{"frechet_distance": 1}'), ["nll"]),
        (lambda stated, folder: stated["study"]["steps"].pop(0), ["frechet_distance"]),
    ],
)
def test_no_entry_has_what_is_not_known_to_be_of_a_model_and_a_part_of_a_data_set_of_the_hub(
    tmp_path, digits_of_the_hub, change, left
):
    stated = planted(tmp_path)
    change(stated, tmp_path)
    assert [entry["dataset"]["task_id"] for entry in write(stated, tmp_path, "dit")] == left


def test_a_figure_that_is_not_finite_is_no_result(tmp_path, digits_of_the_hub):
    entries = write(planted(tmp_path), tmp_path, "dit", frechet_distance=float("nan"))
    assert [entry["value"] for entry in entries] == [30.0]
