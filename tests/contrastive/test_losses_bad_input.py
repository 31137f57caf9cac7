"""Losses refuse what they cannot compute, and say what is allowed."""

import math

import pytest
import torch
from test_losses import LOSSES, MOCO, views

from hf_dpssl.contrastive.losses import info_nce, moco, t_simclr


@pytest.mark.parametrize("name", LOSSES)
def test_wrong_views_and_weights_are_refused(name):
    loss, (a, b) = LOSSES[name], views(4, 3)
    for first, second in [(a, b[:3]), (a, b[:, :2]), (a[0], b[0]), (a[None], b[None])]:
        with pytest.raises(ValueError, match=r"\(N, D\)"):
            loss(first, second)
    with pytest.raises(ValueError, match="at least 2 pairs, got 1"):
        loss(a[:1], b[:1])
    with pytest.raises(ValueError, match=r"weights must have shape \(4,\)"):
        loss(a, b, weights=torch.ones(3))
    for weights in ([1, 1, 1, -1], [0, 0, 0, 0], [1, 1, 1, math.nan]):
        with pytest.raises(ValueError, match="non-negative with a positive sum"):
            loss(a, b, weights=torch.tensor(weights))


@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan])
def test_temperature_and_dof_that_are_not_positive_are_refused(value):
    a, b = views(4, 3)
    with pytest.raises(ValueError, match="temperature"):
        info_nce(a, b, temperature=value)
    for name in ("temperature", "dof"):
        if (name, value) == ("dof", math.inf):
            continue  # the Gaussian kernel
        options = {"temperature": 1.0, "dof": 1.0} | {name: value}
        with pytest.raises(ValueError, match=name):
            t_simclr(a, b, **options)
        with pytest.raises(ValueError, match=name):
            moco(a, b, a, kernel="student_t", **options)
    with pytest.raises(ValueError, match="temperature"):
        moco(a, b, a, kernel="cosine", temperature=value)


def test_unknown_kernel_and_normalization_are_refused_with_the_allowed_ones():
    a, b = views(4, 3)
    with pytest.raises(ValueError, match="'joint', 'anchor'.*'row'"):
        t_simclr(a, b, temperature=1.0, dof=1.0, normalization="row")
    with pytest.raises(ValueError, match="'cosine', 'student_t'.*'gaussian'"):
        moco(a, b, a, kernel="gaussian")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", [*LOSSES, *MOCO])
def test_embeddings_that_are_not_finite_are_refused(name, value):
    a, b = views(4, 3)
    a[1, 2] = value
    with pytest.raises(ValueError, match="finite"):
        LOSSES[name](a, b) if name in LOSSES else MOCO[name](a, b, b)


def test_moco_refuses_an_empty_or_trainable_queue_and_unequal_shapes():
    a, b = views(4, 3)
    with pytest.raises(ValueError, match="must not ask for a gradient"):
        moco(a, b, a.clone().requires_grad_())
    with pytest.raises(ValueError, match="at least one negative"):
        moco(a, b, a[:0])
    for query, key, queue in [(a, b[:3], a), (a, b, a[:, :2]), (a[0], b[0], a), (a, b, a[0])]:
        with pytest.raises(ValueError, match=r"query and key must be \(B, D\)"):
            moco(query, key, queue)
