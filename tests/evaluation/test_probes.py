"""Linear probe and few-shot accuracy against scikit-learn and closed forms."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import sem, t
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid
from sklearn.preprocessing import StandardScaler

from hf_dpssl.evaluation import few_shot, linear_probe


def blobs(rows: int, seed: int, columns: int = 12, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % classes
    centres = torch.randn(classes, columns, generator=torch.Generator().manual_seed(99))
    return centres[labels] + 1.2 * torch.randn(rows, columns, generator=generator), labels


BANK, TEST = blobs(400, seed=0), blobs(300, seed=1)


@pytest.mark.parametrize("strength", [1e-3, 1.0])
def test_logistic_probe_equals_scikit_learn_on_standardised_features(strength):
    bank, features = BANK[0] * torch.logspace(-3, 3, 12) + 5, TEST[0] * torch.logspace(-3, 3, 12) + 5
    scaler = StandardScaler().fit(bank.double().numpy())
    model = LogisticRegression(C=strength, max_iter=1000).fit(scaler.transform(bank.double().numpy()), BANK[1])
    expected = 100 * model.score(scaler.transform(features.double().numpy()), TEST[1])
    found = linear_probe(bank, BANK[1], features, TEST[1], grid=[strength])
    assert found["linear_top1"] == pytest.approx(expected, abs=0.4) and found["linear_c"] == strength


@pytest.mark.parametrize("solver", ["logistic", "sgd"])
def test_probe_chooses_on_the_bank_alone_and_is_deterministic(solver):
    options = {"solver": solver, "epochs": 20, "grid": [1e-6, 0.1]}
    chosen = {linear_probe(*BANK, *test, **options)[k] for test in (TEST, (TEST[0], TEST[1].roll(1)))
              for k in ("linear_c", "linear_learning_rate") if k in linear_probe(*BANK, *test, **options)}  # fmt: skip
    assert chosen == {0.1}
    assert linear_probe(*BANK, *TEST, **options) == linear_probe(*BANK, *TEST, **options)


def test_sgd_on_the_whole_bank_reaches_the_logistic_optimum():
    split = (BANK[0][:, :3], BANK[1], TEST[0][:, :3], TEST[1])  # classes that overlap: the optimum is finite
    by_lbfgs = linear_probe(*split, solver="logistic", grid=[1e6])
    by_sgd = linear_probe(*split, solver="sgd", grid=[1.0], epochs=1000, batch_size=400)
    assert 40 < by_lbfgs["linear_top1"] < 90
    assert by_sgd["linear_top1"] == pytest.approx(by_lbfgs["linear_top1"], abs=0.4)


def test_one_step_of_sgd_is_the_gradient_of_cross_entropy():
    from hf_dpssl.evaluation.probes import _fit_sgd

    x, y = BANK
    (predict,) = _fit_sgd([0.5], x, y, 4, epochs=1, batch_size=len(x), seed=0)
    padded = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    # From zero, softmax is 1/4 everywhere: gradient = x^T (1/4 - one-hot) / N.
    gradient = padded.T @ (0.25 - torch.nn.functional.one_hot(y, 4).double()) / len(x)
    torch.testing.assert_close(predict.args[0].double(), -0.5 * gradient, rtol=1e-5, atol=1e-6)


def test_separable_classes_are_told_apart_with_any_labels():
    bank = torch.cat([torch.full((20, 2), -1.0), torch.full((20, 2), 1.0)]) + 0.01 * BANK[0][:40, :2]
    labels = torch.tensor([7] * 20 + [10**12] * 20)
    for solver in ("logistic", "sgd"):
        assert linear_probe(bank, labels, bank, labels, solver=solver, epochs=5)["linear_top1"] == 100


def test_few_shot_equals_scikit_learns_nearest_centroid_and_t_interval():
    shots, trials, seed = 3, 5, 11
    report = few_shot(*BANK, *TEST, shots=[shots], trials=trials, seed=seed)
    bank, test = (torch.nn.functional.normalize(x, dim=1).numpy() for x in (BANK[0], TEST[0]))
    scores = []
    for trial in range(trials):
        order = np.random.default_rng([seed, trial]).permutation(len(bank))
        rows = np.concatenate([order[BANK[1].numpy()[order] == c][:shots] for c in range(4)])
        model = NearestCentroid().fit(bank[rows], BANK[1].numpy()[rows])
        scores.append(100 * model.score(test, TEST[1].numpy()))
    low, high = t.interval(0.95, trials - 1, loc=np.mean(scores), scale=sem(scores))
    assert report == pytest.approx({"few_shot_top1_3": np.mean(scores), "few_shot_top1_3_ci95": (high - low) / 2})


def test_more_examples_help_and_all_of_them_leave_no_spread():
    report = few_shot(*BANK, *TEST, shots=(1, 10, 100), trials=8)
    assert report["few_shot_top1_1"] < report["few_shot_top1_10"] < report["few_shot_top1_100"]
    assert report["few_shot_top1_100_ci95"] == pytest.approx(0, abs=1e-6)


def test_few_shot_by_logistic_regression_equals_scikit_learn():
    report = few_shot(*BANK, *TEST, shots=(100,), trials=2, classifier="logistic")
    bank, test = (torch.nn.functional.normalize(x, dim=1).numpy() for x in (BANK[0], TEST[0]))
    expected = 100 * LogisticRegression(max_iter=1000).fit(bank, BANK[1]).score(test, TEST[1])
    assert report["few_shot_top1_100"] == pytest.approx(expected, abs=0.4)


@pytest.mark.parametrize("function", [linear_probe, few_shot])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bank": torch.zeros(400, 5)}, "bank and features"),
        ({"labels": TEST[1][:3]}, "one label per row"),
        ({"bank_labels": BANK[1] - 1}, "got -1"),
        ({"labels": TEST[1].float()}, "integer class ids"),
        ({"features": TEST[0] * math.nan}, "row 0 of features is NaN"),
        ({"features": TEST[0][:0], "labels": TEST[1][:0]}, "no features"),
    ],
)
def test_probes_refuse_bad_features_and_labels(function, changes, message):
    arguments = {"bank": BANK[0], "bank_labels": BANK[1], "features": TEST[0], "labels": TEST[1]}
    with pytest.raises(ValueError, match=message):
        function(**(arguments | changes))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "svm"}, "'logistic', 'sgd'"),
        ({"grid": []}, "positive numbers"),
        ({"grid": [1.0, -1.0]}, "positive numbers"),
        ({"validation": 1.0}, r"\(0, 1\)"),
        ({"epochs": 0}, "at least 1"),
        ({"bank_labels": torch.zeros(400, dtype=torch.int64)}, "only class 0"),
    ],
)
def test_linear_probe_refuses_what_is_not_defined(options, message):
    arguments = {"bank": BANK[0], "bank_labels": BANK[1], "features": TEST[0], "labels": TEST[1]}
    with pytest.raises(ValueError, match=message):
        linear_probe(**(arguments | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shots": (1, 101)}, "class 0 has 100 examples .* 101"),
        ({"shots": ()}, "shots of at least 1"),
        ({"trials": 1}, "at least 2 trials"),
        ({"classifier": "svm"}, "'centroid', 'logistic'"),
    ],
)
def test_few_shot_refuses_what_is_not_defined(options, message):
    with pytest.raises(ValueError, match=message):
        few_shot(*BANK, *TEST, **options)
