"""Partition functions in tiles against dense matrices and autograd, in every kernel, range and precision."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hf_dpssl.contrastive import tiles
from hf_dpssl.contrastive.bank_tiles import log_bank_partition
from hf_dpssl.contrastive.losses import info_nce, moco, t_simclr
from hf_dpssl.contrastive.tiles import log_cross_partition, log_partition

KERNELS = ("cosine", "gaussian", "student_t")


def dense(left, right, kernel, exponent):
    squared = (left[:, None] - right).pow(2).sum(-1)
    return {"cosine": left @ right.T, "gaussian": -squared, "student_t": -exponent * torch.log1p(squared)}[kernel]


def points(count, columns, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(count, columns, generator=generator, dtype=torch.float64)).requires_grad_()


@pytest.fixture(params=[(7, 2**27), (7, 0), (640, 2**27)], ids=["kept", "computed twice", "one tile"])
def tiling(request, monkeypatch):
    side, kept = request.param
    monkeypatch.setattr(tiles, "_CPU_TILE", side)
    monkeypatch.setattr(tiles, "_KEPT_BYTES", kept)


@pytest.mark.parametrize("scale", [0.5, 30.0], ids=["sums of kernels", "sums of logarithms"])
@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("kernel", KERNELS)
def test_log_partition_and_gradient_equal_the_dense_matrix(kernel, joint, scale, tiling):
    y, weights = points(23, 5, scale), torch.rand(23, dtype=torch.float64)
    for number in (0.7, 1.0, 3.0, 5.5, 20.0):
        exponent = torch.tensor(number, dtype=torch.float64, requires_grad=True)
        log_k = dense(y, y, kernel, exponent).masked_fill(torch.eye(23, dtype=torch.bool), -math.inf)
        expected = log_k.flatten().logsumexp(0) if joint else (weights * log_k.logsumexp(1)).sum()
        gradients = torch.autograd.grad(expected, (y, exponent), allow_unused=True)
        for learned in (exponent, number):
            value = log_partition(y, kernel=kernel, exponent=learned, joint=joint, weights=weights)
            torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-11)
            inputs = (y, learned) if torch.is_tensor(learned) and kernel == "student_t" else (y,)
            for got, wanted in zip(torch.autograd.grad(value, inputs), gradients, strict=False):
                torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("scale", [0.5, 30.0])
@pytest.mark.parametrize("kernel", KERNELS)
def test_cross_partition_and_gradient_equal_the_dense_matrix(kernel, scale, tiling):
    x, y, exponent = points(13, 4, scale), points(17, 4, scale, seed=1), torch.tensor(2.5, dtype=torch.float64)
    weights, others = torch.rand(13, dtype=torch.float64), torch.rand(17, dtype=torch.float64)
    log_k = dense(x, y, kernel, exponent)
    expected = (weights * log_k.logsumexp(1)).sum() + (others * log_k.logsumexp(0)).sum()
    value = log_cross_partition(x, y, kernel=kernel, exponent=exponent, weights=weights, right_weights=others)
    torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-11)
    for got, wanted in zip(torch.autograd.grad(value, (x, y)), torch.autograd.grad(expected, (x, y)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("scale", "spread"), [*itertools.product((0.3, 50.0), (1.0, 20.0))])
@pytest.mark.parametrize("kernel", KERNELS)
def test_bank_partition_and_gradient_equal_the_dense_matrix(kernel, scale, spread):
    query, bank = points(300, 5, spread), points(2500, 5, spread, seed=1).detach()
    if kernel == "cosine":
        query = F.normalize(query.detach(), dim=1).requires_grad_()
    scale = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    for number in (3.0, 0.7):
        exponent = torch.tensor(number, dtype=torch.float64, requires_grad=True)
        squared = torch.cdist(query, bank, compute_mode="donot_use_mm_for_euclid_dist").pow(2)
        cosine = query @ F.normalize(bank, dim=1).T
        student = -exponent * torch.log1p(scale * squared)
        expected = {"cosine": scale * cosine, "gaussian": -scale * squared, "student_t": student}[kernel].logsumexp(1)
        value = log_bank_partition(query, bank, kernel=kernel, scale=scale, exponent=exponent)
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
        inputs = (query, scale, exponent)[: 3 if kernel == "student_t" else 2]
        upstream = torch.linspace(-1, 1, 300, dtype=torch.float64)
        wanted = torch.autograd.grad(expected, inputs, upstream)
        for one, other in zip(torch.autograd.grad(value, inputs, upstream), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("loss", ["joint", "anchor", "info_nce", "moco student_t", "moco cosine"])
def test_temperature_and_dof_get_their_gradient(loss):
    a, b = points(5, 3).detach(), points(5, 3, seed=1).detach()

    def value(temperature, dof):
        if loss == "info_nce":
            return info_nce(a, b, temperature=temperature) + 0 * dof
        if loss.startswith("moco"):
            return moco(a, b, b.flip(0), kernel=loss.split()[1], temperature=temperature, dof=dof) + 0 * dof
        return t_simclr(a, b, temperature=temperature, dof=dof, normalization=loss)

    for number in (0.3, 4.0, 5.0):
        inputs = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.8, number)]
        assert torch.autograd.gradcheck(value, inputs)


def hard_points() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    cloud = torch.randn(40, 8, generator=generator)
    far = torch.zeros(40, 8)
    far[:, 0] = torch.linspace(0, 1e4, 40)
    return {"cloud": cloud, "coincident": torch.ones(40, 8), "distance 1e4": far, "off the origin": cloud + 100}


@pytest.mark.parametrize("kind", hard_points())
@pytest.mark.parametrize("dof", [1.0, 5.0, 1e3, math.inf])
@pytest.mark.parametrize("normalization", ["joint", "anchor"])
def test_float32_agrees_with_float64_where_sums_of_kernels_would_vanish(kind, dof, normalization):
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


class LargestTensor(TorchDispatchMode):
    """Watches the size of every tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {arg.untyped_storage().data_ptr() for arg in args if torch.is_tensor(arg)}
        if torch.is_tensor(result) and result.untyped_storage().data_ptr() not in given:
            self.elements = max(self.elements, result.untyped_storage().nbytes() // result.element_size())
        return result


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


@pytest.mark.parametrize("loss", [info_nce, moco])
def test_second_derivatives_are_refused_rather_than_wrong(loss):
    a, b = points(6, 2), points(6, 2, seed=1).detach()
    value = loss(a, b, b, temperature=1.0) if loss is moco else loss(a, b, temperature=1.0)
    with pytest.raises(RuntimeError, match="first derivative only"):
        torch.autograd.grad(value, a, create_graph=True)
