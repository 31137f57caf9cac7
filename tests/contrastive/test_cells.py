"""Cells of P x Q x divergence: every named loss is one of them, and all of them train."""

import math

import pytest
import torch

from hf_dpssl import matching
from hf_dpssl.contrastive.losses import clip, info_nce, moco, sne, sup_con, t_simclr, t_sne
from hf_dpssl.contrastive.matching import DIVERGENCES, KERNELS, NORMALIZATIONS, cross_entropy, match, q_similarities

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
    options, queue = {"kernel": kernel, "temperature": 0.7, "dof": 3.0}, points(6, seed=2)

    def cell(query, key):
        mask = torch.cat([torch.eye(3), torch.ones(3, 6)], dim=1).bool()  # no other query's key
        log_q = q_similarities(query, torch.cat([key, queue]), normalization="anchor", mask=mask, **options)
        return match(torch.eye(3, 9), log_q)

    equal(cell, lambda query, key: moco(query, key, queue, **options), points(3), points(3, seed=1))


@pytest.mark.parametrize("kernel", ["cosine", "student_t"])
def test_clip_is_the_mean_of_two_cells(kernel):
    options = {"kernel": kernel, "temperature": 0.7, "dof": 3.0}

    def cell(image, text):
        forth = match(torch.eye(5), q_similarities(image, text, normalization="anchor", **options))
        back = match(torch.eye(5), q_similarities(text, image, normalization="anchor", **options))
        return (forth + back) / 2

    equal(cell, lambda image, text: clip(image, text, **options), points(5), points(5, seed=1))


@pytest.mark.parametrize("kernel", ["cosine", "student_t"])
@pytest.mark.parametrize("labels", [[0, 1, 0, 2, 1, 0], [3, 3, 3, 3, 3, 3], [0, 0, 1, 2, 3, 4]])
def test_sup_con_is_its_cell(kernel, labels):
    options, labels = {"kernel": kernel, "temperature": 0.7, "dof": 3.0}, torch.tensor(labels)
    p = matching.label_similarities(labels, normalization="anchor")

    def cell(z):
        return cross_entropy(p, q_similarities(z, normalization="anchor", **options))

    equal(cell, lambda z: sup_con(z, labels, **options), points(6))


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_sne_is_its_cell(temperature):
    p = matching.gaussian_similarities(points(9), 4.0, normalization="anchor")

    def cell(z):
        return match(p, q_similarities(z, kernel="gaussian", normalization="anchor", temperature=temperature))

    equal(cell, lambda z: sne(p, z, temperature=temperature), points(9, 2, seed=1))


@pytest.mark.parametrize("dof", [1.0, 3.0, math.inf])
def test_t_sne_is_its_cell(dof):
    p = matching.gaussian_similarities(points(9), 4.0, normalization="joint")

    def cell(z):
        return match(p, q_similarities(z, kernel="student_t", normalization="joint", temperature=1.0, dof=dof))

    equal(cell, lambda z: t_sne(p, z, dof=dof), points(9, 2, seed=1))


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
