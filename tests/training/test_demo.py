"""The demo writes everything that it promises, the same in every run, and says so when a target is missed."""

import json

import demo
import pytest
import torch
import yaml
from PIL import Image

from hf_dpssl import ContrastiveEncoder, VQAutoencoder, VQDiTPipeline

SHORT = {"encoder_32d_epochs": 1, "encoder_2d_epochs": 1, "stage_1": 4, "stage_2": 4, "classifier_epochs": 1, "dit": 2}


@pytest.fixture(scope="module")
def short_demo(tmp_path_factory):
    """Folder of a demo that trains for a few steps."""
    folder = tmp_path_factory.mktemp("demo")
    recipe = folder / "short.yaml"
    recipe.write_text(yaml.safe_dump(SHORT), encoding="utf-8")
    return demo.main(["--output_dir", str(folder / "out"), "--recipe", str(recipe)])


def test_demo_writes_complete_checkpoints_pictures_and_report(short_demo):
    names = {path.name for path in short_demo.iterdir()}
    assert names >= {"encoder", "autoencoder", "dit", "samples.png", "reconstructions.png", "map.png", "report.json"}
    assert ContrastiveEncoder.from_pretrained(short_demo / "encoder").num_features == 256
    assert VQAutoencoder.from_pretrained(short_demo / "autoencoder").config.num_codes == 256
    assert len(VQDiTPipeline.from_pretrained(short_demo / "dit").class_names) == 10
    for name in ("samples.png", "reconstructions.png", "map.png"):
        assert min(Image.open(short_demo / name).size) > 200


def test_report_has_every_measure_with_its_circumstances(short_demo):
    report = json.loads((short_demo / "report.json").read_text(encoding="utf-8"))
    metrics = report["metrics"]
    for dimension in (2, 32):
        assert set(metrics[f"knn_{dimension}d"]) == {"t_simclr", "pca", "untrained"}
        assert all(set(value) == {"plain", "moved"} for value in metrics[f"knn_{dimension}d"].values())
    assert metrics["knn_raw_pixels"]["plain"] > 95 > metrics["knn_raw_pixels"]["moved"]  # about 97 % are known
    assert 50 < metrics["knn_2d"]["pca"]["plain"] < 70 and metrics["knn_32d"]["pca"]["plain"] > 94
    assert len(metrics["reconstruction_psnr"]) == 4
    consistency = {"class_consistency" + suffix for suffix in ("", "_guided", "_floor", "_ceiling")}
    assert consistency | {"classifier_accuracy", "code_usage", "code_perplexity", "copies", "diversity"} <= set(metrics)
    assert sum(v for k, v in metrics["seconds"].items() if k != "total") == pytest.approx(
        metrics["seconds"]["total"], abs=1
    )
    assert report["samples"] == {"train": 1437, "held_out": 360, "generated": 300}
    assert report["environment"]["libraries"]["torch"] and report["recipe"] == SHORT


def test_missed_target_is_called_missed(short_demo, capsys):
    report = json.loads((short_demo / "report.json").read_text(encoding="utf-8"))
    target = report["targets"]["class_consistency, percent"]
    assert target["target"] == ">= 90" and target["value"] < 90 and target["met"] is False
    demo.print_table(report["metrics"], report["targets"], report["metrics"]["seconds"], short_demo)
    assert "MISSED class_consistency, percent" in capsys.readouterr().out


def test_moved_digits_depend_on_the_sample_alone():
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(6)
    moved = demo.shift_and_rotate(images, ids)
    assert torch.equal(demo.shift_and_rotate(images[[4, 1]], ids[[4, 1]]), moved[[4, 1]])
    torch.testing.assert_close(demo.shift_and_rotate(images, ids, shift=0, angle=0), images, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_demo_meets_its_targets_and_repeats_itself(launch, tmp_path):
    reports = []
    for name in ("first", "second"):
        launch("demo", ["--output_dir", tmp_path / name]).wait(timeout=1200)
        reports.append(json.loads((tmp_path / name / "report.json").read_text(encoding="utf-8")))
        reports[-1]["metrics"].pop("seconds")
        reports[-1].pop("command")
    assert reports[0] == reports[1]
    known_misses = {"diversity_guided, of real"}  # guidance 2 narrows every class
    missed = {name for name, entry in reports[0]["targets"].items() if not entry["met"]}
    assert missed <= known_misses
