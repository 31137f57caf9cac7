"""Densities of latents against torch.distributions and scikit-learn."""

import pytest
import torch

from hf_dpssl.models.choices import GAN_DENSITIES
from hf_dpssl.models.latent_density import LatentDensity


def cloud(number: int = 400, dim: int = 3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator)
    return torch.randn(number, dim, generator=generator) @ mix + torch.arange(dim)


def covariances(density: LatentDensity) -> torch.Tensor:
    return density.factors @ density.factors.mT


def test_diagonal_and_full_density_have_the_moments_of_the_latents():
    points = cloud()
    mean, covariance = points.mean(0), points.T.cov(correction=0)
    for kind, expected in (("diagonal", covariance.diagonal().diag()), ("full", covariance)):
        density = LatentDensity(kind, 3).fit_(points)
        torch.testing.assert_close(density.means[0], mean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(covariances(density)[0], expected, rtol=1e-4, atol=1e-4)


def test_mixture_is_that_of_scikit_learn():
    from sklearn.mixture import GaussianMixture

    points = torch.cat([cloud(200), cloud(200, seed=1) + 20]).double()
    density = LatentDensity("mixture", 3, components=2).fit_(points, seed=3)
    reg = 1e-6 * float(points.var(0).mean())
    theirs = GaussianMixture(2, random_state=3, reg_covar=reg, max_iter=200).fit(points.numpy())
    torch.testing.assert_close(density.weights, torch.from_numpy(theirs.weights_).float())
    torch.testing.assert_close(density.means, torch.from_numpy(theirs.means_).float())
    torch.testing.assert_close(
        covariances(density), torch.from_numpy(theirs.covariances_).float(), rtol=1e-4, atol=1e-4
    )


def test_samples_have_the_mean_and_covariance_of_the_latents():
    for kind in ["diagonal", "full", "mixture"]:
        points = cloud(2000)
        density = LatentDensity(kind, 3, components=2).fit_(points)
        samples = density.sample(40_000, torch.Generator().manual_seed(0))
        torch.testing.assert_close(samples.mean(0), points.mean(0), rtol=0, atol=0.05)
        expected = points.T.cov(correction=0)
        expected = expected.diagonal().diag() if kind == "diagonal" else expected
        torch.testing.assert_close(samples.T.cov(), expected, rtol=0.05, atol=0.1)


def test_prior_is_the_standard_normal_even_after_a_fit():
    density = LatentDensity("prior", 3).fit_(cloud())
    assert torch.equal(density.weights, torch.ones(1)) and torch.equal(density.means, torch.zeros(1, 3))
    assert torch.equal(density.factors, torch.eye(3)[None])


def test_held_out_latents_are_drawn_without_replacement_until_all_were():
    points = cloud(20)
    density = LatentDensity("held_out", 3, bank_size=20).fit_(points)
    drawn = density.sample(20, torch.Generator().manual_seed(0))
    assert torch.equal(drawn.sort(0).values, points.sort(0).values)
    assert len(density.sample(50)) == 50


def test_same_generator_gives_the_same_latents():
    density = LatentDensity("full", 3).fit_(cloud())
    first, second = (density.sample(5, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second)


def test_degenerate_latents_are_fitted_where_their_covariance_has_no_factor_of_its_own():
    points = torch.cat([cloud(100, 2), torch.zeros(100, 1)], dim=1)
    samples = LatentDensity("full", 3).fit_(points).sample(1000, torch.Generator().manual_seed(0))
    assert bool(torch.isfinite(samples).all()) and float(samples[:, 2].std()) < 0.1


def test_bad_input_is_refused_by_name():
    with pytest.raises(ValueError, match="must be one of"):
        LatentDensity("uniform", 3)
    with pytest.raises(ValueError, match="bank"):
        LatentDensity("held_out", 3)
    density = LatentDensity("full", 3)
    for latents in (cloud(10, 2), cloud(1), cloud(10).fill_(torch.nan)):
        with pytest.raises(ValueError):
            density.fit_(latents)
    with pytest.raises(ValueError, match="at least 1"):
        density.sample(0)
    assert set(GAN_DENSITIES) == {"prior", "diagonal", "full", "mixture", "held_out"}
