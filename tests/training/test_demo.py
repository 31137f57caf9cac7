"""The demo writes what it promises, the same in every run; whoever then does what the READMEs say gets through."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import demo
import numpy as np
import pytest
import timm
import torch
import yaml
from documents import steps_of
from PIL import Image
from repeated_work import Unrendered
from transformers import TrainingArguments

from hf_dpssl import ContrastiveConfig, ContrastiveEncoder, VQAutoencoder, VQDiTPipeline, VQDriftPipeline
from hf_dpssl.cli import train
from hf_dpssl.cli.commands import main
from hf_dpssl.runs import plots
from hf_dpssl.runs.lineage import read_json

REPOSITORY = Path(__file__).parent.parent.parent

SHORT = {
    "encoder_32d_epochs": 1,
    "encoder_2d_epochs": 1,
    "stage_1": 4,
    "stage_2": 4,
    "classifier_epochs": 1,
    "dit": 2,
    "drift": 2,
}


@pytest.fixture(scope="module")
def short_demo(tmp_path_factory, spawn_forked):
    """Folder of a demo that trains for a few steps, its encoders in a fork, and draws a few samples."""
    folder = tmp_path_factory.mktemp("demo")
    recipe = folder / "short.yaml"
    recipe.write_text(yaml.safe_dump(SHORT), encoding="utf-8")
    generators = {
        name: (place, pipeline, options | {"num_inference_steps": 4} if "num_inference_steps" in options else options)
        for name, (place, pipeline, options) in demo.GENERATORS.items()
    }
    few = mock.patch.multiple(demo, NUM_SAMPLES=100, GENERATORS=generators, spawn=spawn_forked)
    with few, mock.patch.object(plots, "Figure", Unrendered):
        return demo.main(["--output_dir", str(folder / "out"), "--recipe", str(recipe)])


def test_demo_writes_complete_checkpoints_pictures_and_report(short_demo):
    names = {path.name for path in short_demo.iterdir()}
    pictures = {"samples.png", "reconstructions.png", "map.png"}
    assert names >= {"encoder", "autoencoder", "drift", "dit", "report.json"} | pictures
    assert ContrastiveEncoder.from_pretrained(short_demo / "encoder").num_features == 256
    assert VQAutoencoder.from_pretrained(short_demo / "autoencoder").config.num_codes == 256
    assert len(VQDiTPipeline.from_pretrained(short_demo / "dit").class_names) == 10
    one_step = VQDriftPipeline.from_pretrained(short_demo / "drift")
    decoupled = VQDriftPipeline.from_pretrained(short_demo / "comparison" / "dae-drift")
    assert one_step.vae.fingerprint() != decoupled.vae.fingerprint()
    arms = [read_json(short_demo / name / "results.json")["arm"] for name in ("autoencoder", "comparison/dae")]
    assert arms == ["joint", "dae"]
    for name in pictures:
        assert min(Image.open(short_demo / name).size) > 200


def test_report_has_every_measure_with_its_circumstances(short_demo):
    report = json.loads((short_demo / "report.json").read_text(encoding="utf-8"))
    metrics = report["metrics"]
    for dimension in (2, 32):
        assert set(metrics[f"knn_{dimension}d"]) == {"t_simclr", "pca", "untrained"}
        assert all(set(value) == {"plain", "moved"} for value in metrics[f"knn_{dimension}d"].values())
    assert metrics["knn_raw_pixels"]["plain"] > 95 > metrics["knn_raw_pixels"]["moved"]  # about 97 % are known
    assert 50 < metrics["knn_2d"]["pca"]["plain"] < 70 and metrics["knn_32d"]["pca"]["plain"] > 94
    assert len(metrics["reconstruction_psnr"]) == 2
    assert {"class_consistency_ceiling", "classifier_accuracy", "code_usage", "code_perplexity"} <= set(metrics)
    assert {name: row["passes"] for name, row in metrics["generators"].items()} == {
        "one_step": 1,
        "one_step_dae": 1,
        "dit": 4,
        "dit_guided": 8,
    }
    assert demo.GENERATORS["dit"][2]["num_inference_steps"] == 25  # as it is shipped
    measures = {"class_consistency", "copies", "diversity", "frechet_distance", "training_seconds", "sampling_seconds"}
    assert all(set(row) == measures | {"passes"} for row in metrics["generators"].values())
    stated = json.loads((short_demo / "drift" / "results.json").read_text(encoding="utf-8"))["metrics"]
    assert stated["diversity"] == metrics["generators"]["one_step"]["diversity"]
    assert sum(v for k, v in metrics["seconds"].items() if k != "total") == pytest.approx(
        metrics["seconds"]["total"], abs=1
    )
    assert report["samples"] == {"train": 1437, "held_out": 360, "generated": 100}
    assert report["environment"]["libraries"]["torch"] and report["recipe"] == SHORT


def test_missed_target_is_called_missed(short_demo, capsys):
    report = json.loads((short_demo / "report.json").read_text(encoding="utf-8"))
    target = report["targets"]["one step: class_consistency, percent"]
    assert target["target"] == ">= 95" and target["value"] < 95 and target["met"] is False
    demo.print_table(report["metrics"], report["targets"], report["metrics"]["seconds"], short_demo)
    assert "MISSED one step: class_consistency, percent" in capsys.readouterr().out


def test_folders_that_no_demo_made_are_left_alone(tmp_path):
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="made by no demo"):
        demo.main(["--output_dir", str(tmp_path)])
    assert [path.name for path in tmp_path.rglob("*")] == ["encoder", "thesis.txt"]
    (tmp_path / "own").mkdir()
    (tmp_path / "own/map.png").write_bytes(b"of a city")
    with pytest.raises(FileExistsError, match="map.png is there and was made by no demo"):
        demo.main(["--output_dir", str(tmp_path / "own")])
    assert (tmp_path / "own/map.png").read_bytes() == b"of a city"


def test_a_recipe_that_is_none_leaves_an_earlier_demo_as_it_is(tmp_path):
    (tmp_path / "out").mkdir()
    for name in (demo.MARK, "map.png"):
        (tmp_path / "out" / name).touch()
    (tmp_path / "short.yaml").write_text("dit: 3")
    for recipe, error in (("nonsense", Exception), (tmp_path / "short.yaml", ValueError)):
        with pytest.raises(error, match="nonsense|exactly the numbers"):
            demo.main(["--output_dir", str(tmp_path / "out"), "--recipe", str(recipe)])
        assert (tmp_path / "out/map.png").exists()


def test_moved_digits_depend_on_the_sample_alone():
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(6)
    moved = demo.shift_and_rotate(images, ids)
    assert torch.equal(demo.shift_and_rotate(images[[4, 1]], ids[[4, 1]]), moved[[4, 1]])
    torch.testing.assert_close(demo.shift_and_rotate(images, ids, shift=0, angle=0), images, rtol=0, atol=1e-5)


NOT_RUN = [["git", "clone"], ["cd", "hf_dpssl"], ["make"], ["source"], ["accelerate"], ["sbatch"]]  # not here
BUDGETS = {  # flags that are put behind those of a command that starts so: the last one holds
    "train contrastive": ["--batch_size", 6, "--max_train_steps", 2],
    "train dae_vq": ["--batch_size", 4, "--stage_1_steps", 2, "--stage_2_steps", 2],
    "train dae_dit": ["--batch_size", 4, "--max_train_steps", 2, "--sampling_steps", 2, "--grid_images_per_class", 1],
    "train dae_drift": ["--batch_size", 64, "--max_train_steps", 2, "--grid_images_per_class", 1],
    "train domains": ["--algorithms", "erm", "--steps", 4],
    "train dae_ar": ["--batch_size", 4, "--max_train_steps", 2, "--samples_per_class", 1],
    "train dae_gan": ["--batch_size", 4, "--max_train_steps", 2, "--stage_1_steps", 2, "--num_generated", 10],
    "evaluate outputs/demo/dit": ["--num_images", 20],
    "sample": ["--num_images", 4],
    "map": ["--image_size", 16, "--batch_size", 8, "--stage_1_epochs", 1, "--stage_2_epochs", 1, "--stage_3_epochs", 1],
    "report": ["--images", 100, "--lipschitz_images", 4, "--distance_images", 10],
}


@pytest.fixture
def readers_folder(short_demo, tmp_path, monkeypatch, launch, hub):
    """A folder in which the demo has run, with pictures and a checkpoint of the reader's own."""
    shutil.copytree(short_demo, tmp_path / "outputs/demo")
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "path/to/images" / name).mkdir(parents=True)
        for index in range(12):
            picture = Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8))
            picture.save(tmp_path / "path/to/images" / name / f"{index}.png")
    for domain in ("photo", "sketch"):
        shutil.copytree(tmp_path / "path/to/images", tmp_path / "path/to/domains" / domain)
    shutil.copy(tmp_path / "path/to/images/cat/0.png", tmp_path / "query.png")
    state = timm.create_model("resnet18", num_classes=128).state_dict()
    moco = {f"module.encoder_{branch}.{key}": value for branch in "qk" for key, value in state.items()}
    moco |= {"module.queue": torch.randn(128, 16), "module.queue_ptr": torch.tensor([0])}
    torch.save({"arch": "resnet18", "state_dict": moco}, tmp_path / "moco_v2_200ep.pth.tar")

    run_script = train.run_script

    def start(script, flags, launcher=None):  # processes as `hf-dpssl train` starts them, with libraries imported
        if script not in train.SCRIPTS:
            return run_script(script, flags, launcher)
        launch(script, flags, 2 if launcher else 1).wait()
        return 0

    monkeypatch.setattr(train, "run_script", start)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("default")  # figures of a few pictures are warned about
def test_commands_and_snippets_of_the_readmes_run_in_order(readers_folder):
    own = {
        "config": ContrastiveConfig(architecture="resnet18", projection_dim=4),
        "arguments": TrainingArguments("outputs/trainer", use_cpu=True, report_to=[]),
        "pairs": [],
        "model": torch.nn.Identity(),  # stands where the reader's SentenceTransformer stands
    }
    for page in ("README.md", "training/README.md"):
        names = dict(own)
        for step in steps_of(REPOSITORY / page):
            if step.python:
                exec(compile(step.python, page, "exec"), names)
            elif step.words[0] == "python":
                assert subprocess.run([sys.executable, *step.words[1:]], timeout=300).returncode == 0, step.words
            elif not any(step.words[: len(start)] == start for start in NOT_RUN):
                command = " ".join(step.words).removeprefix("hf-dpssl ")
                budget = [str(flag) for start, flags in BUDGETS.items() if command.startswith(start) for flag in flags]
                assert main([*step.words[1:], *budget]) == 0, command


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_demo_meets_its_targets_and_repeats_itself(launch, tmp_path):
    reports = []
    for name in ("first", "second"):
        launch("demo", ["--output_dir", tmp_path / name]).wait(timeout=1200)
        reports.append(json.loads((tmp_path / name / "report.json").read_text(encoding="utf-8")))
        reports[-1]["metrics"].pop("seconds")
        for row in reports[-1]["metrics"]["generators"].values():
            row.pop("training_seconds")
            row.pop("sampling_seconds")
        reports[-1].pop("command")
    assert reports[0] == reports[1]
    assert [name for name, entry in reports[0]["targets"].items() if not entry["met"]] == []
