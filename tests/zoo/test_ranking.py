"""The score of an encoder over domains: against a slow transcription, under rotations, and on planted zoos."""

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.covariance import oas

from hf_dpssl.zoo import DomainStatistics, leave_one_domain_out, score_domains
from hf_dpssl.zoo.density import shrinkage
from hf_dpssl.zoo.evidence import maximise_evidence, spectrum_of

DOMAINS, CLASSES = 3, 3


def zoo(dimension=8, per_domain=60, shift=0.0, noise=1.0, seed=0):
    """(features, labels, domains): class means plus noise, and an offset of each domain in a direction of its own."""
    draw = torch.Generator().manual_seed(seed)
    count = DOMAINS * per_domain
    domains = torch.arange(count) // per_domain
    labels = torch.randint(CLASSES, (count,), generator=draw)
    means = 2 * torch.randn(CLASSES, dimension, generator=draw, dtype=torch.float64)
    offsets = shift * torch.randn(DOMAINS, dimension, generator=draw, dtype=torch.float64)
    spread = noise * torch.randn(count, dimension, generator=draw, dtype=torch.float64)
    return means[labels] + offsets[domains] + spread, labels, domains


def slow_score(features, labels, domains, left_out):
    """Parts of the score by scikit-learn and scipy, from the samples themselves."""
    features, one_hot = features.numpy(), np.eye(CLASSES)[labels.numpy()]
    old, new = domains.numpy() != left_out, domains.numpy() == left_out
    mean, dimension = features[old].mean(0), features.shape[1]
    rows = features - mean
    total = 0.0
    for column in (one_hot - one_hot[old].mean(0)).T:
        products, squares = rows[old].T @ column[old, None], (column[old, None] ** 2).sum(0)
        spectrum, _ = spectrum_of(int(old.sum()), rows[old].T @ rows[old], products, squares)
        alpha, beta = (float(value[0]) for value in maximise_evidence(spectrum))
        precision = alpha * np.eye(dimension) + beta * rows[old].T @ rows[old]
        centre = rows[new] @ np.linalg.solve(precision, beta * rows[old].T @ column[old])
        covariance = np.eye(new.sum()) / beta + rows[new] @ np.linalg.solve(precision, rows[new].T)
        total += multivariate_normal(centre, covariance).logpdf(column[new])
    log_density = multivariate_normal(mean, oas(features[old])[0]).logpdf
    scale = 0.5 * np.log(features[old].var(0).mean())
    density = log_density(features[new]).mean() / dimension
    stability = density - log_density(features[old]).mean() / dimension
    return {"labels": total / CLASSES / new.sum(), "density": density + scale, "stability": stability}


@pytest.mark.parametrize("dimension", [8, 120])
def test_parts_are_those_of_scikit_learn_and_scipy(dimension):
    features, labels, domains = zoo(dimension, per_domain=30, shift=0.5, noise=4.0)
    data = (features * torch.logspace(1, -2, dimension), labels, domains)
    for left_out, found in enumerate(leave_one_domain_out(*data)):
        wanted = slow_score(*data, left_out)
        assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-4), left_out
        assert found["score"] == pytest.approx(found["labels"] + found["stability"])


def test_score_does_not_change_under_rotation_scale_offset_order_or_batches():
    features, labels, domains = zoo(shift=0.5)
    wanted = leave_one_domain_out(features, labels, domains)
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    order = torch.randperm(len(features))
    padded = torch.cat([features, torch.zeros(len(features), 300, dtype=torch.float64)], 1)
    changed = {
        "rotation": (features @ rotation, labels, domains),
        "scale": (features * 1e-3, labels, domains),
        "offset": (features + 1e5, labels, domains),
        "order": (features[order], labels[order], domains[order]),
    }
    for name, data in changed.items():
        for found, expected in zip(leave_one_domain_out(*data), wanted, strict=True):
            assert found == pytest.approx(expected, rel=1e-6), name
    for found, expected in zip(leave_one_domain_out(padded, labels, domains), wanted, strict=True):
        assert found["labels"] == pytest.approx(expected["labels"], rel=1e-6)
    statistics = DomainStatistics(DOMAINS, CLASSES, 8)
    for part in torch.arange(len(features)).split(7):
        statistics.update(features[part], labels[part], domains[part])
    for found, expected in zip(score_domains(statistics), wanted, strict=True):
        assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.extended
def test_a_million_samples_give_the_limit_of_least_squares():
    """In float32, far from 0, batch by batch: what is left of log p(y', y) - log p(y) are sums of squared residuals."""
    draw = torch.Generator().manual_seed(0)
    count, dimension = 1_000_000, 6
    domains = torch.arange(count) // (count // DOMAINS + 1)
    labels = torch.randint(CLASSES, (count,), generator=draw)
    means = 30 + torch.randn(CLASSES, dimension, generator=draw)
    features = means[labels] + 0.1 * domains[:, None] + torch.randn(count, dimension, generator=draw)
    statistics = DomainStatistics(DOMAINS, CLASSES, dimension)
    for part in torch.arange(count).split(200_000):
        statistics.update(features[part], labels[part], domains[part])
    found = score_domains(statistics)[2]
    old, new = domains.numpy() != 2, domains.numpy() == 2
    rows, one_hot = features.double().numpy(), np.eye(CLASSES)[labels.numpy()]
    log_density = multivariate_normal(rows[old].mean(0), np.cov(rows[old].T)).logpdf
    stability = (log_density(rows[new]).mean() - log_density(rows[old]).mean()) / dimension
    rows, one_hot = rows - rows[old].mean(0), one_hot - one_hot[old].mean(0)
    before, both = (np.linalg.lstsq(rows[which], one_hot[which], rcond=None)[1] for which in (old, old | new))
    variance = before / old.sum()
    wanted = -0.5 * (np.log(2 * np.pi * variance) + (both - before) / new.sum() / variance).mean()
    assert found["labels"] == pytest.approx(wanted, abs=1e-5)
    assert found["stability"] == pytest.approx(stability, abs=1e-5) and stability < -1e-3


def test_fifty_samples_of_4096_features_say_what_they_say_in_their_own_subspace():
    """In 4,096 dimensions by orthonormal directions, labels are told as well, and the density has a closed form."""
    features, labels, domains = zoo(10, per_domain=17, noise=3.0, shift=0.5)
    turned = features @ torch.linalg.qr(torch.randn(4096, 10, dtype=torch.float64))[0].T
    for left_out, (few, many) in enumerate(
        zip(leave_one_domain_out(features, labels, domains), leave_one_domain_out(turned, labels, domains), strict=True)
    ):
        assert many["labels"] == pytest.approx(few["labels"], rel=1e-7)
        old = features[domains != left_out].numpy()
        new = features[domains == left_out].numpy() - old.mean(0)
        old = old - old.mean(0)
        plain = old.T @ old / len(old)
        scale = np.trace(plain) / 4096
        share = shrinkage(scale, (plain**2).sum() / 4096**2, len(old), 4096)
        inside = (1 - share) * plain / scale + share * np.eye(10)
        misfit = [np.einsum("nd,de,ne->n", x, np.linalg.inv(inside), x).mean() / scale for x in (new, old)]
        volume = np.linalg.slogdet(inside)[1] + (4096 - 10) * np.log(share)
        assert many["density"] == pytest.approx(-0.5 * (np.log(2 * np.pi) + (volume + misfit[0]) / 4096), rel=1e-9)
        assert many["stability"] == pytest.approx(0.5 * (misfit[1] - misfit[0]) / 4096, rel=1e-7, abs=1e-12)


def mean_score(features, labels, domains, part="score"):
    return float(np.mean([entry[part] for entry in leave_one_domain_out(features, labels, domains)]))


def test_the_planted_best_encoder_wins():
    """It separates the classes alike in all domains; every other one lacks one thing, and one has collapsed."""
    features, labels, domains = zoo()
    noise = torch.randn(features.shape, dtype=torch.float64)
    one_way = features[:, :1] * torch.ones(8, dtype=torch.float64)
    encoders = {
        "planted": features,
        "noisy": features + 4 * noise,
        "says nothing": noise,
        "shifted": zoo(shift=3.0)[0],
        "other classes": features[torch.randperm(len(features))],
        "collapsed": one_way + 1e-4 * noise,
    }
    # The domains of this one disagree on where the classes lie: it fails only where a whole domain is left out.
    turned = features.clone()
    for domain in range(DOMAINS):
        chosen = domains == domain
        turned[chosen] = turned[chosen] @ torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    encoders["classes elsewhere"] = turned
    scores = {name: mean_score(rows, labels, domains) for name, rows in encoders.items()}
    assert max(scores, key=scores.get) == "planted", scores
    assert scores["planted"] > sorted(scores.values())[-2] + 0.1, scores
    densities = {name: mean_score(rows, labels, domains, "density") for name, rows in encoders.items()}
    assert max(densities, key=densities.get) == "collapsed"  # why the density itself is no part of the score


def test_labels_that_say_nothing_score_as_their_frequencies_do():
    """The best constant model of 0/1 labels is a Gaussian of their mean and variance."""
    _, labels, domains = zoo(per_domain=400)
    found = mean_score(torch.randn(len(labels), 4), labels, domains, "labels")
    shares = torch.bincount(labels) / len(labels)
    constant = -0.5 * torch.log(2 * torch.pi * torch.e * shares * (1 - shares)).mean()
    assert found == pytest.approx(float(constant), abs=0.02)


def test_what_cannot_be_ranked_is_refused():
    features, labels, domains = zoo()
    only_here = torch.where(domains == 1, torch.tensor(3), labels)
    bad = features.clone()
    bad[5, 2] = torch.nan
    cases = [
        (features, labels, domains * 0, "all samples are of one domain"),
        (features, labels * 0, domains, "all samples are of one class"),
        (features, only_here, domains, "class 3 is found in domain 1 only"),
        (features, labels, domains * 2, "domain 1 has 0 samples"),
        (features[:4], torch.arange(4), torch.tensor([0, 0, 1, 1]), "class 0 is found in domain 0 only"),
        (features[1:], labels, domains, "features must be"),
        (bad, labels, domains, "row 5 of the features is NaN"),
        (bad.repeat(1, 99), labels, domains, "row 5 of the features is NaN"),
        (features * 0 + 7, labels, domains, "features are the same"),
        (features, labels.float(), domains, "labels must be"),
    ]
    for *data, message in cases:
        with pytest.raises(ValueError, match=message):
            leave_one_domain_out(*data)
    draw = torch.Generator().manual_seed(0)
    for _ in range(40):  # what rounding makes of the constant differs
        fixed = torch.where((domains == 0)[:, None], features, torch.randn(features.shape[1], generator=draw))
        with pytest.raises(ValueError, match="but those of one domain"):
            leave_one_domain_out(fixed, labels, domains)
    constant = torch.cat([features, torch.full((len(features), 2), 3.0)], 1)
    assert np.isfinite(mean_score(constant, labels, domains))


def test_a_class_may_lack_in_a_domain():
    features, labels, domains = zoo()
    kept = ~((domains == 0) & (labels == 2))
    assert np.isfinite(mean_score(features[kept], labels[kept], domains[kept]))
