"""Linear probe and few-shot accuracy against scikit-learn and closed forms."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import sem, t
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid
from sklearn.preprocessing import StandardScaler

from hf_dpssl.evaluation import few_shot, linear_probe, probes


def blobs(rows: int, seed: int, columns: int = 12, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % classes
    centres = torch.randn(classes, columns, generator=torch.Generator().manual_seed(99))
    return centres[labels] + 1.2 * torch.randn(rows, columns, generator=generator), labels


BANK, TEST = blobs(400, seed=0), blobs(300, seed=1)


def test_logistic_probe_equals_scikit_learn_on_features_standardised_by_the_bank_alone():
    # Half of the columns of what is classified are far wider than those of the bank: a scale taken from both sets
    # would all but remove them.
    bank, features = BANK[0] * torch.logspace(-3, 3, 12) + 5, TEST[0] * torch.logspace(-3, 3, 12) + 5
    wider = features.clone()
    wider[::2, ::2] = 200 * wider[::2, ::2]
    for strength in (1e-3, 1.0):
        scaler = StandardScaler().fit(bank.double().numpy())
        model = LogisticRegression(C=strength, max_iter=1000).fit(scaler.transform(bank.double().numpy()), BANK[1])
        for given in (features, wider):
            expected = 100 * model.score(scaler.transform(given.double().numpy()), TEST[1])
            found = linear_probe(bank, BANK[1], given, TEST[1], grid=[strength])
            assert found["linear_top1"] == pytest.approx(expected, abs=0.4) and found["linear_c"] == strength


def test_accuracy_of_two_sets_is_the_mean_of_the_accuracies_of_each():
    bank, labels = BANK
    other = torch.cat([300 * TEST[0][:100, :6], TEST[0][:100, 6:]], 1)
    for options in ({"grid": [1e-3]}, {"grid": [0.01], "solver": "sgd", "epochs": 5}):
        parts = [linear_probe(bank, labels, x, TEST[1][:100], **options)["linear_top1"] for x in (TEST[0][:100], other)]
        both = torch.cat([TEST[0][:100], other]), TEST[1][:100].repeat(2)
        assert linear_probe(bank, labels, *both, **options)["linear_top1"] == pytest.approx(sum(parts) / 2)


def test_strength_is_chosen_on_rows_that_the_candidates_were_not_trained_on():
    # Labels hardly depend on the features: what is weakly regularised learns the rows by heart, and does no better on
    # others. Trained on the rows that choose, the weakest would win.
    grid, chosen, leaking = [1e-4, 1e-2, 1e4], [], []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        x, y = torch.randn(120, 60, generator=generator), torch.randint(2, (120,), generator=generator)
        x[:, 0] += y
        held_out = probes._validation_rows(y, 0.25, seed).numpy()
        scaled = StandardScaler().fit_transform(x.double().numpy())

        def score(strength, rows, x=scaled, y=y, held_out=held_out):
            model = LogisticRegression(C=strength, max_iter=1000).fit(x[rows], y[rows])
            return model.score(x[held_out], y[held_out])

        chosen.append(grid[int(np.argmax([score(strength, ~held_out) for strength in grid]))])
        leaking.append(grid[int(np.argmax([score(strength, held_out | ~held_out) for strength in grid]))])
        assert linear_probe(x, y, x, y, grid=grid, validation=0.25, seed=seed)["linear_c"] == chosen[-1]
    assert leaking == [1e4] * 4 and chosen.count(1e4) < 2


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
    by_sgd = linear_probe(*split, solver="sgd", grid=[1.0], epochs=500, batch_size=400)
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


def test_what_is_not_defined_is_refused():
    arguments = {"bank": BANK[0], "bank_labels": BANK[1], "features": TEST[0], "labels": TEST[1]}
    both = (
        ({"bank": torch.zeros(400, 5)}, "bank and features"),
        ({"labels": TEST[1][:3]}, "one label per row"),
        ({"bank_labels": BANK[1] - 1}, "got -1"),
        ({"labels": TEST[1].float()}, "integer class ids"),
        ({"features": TEST[0] * math.nan}, "row 0 of features is NaN"),
        ({"features": TEST[0][:0], "labels": TEST[1][:0]}, "no features"),
    )
    of_the_probe = (
        ({"solver": "svm"}, "'logistic', 'sgd'"),
        ({"grid": []}, "positive numbers"),
        ({"grid": [1.0, -1.0]}, "positive numbers"),
        ({"validation": 1.0}, r"\(0, 1\)"),
        ({"epochs": 0}, "at least 1"),
        ({"bank_labels": torch.zeros(400, dtype=torch.int64)}, "only class 0"),
    )
    of_few_shot = (
        ({"shots": (1, 101)}, "class 0 has 100 examples .* 101"),
        ({"shots": ()}, "shots of at least 1"),
        ({"trials": 1}, "at least 2 trials"),
        ({"classifier": "svm"}, "'centroid', 'logistic'"),
    )
    for function, cases in ((linear_probe, both + of_the_probe), (few_shot, both + of_few_shot)):
        for changes, message in cases:
            with pytest.raises(ValueError, match=message):
                function(**(arguments | changes))
