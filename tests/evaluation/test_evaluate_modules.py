"""The `evaluate` modules work offline, equal the functions, and gather what several processes and batches add."""

import doctest
import inspect
import socket
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from sklearn.metrics import accuracy_score

from hf_dpssl import evaluation

MODULE_FILES = str(Path(evaluation.__file__).parent / "modules")


def refuse(*_, **__):
    raise AssertionError("the network was asked")


def test_all_modules_work_offline_and_equal_the_functions(monkeypatch):
    for owner, name in ((socket.socket, "connect"), (socket.socket, "connect_ex"), (socket, "getaddrinfo")):
        monkeypatch.setattr(owner, name, refuse)
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(80, 6)).astype("float32"))
    y = x[:, :3].argmax(1)
    images = torch.from_numpy(np.random.default_rng(1).uniform(-1, 1, size=(4, 3, 9, 7)).astype("float32"))
    labelled = dict(predictions=x[60:], references=y[60:], bank=x[:60], bank_labels=y[:60])
    inputs = {
        "alignment": dict(predictions=x, references=x + 0.1),
        "class_consistency": dict(predictions=x, references=y),
        "few_shot": labelled | {"shots": [1, 2]},
        "frechet_distance": dict(predictions=x[60:], real=x[:60]),
        "knn": labelled,
        "linear_probe": labelled,
        "reconstruction": dict(predictions=images * 0.9, references=images),
    }
    found = {}
    for name in evaluation.MODULES:
        arrays = {
            key: v.numpy() if torch.is_tensor(v) else v for key, v in inputs.get(name, {"predictions": x}).items()
        }
        found |= evaluation.load(name).compute(**arrays)
    split = (x[:60], y[:60], x[60:], y[60:])
    expected = evaluation.knn(*split) | evaluation.linear_probe(*split) | evaluation.few_shot(*split, shots=[1, 2])
    expected |= evaluation.alignment(x, x + 0.1) | evaluation.uniformity(x) | evaluation.effective_rank(x)
    expected |= evaluation.psnr(images, images * 0.9) | evaluation.ssim(images, images * 0.9)
    moments = [(part.double().mean(0), part.double().T.cov()) for part in (x[:60], x[60:])]
    expected |= {"frechet_distance": evaluation.frechet_distance(*moments[0], *moments[1])}
    expected |= evaluation.inception_score(x) | {"class_consistency": 100 * float((x.argmax(1) == y).double().mean())}
    assert found == pytest.approx(expected)


def test_modules_collect_batches_and_take_options():
    x = torch.randn(90, 4, generator=torch.Generator().manual_seed(0))
    y = x.argmax(1)
    module = evaluation.load("knn")
    for first in (60, 70, 80):
        module.add_batch(predictions=x[first : first + 10], references=y[first : first + 10])
    found = module.compute(bank=x[:60], bank_labels=y[:60], k=[1, 5], metric="euclidean")
    assert found == evaluation.knn(x[:60], y[:60], x[60:], y[60:], k=[1, 5], metric="euclidean")


def test_examples_of_all_modules_are_right():
    for name in evaluation.MODULES:
        found = doctest.testmod(sys.modules[type(evaluation.load(name)).__module__])
        assert found.failed == 0 and found.attempted > 1, name


def test_modules_name_every_option_with_the_default_of_the_function():
    for name in evaluation.MODULES:
        found = inspect.signature(evaluation.load(name)._compute).parameters.values()
        assert all(parameter.kind == parameter.POSITIONAL_OR_KEYWORD for parameter in found), name
        if name in ("frechet_distance", "inception_score", "reconstruction"):
            continue  # of other functions, or with options of its own
        expected = inspect.signature(getattr(evaluation, name)).parameters.values()
        expected = {
            parameter.name: parameter.default for parameter in expected if parameter.kind == parameter.KEYWORD_ONLY
        }
        assert {
            parameter.name: parameter.default for parameter in found if parameter.default != parameter.empty
        } == expected


def test_there_is_a_module_for_each_measure_and_no_other():
    assert evaluation.MODULES == (
        "alignment",
        "class_consistency",
        "effective_rank",
        "few_shot",
        "frechet_distance",
        "inception_score",
        "knn",
        "linear_probe",
        "reconstruction",
        "uniformity",
    )
    with pytest.raises(ValueError, match="no evaluate module 'fid'; there are alignment, .*knn"):
        evaluation.load("fid")


def shared_by_two(folder: str) -> dict[str, torch.Tensor]:
    """In each of two processes: add batches to modules that share a folder, and compute."""
    rank = torch.distributed.get_rank()
    random = np.random.default_rng(0)
    x, images = random.normal(size=(40, 4)).astype("float32"), random.uniform(-1, 1, (40, 1, 8, 8)).astype("float32")
    inputs = {
        "frechet_distance": {"predictions": x},
        "inception_score": {"predictions": x},
        "class_consistency": {"predictions": x, "references": np.arange(40) % 4},
        "reconstruction": {"predictions": images * 0.8, "references": images},
    }
    shared = {"num_process": 2, "process_id": rank, "experiment_id": "test", "cache_dir": folder}
    found = {}
    for name, columns in inputs.items():
        several, options = evaluation.load(name, keep_in_memory=False, **shared), {}
        if name == "frechet_distance":
            options["real"] = x[:20] + 1
        for part in [slice(0, 7), slice(7, 24)] if rank == 0 else [slice(24, 40)]:
            several.add_batch(**{column: values[part] for column, values in columns.items()})
        result = several.compute(**options)
        assert (result is None) == (rank == 1)
        if rank == 0:
            alone = evaluation.load(name).compute(**columns, **options)
            assert result == alone and len(result) > 0, (name, result, alone)
            found |= {key: torch.tensor(value) for key, value in result.items()}
    return found


def test_batches_of_two_processes_give_what_one_process_gives(run_in_two, tmp_path):
    first, second = run_in_two(shared_by_two, str(tmp_path))
    names = {"frechet_distance", "inception_score", "inception_score_std", "class_consistency", "psnr", "ssim"}
    assert set(first) == names and not second


def test_modules_are_loaded_by_path_and_combined_by_the_evaluate_library(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    names = ("inception_score", "class_consistency")
    judges = evaluate.combine([evaluate.load(f"{MODULE_FILES}/{name}.py", keep_in_memory=True) for name in names])
    random = np.random.default_rng(0)
    logits, classes = random.normal(size=(30, 5)).astype("float32"), random.integers(0, 5, 30)
    for part in (slice(0, 11), slice(11, 30)):
        judges.add_batch(predictions=logits[part], references=classes[part])
    found = judges.compute()
    assert found["class_consistency"] == pytest.approx(100 * accuracy_score(classes, logits.argmax(1)))
    assert found == evaluation.inception_score(torch.tensor(logits)) | {"class_consistency": found["class_consistency"]}
    clouds = [
        evaluate.load(f"{MODULE_FILES}/{name}.py", keep_in_memory=True) for name in ("uniformity", "effective_rank")
    ]
    assert set(evaluate.combine(clouds).compute(predictions=logits)) == {
        "uniformity",
        "uniformity_raw",
        "effective_rank",
    }


def test_the_frechet_module_equals_the_formula_by_scipy():
    x, y = (np.random.default_rng(seed).normal(seed, 1 + seed, size=(50, 6)).astype("float32") for seed in (0, 1))
    mu, sigma = zip(*((z.mean(0, dtype="float64"), np.cov(z.T.astype("float64"))) for z in (x, y)), strict=True)
    expected = ((mu[0] - mu[1]) ** 2).sum() + np.trace(sigma[0] + sigma[1] - 2 * sqrtm(sigma[0] @ sigma[1]).real)
    found = evaluation.load("frechet_distance").compute(predictions=x, real=y)
    assert found["frechet_distance"] == pytest.approx(expected)


def test_images_of_different_sizes_are_refused():
    module = evaluation.load("reconstruction")
    for side in (8, 9):
        image = np.zeros((1, 3, side, side), dtype="float32")
        module.add_batch(predictions=image, references=image)
    with pytest.raises(ValueError, match=r"one length, got \[8, 9\]"):
        module.compute()
