"""Reduction to a band keeps the eigenvalues, and the trace of its root is the sum of theirs."""

import numpy as np
import pytest
import torch
from scipy.linalg import eigvals_banded

from hf_dpssl.evaluation.band_matrix import reduce_to_band, trace_of_root_of_band


def symmetric(size: int, values: np.ndarray) -> np.ndarray:
    directions = np.linalg.qr(np.random.default_rng(size).standard_normal((size, size)))[0]
    return (directions * values) @ directions.T


@pytest.mark.parametrize("size, width", [(3, 1), (10, 3), (130, 48), (600, 7), (1100, 48), (1025, 64)])
def test_reduction_keeps_the_eigenvalues_and_reads_the_lower_triangle_only(size, width):
    matrix = symmetric(size, np.random.default_rng(0).standard_normal(size))
    lower = torch.from_numpy(np.tril(matrix) + np.triu(np.full_like(matrix, 7.0), 1))
    band = reduce_to_band(lower, width)
    assert band.shape == (width + 1, size)
    found = eigvals_banded(band, lower=True)
    np.testing.assert_allclose(found, np.linalg.eigvalsh(matrix), atol=1e-12)


def test_reduction_of_what_is_diagonal_already_keeps_the_diagonal():
    values = np.arange(100.0)
    band = reduce_to_band(torch.diag(torch.from_numpy(values)), 8)
    np.testing.assert_allclose(np.sort(band[0]), values, atol=1e-12)
    np.testing.assert_allclose(band[1:], 0, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e12])
def test_trace_of_the_root_is_the_sum_of_the_roots_of_the_eigenvalues(condition, scale):
    values = scale * np.geomspace(1, 1 / condition, 200)
    band = reduce_to_band(torch.from_numpy(symmetric(200, values)), 16)
    assert trace_of_root_of_band(band, 0.0) == pytest.approx(np.sqrt(values).sum(), rel=1e-9)


def test_trace_of_the_root_of_one_number_is_its_root():
    for value in (1e-6, 1.0, 2.0, 12345.0):
        assert trace_of_root_of_band(np.array([[value]]), 0.0) == pytest.approx(value**0.5, rel=1e-11)


def test_matrices_that_are_not_positive_definite_beyond_rounding_have_no_trace():
    for least in (-1.0, 0.0, 1e-14):
        values = np.concatenate([[least], np.linspace(1, 2, 99)])
        band = reduce_to_band(torch.from_numpy(symmetric(100, values)), 8)
        assert trace_of_root_of_band(band, 1e-12) is None
