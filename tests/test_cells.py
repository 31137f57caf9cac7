"""Cells of P x Q x divergence: every named loss is one of them, and all of them train."""

import math

import pytest
import torch

from hf_dpssl import matching
from hf_dpssl.losses import info_nce, moco, t_simclr
from hf_dpssl.matching import DIVERGENCES, KERNELS, NORMALIZATIONS, cross_entropy, match, q_similarities

RING = torch.stack([torch.arange(5).mul(2 * math.pi / 5).cos(), torch.arange(5).mul(2 * math.pi / 5).sin()], dim=1)


def points(rows: int, columns: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def equal(cell, loss, *embeddings: torch.Tensor) -> None:
    """The cell and the named loss agree in value and gradient to 1e-9."""
    results = []
    for function in (cell, loss):
        leaves = [z.clone().requires_grad_() for z in embeddings]
        value = function(*leaves)
        results.append((value.detach(), *torch.autograd.grad(value, leaves)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def pair_cell(kernel: str, normalization: str, weights=None, function=match, **options):
    def cell(a, b):
        p = matching.pair_similarities(len(a), normalization=normalization, weights=weights)
        z = torch.cat([a, b])
        return function(p, q_similarities(z, kernel=kernel, normalization=normalization, **options))

    return cell


@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 0.0, 2.0, 7.0, 0.5])])
def test_pair_losses_are_their_cells(weights):
    a, b = points(5), points(5, seed=1)
    cell = pair_cell("cosine", "anchor", weights, temperature=0.3)
    equal(cell, lambda a, b: info_nce(a, b, temperature=0.3, weights=weights), a, b)
    student = {"temperature": 2.0, "dof": 3.0}
    for normalization, function in [("anchor", match), ("joint", cross_entropy)]:
        cell = pair_cell("student_t", normalization, weights, function, **student)
        loss = {"normalization": normalization, "weights": weights} | student
        equal(cell, lambda a, b, loss=loss: t_simclr(a, b, **loss), a, b)


def test_info_nce_weighed_by_overlap_of_crops_is_the_cell_of_iou_similarities():
    corners = torch.rand(2, 5, 2, generator=torch.Generator().manual_seed(0))
    boxes_1, boxes_2 = torch.cat([corners / 2, corners / 2 + 0.4], dim=2)
    weights = matching.iou_weights(boxes_1, boxes_2, temperature=0.5)

    def cell(a, b):
        p = matching.iou_similarities(boxes_1, boxes_2, temperature=0.5, normalization="anchor")
        return match(p, q_similarities(torch.cat([a, b]), kernel="cosine", normalization="anchor", temperature=0.3))

    equal(cell, lambda a, b: info_nce(a, b, temperature=0.3, weights=weights), points(5), points(5, seed=1))


@pytest.mark.parametrize("kernel", ["cosine", "student_t"])
def test_moco_is_its_cell(kernel):
    options = {"kernel": kernel, "temperature": 0.7, "dof": 3.0}

    def cell(query, key, queue):
        mask = torch.cat([torch.eye(3), torch.ones(3, 6)], dim=1).bool()  # no other query's key
        log_q = q_similarities(query, torch.cat([key, queue]), normalization="anchor", mask=mask, **options)
        return match(torch.eye(3, 9), log_q)

    loss = lambda query, key, queue: moco(query, key, queue, **options)  # noqa: E731
    equal(cell, loss, points(3), points(3, seed=1), points(6, seed=2))


def mixture(size: int, std: float = 0.1) -> torch.Tensor:
    return RING[torch.arange(size) % 5] + std * torch.randn(size, 2, generator=torch.Generator().manual_seed(0))


def boxes(size: int, seed: int) -> torch.Tensor:
    corner = torch.rand(size, 2, generator=torch.Generator().manual_seed(seed)) / 2
    return torch.cat([corner, corner + 0.4], dim=1)


X = mixture(250)
BUILDERS = {
    "gaussian": lambda n: matching.gaussian_similarities(X, 30.0, normalization=n),
    "pairs": lambda n: matching.pair_similarities(125, normalization=n),
    "iou": lambda n: matching.iou_similarities(boxes(125, 0), boxes(125, 1), temperature=0.5, normalization=n),
    "mixup": lambda n: matching.mixup_similarities(X, ratio=0.3, components=RING, component_std=0.1, normalization=n),
    "noise": lambda n: matching.noise_similarities(X, noise_std=0.1, data=X, normalization=n),
    "labels": lambda n: matching.label_similarities(torch.arange(250) % 5, normalization=n),
    "matrix": lambda n: matching.normalize_similarities(1 / (1 + torch.cdist(X, X)), normalization=n),
}


@pytest.mark.parametrize("steps", [3, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("name", BUILDERS)
def test_every_cell_of_this_p_trains_on_the_mixture(name, normalization, steps):
    p = BUILDERS[name](normalization)
    for kernel in KERNELS:
        for divergence in DIVERGENCES:
            smoothing = 0.05 if divergence == "reverse_kl" else 0.0
            start = 0.3 * torch.randn(250, 2, generator=torch.Generator().manual_seed(1))
            z = torch.nn.Parameter(start.clone())
            optimizer, values = torch.optim.Adam([z], lr=0.02), []
            for _ in range(steps + 1):
                log_q = q_similarities(z, kernel=kernel, normalization=normalization, temperature=0.5, dof=3.0)
                loss = match(p, log_q, divergence, smoothing=smoothing)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                values.append(loss.item())
            cell = f"{name}, {kernel}, {normalization}, {divergence}: {values}"
            assert all(math.isfinite(v) and v >= -1e-6 for v in values) and z.isfinite().all(), cell
            assert values[-1] < values[0], cell
