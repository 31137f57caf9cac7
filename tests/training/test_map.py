"""The three-stage 2-D map: what the script writes, and the interactive page."""

import base64
import io
import json
import re
import shutil
import subprocess
import time
from pathlib import Path

import datasets
import map as map_script
import numpy as np
import pytest
import torch
import yaml
from cases import for_each
from launches import forget_accelerator
from pictures import noise, write_parquet
from pictures import row as picture_row
from PIL import Image
from safetensors.torch import load_file
from sklearn.neighbors import KNeighborsClassifier

from hf_dpssl import SimCLRForPreTraining
from hf_dpssl.data.image_data import load_images
from hf_dpssl.pages.map_page import write_map_page
from hf_dpssl.runs.contrastive_arguments import MapArguments

TINY = ["--image_size", 8, "--batch_size", 16, "--model_args", '{"channels": [8, 8, 8, 8]}', "--warmup_epochs", 1]
TINY += ["--stage_1_epochs", 2, "--stage_2_epochs", 2, "--stage_3_epochs", 2, "--projection_hidden_dim", 16]


def write_pictures(folder: Path, classes: list[str], count: int = 48) -> Path:
    for number in range(count):
        path = folder / classes[number % len(classes)] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        brightness = 0.4 + 0.6 * (number % 2)
        Image.fromarray((noise(number, 8, 8) * brightness).astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """(pictures, finished map) of 48 pictures of two classes."""
    base = tmp_path_factory.mktemp("map")
    pictures = write_pictures(base / "pictures", ["dark", "light"])
    flags = [*TINY, "--dataset", pictures, "--output_dir", base / "map", "--page_images", 24]
    forget_accelerator()
    map_script.main([str(flag) for flag in flags])
    forget_accelerator()
    return pictures, base / "map"


def page_content(path: Path) -> tuple[str, dict]:
    page = path.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return page, json.loads(found[1])


def test_script_writes_figure_page_points_and_results(folders):
    _, folder = folders
    results = json.loads((folder / "results.json").read_text())
    assert set(results["metrics"]) == {"knn_top1_pixels_tsne", "knn_top1_features_tsne", "knn_top1_map"}
    assert results["samples"] == {"train": 44, "held_out": 4, "page": 24} and results["method"] == "t-SimCNE"
    assert "together" in results["tsne"] or "transform" in results["tsne"]
    assert Image.open(folder / "map.png").width > 1500
    points = datasets.Dataset.from_parquet(str(folder / "points.parquet"), cache_dir=str(folder / "cache"))
    assert len(points) == 48 and points.features["label"].names == ["dark", "light"]
    held_out = np.array(points["held_out"][:])
    for name in ("pixels_tsne", "features_tsne", "map"):
        plane = np.stack([points[f"{name}_x"][:], points[f"{name}_y"][:]], axis=1)
        labels = np.array(points["label"][:])
        judge = KNeighborsClassifier(15).fit(plane[~held_out], labels[~held_out])
        accuracy = 100 * judge.score(plane[held_out], labels[held_out])
        assert results["metrics"][f"knn_top1_{name}"] == pytest.approx(accuracy)


def test_images_without_class_are_on_the_map_and_not_among_the_neighbours(tmp_path, capsys):
    labels = [0, 1, None, 1] * 10
    images, feature = [picture_row(i) for i in range(40)], datasets.ClassLabel(2)
    path = write_parquet(tmp_path / "set.parquet", images, label=(labels, feature))
    data = load_images(str(path), hold_out=False)
    parts = {
        "images": torch.zeros(40, 3, 8, 8, dtype=torch.uint8), "labels": torch.tensor(data.train["label"][:]),
        "rows": list(range(40)), "files": [None] * 40, "held_out": [i >= 30 for i in range(40)],
    }  # fmt: skip
    points = np.random.default_rng(0).normal(size=(40, 2))
    map_script.save(MapArguments(knn_k=3), data, dict.fromkeys(("x", "y", "map"), points), parts, "", tmp_path)
    known = parts["labels"].numpy() >= 0
    bank, queries = known & (np.arange(40) < 30), known & (np.arange(40) >= 30)
    judge = KNeighborsClassifier(3).fit(points[bank], parts["labels"][bank])
    accuracy = 100 * judge.score(points[queries], parts["labels"][queries])
    assert json.loads((tmp_path / "results.json").read_text())["metrics"]["knn_top1_map"] == pytest.approx(accuracy)
    assert "10 images without class are on the map" in capsys.readouterr().out


def test_points_of_the_map_are_the_embeddings_of_the_last_stage(folders):
    pictures, folder = folders
    points = datasets.Dataset.from_parquet(str(folder / "points.parquet"), cache_dir=str(folder / "cache"))
    model = SimCLRForPreTraining.from_pretrained(folder / "encoder" / "pretraining").eval()
    statistics = model.config.pretrained_cfg
    for row in points.select([0, 20, 47]):
        label = ["dark", "light"][row["label"]]
        pixels = torch.from_numpy(np.asarray(Image.open(pictures / label / row["file"])).copy()).permute(2, 0, 1) / 255
        mean, std = (torch.tensor(statistics[name]).view(3, 1, 1) for name in ("mean", "std"))
        with torch.no_grad():
            expected = model(((pixels - mean) / std)[None]).embeddings[0]
        torch.testing.assert_close(torch.tensor([row["map_x"], row["map_y"]]), expected, rtol=0, atol=1e-5)


def test_stages_are_those_of_t_simcne(folders):
    _, folder = folders
    stages = [yaml.safe_load((folder / f"{name}.yaml").read_text()) for name in ("stage-1", "stage-2", "encoder")]
    assert [stage["projection_dim"] for stage in stages] == [128, 2, 2]
    assert [stage["freeze"] for stage in stages] == ["none", "all_but_last_layer", "none"]
    assert [stage["warmup_steps"] for stage in stages] == [2, 0, 2]  # 44 pictures are 2 batches of 16
    assert stages[0]["learning_rate"] == stages[1]["learning_rate"] == 10 * stages[2]["learning_rate"]
    assert {(s["kernel"], s["normalization"], s["dof"], s["temperature"], s["feature_norm"]) for s in stages} == {
        ("student_t", "anchor", 1, 1, "none")
    }
    first, second, third = (
        load_file(folder / f"{n}/pretraining/model.safetensors") for n in ("stage-1", "stage-2", "encoder")
    )
    changed = {name for name, value in second.items() if not value.equal(first[name])}
    assert changed == {"head.2.weight", "head.2.bias"}
    assert not third["encoder.timm_model.conv1.0.weight"].equal(second["encoder.timm_model.conv1.0.weight"])


def test_page_of_the_script_holds_as_many_points_as_asked_for_of_each_class_its_share_and_no_address(folders):
    _, folder = folders
    page, content = page_content(folder / "map.html")
    points = datasets.Dataset.from_parquet(str(folder / "points.parquet"), cache_dir=str(folder / "cache"))
    rows = [points["file"][:].index(name) for name in content["names"]]
    assert len(set(rows)) == 24 and np.bincount(content["labels"]).tolist() == [12, 12]
    assert content["labels"] == points.select(rows)["label"][:]
    assert content["heldOut"] == [int(flag) for flag in points.select(rows)["held_out"]]
    for shown, name in zip(content["maps"], ("pixels_tsne", "features_tsne", "map"), strict=True):
        plane = np.stack([points[f"{name}_x"][:], points[f"{name}_y"][:]], axis=1).astype(float)[rows]
        scaled = (plane - plane.min(0)) * 10_000 / (plane.max(0) - plane.min(0)).max()
        np.testing.assert_allclose(np.array(shown["points"]).reshape(-1, 2), scaled, atol=0.51)
    assert not re.search(r"https?:|//\w|@import|url\(", page.split('src="data:')[0] + page.split("</script>", 1)[1])
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []


def write_page(path: Path, count: int = 7, side: int = 6, **changes) -> torch.Tensor:
    images = torch.stack([torch.from_numpy(noise(i, side, side)).permute(2, 0, 1) for i in range(count)])
    options = {
        "names": [f"{i}.png" for i in range(count)],
        "labels": [i % 3 - 1 for i in range(count)],
        "class_names": ["cat", "dog"],
        "held_out": [i == 2 for i in range(count)],
        "title": "a map",
    }
    maps = {"one": np.random.default_rng(0).normal(size=(count, 2))}
    write_map_page(path, changes.pop("maps", maps), images, **options | changes)
    return images


def test_sprite_sheet_holds_each_picture_where_the_page_looks_for_it(tmp_path):
    images = write_page(tmp_path / "map.html")
    page, content = page_content(tmp_path / "map.html")
    found = re.search(r'src="data:image/png;base64,([^"]+)"', page)
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(found[1]))))
    side, columns = content["side"], content["columns"]
    for i, picture in enumerate(images):
        top, left = i // columns * side, i % columns * side
        assert (sheet[top : top + side, left : left + side] == picture.permute(1, 2, 0).numpy()).all()


def test_ten_thousand_pictures_fit_on_a_page_of_some_megabytes(tmp_path):
    points = np.random.default_rng(0).normal(size=(10_000, 2))
    images = torch.randint(0, 256, (10_000, 3, 8, 8), dtype=torch.uint8).repeat_interleave(4, 2).repeat_interleave(4, 3)
    write_map_page(
        tmp_path / "map.html", {"one": points}, images, names=["x.png"] * 10_000, labels=[0] * 10_000,
        class_names=["cat"], held_out=[False] * 10_000, title="large",
    )  # fmt: skip
    assert len(page_content(tmp_path / "map.html")[1]["labels"]) == 10_000
    assert (tmp_path / "map.html").stat().st_size < 12e6


def test_names_cannot_end_the_script_or_become_markup(tmp_path):
    bad = "</script><script>alert(1)</script>"
    write_page(tmp_path / "map.html", names=[bad] * 7, class_names=[bad, "&"], title=bad)
    page, content = page_content(tmp_path / "map.html")
    assert content["names"] == [bad] * 7 and content["classes"] == [bad, "&"]
    assert page.count("<script") == 2 and "alert(1)</script>" not in page


@for_each(
    "changes, message",
    [
        ({"names": ["one"]}, "as many points, names, labels and flags as its 7 images"),
        ({"maps": {}}, "as many points"),
        ({"maps": {"one": np.full((7, 2), np.nan)}}, "not finite"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_page(tmp_path / "map.html", **changes)
    assert not (tmp_path / "map.html").exists()


def test_script_of_the_page_is_valid_javascript(tmp_path):
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    write_page(tmp_path / "map.html")
    script = page_content(tmp_path / "map.html")[0].rsplit("<script>", 1)[1].split("</script>")[0]
    (tmp_path / "page.js").write_text(script)
    done = subprocess.run(["node", "--check", str(tmp_path / "page.js")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_held_out_points_come_from_open_tsne_transform_where_it_is_installed():
    open_tsne = pytest.importorskip("openTSNE")
    inputs = np.random.default_rng(0).normal(size=(80, 5)) + 8 * (np.arange(80) % 2)[:, None]
    held_out = np.arange(80) >= 60
    points, how = map_script.tsne(inputs, held_out, seed=0)
    assert "transform" in how and points.shape == (80, 2) and open_tsne.__version__
    alone, _ = map_script.tsne(np.concatenate([inputs[:60], inputs[:20] + 100]), held_out, seed=0)
    np.testing.assert_allclose(alone[:60], points[:60])  # held-out images move no point of the train images


def test_flags_that_have_no_meaning_for_a_map_are_refused(refusal, tmp_path):
    for flags, message in [
        (["--streaming", "--max_train_steps", 5], "a map counts epochs"),
        (["--stage_2_epochs", 0], "--stage_2_epochs must be at least 1, got 0"),
    ]:
        assert message in refusal("map", [*flags, "--output_dir", tmp_path / "out"])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_map_of_pictures_without_classes_has_no_accuracy_also_with_the_joint_loss(launch, tmp_path):
    write_pictures(tmp_path / "pictures", ["."])
    flags = [*TINY, "--dataset", tmp_path / "pictures", "--normalization", "joint", "--output_dir", tmp_path / "map"]
    launch("map", flags).wait()
    results = json.loads((tmp_path / "map" / "results.json").read_text())
    assert results["metrics"] == {} and results["method"] == "t-SimCLR"
    assert page_content(tmp_path / "map" / "map.html")[1]["labels"] == [-1] * 48


def final_weights(folder: Path) -> dict:
    return load_file(folder / "encoder" / "pretraining" / "model.safetensors")


@pytest.mark.slow
def test_killed_map_goes_on_to_the_same_weights_and_two_processes_draw_one_map(folders, launch, tmp_path):
    pictures, whole = folders
    flags = [*TINY, "--dataset", pictures, "--checkpointing_steps", 1, "--resume_from_checkpoint", "latest"]
    flags += ["--output_dir", tmp_path / "killed"]
    launched = launch("map", flags)
    while launched.is_alive() and not (tmp_path / "killed/checkpoints/stage-2/step-00000001").exists():
        time.sleep(0.002)
    assert launched.is_alive(), "the kill came too late"
    launched.kill()
    assert "stage-1: resumed at step 4" in launch("map", flags).wait()
    found, expected = final_weights(tmp_path / "killed"), final_weights(whole)
    assert all(value.equal(expected[name]) for name, value in found.items())
    half = [*flags[:-1], tmp_path / "two", "--batch_size", 8, "--num_processes", 2]
    launch("map", half, 2).wait()
    assert len(page_content(tmp_path / "two" / "map.html")[1]["labels"]) == 48
