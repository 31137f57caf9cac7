"""The bootstrap interval of a Frechet distance: quantiles of a loop over its closed form in one dimension."""

import numpy as np
import pytest
import torch

from hf_dpssl.evaluation import frechet_interval


def distance(real: np.ndarray, generated: np.ndarray) -> float:
    """(mean - mean)^2 + (deviation - deviation)^2 of two samples of numbers."""
    return (real.mean() - generated.mean()) ** 2 + (real.std(ddof=1) - generated.std(ddof=1)) ** 2


@pytest.mark.parametrize("level", [0.5, 0.9])
def test_interval_lies_between_the_quantiles_of_centred_resamples(level):
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(60, 1, generator=generator).double()
    generated = 0.3 + 1.5 * torch.randn(40, 1, generator=generator).double()
    draws, values = torch.Generator().manual_seed(7), []
    for _ in range(200):
        chosen = generated[torch.randint(40, (40,), generator=draws)].numpy()
        beside = real[torch.randint(60, (60,), generator=draws)].numpy()
        values.append(distance(beside, chosen))
    whole, values = distance(real.numpy(), generated.numpy()), np.array(values)
    low, high = whole + np.quantile(values - values.mean(), [(1 - level) / 2, (1 + level) / 2])
    draws = torch.Generator().manual_seed(7)
    found = frechet_interval(real, generated, resamples=200, level=level, generator=draws)
    expected = {"fid": whole, "fid_low": low, "fid_high": high, "fid_std": values.std(ddof=1)}
    assert found == pytest.approx(expected, rel=1e-6)
