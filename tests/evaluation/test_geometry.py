"""Effective rank, alignment and uniformity: closed forms, loops and invariances."""

import math

import pytest
import torch

from hf_dpssl.contrastive import losses
from hf_dpssl.evaluation import alignment, effective_rank, uniformity


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_effective_rank_of_equal_singular_values_is_the_dimension_and_of_one_vector_1():
    for dimension, rows in ((1, 16), (3, 200), (16, 16), (16, 200)):
        orthonormal = torch.linalg.qr(random(rows, dimension)).Q
        assert effective_rank(7 * orthonormal)["effective_rank"] == pytest.approx(dimension, rel=1e-6)
    for rows in (5, 300):
        line = random(rows, 1).double() * random(1, 8).double()
        assert effective_rank(line)["effective_rank"] == pytest.approx(1)


def test_effective_rank_is_exp_of_the_entropy_of_the_singular_values():
    values = torch.tensor([4.0, 2.0, 1.0, 1.0])
    latents = torch.linalg.qr(random(50, 4)).Q * values @ torch.linalg.qr(random(4, 4, seed=1)).Q
    shares = values / values.sum()
    assert effective_rank(latents)["effective_rank"] == pytest.approx(
        math.exp(-float((shares * shares.log()).sum())), rel=1e-5
    )


def test_effective_rank_ignores_scale_and_with_centring_also_the_mean():
    latents = random(100, 6)
    plain = effective_rank(latents)["effective_rank"]
    assert effective_rank(1e-6 * latents)["effective_rank"] == pytest.approx(plain, rel=1e-5)
    moved = latents + 50
    assert effective_rank(moved)["effective_rank"] < 0.6 * plain
    centred = effective_rank(latents, centre=True)["effective_rank"]
    assert effective_rank(moved, centre=True)["effective_rank"] == pytest.approx(centred, rel=1e-5)


def test_alignment_equals_the_loops():
    alpha = 1.5
    first, second = random(20, 5), random(20, 5, seed=1)
    points = torch.cat([first, second]).double()
    pairs = [(i, j) for i in range(40) for j in range(i)]
    mean_square = sum(float((points[i] - points[j]).norm()) ** 2 for i, j in pairs) / len(pairs)
    raw = [float((a - b).norm()) / (mean_square / 2) ** 0.5 for a, b in zip(first, second, strict=True)]
    found = alignment(first, second, alpha=alpha)
    assert found["alignment"] == float(losses.alignment(first, second, alpha=alpha))
    assert found["alignment_raw"] == pytest.approx(sum(d**alpha for d in raw) / 20, rel=1e-6)


def test_uniformity_equals_the_loops():
    points = random(30, 5).double()
    pairs = [(i, j) for i in range(30) for j in range(i)]
    squares = [float((points[i] - points[j]).norm()) ** 2 for i, j in pairs]
    scale = sum(squares) / len(squares) / 2
    found = uniformity(points)
    expected = math.log(sum(math.exp(-2 * d / scale) for d in squares) / len(squares))
    assert found["uniformity_raw"] == pytest.approx(expected, rel=1e-9)
    assert found["uniformity"] == float(losses.uniformity(points))


def test_uniformity_of_a_simplex_is_its_bound_in_both_forms():
    # n unit vectors at equal angles: |x - y|^2 = 2 n / (n - 1); in the raw form the mean is 2 by definition.
    n = 9
    simplex = torch.eye(n, dtype=torch.float64) - 1 / n
    found = uniformity(simplex, t=2.0)
    assert found["uniformity"] == pytest.approx(-2 * 2 * n / (n - 1), rel=1e-5)
    assert found["uniformity_raw"] == pytest.approx(-4, rel=1e-9)


def test_raw_forms_ignore_shift_and_scale():
    first, second = random(50, 5).double(), random(50, 5, seed=1).double()
    assert alignment(3 * first + 7, 3 * second + 7)["alignment_raw"] == pytest.approx(
        alignment(first, second)["alignment_raw"]
    )
    assert uniformity(3 * first + 7)["uniformity_raw"] == pytest.approx(uniformity(first)["uniformity_raw"])


def test_raw_uniformity_of_a_uniform_sphere_is_that_on_the_sphere():
    sphere = torch.nn.functional.normalize(random(1000, 32), dim=1)
    found = uniformity(5 * sphere)
    assert found["uniformity_raw"] == pytest.approx(found["uniformity"], abs=0.02)


def test_clouds_that_are_not_finite_or_empty_are_refused():
    for function in (effective_rank, uniformity, lambda x: alignment(x, x)):
        with pytest.raises(ValueError, match="NaN|finite"):
            function(torch.full((3, 2), math.nan))
        with pytest.raises(ValueError):
            function(torch.zeros(0, 2))


def test_clouds_without_extent_are_refused():
    with pytest.raises(ValueError, match="all 0"):
        effective_rank(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="all 0 after centring"):
        effective_rank(torch.ones(3, 2), centre=True)
    for function in (uniformity, lambda x: alignment(x, x)):
        with pytest.raises(ValueError, match="all vectors are the same"):
            function(torch.ones(3, 2))
