"""Frechet distance, its statistics and its uncertainty: torch-fidelity, closed forms, and processes."""

import math

import numpy as np
import pytest
import torch
from cases import for_each

from hf_dpssl.evaluation import (
    FeatureStatistics,
    frechet_distance,
    frechet_distance_of_features,
    frechet_extrapolation,
    frechet_interval,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(size: int, condition: float, seed: int) -> np.ndarray:
    """Of eigenvalues that fall geometrically from 1 to 1 / condition, in random directions."""
    directions = np.linalg.qr(random(size, size, seed=seed).numpy())[0]
    values = np.geomspace(1, 1 / condition, size)
    sigma = (directions * values) @ directions.T
    return (sigma + sigma.T) / 2


def fidelity(mu_1, sigma_1, mu_2, sigma_2) -> float:
    metric_fid = pytest.importorskip("torch_fidelity.metric_fid")
    statistics = ({"mu": mu, "sigma": sigma} for mu, sigma in ((mu_1, sigma_1), (mu_2, sigma_2)))
    return metric_fid.fid_statistics_to_metric(*statistics, False)[metric_fid.KEY_METRIC_FID]


def test_full_rank_equals_torch_fidelity():
    for size, condition in ((1, 1.0), (2, 1e4), (65, 1e8), (300, 1e4), (300, 1e8)):
        mu_1, mu_2 = 0.1 * random(2, size).numpy()
        given = mu_1, covariance(size, condition, 1), mu_2, 0.7 * covariance(size, condition, 2)
        assert frechet_distance(*given) == pytest.approx(fidelity(*given), rel=1e-6), (size, condition)
        assert frechet_distance(*map(torch.from_numpy, given)) == frechet_distance(*given)


def test_features_like_pooled_activations_equal_torch_fidelity():
    # Not negative, of very different variance, correlated.
    mixing = random(96, 96) / 10 * torch.logspace(0, -2, 96, dtype=torch.float64)
    first, second = ((random(1000, 96, seed=10 + s) @ mixing + 0.1 * s).relu() for s in (0, 1))
    given = [value for x in (first, second) for value in (x.mean(0).numpy(), np.cov(x.numpy(), rowvar=False))]
    assert frechet_distance(*given) == pytest.approx(fidelity(*given), rel=1e-6)
    assert frechet_distance_of_features(first, second) == pytest.approx(fidelity(*given), rel=1e-6)


@for_each("zeros", [(0, 0), (10, 0), (0, 10), (15, 25), (40, 40)])
def test_commuting_covariances_give_the_closed_form(zeros):
    directions = torch.linalg.qr(random(40, 40)).Q
    variances = [random(40, seed=s).square() for s in (1, 2)]
    for variance, count in zip(variances, zeros, strict=True):
        variance[:count] = 0
    sigmas = [(directions * v) @ directions.T for v in variances]
    expected = float((variances[0].sqrt() - variances[1].sqrt()).square().sum())
    found = frechet_distance(torch.zeros(40), sigmas[0], torch.zeros(40), sigmas[1])
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_ill_conditioned_covariances_with_common_directions_give_the_closed_form():
    for condition in (1e4, 1e8):  # the product has the square of that condition
        first = covariance(300, condition, 1)
        expected = np.trace(first) * (1 - math.sqrt(0.7)) ** 2
        found = frechet_distance(np.zeros(300), first, np.zeros(300), 0.7 * first)
        assert found == pytest.approx(expected, rel=1e-6)


def test_covariances_on_orthogonal_subspaces_share_nothing():
    directions = torch.linalg.qr(random(50, 50)).Q
    first, second = directions[:, :20] @ directions[:, :20].T, directions[:, 20:35] @ directions[:, 20:35].T
    assert frechet_distance(torch.zeros(50), first, torch.zeros(50), second) == pytest.approx(35, rel=1e-6)


def test_planted_low_rank_equals_the_nuclear_norm_in_the_small_space():
    first, second = random(200, 30, seed=1), random(200, 45, seed=2)  # S = F F^T of rank 30 and 45
    nuclear = float(torch.linalg.svdvals(first.T @ second).sum())
    expected = float(first.square().sum() + second.square().sum()) - 2 * nuclear
    found = frechet_distance(torch.zeros(200), first @ first.T, torch.zeros(200), second @ second.T)
    assert found == pytest.approx(expected, rel=1e-6)


def test_features_fewer_than_dimensions_agree_with_their_covariances():
    for numbers in ((20, 30), (20, 300), (300, 20), (99, 101)):
        first, second = random(numbers[0], 200, seed=1), 2 + 1.5 * random(numbers[1], 200, seed=2)
        moments = [value for x in (first, second) for value in (x.mean(0), torch.cov(x.T))]
        assert frechet_distance_of_features(first, second) == pytest.approx(frechet_distance(*moments), rel=1e-6)


def test_equal_gaussians_are_at_distance_0_and_a_shift_adds_its_square():
    sigma = covariance(80, 1e6, 0)
    zero, shift = np.zeros(80), np.full(80, 0.5)
    assert abs(frechet_distance(zero, sigma, zero, sigma)) < 1e-9
    assert frechet_distance(zero, sigma, shift, sigma) == pytest.approx(20, rel=1e-9)
    assert frechet_distance(zero, np.zeros((80, 80)), shift, sigma) == pytest.approx(20 + np.trace(sigma), rel=1e-9)


def test_streamed_statistics_do_not_depend_on_batches_and_survive_a_large_mean():
    features = 1e6 + random(1000, 7) @ random(7, 7, seed=1)
    whole, parts = FeatureStatistics().update(features), FeatureStatistics()
    for part in features.split(33):
        parts.update(part)
    merged = FeatureStatistics().merge(FeatureStatistics().update(features[:400]))
    merged.merge(FeatureStatistics()).merge(FeatureStatistics().update(features[400:]))
    exact = np.cov((features - 1e6).numpy(), rowvar=False)
    for statistics in (whole, parts, merged):
        assert statistics.count == 1000
        np.testing.assert_allclose(statistics.mean - 1e6, (features - 1e6).mean(0), atol=1e-9)
        np.testing.assert_allclose(statistics.covariance, exact, rtol=1e-7, atol=1e-9)


def test_statistics_go_through_a_file(tmp_path):
    statistics = FeatureStatistics().update(random(50, 5))
    np.savez(tmp_path / "statistics.npz", **statistics.state_dict())
    again = FeatureStatistics.from_state_dict(np.load(tmp_path / "statistics.npz"))
    again.update(random(30, 5, seed=1)), statistics.update(random(30, 5, seed=1))
    assert again.count == statistics.count == 80
    np.testing.assert_allclose(again.covariance, statistics.covariance, rtol=1e-12)


SHARES = ([45, 15], [60, 0])


def statistics_of_one_process() -> dict[str, torch.Tensor]:
    rank, found = torch.distributed.get_rank(), {}
    for case, rows in enumerate(SHARES):
        own = random(60, 5)[sum(rows[:rank]) : sum(rows[: rank + 1])]
        gathered = FeatureStatistics().update(own).gather()
        found |= {f"count_{case}": torch.tensor(gathered.count), f"mean_{case}": gathered.mean}
        found[f"covariance_{case}"] = gathered.covariance
    return found


def test_two_processes_have_the_statistics_of_one(run_in_two):
    alone = FeatureStatistics().update(random(60, 5)).gather()
    results = run_in_two(statistics_of_one_process)
    for case in range(len(SHARES)):
        for result in results:
            assert int(result[f"count_{case}"]) == 60
            torch.testing.assert_close(result[f"mean_{case}"], alone.mean, rtol=0, atol=1e-14)
            torch.testing.assert_close(result[f"covariance_{case}"], alone.covariance, rtol=1e-12, atol=1e-14)
        assert torch.equal(results[0][f"covariance_{case}"], results[1][f"covariance_{case}"])


def test_extrapolation_removes_the_bias_of_few_features():
    shift = 0.1 * torch.ones(16)  # true distance 16 * 0.01
    found = [frechet_extrapolation(random(2000, 16, seed=s), shift + random(2000, 16, seed=100 + s)) for s in range(12)]
    plain, infinite = (sum(f[key] for f in found) / len(found) for key in ("fid", "fid_infinity"))
    assert plain - 0.16 > 0.05 and abs(infinite - 0.16) < 0.02
    assert all(f["fid_slope"] > 0 for f in found)


def test_interval_covers_the_expected_distance_of_as_many_features_as_often_as_it_says():
    # 16 dimensions and 60 features: the resamples lie three of their deviations above the distance they are drawn
    # from, as a resample has the bias of 60 features once more. An interval of their quantiles would never cover it.
    def draw(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        return random(60, 16, seed=seed), 0.5 + random(60, 16, seed=10_000 + seed)

    expected = np.mean([frechet_distance_of_features(*draw(seed)) for seed in range(1000, 1400)])
    assert expected > 16 * 0.25 + 1  # the distance of the two normal distributions is 4, the rest is bias
    found = [frechet_interval(*draw(seed), resamples=60, level=0.9) for seed in range(60)]
    covered = sum(f["fid_low"] <= expected <= f["fid_high"] for f in found)
    assert covered >= 45  # of 60: 54 are expected
    assert all(f["fid_low"] < f["fid"] < f["fid_high"] for f in found)


def test_interval_of_many_features_covers_the_known_distance():
    def draw(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        return random(2000, 2, seed=seed), 1 + random(2000, 2, seed=10_000 + seed)

    found = [frechet_interval(*draw(seed), resamples=60) for seed in range(40)]
    covered = sum(f["fid_low"] <= 2 <= f["fid_high"] for f in found)
    assert covered >= 33  # of 40: 38 are expected
    fresh = [frechet_distance_of_features(*draw(seed)) for seed in range(100, 200)]
    assert np.mean([f["fid_std"] for f in found]) == pytest.approx(float(np.std(fresh, ddof=1)), rel=0.25)
    assert frechet_interval(*draw(0), resamples=60) == found[0]


def test_bad_input_is_refused_with_what_was_given():
    mu, sigma = np.zeros(3), np.eye(3)
    for bad, message in (
        ((mu, sigma, np.zeros(2), sigma), "one D"),
        ((mu, sigma, mu, np.eye(2)), "one D"),
        ((mu, sigma, mu, np.full((3, 3), math.nan)), "sigma_2 must be finite"),
        ((mu, sigma, mu, np.diag([1.0, 1, -1])), "no covariance"),
        ((mu, sigma, mu, np.triu(np.ones((3, 3)))), "not symmetric"),
        ((mu, np.ones((3, 3)) * 2 - np.eye(3), mu, sigma), "negative eigenvalue"),
        ((mu, sigma, mu, np.ones((3, 3)) * 2 - np.eye(3)), "negative eigenvalue"),
    ):
        with pytest.raises(ValueError, match=message):
            frechet_distance(*bad)
    with pytest.raises(ValueError, match="N >= 2"):
        frechet_distance_of_features(torch.zeros(1, 3), torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"4 x 16 = 64 features of either kind, got 60"):
        frechet_extrapolation(random(60, 16), random(80, 16))
    with pytest.raises(ValueError, match="level"):
        frechet_interval(random(60, 16), random(80, 16), level=95)
    statistics = FeatureStatistics()
    with pytest.raises(ValueError, match="at least 1"):
        _ = statistics.mean
    with pytest.raises(ValueError, match=r"\(N, 5\)"):
        statistics.update(random(3, 5)).update(random(3, 4))
    with pytest.raises(ValueError, match="sigma lacks"):
        FeatureStatistics.from_state_dict({"count": np.array(3), "mu": mu})
