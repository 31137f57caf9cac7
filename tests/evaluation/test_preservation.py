"""Trustworthiness and continuity against a loop; spectrum of a cloud."""

import numpy as np
import pytest
import torch

from hf_dpssl.evaluation import continuity, effective_rank, spectrum, trustworthiness


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_loop(x: torch.Tensor, z: torch.Tensor, k: int) -> float:
    n, total = len(x), 0
    for i in range(n):
        ranks = {j: r for r, j in enumerate(sorted(set(range(n)) - {i}, key=lambda j: float((x[i] - x[j]).norm())), 1)}
        nearest = sorted(set(range(n)) - {i}, key=lambda j: float((z[i] - z[j]).norm()))[:k]
        total += sum(max(0, ranks[j] - k) for j in nearest)
    return 1 - 2 / (n * k * (2 * n - 3 * k - 1)) * total


def test_both_equal_the_loop_of_the_paper():
    x, z = random(25, 4), random(25, 2, seed=1)
    for k in (1, 3, 12):
        assert trustworthiness(x, z, k=k)["trustworthiness"] == pytest.approx(by_loop(x, z, k))
        assert continuity(x, z, k=k)["continuity"] == pytest.approx(by_loop(z, x, k))


def test_isometries_keep_all_neighbours_and_images_are_flattened():
    x = random(50, 3, 2, 2)
    z = 5 * x.flatten(1) @ torch.linalg.qr(random(12, 12)).Q + 3
    assert trustworthiness(x, z, k=5) == {"trustworthiness": 1.0} and continuity(x, z, k=5) == {"continuity": 1.0}


def test_a_fold_is_continuous_and_not_trustworthy_a_cut_the_other_way_round():
    line = torch.linspace(-1, 1, 200)[:, None]
    fold = line.abs()  # two ends become neighbours
    assert continuity(line, fold, k=5)["continuity"] > 0.95 > trustworthiness(line, fold, k=5)["trustworthiness"]
    angle = torch.linspace(0, 2 * torch.pi, 201)[:-1, None]
    circle = torch.cat([angle.cos(), angle.sin()], 1)
    cut = angle  # neighbours at the cut are torn apart
    assert trustworthiness(circle, cut, k=5)["trustworthiness"] > continuity(circle, cut, k=5)["continuity"]


def test_bad_neighbourhoods_are_refused():
    with pytest.raises(ValueError, match="same points"):
        trustworthiness(random(5, 2), random(6, 2))
    for k in (0, 5):
        with pytest.raises(ValueError, match="below half"):
            continuity(random(10, 2), random(10, 2), k=k)
    with pytest.raises(ValueError, match="NaN or infinite"):
        trustworthiness(random(10, 2) / 0, random(10, 2), k=2)


def test_spectrum_is_that_of_the_covariance():
    for shape in ((20, 30), (200, 6)):
        latents = 3 * random(*shape) @ torch.diag(torch.linspace(0.1, 2, shape[1])) + 7
        values = np.linalg.eigvalsh(np.cov(latents.double().numpy().T))[::-1][: min(shape)]
        np.testing.assert_allclose(spectrum(latents), values / values.sum(), atol=1e-9)


def test_flat_and_collapsed_spectra_and_their_effective_rank():
    corners = torch.cat([torch.eye(4), -torch.eye(4)])
    torch.testing.assert_close(spectrum(corners), torch.full((4,), 0.25).double())
    line = random(50, 1) @ random(1, 4)
    assert float(spectrum(line)[0]) == pytest.approx(1) and spectrum(line).shape == (4,)
    assert effective_rank(line, centre=True)["effective_rank"] == pytest.approx(1, rel=1e-4)
    with pytest.raises(ValueError, match="all vectors are the same"):
        spectrum(torch.ones(5, 3))
    with pytest.raises(ValueError, match="N >= 2"):
        spectrum(torch.ones(1, 3))
