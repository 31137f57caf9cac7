"""Kernels against loops in float64, and what must hold for any similarity: symmetry, range, invariances."""

import math

import pytest
import torch

from hf_dpssl.contrastive.kernels import (
    check_positive,
    in_float32,
    log_cosine,
    log_gaussian,
    log_student_t,
    squared_distances,
    student_t_from_squared_distance,
)

KERNELS = {
    "cosine": lambda x, y: log_cosine(x, y, temperature=0.3),
    "gaussian": lambda x, y: log_gaussian(x, y, temperature=0.7),
    "student_t": lambda x, y: log_student_t(x, y, temperature=1.5, dof=3.0),
}


def points(rows: int, columns: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def by_loop(x: torch.Tensor, y: torch.Tensor, similarity) -> torch.Tensor:
    """similarity(list, list) -> float for every pair of rows."""
    return torch.tensor([[similarity(a, b) for b in y.tolist()] for a in x.tolist()], dtype=torch.float64)


def squared_distance(a: list[float], b: list[float]) -> float:
    return math.fsum((p - q) ** 2 for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize(("rows", "others", "columns"), [(1, 1, 1), (3, 5, 2), (7, 2, 16)])
def test_squared_distances_equal_the_loop(rows, others, columns):
    x, y = points(rows, columns), points(others, columns, seed=1)
    torch.testing.assert_close(squared_distances(x, y), by_loop(x, y, squared_distance), rtol=1e-12, atol=1e-12)


def test_squared_distances_are_as_exact_far_from_the_origin_as_near_it():
    near = points(20, 8).float()
    for offset in (1e2, 1e4, 1e6):
        far = near + offset  # rounded: the oracle below sees the same rounded points
        exact = by_loop(far, far, squared_distance)
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


@pytest.mark.parametrize("temperature", [0.1, 1.0, 8.0])
def test_cosine_kernel_equals_the_loop(temperature):
    x, y = points(4, 3), points(5, 3, seed=1)

    def cosine(a, b):
        return sum(p * q for p, q in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b) / temperature

    torch.testing.assert_close(log_cosine(x, y, temperature=temperature), by_loop(x, y, cosine))


@pytest.mark.parametrize("temperature", [0.1, 1.0, 8.0])
def test_gaussian_kernel_equals_the_loop(temperature):
    x, y = points(4, 3), points(5, 3, seed=1)
    expected = by_loop(x, y, lambda a, b: math.log(math.exp(-squared_distance(a, b) / temperature)))
    torch.testing.assert_close(log_gaussian(x, y, temperature=temperature), expected)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 8.0])
@pytest.mark.parametrize("dof", [0.5, 1.0, 5.0, 100.0])
def test_student_t_kernel_equals_the_loop(temperature, dof):
    x, y = points(4, 3), points(5, 3, seed=1)
    expected = by_loop(
        x, y, lambda a, b: math.log((1 + squared_distance(a, b) / (temperature * dof)) ** (-(dof + 1) / 2))
    )
    torch.testing.assert_close(log_student_t(x, y, temperature=temperature, dof=dof), expected)


def test_student_t_of_one_degree_of_freedom_is_the_cauchy_kernel():
    x, y = points(4, 3), points(5, 3, seed=1)
    expected = by_loop(x, y, lambda a, b: -math.log(1 + squared_distance(a, b) / 2.5))
    torch.testing.assert_close(log_student_t(x, y, temperature=2.5, dof=1), expected)


def test_student_t_tends_to_the_gaussian_of_twice_the_temperature():
    x, y = points(6, 3), points(5, 3, seed=1)
    gaussian = log_gaussian(x, y, temperature=2 * 1.7)
    errors = [(log_student_t(x, y, temperature=1.7, dof=dof) - gaussian).abs().max() for dof in (1e2, 1e4, 1e6)]
    assert errors[2] < 1e-4
    assert errors[0] > 50 * errors[1] > 2500 * errors[2], "the error should fall like 1/dof"


def test_log_kernel_does_not_underflow_where_the_kernel_itself_does():
    value = student_t_from_squared_distance(torch.tensor(1e4), temperature=1.0, dof=100.0)
    assert value.exp() == 0
    torch.testing.assert_close(value, torch.tensor(-50.5 * math.log1p(100)))


@pytest.mark.parametrize("name", KERNELS)
def test_kernel_is_symmetric(name):
    x, y = points(6, 4), points(3, 4, seed=1)
    torch.testing.assert_close(KERNELS[name](x, y), KERNELS[name](y, x).T)


@pytest.mark.parametrize("name", KERNELS)
def test_a_point_is_most_similar_to_itself(name):
    x = points(9, 4)
    torch.testing.assert_close(KERNELS[name](x, x).argmax(1), torch.arange(9))


@pytest.mark.parametrize("name", ["gaussian", "student_t"])
def test_distance_kernels_do_not_change_under_shift_and_rotation(name):
    x, y = points(6, 4), points(3, 4, seed=1)
    rotation = torch.linalg.qr(points(4, 4, seed=2)).Q
    torch.testing.assert_close(KERNELS[name](x @ rotation + 5, y @ rotation + 5), KERNELS[name](x, y))


def test_cosine_kernel_does_not_depend_on_lengths():
    x, y = points(6, 4), points(3, 4, seed=1)
    torch.testing.assert_close(KERNELS["cosine"](10 * x, 0.1 * y), KERNELS["cosine"](x, y))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_points_are_computed_in_float32(name, dtype):
    x, y = points(6, 32).to(dtype), points(5, 32, seed=1).to(dtype)
    result = KERNELS[name](x, y)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), KERNELS[name](x.double(), y.double()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", KERNELS)
def test_autocast_does_not_lower_the_precision_of_kernels(name):
    x, y = points(6, 32).float(), points(5, 32, seed=1).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = KERNELS[name](x, y)
    torch.testing.assert_close(result, KERNELS[name](x, y), rtol=0, atol=0)


def test_float64_points_keep_their_precision():
    assert [t.dtype for t in in_float32(points(1, 1), points(1, 1).half())] == [torch.float64, torch.float32]


@pytest.mark.parametrize("value", [0, -1, -0.5, math.inf, math.nan])
@pytest.mark.parametrize("name", ["temperature", "dof"])
def test_check_positive_names_what_is_not_positive_and_finite(name, value):
    with pytest.raises(ValueError, match=name):
        check_positive(**{name: value})


@pytest.mark.parametrize("kernel", [log_cosine, log_gaussian])
def test_kernels_refuse_a_temperature_that_is_not_positive(kernel):
    with pytest.raises(ValueError, match="temperature"):
        kernel(points(2, 2), points(2, 2), temperature=0)


def test_student_t_refuses_degrees_of_freedom_that_are_not_positive():
    with pytest.raises(ValueError, match="dof"):
        log_student_t(points(2, 2), points(2, 2), temperature=1.0, dof=0)
