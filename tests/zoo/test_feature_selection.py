"""Spike and slab by variational EM: its bound against a sum over all choices, and planted features."""

import itertools

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from hf_dpssl.zoo import select_features
from hf_dpssl.zoo.feature_selection import _SpikeAndSlab


def planted(samples, dimension, relevant, classes=4, noise=0.3, seed=0):
    """Normal features of which the first ones decide the class."""
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(samples, dimension, generator=draw, dtype=torch.float64)
    weights = torch.randn(relevant, classes, generator=draw, dtype=torch.float64)
    weights = 2 * torch.nn.functional.normalize(weights - weights.mean(1, keepdim=True))  # all alike decide nothing
    errors = noise * torch.randn(samples, classes, generator=draw, dtype=torch.float64)
    return features, (features[:, :relevant] @ weights + errors).argmax(1)


def test_bound_lies_below_the_sum_over_all_choices_of_features_and_close_to_it():
    """Also with fewer samples than features, where another identity inverts."""
    for samples, dimension in [(40, 4), (5, 8)]:
        features, labels = planted(samples, dimension, 2, classes=3)
        x = features.numpy()
        y = np.eye(3)[labels.numpy()]
        x, y = x - x.mean(0), y - y.mean(0)
        model = _SpikeAndSlab(x, y, np.full(dimension, 0.5))
        for turn in range(5):
            bound = model.turn()
            terms = []
            for chosen in itertools.product([0, 1], repeat=dimension):
                variances = np.where(chosen, 1 / model.slab, 1 / model.spike)
                covariance = x * variances @ x.T + np.eye(samples) / model.beta
                fit = multivariate_normal(np.zeros(samples), covariance).logpdf(y.T).sum()
                terms.append(fit + np.log(np.where(chosen, model.share, 1 - model.share)).sum())
            exact = logsumexp(terms)
            assert bound <= exact + 1e-8, (samples, turn)
        assert exact - bound < 5, (samples, bound, exact)


def test_bound_never_falls_and_planted_features_are_found():
    cases = [(400, 50, 5), (1000, 200, 10), (200, 300, 6)]  # the last is wider than its samples
    for samples, dimension, relevant in cases:
        for seed in range(2):
            found = select_features(*planted(samples, dimension, relevant, seed=seed))
            assert np.diff(found.bounds).min() > -1e-9 * abs(found.bounds[-1]), (samples, seed)
            assert found.kept[:relevant].sum() == relevant, (samples, seed, found.kept.nonzero())
            assert found.kept[relevant:].sum() <= 0.02 * dimension, (samples, seed, found.kept.nonzero())
    nothing = select_features(torch.randn(300, 30), torch.randint(4, (300,)))
    assert not nothing.kept.any()


def test_features_that_tell_the_classes_only_together_are_all_kept():
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(400, 100, generator=draw, dtype=torch.float64)
    signal = features @ torch.randn(100, 3, generator=draw, dtype=torch.float64)
    labels = (signal + 25 * torch.randn(400, 3, generator=draw, dtype=torch.float64)).argmax(1)
    found = select_features(torch.cat([features, torch.ones(400, 1)], 1), labels)
    assert found.kept[:100].all() and not found.kept[100], found.kept.sum()


def test_columns_that_are_constant_or_repeated_change_nothing_for_the_others():
    features, labels = planted(300, 20, 3)
    alone = select_features(features, labels)
    more = [features, torch.full((300, 2), 7.0), -3 * features[:, :5] + 1, 1e6 + torch.zeros(300, 1)]
    found = select_features(torch.cat(more, 1), labels)
    assert torch.equal(found.kept[:20], alone.kept) and not found.kept[20:].any() and alone.kept[:3].all()
    assert found.relevance[:20] == pytest.approx(alone.relevance, abs=1e-6)
    scaled = select_features(features * torch.logspace(-4, 4, 20) + 5, labels)
    assert torch.equal(scaled.kept, alone.kept)


def test_features_that_cannot_be_selected_from_are_refused():
    features, labels = planted(30, 4, 2)
    cases = [
        (features * torch.nan, labels, {}, "must be finite"),
        (features * 0 + 2, labels, {}, "the same for all samples"),
        (features, labels * 0, {}, "one class"),
        (features, labels[1:], {}, "one per row"),
        (features, labels, {"rounds": 0}, "rounds must be"),
        (features, labels, {"tolerance": 0.0}, "tolerance"),
    ]
    for *given, options, message in cases:
        with pytest.raises(ValueError, match=message):
            select_features(*given, **options)
