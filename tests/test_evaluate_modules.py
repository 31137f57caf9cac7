"""The `evaluate` modules work offline and equal the functions; `hf-dpssl evaluate` runs them on an encoder."""

import json
import os
import subprocess
import sys

import datasets
import pytest
import torch
from PIL import Image

from hf_dpssl import ContrastiveConfig, ContrastiveEncoder, evaluation
from hf_dpssl.cli import main
from hf_dpssl.data import load_images
from hf_dpssl.embedder import ImageEmbedder
from hf_dpssl.evaluate_encoder import extract_features

OFFLINE = """
import json, socket, sys

def refuse(*_):
    raise AssertionError("the network was asked")

socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = socket.create_connection = refuse
import numpy as np
from hf_dpssl import evaluation

x = np.random.default_rng(0).normal(size=(80, 6)).astype("float32")
y = x[:, :3].argmax(1)
labelled = dict(predictions=x[60:], references=y[60:], bank=x[:60], bank_labels=y[:60])
inputs = {"alignment": dict(predictions=x, references=x + 0.1)}
inputs |= {name: labelled for name in ("knn", "linear_probe")} | {"few_shot": labelled | {"shots": [1, 2]}}
found = {}
for name in evaluation.MODULES:
    found |= evaluation.load(name).compute(**inputs.get(name, dict(predictions=x)))
print(json.dumps(found))
"""


def test_all_modules_work_offline_and_equal_the_functions(tmp_path):
    variables = {"HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE], env=os.environ | variables, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    import numpy as np

    x = torch.from_numpy(np.random.default_rng(0).normal(size=(80, 6)).astype("float32"))
    y = x[:, :3].argmax(1)
    split = (x[:60], y[:60], x[60:], y[60:])
    expected = evaluation.knn(*split) | evaluation.linear_probe(*split) | evaluation.few_shot(*split, shots=[1, 2])
    expected |= evaluation.alignment(x, x + 0.1) | evaluation.uniformity(x) | evaluation.effective_rank(x)
    assert found == pytest.approx(expected)


def test_modules_collect_batches_and_take_options():
    x = torch.randn(90, 4, generator=torch.Generator().manual_seed(0))
    y = x.argmax(1)
    module = evaluation.load("knn")
    for first in (60, 70, 80):
        module.add_batch(predictions=x[first : first + 10], references=y[first : first + 10])
    found = module.compute(bank=x[:60], bank_labels=y[:60], k=[1, 5], metric="euclidean")
    assert found == evaluation.knn(x[:60], y[:60], x[60:], y[60:], k=[1, 5], metric="euclidean")


def test_there_is_a_module_for_each_measure_of_features_and_no_other():
    assert evaluation.MODULES == ("alignment", "effective_rank", "few_shot", "knn", "linear_probe", "uniformity")
    with pytest.raises(ValueError, match="no evaluate module 'fid'; there are alignment, .*knn"):
        evaluation.load("fid")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A folder with an untrained encoder for images of 16 px."""
    torch.manual_seed(0)
    statistics = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "crop_pct": 1.0}
    config = ContrastiveConfig("resnet10t", {"channels": [8, 16, 32, 64]}, {"input_size": [3, 16, 16], **statistics})
    folder = tmp_path_factory.mktemp("encoder")
    ContrastiveEncoder(config).save_pretrained(folder)
    return folder


def test_features_of_rows_are_those_of_their_pictures(encoder):
    data, embedder = load_images("digits"), ImageEmbedder(str(encoder))
    features, labels = extract_features(embedder, data, data.evaluation, range(0, 50, 5), batch_size=4)
    assert features.shape == (10, 64) and labels.tolist() == data.evaluation["label"][0:50:5]
    alone, _ = extract_features(embedder, data, data.evaluation, range(20, 21))
    torch.testing.assert_close(features[4], alone[0], rtol=1e-4, atol=1e-5)


def test_evaluate_prints_and_writes_what_the_functions_give(encoder, tmp_path, capsys):
    output = tmp_path / "new" / "results.json"
    flags = ["--protocol", "knn", "linear", "few_shot", "shape", "--evaluation_images", "300", "--knn_k", "1", "20"]
    assert main(["evaluate", str(encoder), *flags, "--trials", "3", "--seed", "5", "--output", str(output)]) == 0
    results = json.loads(output.read_text(encoding="utf-8"))
    data, embedder = load_images("digits"), ImageEmbedder(str(encoder))
    # 1437 training images are more than 300: every 5th; 360 held-out ones: every 2nd.
    bank = extract_features(embedder, data, data.train, range(0, 1437, 5))
    query = extract_features(embedder, data, data.evaluation, range(0, 360, 2))
    expected = evaluation.knn(*bank, *query, k=(1, 20)) | evaluation.linear_probe(*bank, *query, seed=5)
    expected |= evaluation.few_shot(*bank, *query, trials=3, seed=5)
    expected |= evaluation.uniformity(query[0]) | evaluation.effective_rank(query[0])
    assert results["metrics"] == pytest.approx(expected, rel=1e-5)
    assert results["samples"] == {"evaluation": 180, "bank": 288} and results["dataset"] == "digits"
    assert results["seed"] == 5 and results["options"]["trials"] == 3 and "torch" in results["environment"]["libraries"]
    printed = capsys.readouterr().out
    assert all(f"{name} " in printed for name in expected) and "results.json" in printed


def test_evaluate_says_what_is_wrong_in_one_line(encoder, tmp_path, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(20):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(pictures / f"{i}.png")
    cases = [
        ([str(tmp_path / "nothing")], "nothing"),
        ([str(encoder), "--dataset", str(pictures)], "has no classes, which knn, linear need: use --protocol shape"),
        ([str(encoder), "--protocol", "knn", "--knn_k", "5000"], r"k must lie in [1, 1437]"),
        ([str(encoder), "--protocol", "few_shot", "--shots", "999"], "fewer than the 999 asked for"),
        ([str(encoder), "--evaluation_images", "0"], "--evaluation_images must be at least 1"),
        ([str(encoder), "--features", "embeddings"], "no folder pretraining/"),
    ]
    for argv, message in cases:
        assert main(["evaluate", *argv, "--output", str(tmp_path / "out.json")]) == 2
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error
    assert not (tmp_path / "out.json").exists()
    assert main(["evaluate", str(encoder), "--dataset", str(pictures), "--protocol", "shape"]) == 0
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
