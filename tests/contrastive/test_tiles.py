"""Partition functions in tiles against dense matrices and autograd, in every kernel, range and precision."""

import math

import loops
import pytest
import torch
from cases import for_each
from largest_tensor import LargestTensor
from loops import points

from hf_dpssl.contrastive import tiles
from hf_dpssl.contrastive.kernels import KERNELS, Kernel
from hf_dpssl.contrastive.losses import info_nce, moco, t_simclr
from hf_dpssl.contrastive.tiles import log_bank_partition, log_cross_partition, log_partition

# Scales of the kernel at which sums of kernels stay in range, and at which they run over logarithms.
NARROW, WIDE = 0.25, 900.0


def number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def dense(left, right, kernel: Kernel) -> torch.Tensor:
    """Log-similarities as a matrix, by autograd of the definitions."""
    squared = (left[:, None] - right).pow(2).sum(-1)
    cosine = torch.nn.functional.cosine_similarity(left[:, None], right, dim=-1)
    return {
        "cosine": kernel.scale * cosine,
        "gaussian": -kernel.scale * squared,
        "student_t": -kernel.exponent * torch.log1p(kernel.scale * squared),
    }[kernel.form]


def assert_same(value, expected, inputs, rtol=1e-9, atol=1e-10, upstream=None) -> None:
    """Equal values and gradients by all inputs that the kernel has."""
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    found = torch.autograd.grad(value, inputs, upstream)
    for one, other in zip(found, torch.autograd.grad(expected, inputs, upstream), strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


@pytest.fixture(params=[(7, 2**27), (7, 0), (640, 2**27)], ids=["kept", "computed twice", "one tile"])
def tiling(request, monkeypatch):
    side, kept = request.param
    monkeypatch.setattr(tiles, "_CPU_TILE", side)
    monkeypatch.setattr(tiles, "_KEPT_BYTES", kept)


@for_each("form", KERNELS)
def test_log_partition_and_gradient_equal_the_dense_matrix(form, tiling):
    x, weights = points(23, 5).requires_grad_(), torch.rand(23, dtype=torch.float64)
    diagonal = torch.eye(23, dtype=torch.bool)
    for value in (NARROW, WIDE):
        for exponent in (0.7, 1.0, 3.0, 5.5, 20.0) if form == "student_t" else (1.0,):
            learned = Kernel(form, number(value), number(exponent))
            log_k = dense(x, x, learned).masked_fill(diagonal, -math.inf)
            inputs = (x, learned.scale, learned.exponent)[: 3 if form == "student_t" else 2]
            for joint in (True, False):
                expected = log_k.flatten().logsumexp(0) if joint else (weights * log_k.logsumexp(1)).sum()
                found = log_partition(x, learned, joint=joint, weights=weights)
                (gradient,) = torch.autograd.grad(expected, x, retain_graph=True)
                given = log_partition(x, Kernel(form, value, exponent), joint=joint, weights=weights)
                torch.testing.assert_close(torch.autograd.grad(given, x)[0], gradient, rtol=1e-9, atol=1e-10)
                torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
                wanted = torch.autograd.grad(expected, inputs, retain_graph=True)
                for one, other in zip(torch.autograd.grad(found, inputs), wanted, strict=True):
                    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@for_each("form", KERNELS)
def test_cross_partition_and_gradient_equal_the_dense_matrix(form, tiling):
    x, y = points(13, 4).requires_grad_(), points(17, 4, seed=1).requires_grad_()
    weights, others = torch.rand(13, dtype=torch.float64), torch.rand(17, dtype=torch.float64)
    for value in (NARROW, WIDE):
        kernel = Kernel(form, number(value), 2.5)
        log_k = dense(x, y, kernel)
        expected = (weights * log_k.logsumexp(1)).sum() + (others * log_k.logsumexp(0)).sum()
        found = log_cross_partition(x, y, kernel, weights=weights, right_weights=others)
        assert_same(found, expected, (x, y, kernel.scale))


@for_each("form", KERNELS)
def test_bank_partition_and_gradient_equal_the_dense_matrix(form):
    upstream = torch.linspace(-1, 1, 300, dtype=torch.float64)
    for spread in (1.0, 20.0):
        query, bank = points(300, 5, scale=spread).requires_grad_(), points(2500, 5, seed=1, scale=spread)
        for value, exponent in ((0.3, 3.0), (50.0, 0.7)):
            kernel = Kernel(form, number(value), number(exponent))
            inputs = (query, kernel.scale, kernel.exponent)[: 3 if form == "student_t" else 2]
            expected = dense(query, bank, kernel).logsumexp(1)
            assert_same(log_bank_partition(query, bank, kernel), expected, inputs, 1e-8, 1e-9, upstream)


def test_temperature_and_dof_get_their_gradient():
    a, b = loops.views(5)
    inputs = [number(0.8), number(4.0)]

    def moco_of(kernel):
        return lambda temperature, dof: moco(a, b, b.flip(0), kernel=kernel, temperature=temperature, dof=dof) + 0 * dof

    assert torch.autograd.gradcheck(lambda temperature, dof: info_nce(a, b, temperature=temperature) + 0 * dof, inputs)
    for kernel in ("cosine", "student_t"):
        assert torch.autograd.gradcheck(moco_of(kernel), inputs)
    for normalization in ("joint", "anchor"):
        for dof in (0.3, 4.0, 5.0):
            assert torch.autograd.gradcheck(
                lambda temperature, dof, n=normalization: t_simclr(
                    a, b, temperature=temperature, dof=dof, normalization=n
                ),
                [number(0.8), number(dof)],
            )


def hard_points() -> dict[str, torch.Tensor]:
    cloud = points(40, 8).float()
    far = torch.zeros(40, 8)
    far[:, 0] = torch.linspace(0, 1e4, 40)
    return {"cloud": cloud, "coincident": torch.ones(40, 8), "distance 1e4": far, "off the origin": cloud + 100}


@for_each("kind", hard_points())
def test_float32_agrees_with_float64_where_sums_of_kernels_would_vanish(kind):
    for normalization in ("joint", "anchor"):
        for dof in (1.0, 5.0, 1e3, math.inf):
            results = []
            for dtype in (torch.float32, torch.float64):
                z = hard_points()[kind].to(dtype).requires_grad_()
                value = t_simclr(*z.chunk(2), temperature=2.0, dof=dof, normalization=normalization)
                value.backward()
                results.append((value.detach().double(), z.grad.double()))
            (value, gradient), (exact, exact_gradient) = results
            assert value.isfinite() and gradient.isfinite().all()
            torch.testing.assert_close(value, exact, rtol=1e-4, atol=1e-4)
            # At 1e4 a rounding of the points themselves moves a near-Gaussian kernel by some per cent.
            share = 5e-3 if kind == "distance 1e4" and dof >= 1e3 else 1e-4
            largest = float(exact_gradient.abs().max())
            torch.testing.assert_close(gradient, exact_gradient, rtol=1e-3, atol=share * largest + 1e-9)


def test_no_tensor_grows_with_the_square_of_the_batch(monkeypatch):
    monkeypatch.setattr(tiles, "_CPU_TILE", 64)
    views = torch.randn(2, 600, 4, requires_grad=True)
    allowed = 3 * 64**2  # work space; the extended points need less, 1,200 x 1,200 similarities 117 times as much
    for loss in (
        lambda: info_nce(*views, temperature=0.5),
        lambda: t_simclr(*views, temperature=8.0, dof=5.0),
        lambda: t_simclr(*views, temperature=8.0, dof=5.0, normalization="anchor"),
        lambda: t_simclr(100 * views[0], views[1], temperature=0.1, dof=500.0),
    ):
        with LargestTensor() as largest:
            loss().backward()
        assert 0 < largest.elements <= allowed


def test_bank_is_not_copied():
    query, key, queue = torch.randn(8, 4, requires_grad=True), torch.randn(8, 4), torch.randn(20_000, 4)
    for kernel in ("cosine", "student_t"):
        with LargestTensor() as largest:
            moco(query, key, queue, kernel=kernel, temperature=1.0).backward()
        assert 0 < largest.elements <= 1024 * 8, "a chunk of the queue, not the queue"


def test_second_derivatives_are_refused_rather_than_wrong():
    a, b = loops.views(6)
    a.requires_grad_()
    for value in (info_nce(a, b, temperature=1.0), moco(a, b, b, temperature=1.0)):
        with pytest.raises(RuntimeError, match="first derivative only"):
            torch.autograd.grad(value, a, create_graph=True)
