"""A run goes on with the images it began with, wherever they lie, and a refused one leaves everything as it was."""

import json
import os
import shutil
from dataclasses import asdict, replace
from types import SimpleNamespace

import evaluate
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import make_dit

from hf_dpssl.autoencoder import latent_codec
from hf_dpssl.autoencoder.arguments import VQArguments
from hf_dpssl.data import load_images
from hf_dpssl.latent_training.dit_arguments import DiTArguments
from hf_dpssl.runs import shared_storage
from hf_dpssl.runs.continuation import Processes, check_same_run
from hf_dpssl.runs.training_checkpoints import CheckpointFolder
from hf_dpssl.runs.training_loop import check_start, same_checkpoint

ENCODER = ["--batch_size", 4, "--image_size", 16, "--checkpointing_steps", 1, "--logging_steps", 1]


@pytest.fixture
def pictures(tmp_path):
    """Twelve pictures of two classes."""
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for index in range(6):
            picture = Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            picture.save(tmp_path / "pictures" / name / f"{index}.png")
    return tmp_path / "pictures"


def flags(pictures, folder, steps, *more):
    return [*ENCODER, "--dataset", pictures, "--output_dir", folder, "--max_train_steps", steps, *more]


def weights(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*.safetensors")}


def test_content_is_that_of_the_images_and_not_of_their_place(pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "moved", copy_function=shutil.copyfile)
    before = load_images(str(pictures)).content
    assert load_images(str(tmp_path / "moved")).content == before
    Image.new("RGB", (16, 16)).save(tmp_path / "moved/cat/0.png")
    changed = load_images(str(tmp_path / "moved")).content
    (pictures / "dog").rename(pictures / "wolf")
    renamed = load_images(str(pictures)).content
    assert len({before, changed, renamed}) == 3


@pytest.mark.extended
def test_moved_images_go_on_and_other_classes_are_refused_with_both_lists(pictures, tmp_path, run_script, refusal):
    constant = ["--lr_scheduler", "constant"]
    run_script("contrastive", flags(pictures, tmp_path / "whole", 3, *constant))
    run_script("contrastive", flags(pictures, tmp_path / "run", 2, *constant))
    moved = pictures.rename(tmp_path / "elsewhere")
    resume = [*constant, "--resume_from_checkpoint", "latest"]
    printed = run_script("contrastive", flags(moved, tmp_path / "run", 3, *resume, "--knn_k", 3))
    assert "resumed at step 2" in printed and "others" not in printed
    assert weights(tmp_path / "run/encoder") == weights(tmp_path / "whole/encoder")

    (moved / "dog").rename(moved / "wolf")
    message = refusal("contrastive", flags(moved, tmp_path / "run", 4, *resume))
    assert "'cat', 'dog'" in message and "'cat', 'wolf'" in message and "--overwrite" in message
    (moved / "wolf").rename(moved / "dog")
    Image.new("RGB", (16, 16)).save(moved / "cat/9.png")
    printed = run_script("contrastive", flags(moved, tmp_path / "run", 4, *resume))
    assert "the images are others" in printed and "resumed at step 3" in printed


def test_what_measures_shows_or_saves_memory_may_change_and_what_decides_about_weights_may_not():
    speed = {"gradient_checkpointing": True, "checkpointing_steps": 7, "num_workers": 3, "evaluation_images": 9}
    samples = {"sampling_steps": 3, "guidance_scale": 4.0, "grid_images_per_class": 1, "validation_steps": 5}
    for args, free, bound in (
        (DiTArguments(), speed | samples | {"compile": True}, {"learning_rate": 0.5, "width": 8, "seed": 3}),
        (VQArguments(), speed | {"validation_steps": 5, "validation_images": 8}, {"num_codes": 8, "batch_size": 2}),
        (VQArguments(adversarial="hinge"), speed, {"validation_steps": 5}),  # whose guard follows the validations
    ):
        meta = {"arguments": asdict(args), "num_processes": 1, "sharded": False, "readers": False}
        now = (Processes(1, sharded=False), None, {}, "run")
        check_same_run(meta, replace(args, **free), *now)
        for name, value in bound.items():
            with pytest.raises(ValueError, match=f"{name}: .* -> {value}"):
                check_same_run(meta, replace(args, **free, **{name: value}), *now)


def test_other_latent_statistics_of_the_autoencoder_are_refused_and_may_lack_in_a_checkpoint_of_before():
    args, now = DiTArguments(), (Processes(1, sharded=False), None)
    meta = {"arguments": asdict(args), "num_processes": 1, "sharded": False, "readers": False}
    vae = make_dit().vae
    meta["sources"] = latent_codec.sources(vae)
    check_same_run(meta, args, *now, latent_codec.sources(vae), "run")
    vae.config.latent_std = [3.0] * 4
    with pytest.raises(ValueError, match="its latent normalization .* other latent_mean and latent_std"):
        check_same_run(meta, args, *now, latent_codec.sources(vae), "run")
    meta["sources"] = {"autoencoder": vae.fingerprint()}
    check_same_run(meta, args, *now, latent_codec.sources(vae), "run")
    with pytest.raises(ValueError, match="its autoencoder .* Give that of the run"):
        check_same_run(meta, args, *now, latent_codec.sources(make_dit(seed=1).vae), "run")


@pytest.mark.extended
def test_length_changes_only_under_a_schedule_without_end_and_never_below_what_is_done(
    pictures, tmp_path, run_script, refusal
):
    run_script("contrastive", flags(pictures, tmp_path / "cosine", 2))
    resume = ["--resume_from_checkpoint", "latest"]
    message = refusal("contrastive", flags(pictures, tmp_path / "cosine", 3, *resume))
    assert "max_train_steps: 2 -> 3" in message and "--lr_scheduler constant" in message
    constant = ["--lr_scheduler", "constant"]
    run_script("contrastive", flags(pictures, tmp_path / "constant", 2, *constant))
    assert "step 2" in refusal("contrastive", flags(pictures, tmp_path / "constant", 1, *constant, *resume))


@pytest.mark.extended
def test_refused_generator_leaves_the_latents_of_the_good_run(pictures, tmp_path, run_script, refusal):
    tiny = ["--dataset", pictures, "--image_size", 16, "--batch_size", 2, "--output_dir", tmp_path / "run"]
    short = [
        "--stage_1_steps",
        1,
        "--stage_2_steps",
        1,
        "--num_codes",
        8,
        "--encoder_channels",
        8,
        "--decoder_channels",
    ]
    short += [8, "--auxiliary_channels", 8]
    run_script("dae_vq", [*tiny, *short])
    dit = [*tiny, "--autoencoder", tmp_path / "run/autoencoder", "--max_train_steps", 1, "--width", 16, "--num_layers"]
    dit += [1, "--num_heads", 2, "--sampling_steps", 1, "--grid_images_per_class", 1]
    run_script("dae_dit", dit)
    before = {path: path.read_bytes() for path in (tmp_path / "run/latents").rglob("*") if path.is_file()}
    moved = shutil.copytree(tmp_path / "run/autoencoder", tmp_path / "moved")
    resume = ["--resume_from_checkpoint", "latest"]
    assert "resumed at step 1" in run_script("dae_dit", [*dit, *resume, "--autoencoder", moved])
    run_script("dae_vq", [*tiny, *short, "--seed", 1, "--overwrite"])
    assert "its autoencoder (fingerprint" in refusal("dae_dit", [*dit, *resume])
    dit = [*dit, "--autoencoder", moved]
    (pictures / "dog").rename(pictures / "wolf")
    assert "'cat', 'wolf'" in refusal("dae_dit", [*dit, *resume])
    assert "--overwrite" in refusal("dae_dit", dit)
    assert {path: path.read_bytes() for path in before} == before and before
    meta = json.loads(next((tmp_path / "run/checkpoints/dit").rglob("meta.json")).read_text())
    assert meta["data"]["classes"] == ["cat", "dog"]


def test_a_finished_training_is_kept_when_its_measures_cannot_be_taken(pictures, tmp_path, run_script, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", "/proc/nowhere")
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_CACHE", "/proc/nowhere")
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", "/proc/nowhere")
    printed = run_script("contrastive", flags(pictures, tmp_path / "run", 1))
    assert "knn is not measured" in printed
    assert (tmp_path / "run/encoder/model.safetensors").exists()
    results = json.loads((tmp_path / "run/encoder/results.json").read_text())
    assert "knn" in results["not_measured"] and "knn_top1" not in results["metrics"]


def test_encoders_and_extractors_that_are_not_there_are_refused_before_anything_is_trained(pictures, tmp_path, refusal):
    missing = str(tmp_path / "missing")
    given = ["--dataset", pictures, "--output_dir", tmp_path / "run"]
    for script, flag in (("dae_gan", "--extractor"), ("dae_ar", "--extractor"), ("dae_dit", "--align_encoder")):
        assert missing in refusal(script, [*given, flag, missing]), script
    assert missing in refusal("dae_drift", [*given, "--features", missing])
    assert missing in refusal("dae_dit", [*given, "--validation_steps", 1, "--validation_extractor", missing])
    assert not (tmp_path / "run").exists()


def _latest(folder: str) -> dict:
    """What each of two processes takes for the latest checkpoint of a folder that only the first one sees."""
    rank = torch.distributed.get_rank()
    checkpoints = CheckpointFolder(f"{folder}/shared")
    seen = same_checkpoint("latest", checkpoints)
    os.chdir(f"{folder}/{rank}")  # as on two machines: the same path, other disks
    seen = f"{seen} {same_checkpoint('latest', CheckpointFolder('both'))}"
    try:
        same_checkpoint("latest", CheckpointFolder("run"))
        message = ""
    except FileNotFoundError as error:
        message = str(error)
    named = torch.tensor(list(f"{seen} {message}".encode()))
    return {"named": named}


def test_all_processes_go_on_from_the_checkpoint_of_the_first_or_say_who_does_not_see_it(run_in_two, tmp_path):
    for step in (1, 2):
        CheckpointFolder(tmp_path / "shared").save(step, {}, {})
    CheckpointFolder(tmp_path / "0/run").save(7, {}, {})
    CheckpointFolder(tmp_path / "0/both").save(3, {}, {})
    for step in (3, 9):  # the second machine has been further once
        CheckpointFolder(tmp_path / "1/both").save(step, {}, {})
    for result in run_in_two(_latest, str(tmp_path)):
        text = bytes(result["named"].tolist()).decode()
        assert "shared/step-00000002" in text and "both/step-00000003" in text
        assert "[1] of 2 do not see" in text and "step-00000007" in text and "shared storage" in text


def _fresh_start(folder: str) -> dict:
    """What a process is told at the start of a run, in a folder that both see and in one that each has itself."""
    rank, said = torch.distributed.get_rank(), []
    shared_storage._PATIENCE = 0.5
    shared_storage.socket.gethostname = lambda: f"machine-{rank}"
    accelerator = SimpleNamespace(is_main_process=rank == 0)
    os.chdir(f"{folder}/{rank}")
    for name in (f"{folder}/shared", "own"):
        try:
            check_start(DiTArguments(output_dir=name), accelerator, "dit", None, {})
            said.append("starts")
        except FileNotFoundError as error:
            said.append(str(error))
    return {"said": torch.tensor(list("; ".join(said).encode()))}


def test_a_fresh_start_names_the_machines_that_do_not_see_the_folder_of_the_first(run_in_two, tmp_path):
    for rank in "01":
        (tmp_path / rank).mkdir()
    for result in run_in_two(_fresh_start, str(tmp_path)):
        text = bytes(result["said"].tolist()).decode()
        assert text.startswith("starts; machine-1: own is not the folder into which machine-0 writes") and (
            "shared storage" in text
        )
    assert not list((tmp_path / "shared").iterdir()) and not (tmp_path / "1" / "own").exists()
