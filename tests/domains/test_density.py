"""The Gaussian density against scipy, and its shrinkage against scikit-learn."""

import numpy as np
import pytest
from scipy.stats import multivariate_normal
from sklearn.covariance import oas

from hf_dpssl.domains.density import held_out_density, shrinkage


@pytest.mark.parametrize("samples, dimension", [(200, 6), (10, 25)])
def test_density_is_that_of_scipy_under_scikit_learns_shrunk_covariance(samples, dimension):
    random = np.random.default_rng(0)
    spread = np.geomspace(0.1, 5, dimension)
    old = random.normal(size=(samples, dimension)) * spread + 3
    new = random.normal(size=(50, dimension)) * spread[::-1] + 2
    mean = old.mean(0)
    eigenvalues, vectors = np.linalg.eigh((old - mean).T @ (old - mean) / samples)
    moments = (((new - mean) @ vectors) ** 2).mean(0)
    covariance, share = oas(old)
    assert shrinkage(eigenvalues, samples, dimension) == pytest.approx(share, rel=1e-9)
    density, stability = held_out_density(eigenvalues, samples, moments, dimension)
    log_density = multivariate_normal(mean, covariance).logpdf
    log_scale = 0.5 * np.log(eigenvalues.mean())
    assert density == pytest.approx(log_density(new).mean() / dimension + log_scale, rel=1e-9)
    assert stability == pytest.approx((log_density(new).mean() - log_density(old).mean()) / dimension, rel=1e-9)


def test_directions_without_variance_count_as_dimensions():
    eigenvalues, moments = np.array([2.0, 0.5]), np.array([1.0, 0.6])
    padded = held_out_density(np.append(eigenvalues, [0, 0, 0]), 40, np.append(moments, [0, 0, 0]), 5)
    assert held_out_density(eigenvalues, 40, moments, 5) == pytest.approx(padded, rel=1e-12)
