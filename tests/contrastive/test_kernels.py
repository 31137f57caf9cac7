"""Kernels against loops in float64, and what must hold for any similarity: symmetry, range, invariances."""

import math

import loops
import pytest
import torch
from cases import for_each
from loops import points

from hf_dpssl.contrastive.kernels import KERNELS, Kernel, log_similarities, make_kernel, squared_distances

OPTIONS = {
    "cosine": {"kernel": "cosine", "temperature": 0.3},
    "gaussian": {"kernel": "gaussian", "temperature": 0.7},
    "student_t": {"kernel": "student_t", "temperature": 1.5, "dof": 3.0},
}


def test_squared_distances_equal_the_loop():
    for rows, others, columns in [(1, 1, 1), (3, 5, 2), (7, 2, 16)]:
        x, y = points(rows, columns), points(others, columns, seed=1)
        expected = loops.matrix(x, y, loops.squared_distance)
        torch.testing.assert_close(squared_distances(x, y), expected, rtol=1e-12, atol=1e-12)


def test_squared_distances_are_as_exact_far_from_the_origin_as_near_it():
    near = points(20, 8).float()
    for offset in (1e2, 1e4, 1e6):
        far = near + offset  # rounded: the oracle below sees the same rounded points
        exact = loops.matrix(far, far, loops.squared_distance)
        error = (squared_distances(far, far).double() - exact).abs().max()
        assert error < 1e-5 * exact.max(), f"offset {offset}: error {error}"


def test_squared_distances_are_never_negative_and_zero_on_the_diagonal():
    x = points(50, 64, scale=100).float()
    x[25:] = x[:25]
    distances = squared_distances(x, x)
    assert distances.min() >= 0
    assert distances.diagonal().max() < 1e-6 * distances.max()


def test_gradient_of_squared_distances_is_twice_the_difference():
    x, y = points(1, 4).requires_grad_(), points(1, 4, seed=1)
    squared_distances(x, y).sum().backward()
    torch.testing.assert_close(x.grad, 2 * (x.detach() - y))


@for_each("name", KERNELS)
def test_every_form_of_a_kernel_equals_the_logarithm_of_the_loop(name):
    x, y = points(4), points(5, seed=1)
    for temperature in (0.1, 1.0, 8.0):
        for dof in (0.5, 1.0, 5.0, 100.0):
            expected = loops.matrix(x, y, loops.similarity(name, temperature, dof)).log()
            kernel = make_kernel(name, temperature, dof)
            found = log_similarities(x, y, kernel=name, temperature=temperature, dof=dof)
            torch.testing.assert_close(found, expected)
            torch.testing.assert_close(kernel.pairs(x, y[:4]), expected.diagonal())
            left, right = kernel.scaled(x, y)  # as the tiles see them: without a scale
            unit = {
                "cosine": left @ right.T,
                "gaussian": -torch.cdist(left, right).square(),
                "student_t": -(dof + 1) / 2 * torch.cdist(left, right).square().log1p(),
            }
            torch.testing.assert_close(unit[name], expected)


def test_student_t_tends_to_the_gaussian_of_twice_the_temperature_which_infinite_dof_give():
    x, y = points(6), points(5, seed=1)
    gaussian = log_similarities(x, y, kernel="gaussian", temperature=2 * 1.7)

    def student_t(dof):
        return log_similarities(x, y, kernel="student_t", temperature=1.7, dof=dof)

    assert torch.equal(student_t(math.inf), gaussian)
    errors = [(student_t(dof) - gaussian).abs().max() for dof in (1e2, 1e4, 1e6)]
    assert errors[2] < 1e-4
    assert errors[0] > 50 * errors[1] > 2500 * errors[2], "the error should fall like 1/dof"


def test_log_kernel_does_not_underflow_where_the_kernel_itself_does():
    value = make_kernel("student_t", 1.0, 100.0).of_squared_distances(torch.tensor(1e4))
    assert value.exp() == 0
    torch.testing.assert_close(value, torch.tensor(-50.5 * math.log1p(100)))


@for_each("name", KERNELS)
def test_kernel_is_symmetric_largest_at_the_point_itself_and_keeps_its_invariance(name):
    x, y = points(6, 4), points(3, 4, seed=1)
    found = log_similarities(x, y, **OPTIONS[name])
    torch.testing.assert_close(found, log_similarities(y, x, **OPTIONS[name]).T)
    assert torch.equal(log_similarities(x, x, **OPTIONS[name]).argmax(1), torch.arange(6))
    rotation = torch.linalg.qr(points(4, 4, seed=2)).Q
    if name == "cosine":
        moved = 10 * x @ rotation, 0.1 * y @ rotation
    else:
        moved = x @ rotation + 5, y @ rotation + 5
    torch.testing.assert_close(log_similarities(*moved, **OPTIONS[name]), found)


@for_each("name", KERNELS)
def test_half_precision_is_computed_in_float32_autocast_changes_no_bit_and_float64_stays(name):
    for dtype in (torch.bfloat16, torch.float16):
        x, y = points(6, 32).to(dtype), points(5, 32, seed=1).to(dtype)
        found = log_similarities(x, y, **OPTIONS[name])
        exact = log_similarities(x.double(), y.double(), **OPTIONS[name])
        assert found.dtype == torch.float32 and exact.dtype == torch.float64
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    x, y = points(6, 32).float(), points(5, 32, seed=1).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = log_similarities(x, y, **OPTIONS[name])
    assert torch.equal(found, log_similarities(x, y, **OPTIONS[name]))


def test_options_that_no_kernel_has_are_refused_with_the_reason():
    x = points(2, 2)
    for name in KERNELS:
        for temperature in (0, -0.5, math.inf, math.nan, torch.tensor(0.0)):
            with pytest.raises(ValueError, match="temperature must be a positive finite number, got"):
                log_similarities(x, x, kernel=name, temperature=temperature)
    for dof in (0, -1, math.nan, -math.inf):
        with pytest.raises(ValueError, match=f"dof must be positive .*got {float(dof)}"):
            log_similarities(x, x, kernel="student_t", temperature=1.0, dof=dof)
    with pytest.raises(ValueError, match="'cosine', 'gaussian', 'student_t'.*got 'l1'"):
        make_kernel("l1", 1.0)
    assert make_kernel("cosine", 2.0, dof=-1) == Kernel("cosine", 0.5), "dof are read for Student-t only"
