"""Similarities P against scikit-learn, openTSNE, torchvision, loops and integrals; perplexity by bisection."""

import itertools
import math

import numpy as np
import pytest
import torch
import torchvision
from cases import for_each
from loops import points
from sklearn.manifold._utils import _binary_search_perplexity

from hf_dpssl.contrastive.matching import (
    NORMALIZATIONS,
    box_iou,
    gaussian_similarities,
    iou_similarities,
    iou_weights,
    label_similarities,
    mixup_similarities,
    noise_similarities,
    normalize_similarities,
    pair_similarities,
)
from hf_dpssl.contrastive.similarities import perplexity_temperatures
from hf_dpssl.data.views import NATURAL, crop_boxes

LABELS = torch.tensor([0, 1, 0, 2, 1, 0])


def boxes(rows: int, seed: int = 0) -> torch.Tensor:
    corners = torch.rand(rows, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.cat([corners.amin(1), corners.amax(1)], dim=1)


BUILDERS = {
    "gaussian": lambda n: gaussian_similarities(points(6), 3.0, normalization=n),
    "pairs": lambda n: pair_similarities(3, normalization=n, weights=torch.tensor([1.0, 2.0, 3.0])),
    "iou": lambda n: iou_similarities(boxes(3), boxes(3, seed=1), temperature=0.5, normalization=n),
    "mixup": lambda n: mixup_similarities(
        points(6), ratio=0.4, components=points(4, seed=1), component_std=0.5, normalization=n
    ),
    "noise": lambda n: noise_similarities(points(6), noise_std=0.7, normalization=n),
    "noise of data": lambda n: noise_similarities(points(6), noise_std=0.7, data=points(9), normalization=n),
    "labels": lambda n: label_similarities(LABELS, normalization=n),
    "matrix": lambda n: normalize_similarities(points(6, 6).exp(), normalization=n),
}


@for_each("name", BUILDERS)
def test_similarities_are_distributions_over_other_points(name):
    joint, anchor = (BUILDERS[name](normalization) for normalization in NORMALIZATIONS)
    for p in (joint, anchor):
        assert p.shape == (6, 6) and p.dtype == torch.float64 and (p >= 0).all() and (p.diagonal() == 0).all()
    assert math.isclose(joint.sum(), 1, rel_tol=1e-12)
    sums = {"pairs": [0.5, 1, 1.5] * 2, "labels": [1, 1, 1, 0, 1, 1]}.get(name, [1] * 6)
    if name == "iou":
        sums = iou_weights(boxes(3), boxes(3, seed=1), temperature=0.5).repeat(2).tolist()
    torch.testing.assert_close(anchor.sum(1), torch.tensor(sums, dtype=torch.float64), rtol=1e-12, atol=0)
    if name != "matrix":
        torch.testing.assert_close(joint, joint.T, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="'joint', 'anchor'.*'row'"):
        BUILDERS[name]("row")


def test_bisection_meets_the_perplexity_to_1e_10():
    for scale in (1e-6, 1.0, 1e6):
        x = scale * points(50) * torch.logspace(-2, 2, 50, dtype=torch.float64)[:, None]  # dense and sparse regions
        distances = torch.cdist(x, x).square().fill_diagonal_(math.inf)
        for perplexity in (1.001, 2.0, 7.5, 30.0, 48.9):
            p = (-distances / perplexity_temperatures(distances, perplexity)[:, None]).softmax(1)
            reached = [math.exp(-sum(v * math.log(v) for v in row if v > 0)) for row in p.tolist()]
            assert max(abs(value - perplexity) for value in reached) < 1e-10 * perplexity


def test_conditional_similarities_equal_those_of_scikit_learn():
    x = points(60, 5)
    squared = torch.cdist(x, x).square().numpy().astype(np.float32)
    theirs = torch.from_numpy(np.asarray(_binary_search_perplexity(squared, 12.0, 0))).double()
    ours = gaussian_similarities(x, 12.0, normalization="anchor")
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)  # theirs: entropy within 1e-5


def test_similarities_equal_those_of_open_tsne():
    affinity = pytest.importorskip("openTSNE.affinity")
    x = points(60, 5)
    theirs = affinity.PerplexityBasedNN(x.numpy(), 19.7, method="exact", n_jobs=1, k_neighbors=59)
    joint = torch.from_numpy(theirs.P.toarray())
    torch.testing.assert_close(gaussian_similarities(x, 19.7, normalization="joint"), joint, rtol=1e-6, atol=1e-12)


def test_duplicate_points_share_their_probability():
    x = points(10).repeat(3, 1)
    p = gaussian_similarities(x, 4.0, normalization="anchor")
    torch.testing.assert_close(p[0, 10], p[0, 20], rtol=1e-12, atol=0)
    assert p[0, 10] > p[0, 1:10].max()


def test_perplexity_that_cannot_be_met_is_refused():
    x = points(10)
    for perplexity in (1.0, 0.5, 9.0, 20.0, math.nan):
        with pytest.raises(ValueError, match=r"perplexity must lie in \(1, 9\)"):
            gaussian_similarities(x, perplexity, normalization="joint")
    with pytest.raises(ValueError, match="row 0 has 4 nearest points at one distance.*duplicate"):
        gaussian_similarities(x[:2].repeat(5, 1), 4.0, normalization="joint")
    with pytest.raises(ValueError, match="without NaN"):
        perplexity_temperatures(torch.full((3, 3), math.nan), 1.5)


def test_pair_similarities_equal_the_loop():
    for weights, relative in [(None, [1.0] * 3), (torch.tensor([1.0, 5.0, 3.0]), [1 / 3, 5 / 3, 1.0])]:
        expected = torch.zeros(6, 6, dtype=torch.float64)
        for i, weight in enumerate(relative):
            expected[i, i + 3] = weight
            expected[i + 3, i] = weight
        torch.testing.assert_close(pair_similarities(3, normalization="anchor", weights=weights), expected)
        torch.testing.assert_close(pair_similarities(3, normalization="joint", weights=weights), expected / 6)


def test_box_iou_equals_torchvision_and_known_values():
    a, b = boxes(50), boxes(50, seed=1)
    torch.testing.assert_close(box_iou(a, b), torchvision.ops.box_iou(a, b).diagonal())
    unit = torch.tensor([[0.0, 0, 1, 1]])
    for other, expected in [([0, 0, 1, 1], 1), ([0.5, 0, 1.5, 1], 1 / 3), ([1, 0, 2, 1], 0), ([2, 2, 3, 3], 0)]:
        assert math.isclose(box_iou(unit, torch.tensor([other], dtype=torch.float32)), expected)


def test_crop_boxes_of_two_views_can_be_weighed():
    views = [crop_boxes(NATURAL, torch.rand(40, 4, generator=torch.Generator().manual_seed(seed))) for seed in (0, 1)]
    overlap = box_iou(*views)
    assert (overlap >= 0).all() and (overlap < 1).all() and overlap.std() > 0.05
    torch.testing.assert_close(box_iou(views[0], views[0]), torch.ones(40, dtype=torch.float64))


def test_iou_weights_are_proportional_to_the_exponential_and_flatten_with_temperature():
    a, b = boxes(8), boxes(8, seed=1)
    weights = iou_weights(a, b, temperature=0.2)
    ratio = weights / (box_iou(a, b) / 0.2).exp()
    torch.testing.assert_close(ratio, ratio[:1].expand(8))
    assert math.isclose(weights.mean(), 1)
    torch.testing.assert_close(iou_weights(a, b, temperature=1e9), torch.ones(8, dtype=torch.float64))
    assert iou_weights(a, b, temperature=1e-4).isfinite().all(), "exp(1 / temperature) itself would overflow"


def test_mixup_similarities_are_the_density_of_simulated_mixup():
    """Views are mixed as a training loop mixes them; their differences are counted in small boxes round x - y."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [1.0, 0.2], [0.3, 1.1]], dtype=torch.float64)
    x = torch.tensor([[0.0, 0.0], [0.3, 0.1], [0.1, 0.45], [0.55, 0.5]], dtype=torch.float64)
    ratio, std, count, half = 0.5, 0.3, 1_000_000, 0.06

    def draw() -> torch.Tensor:
        which = torch.randint(3, (count,), generator=generator)
        return centres[which] + std * torch.randn(count, 2, generator=generator, dtype=torch.float64)

    original = draw()
    views = [(1 - ratio) * original + ratio * draw() for _ in range(2)]
    difference = views[0] - views[1]
    counts = torch.zeros(4, 4, dtype=torch.float64)
    for i, j in itertools.permutations(range(4), 2):
        counts[i, j] = ((difference - (x[i] - x[j])).abs() < half).all(1).sum()
    assert counts[counts > 0].min() > 1500, "the counting error is below 3 %"
    options = {"ratio": ratio, "components": centres, "component_std": std}
    found = mixup_similarities(x, normalization="joint", **options)
    torch.testing.assert_close(found, counts / counts.sum(), rtol=0.1, atol=0)
    found = mixup_similarities(x, normalization="anchor", **options)
    torch.testing.assert_close(found, counts / counts.sum(1, keepdim=True), rtol=0.1, atol=0)


def test_sampled_mixup_converges_to_the_closed_form():
    options = {"ratio": 0.4, "components": points(25, 2, seed=1), "component_std": 0.5, "normalization": "joint"}
    exact = mixup_similarities(points(8, 2), **options)
    errors = []
    for samples in (20, 600):  # of 625
        draws = [
            mixup_similarities(points(8, 2), samples=samples, generator=torch.Generator().manual_seed(seed), **options)
            for seed in range(8)
        ]
        errors.append(sum((p - exact).abs().sum() for p in draws) / 8)
        torch.testing.assert_close(draws[0], draws[0].T)
    assert errors[1] < 0.4 * errors[0] and errors[1] < 0.1


def test_label_similarities_equal_the_loop():
    expected = torch.zeros(6, 6, dtype=torch.float64)
    for i, j in [(0, 2), (0, 5), (2, 0), (2, 5), (5, 0), (5, 2)]:
        expected[i, j] = 1 / 2
    expected[1, 4] = expected[4, 1] = 1.0
    torch.testing.assert_close(label_similarities(LABELS, normalization="anchor"), expected)
    torch.testing.assert_close(label_similarities(LABELS, normalization="joint"), expected / 5)


def test_far_points_keep_a_conditional_distribution():
    x = torch.tensor([[0.0], [1.0], [1e4], [1e4 + 2]])
    for data in (None, x):
        p = noise_similarities(x, noise_std=0.1, normalization="anchor", data=data)
        assert p.isfinite().all()
        torch.testing.assert_close(p.sum(1), torch.ones(4, dtype=torch.float64))


def test_matrix_of_a_user_keeps_its_ratios_and_loses_diagonal_and_masked_pairs():
    matrix = torch.tensor([[9.0, 1, 3], [2, 9, 0], [4, 4, 9]])
    p = normalize_similarities(matrix, normalization="joint")
    torch.testing.assert_close(p, torch.tensor([[0.0, 1, 3], [2, 0, 0], [4, 4, 0]], dtype=torch.float64) / 14)
    mask = torch.tensor([[True, False, True], [False, True, True], [True, True, True]])
    p = normalize_similarities(matrix, normalization="anchor", mask=mask)
    torch.testing.assert_close(p, torch.tensor([[0, 0, 1], [0, 0, 0], [0.5, 0.5, 0]], dtype=torch.float64))
    huge = normalize_similarities(matrix.double() * 1e307, normalization="joint")
    torch.testing.assert_close(huge, normalize_similarities(matrix, normalization="joint"))


def test_bad_input_is_refused_with_the_reason():
    for call, message in [
        (lambda: normalize_similarities(torch.ones(2, 3), normalization="joint"), r"square matrix, got \(2, 3\)"),
        (lambda: normalize_similarities(-torch.ones(2, 2), normalization="joint"), "non-negative"),
        (lambda: normalize_similarities(torch.full((2, 2), math.inf), normalization="joint"), "finite"),
        (lambda: normalize_similarities(torch.eye(3), normalization="joint"), "no point has a neighbour"),
        (lambda: normalize_similarities(torch.ones(2, 2), normalization="joint", mask=torch.ones(2, 2)), "bool"),
        (lambda: gaussian_similarities(torch.full((5, 2), math.nan), 2, normalization="joint"), "finite"),
        (lambda: pair_similarities(1, normalization="joint"), "at least 2 pairs are needed, got 1"),
        (lambda: pair_similarities(3, normalization="joint", weights=torch.ones(2)), r"shape \(3,\), got \(2,\)"),
        (lambda: pair_similarities(2, normalization="joint", weights=torch.tensor([1.0, -1])), "non-negative"),
        (lambda: box_iou(torch.ones(2, 4), torch.ones(3, 4)), r"\(N, 4\)"),
        (lambda: box_iou(torch.tensor([[1.0, 0, 0, 1]]), torch.ones(1, 4)), "right >= left"),
        (lambda: box_iou(torch.ones(1, 4), torch.ones(1, 4)), "no area"),
        (lambda: iou_weights(boxes(2), boxes(2), temperature=0), "temperature"),
        (lambda: noise_similarities(points(4), noise_std=0, normalization="joint"), "noise_std"),
        (lambda: noise_similarities(points(4), noise_std=1, data=points(4, 2), normalization="joint"), "3 columns"),
        (lambda: noise_similarities(points(1), noise_std=1, normalization="joint"), "at least 2 points"),
        (lambda: label_similarities(torch.arange(4), normalization="joint"), "no point has a neighbour"),
        (lambda: label_similarities(torch.ones(4), normalization="joint"), "integers"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    for ratio in (0, -1, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"ratio must lie in \(0, 1\]"):
            mixup_similarities(points(4), ratio=ratio, components=points(2), component_std=1, normalization="joint")
