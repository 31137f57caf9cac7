"""The Bayesian linear model against integration by quadrature, scikit-learn, and the conditions of a maximum."""

import numpy as np
import pytest
from scipy.stats import multivariate_normal
from sklearn.linear_model import BayesianRidge

from hf_dpssl.zoo.evidence import log_evidence, log_predictive, maximise_evidence, spectrum_of
from hf_dpssl.zoo.tridiagonal import tridiagonal_of


def spectrum(features, labels):
    return spectrum_of(len(features), features.T @ features, features.T @ labels, (labels**2).sum(0))[0]


def problem(samples, dimension, seed=0, noise=0.5):
    """Features of unequal variances, and two columns of labels: linear ones with noise, and noise."""
    random = np.random.default_rng(seed)
    features = random.normal(size=(samples, dimension)) * np.geomspace(0.3, 3.0, dimension)
    weights = random.normal(size=dimension) / np.sqrt(dimension)
    linear = features @ weights + noise * random.normal(size=samples)
    return features, np.stack([linear, random.normal(size=samples)], 1)


def integrated(features, labels, alpha, beta):
    """log of the integral over the weights, on a fine grid, of likelihood times prior, for one column of labels."""
    side = np.linspace(-8, 8, 401) / np.sqrt(alpha)
    weights = np.stack([axis.ravel() for axis in np.meshgrid(*[side] * features.shape[1])], 1)
    errors = labels - weights @ features.T
    log_likelihood = 0.5 * len(labels) * np.log(beta / (2 * np.pi)) - beta / 2 * (errors**2).sum(1)
    log_prior = 0.5 * features.shape[1] * np.log(alpha / (2 * np.pi)) - alpha / 2 * (weights**2).sum(1)
    values = log_likelihood + log_prior
    return values.max() + np.log(np.exp(values - values.max()).sum() * (side[1] - side[0]) ** features.shape[1])


@pytest.mark.parametrize("dimension", [1, 2])
def test_evidence_and_predictive_are_the_integrals_over_the_weights(dimension):
    features, labels = problem(7, dimension)
    alpha, beta = np.array([0.7, 2.0]), np.array([3.0, 0.4])
    old = slice(0, 4)
    whole, train = spectrum(features, labels), spectrum(features[old], labels[old])
    predicted = log_predictive(train, whole, alpha, beta)
    for column in range(2):
        parts = (alpha[column], beta[column])
        wanted = integrated(features, labels[:, column], *parts)
        assert log_evidence(whole, alpha, beta)[column] == pytest.approx(wanted, abs=1e-6)
        wanted -= integrated(features[old], labels[old, column], *parts)
        assert predicted[column] == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("samples, dimension", [(40, 5), (12, 30)])
def test_predictive_is_the_normal_density_of_new_labels_given_old_ones(samples, dimension):
    features, labels = problem(samples + 6, dimension, seed=1)
    old, new = features[:samples], features[samples:]
    train = spectrum(old, labels[:samples])
    alpha, beta = maximise_evidence(train)
    found = log_predictive(train, spectrum(features, labels), alpha, beta)
    for column in range(2):
        precision = alpha[column] * np.eye(dimension) + beta[column] * old.T @ old
        mean = new @ np.linalg.solve(precision, beta[column] * old.T @ labels[:samples, column])
        covariance = np.eye(6) / beta[column] + new @ np.linalg.solve(precision, new.T)
        wanted = multivariate_normal(mean, covariance).logpdf(labels[samples:, column])
        assert found[column] == pytest.approx(wanted, rel=1e-7)


def test_maximum_is_that_of_scikit_learns_bayesian_ridge():
    features, labels = problem(60, 8)
    found = spectrum(features, labels[:, :1])
    alpha, beta = maximise_evidence(found)
    flat = {"alpha_1": 0, "alpha_2": 0, "lambda_1": 0, "lambda_2": 0}
    ridge = BayesianRidge(fit_intercept=False, compute_score=True, tol=1e-12, max_iter=1000, **flat)
    ridge.fit(features, labels[:, 0])
    assert [alpha[0], beta[0]] == pytest.approx([ridge.lambda_, ridge.alpha_], rel=1e-5)
    assert log_evidence(found, alpha, beta)[0] == pytest.approx(ridge.scores_[-1], rel=1e-9)


def test_the_largest_of_several_maxima_is_found_where_a_fixed_point_stops_at_another():
    """Classes of features wider than the samples are many: BayesianRidge ends without noise, and with less evidence."""
    random = np.random.default_rng(0)
    classes = np.arange(60) % 3
    features = 2 * random.normal(size=(3, 120))[classes] + 4 * random.normal(size=(60, 120))
    features = (features - features.mean(0)) * np.logspace(1, -2, 120)
    labels = np.eye(3)[classes] - 1 / 3
    found = spectrum(features, labels)
    flat = {"alpha_1": 0, "alpha_2": 0, "lambda_1": 0, "lambda_2": 0}
    ridges = [BayesianRidge(fit_intercept=False, **flat).fit(features, column) for column in labels.T]
    theirs = log_evidence(found, *(np.array([getattr(r, name) for r in ridges]) for name in ("lambda_", "alpha_")))
    ours = log_evidence(found, *maximise_evidence(found))
    assert (ours > theirs - 1e-6).all() and (ours > theirs + 1).any()


@pytest.mark.parametrize("samples, dimension", [(50, 3), (400, 40), (30, 90)])
def test_no_other_precisions_have_more_evidence(samples, dimension):
    features, labels = problem(samples, dimension, seed=2)
    found = spectrum(features, labels)
    alpha, beta = maximise_evidence(found)
    best = log_evidence(found, alpha, beta)
    assert np.isfinite(best).all()
    for more in np.geomspace(1e-6, 1e6, 25):
        for most in np.geomspace(1e-6, 1e6, 25):
            assert (log_evidence(found, alpha * more, beta * most) <= best + 1e-9 * abs(best)).all()


def test_labels_that_are_linear_and_columns_that_are_constant_leave_all_finite():
    features, labels = problem(50, 4, noise=0.0)
    alpha, beta = maximise_evidence(spectrum(features, labels))
    noise = 1 / beta[0] / (labels[:, 0] ** 2).mean()
    assert 0.5e-8 < noise < 2e-8  # the stated floor
    padded = np.concatenate([features, np.zeros((50, 3))], 1)
    assert np.allclose(maximise_evidence(spectrum(padded, labels)), (alpha, beta), rtol=1e-6)
    with pytest.raises(ValueError, match="column 1 of the labels is 0 everywhere"):
        maximise_evidence(spectrum(features, labels * [1, 0]))
    with pytest.raises(ValueError, match="the same for all samples"):
        maximise_evidence(spectrum(features * 0, labels))


def test_the_tridiagonal_form_is_that_of_eigenvectors_and_of_moved_samples():
    """Evidence anywhere, its maximum, and the evidence after an offset, against the samples with that offset."""
    for samples, dimension in [(60, 8), (400, 40), (9, 2)]:
        features, labels = problem(samples, dimension, seed=4)
        features, labels = features - features.mean(0), labels - labels.mean(0)
        given = (samples, features.T @ features, features.T @ labels, (labels**2).sum(0))
        plain, turned = spectrum_of(*given)[0], tridiagonal_of(*given)
        for alpha, beta in [(0.01, 3.0), (5.0, 0.2), (1e6, 1e-3)]:
            alphas, betas = np.array([alpha, 2 * alpha]), np.array([beta, beta / 3])
            wanted = log_evidence(plain, alphas, betas)
            assert log_evidence(turned, alphas, betas) == pytest.approx(wanted, rel=1e-9)
            offset, shares = np.linspace(-2, 3, dimension), np.array([0.3, -0.5])
            wanted = log_evidence(spectrum(features + offset, labels + shares), alphas, betas)
            assert turned.moved_evidence(offset, shares, alphas, betas) == pytest.approx(wanted, rel=1e-8)
        assert np.allclose(maximise_evidence(turned), maximise_evidence(plain), rtol=1e-5)
    exact = problem(50, 4, noise=0.0)
    given = (50, exact[0].T @ exact[0], exact[0].T @ exact[1], (exact[1] ** 2).sum(0))
    assert np.allclose(maximise_evidence(tridiagonal_of(*given)), maximise_evidence(spectrum_of(*given)[0]), rtol=1e-3)
    wide = problem(20, 30)[0]
    assert tridiagonal_of(20, wide.T @ wide, np.zeros((30, 1)), np.ones(1)) is None
