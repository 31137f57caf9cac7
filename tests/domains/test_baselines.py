"""LogME and H-score against transcriptions of their formulas."""

import numpy as np
import pytest
import torch

from hf_dpssl.domains import h_score, knn_across_domains, log_me


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


def test_knn_across_domains_knows_the_other_domains_only():
    """The domains have their classes in swapped places: neighbours elsewhere are all wrong."""
    labels, domains = torch.arange(40) % 2, torch.arange(40) // 20
    features = torch.eye(2)[(labels + domains) % 2] + 0.01 * torch.randn(40, 2)
    assert knn_across_domains(features, labels, domains, k=5) == [0, 0]
    features = torch.eye(2)[labels] + 0.01 * torch.randn(40, 2)
    assert knn_across_domains(features, labels, domains, k=5) == [100, 100]


def test_baselines_refuse_what_they_cannot_measure():
    features, labels = data(9, 3)
    for measure in (log_me, h_score):
        for given in [(features * torch.nan, labels), (features, labels[1:]), (features, labels * 0)]:
            with pytest.raises(ValueError):
                measure(*given)
