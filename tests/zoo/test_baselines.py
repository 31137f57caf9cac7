"""Baselines against transcriptions of their formulas, another library's values, and refits of every sample."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from hf_dpssl.zoo import accuracy_in_domain, h_score, knn_across_domains, log_me, nce, nce_of_clusters, trans_rate
from hf_dpssl.zoo.evidence import maximise_evidence, spectrum_of


def data(samples, dimension):
    torch.manual_seed(0)
    labels = torch.arange(samples) % 3
    return torch.randn(3, dimension, dtype=torch.float64)[labels] + torch.randn(samples, dimension).double(), labels


def log_me_by_fixed_point(features, labels):
    """You et al. 2021, algorithm 1, with as many steps as it takes."""
    features, total = features.numpy(), 0.0
    samples, dimension = features.shape
    for column in np.eye(3)[labels.numpy()].T:
        alpha = beta = 1.0
        for _ in range(5000):
            precision = alpha * np.eye(dimension) + beta * features.T @ features
            mean = beta * np.linalg.solve(precision, features.T @ column)
            misfit = ((features @ mean - column) ** 2).sum()
            gamma = beta * np.trace(np.linalg.solve(precision, features.T @ features))
            before = alpha
            alpha, beta = gamma / (mean @ mean), (samples - gamma) / misfit
            if abs(alpha / before - 1) < 1e-10:
                break
        precision = alpha * np.eye(dimension) + beta * features.T @ features
        mean = beta * np.linalg.solve(precision, features.T @ column)
        misfit = ((features @ mean - column) ** 2).sum()
        total += 0.5 * (samples * np.log(beta / (2 * np.pi)) + dimension * np.log(alpha) - beta * misfit)
        total += 0.5 * (-alpha * mean @ mean - np.linalg.slogdet(precision)[1])
    return total / 3 / samples


def test_log_me_is_the_fixed_point_of_its_authors():
    given = data(90, 6)
    assert log_me(*given) == pytest.approx(log_me_by_fixed_point(*given), rel=1e-6)
    wide = data(20, 200)  # wider than there are samples, through fewer coordinates
    alpha_free = torch.cat([wide[0], torch.zeros(20, 50, dtype=torch.float64)], 1)
    assert log_me(*wide) == pytest.approx(log_me(alpha_free, wide[1]), rel=1e-9)


def test_h_score_is_its_formula_and_counts_separated_classes():
    features, labels = data(90, 6)
    means = np.stack([features[labels == c].mean(0).numpy() for c in labels])
    wanted = np.trace(np.linalg.inv(np.cov(features.numpy().T)) @ np.cov(means.T))
    assert h_score(features, labels) == pytest.approx(wanted, rel=1e-9)
    apart = torch.eye(3).double()[labels] + 1e-6 * torch.randn(90, 3)
    assert h_score(apart, labels) == pytest.approx(2, abs=1e-4)


def test_values_are_those_of_transfer_learning_library():
    """Computed once by tllib.ranking of thuml/Transfer-Learning-Library at c4aa59e, from these very arrays."""
    labels = np.arange(60) % 3
    features = np.sin(0.37 * np.arange(300).reshape(60, 5) ** 2) + np.cos(np.arange(15).reshape(3, 5))[labels]
    source = (features[:, 0] > 0) + 2 * (features[:, 1] > 0.5)
    given = torch.from_numpy(features), torch.from_numpy(labels)
    assert h_score(*given) == pytest.approx(1.1023738949858437, rel=1e-10)
    assert trans_rate(*given) == pytest.approx(0.2829341684493407, rel=1e-10)
    assert trans_rate(*given, epsilon=1.0) == pytest.approx(0.06203162410779206, rel=1e-10)
    assert nce(torch.from_numpy(source), given[1]) == pytest.approx(-0.6652304731789993, rel=1e-10)
    assert log_me(*given) == pytest.approx(-0.649095682829453, rel=1e-4)  # theirs stops at a change of 1 %


def test_trans_rate_of_features_wider_than_samples_is_that_of_their_formula():
    features, labels = data(20, 50)

    def rate(rows):
        return 0.5 * np.linalg.slogdet(np.eye(50) + 1e4 / len(rows) * rows.T @ rows)[1]

    rows = (features - features.mean(0)).numpy()
    wanted = rate(rows) - np.mean([rate(rows[labels.numpy() == c]) for c in range(3)])
    assert trans_rate(features, labels) == pytest.approx(wanted, rel=1e-8)


def test_nce_is_zero_where_clusters_are_classes_and_the_entropy_where_they_say_nothing():
    labels, domains = torch.arange(120) % 4, torch.arange(120) // 60
    apart = 9 * torch.eye(4)[labels] + 0.01 * torch.randn(120, 4)
    assert nce_of_clusters(apart, labels, domains) == pytest.approx(0, abs=1e-12)
    assert nce(torch.arange(120) // 4, labels) == pytest.approx(-np.log(4), rel=1e-12)
    assert nce_of_clusters(torch.ones(120, 4), labels, domains) == pytest.approx(-np.log(4), rel=1e-12)


def test_accuracy_in_domain_is_that_of_refits_without_each_sample():
    for samples, dimension in [(60, 6), (24, 40)]:
        features, labels = data(samples, dimension)
        features += 2 * torch.randn(features.shape)
        rows, one_hot = features.numpy(), np.eye(3)[labels.numpy()]
        centred = rows - rows.mean(0)
        targets = one_hot - one_hot.mean(0)
        products, squares = centred.T @ targets, (targets**2).sum(0)
        alpha, beta = maximise_evidence(spectrum_of(samples, centred.T @ centred, products, squares)[0])
        right = 0
        for row in range(samples):
            others = np.arange(samples) != row
            ridge = Ridge(alpha / beta, solver="cholesky").fit(rows[others], one_hot[others])
            right += ridge.predict(rows[row : row + 1]).argmax() == labels[row]
        assert 40 < accuracy_in_domain(features, labels) < 100
        assert accuracy_in_domain(features, labels) == pytest.approx(100 * right / samples)


def test_knn_across_domains_knows_the_other_domains_only():
    """The domains have their classes in swapped places: neighbours elsewhere are all wrong."""
    labels, domains = torch.arange(40) % 2, torch.arange(40) // 20
    features = torch.eye(2)[(labels + domains) % 2] + 0.01 * torch.randn(40, 2)
    assert knn_across_domains(features, labels, domains, k=5) == [0, 0]
    features = torch.eye(2)[labels] + 0.01 * torch.randn(40, 2)
    assert knn_across_domains(features, labels, domains, k=5) == [100, 100]


def test_baselines_refuse_what_they_cannot_measure():
    features, labels = data(9, 3)
    for measure in (log_me, h_score, trans_rate, accuracy_in_domain, nce):
        for given in [(features * torch.nan, labels), (features, labels[1:]), (features, labels * 0)]:
            with pytest.raises(ValueError):
                measure(*given)
    with pytest.raises(ValueError, match="epsilon"):
        trans_rate(features, labels, epsilon=0)
