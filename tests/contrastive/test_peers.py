"""The same numbers as other libraries: lightly, tsimcne, pytorch-metric-learning, openTSNE, scikit-learn."""

from functools import partial

import numpy as np
import pytest
import torch
from cases import for_each
from sklearn.manifold._t_sne import _joint_probabilities, _kl_divergence

from hf_dpssl.contrastive.losses import info_nce, sup_con, t_simclr, t_sne
from hf_dpssl.contrastive.matching import (
    cross_entropy,
    gaussian_similarities,
    label_similarities,
    match,
    pair_similarities,
    q_similarities,
)

IN_FLOAT32 = 1e-6  # some of tsimcne's losses compute in float32 whatever they are given


def views(pairs: int = 32, columns: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(pairs, columns, generator=generator)
    return first, first + 0.5 * torch.randn(pairs, columns, generator=generator)


def equal(ours, theirs, tolerance: float = 1e-9) -> None:
    """Value and gradients of two functions of two views agree, computed in float64."""
    results = []
    for function in (ours, theirs):
        leaves = [z.double().requires_grad_() for z in views()]
        value = function(*leaves)
        results.append((value.detach(), *torch.autograd.grad(value, leaves)))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other.to(mine), rtol=tolerance, atol=tolerance)


def cell(kernel: str, **options):
    def function(a, b):
        p = pair_similarities(len(a), normalization="anchor")
        return match(p, q_similarities(torch.cat([a, b]), kernel=kernel, normalization="anchor", **options))

    return function


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_info_nce_equals_ntxentloss_of_lightly(temperature):
    loss = pytest.importorskip("lightly.loss").NTXentLoss(temperature=temperature)
    equal(lambda a, b: info_nce(a, b, temperature=temperature), loss)
    equal(cell("cosine", temperature=temperature), loss)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_info_nce_equals_infoncecosine_of_tsimcne(temperature):
    loss = pytest.importorskip("tsimcne.losses.infonce").InfoNCECosine(temperature=temperature)
    equal(lambda a, b: info_nce(a, b, temperature=temperature), lambda a, b: loss(torch.cat([a, b]))["loss"])


@for_each("temperature, dof", [(0.5, 5), (8.0, 5), (2.0, 1), (1.0, 30)])
def test_t_simclr_per_anchor_equals_infoncet_of_tsimcne(temperature, dof):
    # Its temperature multiplies and its scale is 2 / dof: d^2 / (temperature * dof) needs 1 / (2 temperature).
    infonce = pytest.importorskip("tsimcne.losses.infonce")
    loss = infonce.InfoNCET(dof=dof, temperature=1 / (2 * temperature))
    options = {"temperature": temperature, "dof": float(dof)}
    ours = partial(t_simclr, normalization="anchor", **options)
    equal(ours, lambda a, b: loss(torch.cat([a, b]))["loss"], IN_FLOAT32)
    equal(cell("student_t", **options), lambda a, b: loss(torch.cat([a, b]))["loss"], IN_FLOAT32)


def test_t_simclr_of_dof_1_equals_infoncecauchy_of_tsimcne():
    loss = pytest.importorskip("tsimcne.losses.infonce").InfoNCECauchy()  # log(1 + 2 d^2): our temperature 1/2
    options = {"temperature": 0.5, "dof": 1.0, "normalization": "anchor"}
    equal(partial(t_simclr, **options), lambda a, b: loss(torch.cat([a, b]))["loss"], IN_FLOAT32)


def test_gaussian_cell_equals_infoncegaussian_of_tsimcne():
    # Its temperature multiplies the distance BEFORE the square.
    loss = pytest.importorskip("tsimcne.losses.infonce").InfoNCEGaussian(temperature=0.5)
    equal(cell("gaussian", temperature=4.0), lambda a, b: loss(torch.cat([a, b]))["loss"])


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_info_nce_equals_ntxentloss_of_pytorch_metric_learning(temperature):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    theirs = losses.SelfSupervisedLoss(losses.NTXentLoss(temperature=temperature))
    equal(lambda a, b: info_nce(a, b, temperature=temperature), theirs)


@pytest.mark.parametrize("labels", [[0, 1, 0, 2, 1, 0, 2, 2], [0, 0, 0, 0, 1, 1, 1, 1]])
def test_sup_con_and_its_cell_equal_supconloss_of_pytorch_metric_learning(labels):
    theirs = pytest.importorskip("pytorch_metric_learning.losses").SupConLoss(temperature=0.2)
    labels = torch.tensor(labels * 8)

    def cell(a, b):
        log_q = q_similarities(torch.cat([a, b]), kernel="cosine", normalization="anchor", temperature=0.2)
        return cross_entropy(label_similarities(labels, normalization="anchor"), log_q)

    equal(cell, lambda a, b: theirs(torch.cat([a, b]), labels))
    loss = lambda a, b: sup_con(torch.cat([a, b]), labels, temperature=0.2)  # noqa: E731
    equal(loss, lambda a, b: theirs(torch.cat([a, b]), labels))


def t_sne_cell(p, z):
    return match(p, q_similarities(z, kernel="student_t", normalization="joint", temperature=1.0, dof=1.0))


@pytest.mark.parametrize("loss", [t_sne, t_sne_cell])
def test_t_sne_and_its_cell_equal_value_and_gradient_of_scikit_learn(loss):
    points = torch.cat(views()).double()
    squared = torch.cdist(points, points).square().numpy().astype(np.float32)
    condensed = _joint_probabilities(squared, 10.0, 0)
    condensed = condensed.astype(np.float64) / condensed.sum() / 2  # each pair once, the matrix sums to 1
    p = torch.zeros(64, 64, dtype=torch.float64)
    p[tuple(torch.triu_indices(64, 64, 1))] = torch.from_numpy(condensed)
    p = p + p.T
    ours = gaussian_similarities(points, 10.0, normalization="joint")
    torch.testing.assert_close(ours, p, rtol=2e-3, atol=1e-7)  # its bisection stops at 1e-5 of the entropy
    z = (0.1 * points[:, :2]).clone().requires_grad_()
    ours = loss(p, z)
    ours.backward()
    value, gradient = _kl_divergence(z.detach().numpy().ravel(), condensed, 1, 64, 2)
    assert abs(float(ours.detach()) - value) < 1e-6
    torch.testing.assert_close(z.grad.flatten(), torch.from_numpy(gradient), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("loss", [t_sne, t_sne_cell])
def test_t_sne_and_its_cell_equal_value_and_gradient_of_open_tsne(loss):
    open_tsne = pytest.importorskip("openTSNE.tsne")
    affinity = pytest.importorskip("openTSNE.affinity")
    points = torch.cat(views()).double()
    p = affinity.PerplexityBasedNN(points.numpy(), 20.99, method="exact", n_jobs=1, k_neighbors=63).P
    z = (0.1 * points[:, :2]).clone().requires_grad_()
    ours = loss(gaussian_similarities(points, 20.99, normalization="joint"), z)
    ours.backward()
    embedding = z.detach().numpy().copy()
    value, gradient = open_tsne.kl_divergence_bh(
        embedding, p, dof=1, bh_params={"theta": 0.0}, fft_params={}, should_eval_error=True, n_jobs=1
    )
    assert abs(float(ours.detach()) - value) < 1e-6
    torch.testing.assert_close(z.grad, 4 * torch.from_numpy(gradient), rtol=1e-6, atol=1e-8)  # it leaves out the 4
