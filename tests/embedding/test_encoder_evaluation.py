"""`hf-dpssl evaluate` of image encoders equals the functions on their features, and says what is wrong in one line."""

import json
import shutil

import datasets
import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf
from transformers import ResNetConfig, ResNetModel, ViTImageProcessor

from hf_dpssl import ContrastiveConfig, ContrastiveEncoder, evaluation
from hf_dpssl.cli.commands import main
from hf_dpssl.data.image_data import load_images
from hf_dpssl.data.subsets import random_rows
from hf_dpssl.embedding.embedder import ImageEmbedder
from hf_dpssl.embedding.encoder_evaluation import extract_features, extract_views
from hf_dpssl.hub.card_data import evaluation_results

RESNET = {"channels": [8, 16, 32, 64]}
FEW = ["--evaluation_images", "100"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A folder with an untrained encoder for images of 16 px."""
    torch.manual_seed(0)
    statistics = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "crop_pct": 1.0}
    config = ContrastiveConfig("resnet10t", RESNET, {"input_size": [3, 16, 16], **statistics})
    folder = tmp_path_factory.mktemp("encoder")
    ContrastiveEncoder(config).save_pretrained(folder)
    return folder


def evaluations(folder) -> list[dict]:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))["evaluations"]


def test_features_of_rows_are_those_of_their_pictures(encoder):
    data, embedder = load_images("digits"), ImageEmbedder(str(encoder))
    features, labels = extract_features(embedder, data, data.evaluation, range(0, 50, 5), batch_size=4)
    assert features.shape == (10, 64) and labels.tolist() == data.evaluation["label"][0:50:5]
    alone, _ = extract_features(embedder, data, data.evaluation, range(20, 21))
    torch.testing.assert_close(features[4], alone[0], rtol=1e-4, atol=1e-5)


def test_numbers_are_those_of_the_functions(encoder, tmp_path, capsys):
    output = tmp_path / "new" / "evaluation.json"
    flags = ["--protocol", "knn", "linear", "few_shot", "geometry", "--evaluation_images", "300", "--knn_k", "1", "20"]
    assert main(["evaluate", str(encoder), *flags, "--trials", "3", "--seed", "5", "--output", str(output)]) == 0
    (found,) = json.loads(output.read_text(encoding="utf-8"))["evaluations"]
    data, embedder = load_images("digits"), ImageEmbedder(str(encoder))
    bank, query = (
        extract_features(embedder, data, split, random_rows(len(split), 300, labels=split["label"][:], seed=5))
        for split in (data.train, data.evaluation)
    )
    expected = evaluation.knn(*bank, *query, k=(1, 20)) | evaluation.linear_probe(*bank, *query, seed=5)
    expected |= evaluation.few_shot(*bank, *query, trials=3, seed=5)
    expected |= evaluation.uniformity(query[0]) | evaluation.effective_rank(query[0])
    assert found["metrics"] == pytest.approx(expected, rel=1e-5)
    assert found["samples"] == {"evaluation": 300, "bank": 300} and found["dataset"] == "digits"
    assert found["kind"] == "encoder" and found["fingerprint"]["model"] == embedder.fingerprint
    assert found["seed"] == 5 and found["options"]["trials"] == 3 and "torch" in found["environment"]["libraries"]
    printed = capsys.readouterr().out
    assert all(f"{name} " in printed for name in expected) and "evaluation.json" in printed
    assert not (encoder / "results.json").exists()


@pytest.mark.extended
def test_views_of_a_picture_are_nearer_to_each_other_than_to_those_of_others(encoder, capsys):
    data, embedder = load_images("digits"), ImageEmbedder(str(encoder))
    rows = random_rows(360, 45, labels=data.evaluation["label"][:])
    first, second = extract_views(embedder, data, data.evaluation, rows, seed=0, batch_size=7)
    assert first.shape == second.shape == (45, 64) and not torch.allclose(first, second)
    again, _ = extract_views(embedder, data, data.evaluation, rows, seed=0, batch_size=45)
    torch.testing.assert_close(first, again, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(first, extract_views(embedder, data, data.evaluation, rows, seed=1)[0])
    pairs = evaluation.alignment(first, second)
    first, second = extract_views(embedder, data, data.evaluation, range(360), seed=0)
    alike, other = (evaluation.alignment(first, views)["alignment"] for views in (second, second.roll(1, 0)))
    assert alike < 0.98 * other
    assert main(["evaluate", str(encoder), "--protocol", "views", "--evaluation_images", "45", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == pytest.approx(pairs, rel=1e-4)


@pytest.mark.extended
def test_all_images_are_used_and_a_cap_stands_in_the_arguments_of_the_metric(encoder, capsys):
    cases = [([], {"evaluation": 360, "bank": 1437}, None), (FEW, {"evaluation": 100, "bank": 100}, 100)]
    for flags, samples, cap in cases:
        assert main(["evaluate", str(encoder), "--protocol", "knn", "geometry", "--json", *flags]) == 0
        entry = json.loads(capsys.readouterr().out)
        assert entry["samples"] == samples and entry["options"]["evaluation_images"] == cap
        for result in evaluation_results(entry):
            assert result.metric_args["samples"] == samples and result.metric_args.get("evaluation_images") == cap
            if "kNN" in result.metric_name:
                how = {"knn_k": [20], "knn_metric": "cosine", "knn_weighting": "uniform", "features": "features"}
                assert how.items() <= result.metric_args.items()


@pytest.mark.extended
def test_the_same_command_gives_the_same_fingerprint_and_numbers_and_one_entry(encoder, tmp_path, capsys):
    folder = shutil.copytree(encoder, tmp_path / "encoder")
    (folder / "results.json").write_text(json.dumps({"metrics": {"knn_top1": 1.0}, "seed": 3}))
    command = ["evaluate", str(folder), *FEW]
    assert main(command) == 0
    (first,) = evaluations(folder)
    assert main(command) == 0
    (second,) = evaluations(folder)
    assert first["fingerprint"] == second["fingerprint"] and first["metrics"] == second["metrics"]
    assert {"knn_top1", "linear_top1", "uniformity", "effective_rank", "alignment"} <= set(first["metrics"])
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    assert main(["evaluate", str(moved), *FEW, "--batch_size", "32"]) == 0 and len(evaluations(moved)) == 1
    assert main([*command, "--seed", "1"]) == 0
    assert [entry["seed"] for entry in evaluations(folder)] == [0, 1]
    assert len({entry["fingerprint"]["sha256"] for entry in evaluations(folder)}) == 2
    content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert content["metrics"] == {"knn_top1": 1.0} and content["seed"] == 3  # what the run wrote stays
    assert str(tmp_path) not in json.dumps(content)


@pytest.mark.extended
def test_encoders_of_timm_and_transformers_are_measured(tmp_path, capsys):
    torch.manual_seed(0)
    channels = {"channels": [8, 8, 16, 16]}
    save_for_hf(timm.create_model("resnet10t", num_classes=10, **channels), tmp_path / "timm", model_args=channels)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    ResNetModel(ResNetConfig(**sizes)).save_pretrained(tmp_path / "resnet")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "resnet")
    for name in ("timm", "resnet"):
        flags = ["--evaluation_images", "30", "--knn_k", "1", "--protocol", "knn", "geometry", "--json"]
        assert main(["evaluate", str(tmp_path / name), *flags]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["kind"] == "encoder" and 1 <= found["metrics"]["effective_rank"] <= 16
        assert evaluations(tmp_path / name) == [found]


@pytest.mark.extended
def test_what_is_wrong_is_said_in_one_line(encoder, tmp_path, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(20):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(pictures / f"{i}.png")
    (tmp_path / "empty").mkdir()
    unet = tmp_path / "unet"
    unet.mkdir()
    (unet / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    damaged = shutil.copytree(encoder, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"nothing")
    cases = [
        ([str(tmp_path / "nothing")], "nothing"),
        ([str(tmp_path / "empty")], "is no finished checkpoint"),
        ([str(unet)], "unet holds a UNet2DModel, which is not measured: give an image encoder"),
        ([str(damaged), *FEW], "hf-dpssl evaluate: "),
        ([str(encoder), "--dataset", str(pictures)], "has no classes, which knn, linear need: use --protocol geometry"),
        ([str(encoder), "--protocol", "knn", "--knn_k", "5000"], r"k must lie in [1, 1437]"),
        ([str(encoder), "--protocol", "few_shot", "--shots", "999"], "fewer than the 999 asked for"),
        ([str(encoder), "--evaluation_images", "0"], "--evaluation_images must be at least 1"),
        ([str(encoder), "--features", "embeddings"], "no folder pretraining/"),
        ([str(encoder), "--extractor", "inception"], "--extractor is for autoencoders and generators, and "),
        ([str(encoder), "--num_inference_steps", "3"], "is of kind 'encoder': leave it out"),
        ([str(encoder), "--push"], "--push is for a Hub id; hf-dpssl push publishes the folder"),
    ]
    for argv, message in cases:
        assert main(["evaluate", *argv, "--output", str(tmp_path / "out.json")]) == 2
        error = capsys.readouterr().err.strip()
        assert message in error and "Traceback" not in error
        assert error.splitlines()[-1].startswith("hf-dpssl evaluate: ")
    assert not (tmp_path / "out.json").exists()
    (tmp_path / "out.json").write_text('{"evaluations": [1]}')
    few = ["--dataset", str(pictures), "--protocol", "geometry", "--output", str(tmp_path / "out.json")]
    assert main(["evaluate", str(encoder), *few]) == 2 and "must be a list of evaluations" in capsys.readouterr().err
    (tmp_path / "out.json").unlink()
    assert main(["evaluate", str(encoder), *few]) == 0
    assert "effective_rank" in capsys.readouterr().out


def test_skipped_pictures_are_left_out_of_the_features(encoder):
    data, embedder = load_images("digits"), ImageEmbedder(str(encoder))
    rows = [data.evaluation[i] for i in range(4)]
    rows[2] = rows[2] | {data.image_column: {"bytes": b"no picture", "path": None}}
    broken = datasets.Dataset.from_list(rows, features=data.evaluation.features)
    features, labels = extract_features(embedder, data, broken, range(4), on_bad_image="skip")
    assert len(features) == 3 and labels.tolist() == [rows[i]["label"] for i in (0, 1, 3)]
    with pytest.raises(ValueError, match="row 2"):
        extract_features(embedder, data, broken, range(4))
