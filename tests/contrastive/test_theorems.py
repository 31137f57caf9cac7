"""What the paper proves, as statements with their constants: SimCLR as SNE, noise and mixup as P, ideal embeddings.

Source: Hu et al., ICLR 2023, section 3; where a statement needs more care than its usual wording, the test says so.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import for_each

from hf_dpssl.contrastive.losses import alignment, info_nce, t_simclr, uniformity
from hf_dpssl.contrastive.matching import (
    cross_entropy,
    match,
    mixup_similarities,
    noise_similarities,
    pair_similarities,
    q_similarities,
)

PAIRS = 6
RING = torch.stack([torch.arange(5).mul(2 * math.pi / 5).cos(), torch.arange(5).mul(2 * math.pi / 5).sin()], dim=1)


def views(pairs: int = PAIRS, columns: int = 3, spread: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(pairs, columns, generator=generator, dtype=torch.float64)
    return first, first + spread * torch.randn(pairs, columns, generator=generator, dtype=torch.float64)


def mixture(points: int = 250, std: float = 0.1) -> torch.Tensor:
    """Five Gaussians on a circle in the plane."""
    noise = torch.randn(points, 2, generator=torch.Generator().manual_seed(0))
    return RING[torch.arange(points) % 5] + std * noise


# Three readings of "SimCLR is SNE" with P on positive pairs; only the first and the last are divergences.


def test_one_hot_rows_of_p_make_the_mean_row_kl_equal_to_info_nce():
    a, b = views()
    p = pair_similarities(PAIRS, normalization="anchor")
    log_q = q_similarities(torch.cat([a, b]), kernel="cosine", normalization="anchor", temperature=0.5)
    torch.testing.assert_close(match(p, log_q), info_nce(a, b, temperature=0.5), rtol=1e-12, atol=0)


def test_joint_p_against_conditional_q_gives_info_nce_minus_log_2n_which_is_no_divergence():
    for spread in [0.5, 0.0]:
        a, b = views(spread=spread)
        p = pair_similarities(PAIRS, normalization="joint")  # 1/(2N) on positive pairs: sums to 1 over ALL pairs
        log_q = q_similarities(torch.cat([a, b]), kernel="cosine", normalization="anchor", temperature=0.1)
        assert math.isclose(log_q.exp().sum(), 2 * PAIRS), "while Q sums to 2N"
        positive = p > 0
        value = (p[positive] * (p[positive].log() - log_q[positive])).sum()
        expected = info_nce(a, b, temperature=0.1) - math.log(2 * PAIRS)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
        assert value < 0, "a divergence of two distributions could not be negative"


def test_joint_p_against_joint_q_makes_kl_equal_to_t_simclr_minus_log_2n():
    for dof in [1.0, 5.0]:
        a, b = views()
        p = pair_similarities(PAIRS, normalization="joint")
        log_q = q_similarities(torch.cat([a, b]), kernel="student_t", normalization="joint", temperature=2.0, dof=dof)
        loss = t_simclr(a, b, temperature=2.0, dof=dof)
        torch.testing.assert_close(match(p, log_q), loss - math.log(2 * PAIRS), rtol=1e-12, atol=0)
        torch.testing.assert_close(cross_entropy(p, log_q), loss, rtol=1e-12, atol=0)


def test_at_collapse_the_divergence_is_log_of_the_other_candidates():
    z = torch.ones(2 * PAIRS, 3, dtype=torch.float64)
    for normalization in ("joint", "anchor"):  # log(2N (2N - 1)) is the joint loss; its KL lacks log(2N)
        log_q = q_similarities(z, kernel="student_t", normalization=normalization, temperature=1.0)
        value = match(pair_similarities(PAIRS, normalization=normalization), log_q)
        assert math.isclose(value, math.log(2 * PAIRS - 1), rel_tol=1e-12)


def test_cosine_is_the_gaussian_of_normalised_embeddings_at_twice_the_temperature():
    z = torch.cat(views())
    for normalization in ("joint", "anchor"):
        cosine = q_similarities(z, kernel="cosine", normalization=normalization, temperature=0.3)
        unit = F.normalize(z, dim=1)  # |x - y|^2 = 2 - 2 cos
        gaussian = q_similarities(unit, kernel="gaussian", normalization=normalization, temperature=0.6)
        torch.testing.assert_close(cosine.exp(), gaussian.exp(), rtol=1e-12, atol=1e-15)


# Proposition 3.2: Gaussian noise of standard deviation s as augmentation.


@pytest.mark.parametrize("columns", [1, 2])
def test_views_of_a_flat_measure_have_the_gaussian_density_of_twice_the_variance(columns):
    std, pair = 0.5, torch.tensor([[0.3, -0.2], [1.1, 0.5]], dtype=torch.float64)[:, :columns]
    axis = torch.arange(-5, 5.001, 0.05, dtype=torch.float64)
    originals = torch.cartesian_prod(*[axis] * columns).view(-1, columns)

    def normal(distances, variance):
        return (-distances / (2 * variance)).exp() / (2 * math.pi * variance) ** (columns / 2)

    squared = torch.cdist(pair, originals).square()
    integral = (normal(squared[0], std**2) * normal(squared[1], std**2)).sum() * 0.05**columns
    expected = normal((pair[0] - pair[1]).square().sum(), 2 * std**2)
    torch.testing.assert_close(integral, expected, rtol=1e-10, atol=0)


def test_p_of_noise_on_a_flat_measure_is_a_falling_function_of_distance_alone():
    x = torch.cat(views())
    p = noise_similarities(x, noise_std=0.6, normalization="joint")
    squared = torch.cdist(x, x).square()
    off = ~torch.eye(len(x), dtype=torch.bool)
    log_constant = p[off].log() + squared[off] / (4 * 0.6**2)  # N(x - y; 0, 2 s^2 I)
    torch.testing.assert_close(log_constant, log_constant[:1].expand_as(log_constant), rtol=1e-10, atol=0)
    assert (p[off][squared[off].argsort()].diff() <= 0).all()


def test_p_of_noise_on_a_fine_grid_of_originals_is_that_of_the_flat_measure():
    x = 0.5 * torch.cat(views(columns=2))
    axis = torch.arange(-4, 4.01, 0.1, dtype=torch.float64)
    grid = noise_similarities(x, noise_std=0.3, data=torch.cartesian_prod(axis, axis), normalization="joint")
    flat = noise_similarities(x, noise_std=0.3, normalization="joint")
    torch.testing.assert_close(grid, flat, rtol=1e-6, atol=1e-12)


def test_p_of_noise_on_finite_data_departs_by_the_density_of_the_data_at_the_midpoint():
    x, std = mixture().double(), 0.1
    p = noise_similarities(x, noise_std=std, data=x, normalization="joint")
    middle = ((x[:, None] + x) / 2).flatten(0, 1)  # (n^2, 2)
    log_density = (-torch.cdist(middle, x).square() / std**2).logsumexp(1).view(250, 250)  # data + N(0, s^2/2)
    log_product = log_density - torch.cdist(x, x).square() / (4 * std**2)
    expected = log_product.fill_diagonal_(-math.inf).flatten().softmax(0).view(250, 250)
    torch.testing.assert_close(p, expected, rtol=1e-9, atol=1e-15)
    flat = noise_similarities(x, noise_std=std, normalization="joint")
    assert (p - flat).abs().sum() / 2 > 0.05, "total variation: the proposition does not hold for a data set"


def test_p_of_noise_on_finite_data_is_no_function_of_the_difference():
    data = torch.tensor([[0.0], [0.1], [3.0]], dtype=torch.float64)
    x = torch.tensor([[0.0], [0.5], [1.5], [2.0]], dtype=torch.float64)  # two pairs at distance 0.5
    flat = noise_similarities(x, noise_std=0.5, normalization="joint")
    torch.testing.assert_close(flat[0, 1], flat[2, 3], rtol=1e-12, atol=0)
    finite = noise_similarities(x, noise_std=0.5, data=data, normalization="joint")
    assert finite[0, 1] > 5 * finite[2, 3], "the pair near the data is the likelier one"


def test_mixup_follows_the_span_of_the_class_means_where_noise_does_not():
    means = F.pad(RING.double(), (0, 8))  # a plane in 10 dimensions
    x = torch.zeros(3, 10, dtype=torch.float64)
    step = 0.5 * (means[0] - means[1])  # from one view to another whose partners are of two classes
    x[1], x[2, 9] = step, step.norm()  # the same length out of the plane
    mixup = mixup_similarities(x, ratio=0.5, components=means, component_std=0.1, normalization="joint")
    noise = noise_similarities(x, noise_std=0.1, normalization="joint")
    torch.testing.assert_close(noise[0, 1], noise[0, 2])
    assert mixup[0, 1] > 5 * mixup[0, 2]


# Ideal embeddings: views coincide (alignment) and samples are spread evenly (uniformity).


def ideal_info_nce(cosines: list[float], temperature: float) -> float:
    """InfoNCE when both views of a sample coincide and it has these cosines to the other samples."""
    others = 2 * sum(math.exp(c / temperature) for c in cosines)
    return -1 / temperature + math.log(math.exp(1 / temperature) + others)


def polygon(samples: int) -> list[float]:
    return [math.cos(2 * math.pi * k / samples) for k in range(1, samples)]


@for_each(
    "samples, columns, cosines, temperature",
    [(7, 2, polygon(7), 0.2), (12, 2, polygon(12), 0.5), (5, 4, [-1 / 4] * 4, 0.5), (5, 8, [-1 / 4] * 4, 0.2)],
)
def test_free_embeddings_end_on_the_regular_polygon_or_the_simplex(samples, columns, cosines, temperature):
    a, b = (z.requires_grad_() for z in views(samples, columns, spread=1.0))
    optimizer = torch.optim.LBFGS(
        [a, b], max_iter=1000, tolerance_grad=1e-13, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def step():
        optimizer.zero_grad()
        loss = info_nce(a, b, temperature=temperature)
        loss.backward()
        return loss

    start = step().item()
    optimizer.step(step)
    ideal = ideal_info_nce(cosines, temperature)
    assert start > ideal + 0.1 and abs(step().item() - ideal) < 1e-9
    unit = F.normalize(a.detach(), dim=1)
    torch.testing.assert_close(unit, F.normalize(b.detach(), dim=1), rtol=0, atol=1e-4)  # alignment
    found = (unit @ unit.T)[~torch.eye(samples, dtype=torch.bool)].sort().values
    expected = torch.tensor(sorted(cosines * samples), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)  # uniformity


@pytest.mark.extended
def test_simclr_on_the_mixture_nearly_reaches_alignment_and_uniformity():
    x, generator = mixture(), torch.Generator().manual_seed(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [torch.nn.Linear(2, 128), torch.nn.ReLU(), torch.nn.Linear(128, 128), torch.nn.ReLU()]
        encoder = torch.nn.Sequential(*layers, torch.nn.Linear(128, 2))
    optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
    for _ in range(200):
        a, b = (encoder(x + 0.01 * torch.randn(250, 2, generator=generator)) for _ in range(2))
        loss = info_nce(a, b, temperature=0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    a, b = a.detach(), b.detach()
    assert 0 < loss.item() - ideal_info_nce(polygon(250), 0.5) < 0.02
    assert alignment(a, b) < 2e-3
    ideal = torch.tensor([math.exp(-4 + 4 * c) for c in polygon(250)]).mean().log()
    assert abs(uniformity(a) - ideal) < 0.1
