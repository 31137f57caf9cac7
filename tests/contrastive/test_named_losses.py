"""CLIP, supervised contrastive, SNE, t-SNE, alignment and uniformity against loops from their papers' formulas."""

import math

import pytest
import torch
from sklearn.manifold._t_sne import _joint_probabilities, _kl_divergence
from test_losses import close, exp_cosine, gaussian, student_t, views

from hf_dpssl.contrastive.losses import alignment, clip, info_nce, sne, sup_con, t_simclr, t_sne, uniformity

KERNELS = {
    "cosine": (lambda x, y: exp_cosine(x, y, 0.7), {"kernel": "cosine"}),
    "student_t": (lambda x, y: student_t(x, y, 0.7, 3.0), {"kernel": "student_t", "dof": 3.0}),
    "gaussian": (lambda x, y: gaussian(x, y, 2 * 0.7), {"kernel": "student_t", "dof": math.inf}),
}


@pytest.mark.parametrize("name", KERNELS)
def test_clip_equals_loop_form_oracle(name):
    kernel, options = KERNELS[name]
    image, text = views(6, 3)
    x, y, total = image.tolist(), text.tolist(), 0.0
    for i in range(6):
        total -= math.log(kernel(x[i], y[i]) / sum(kernel(x[i], other) for other in y)) / 12
        total -= math.log(kernel(x[i], y[i]) / sum(kernel(other, y[i]) for other in x)) / 12
    assert close(clip(image, text, temperature=0.7, **options), total)
    assert close(clip(image[:1].expand(6, 3), image[:1].expand(6, 3), temperature=0.7, **options), math.log(6))


@pytest.mark.parametrize("name", KERNELS)
def test_sup_con_equals_loop_form_oracle_and_skips_lonely_anchors(name):
    kernel, options = KERNELS[name]
    x, labels = views(8, 3)[0], torch.tensor([0, 1, 0, 2, 1, 1, 0, 3])
    rows, terms = x.tolist(), []
    for i in range(8):
        positives = [p for p in range(8) if p != i and labels[p] == labels[i]]
        if positives:
            denominator = sum(kernel(rows[i], rows[a]) for a in range(8) if a != i)
            terms.append(-sum(math.log(kernel(rows[i], rows[p]) / denominator) for p in positives) / len(positives))
    assert close(sup_con(x, labels, temperature=0.7, **options), sum(terms) / len(terms))


def test_sup_con_of_one_positive_each_is_the_contrastive_loss():
    a, b = views(5, 3)
    z, labels = torch.cat([a, b]), torch.arange(5).repeat(2)
    torch.testing.assert_close(sup_con(z, labels, temperature=0.5), info_nce(a, b, temperature=0.5))
    expected = t_simclr(a, b, temperature=0.5, dof=2.0, normalization="anchor")
    torch.testing.assert_close(sup_con(z, labels, temperature=0.5, kernel="student_t", dof=2.0), expected)


def test_sne_equals_loop_form_oracle():
    y, p = views(6, 2)[0], torch.rand(6, 6, dtype=torch.float64).fill_diagonal_(0)
    p[0, 1] = 0
    p = p / p.sum(1, keepdim=True)
    rows, total = y.tolist(), 0.0
    for i in range(6):
        denominator = sum(gaussian(rows[i], rows[k], 1.5) for k in range(6) if k != i)
        for j in range(6):
            if p[i, j] > 0:
                q = gaussian(rows[i], rows[j], 1.5) / denominator
                total += float(p[i, j]) * math.log(float(p[i, j]) / q) / 6
    assert close(sne(p, y, temperature=1.5), total)


@pytest.mark.parametrize("dof", [1.0, 2.0, 7.0])
def test_t_sne_equals_scikit_learns_objective_and_gradient(dof):
    x, y = views(20, 6)[0], views(20, 2, seed=3)[0].requires_grad_()
    condensed = _joint_probabilities(torch.cdist(x, x).pow(2).numpy().astype("float32"), 5.0, 0)
    rows, columns = torch.triu_indices(20, 20, offset=1)
    p = torch.zeros(20, 20, dtype=torch.float64)
    p[rows, columns] = p[columns, rows] = torch.from_numpy(condensed).double()
    kl, gradient = _kl_divergence(y.detach().numpy().ravel(), condensed, dof, 20, 2)
    loss = t_sne(p, y, dof=dof)
    loss.backward()
    assert close(loss.detach(), kl, 1e-6)
    if dof == 1:  # the only one for which scikit-learn's gradient is that of its objective
        torch.testing.assert_close(y.grad.flatten(), torch.from_numpy(gradient), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("loss", [sne, t_sne])
def test_neighbour_embedding_gradient_equals_finite_differences(loss):
    y, p = views(5, 2)[0].requires_grad_(), torch.rand(5, 5, dtype=torch.float64).fill_diagonal_(0)
    p = p / (p.sum(1, keepdim=True) if loss is sne else p.sum())
    assert torch.autograd.gradcheck(lambda z: loss(p, z), (y,))


def test_neighbour_embedding_of_its_own_similarities_is_zero():
    y = views(9, 2)[0]
    kernel = torch.exp(-torch.cdist(y, y).pow(2)).fill_diagonal_(0)
    assert close(sne(kernel / kernel.sum(1, keepdim=True), y), 0.0, 1e-12)
    kernel = (1 / (1 + torch.cdist(y, y).pow(2))).fill_diagonal_(0)
    assert close(t_sne(kernel / kernel.sum(), y), 0.0, 1e-12)


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_alignment_equals_loop_form_oracle(alpha):
    a, b = views(6, 3)
    unit = [[[v / math.hypot(*row) for v in row] for row in part.tolist()] for part in (a, b)]
    expected = sum(math.dist(p, q) ** alpha for p, q in zip(*unit, strict=True)) / 6
    assert close(alignment(a, b, alpha=alpha), expected)
    assert close(alignment(a, -a, alpha=alpha), 2**alpha) and close(alignment(a, 3 * a), 0.0)


def test_uniformity_equals_loop_form_oracle_and_its_bounds():
    x = views(7, 3)[0]
    unit = [[v / math.hypot(*row) for v in row] for row in x.tolist()]
    values = [math.exp(-2 * math.dist(unit[i], unit[j]) ** 2) for i in range(7) for j in range(i)]
    assert close(uniformity(x), math.log(sum(values) / len(values)))
    assert close(uniformity(x[:1].expand(7, 3)), 0.0, 1e-9)
    assert close(uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64), t=3.0), -12.0)


def test_bad_input_is_refused_with_what_is_allowed():
    a, b = views(4, 3)
    with pytest.raises(ValueError, match="'cosine', 'student_t'.*'gaussian'"):
        clip(a, b, temperature=1.0, kernel="gaussian")
    with pytest.raises(ValueError, match="no class twice"):
        sup_con(a, torch.arange(4), temperature=1.0)
    with pytest.raises(ValueError, match=r"labels \(N,\)"):
        sup_con(a, torch.arange(3), temperature=1.0)
    with pytest.raises(ValueError, match="sum to 1 in every row"):
        sne(torch.ones(4, 4).fill_diagonal_(0), a)
    with pytest.raises(ValueError, match="sum to 1 over all pairs"):
        t_sne(torch.ones(4, 4).fill_diagonal_(0), a)
    with pytest.raises(ValueError, match="diagonal of 0"):
        t_sne(torch.full((4, 4), 1 / 16), a)
    for call in (lambda: alignment(a, b, alpha=0), lambda: uniformity(a, t=-1.0), lambda: uniformity(a[:1])):
        with pytest.raises(ValueError):
            call()
