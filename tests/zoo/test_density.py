"""The Gaussian density against scipy, and its shrinkage against scikit-learn."""

import numpy as np
import pytest
from scipy.stats import multivariate_normal
from sklearn.covariance import oas

from hf_dpssl.zoo.density import held_out_density, shrinkage


@pytest.mark.parametrize("samples, dimension", [(200, 6), (10, 25)])
def test_density_is_that_of_scipy_under_scikit_learns_shrunk_covariance(samples, dimension):
    random = np.random.default_rng(0)
    spread = np.geomspace(0.1, 5, dimension)
    old = random.normal(size=(samples, dimension)) * spread + 3
    new = random.normal(size=(50, dimension)) * spread[::-1] + 2
    mean = old.mean(0)
    plain = (old - mean).T @ (old - mean) / samples
    moments = (new - mean).T @ (new - mean) / len(new)
    covariance, share = oas(old)
    scale = np.trace(plain) / dimension
    found = shrinkage(scale, (plain**2).sum() / dimension**2, samples, dimension)
    assert found == pytest.approx(share, rel=1e-9)
    density, stability = held_out_density(samples * plain, samples, 50 * moments, 50)
    log_density = multivariate_normal(mean, covariance).logpdf
    log_scale = 0.5 * np.log(scale)
    assert density == pytest.approx(log_density(new).mean() / dimension + log_scale, rel=1e-9)
    assert stability == pytest.approx((log_density(new).mean() - log_density(old).mean()) / dimension, rel=1e-9)


def test_directions_without_variance_count_as_dimensions():
    covariance, moments = np.diag([2.0, 0.5]), np.diag([1.0, 0.6])
    padded = held_out_density(40 * np.diag([2.0, 0.5, 0, 0, 0]), 40, 8 * np.diag([1.0, 0.6, 0, 0, 0]), 8)
    assert held_out_density(40 * covariance, 40, 8 * moments, 8, 5) == pytest.approx(padded, rel=1e-12)
    with pytest.raises(ValueError, match="the same for all samples"):
        held_out_density(0 * covariance, 40, moments, 8)
