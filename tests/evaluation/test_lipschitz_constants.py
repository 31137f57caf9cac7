"""Local Lipschitz constants against singular values, closed forms and float64; the gauge of an autoencoder."""

import math

import pytest
import torch
from torch import nn

from hf_dpssl.evaluation import lipschitz, lipschitz_pair, lipschitz_pair_values, local_lipschitz_values
from hf_dpssl.evaluation.lipschitz_constants import distance_ratios, local_singular_values


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Attention(nn.Module):
    """Convolution, group normalization and self-attention over positions, as in an autoencoder's middle block."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(2, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.queries = nn.Linear(8, 24)

    def forward(self, x):
        hidden = nn.functional.silu(self.norm(self.convolution(x))).flatten(2).transpose(1, 2)
        q, k, v = self.queries(hidden).chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(q, k, v)


def test_values_of_a_linear_map_are_its_singular_values():
    for shape in ((7, 5), (5, 7)):
        weight = random(*shape).double()
        exact = torch.linalg.svdvals(weight)
        points = random(9, shape[1]).double()
        top = local_singular_values(lambda x, w=weight: x @ w.T + 1, points, count=3, iterations=500, tolerance=1e-9)
        torch.testing.assert_close(top, exact[:3].expand(9, 3), rtol=1e-5, atol=0)
        everything = local_singular_values(lambda x, w=weight: x @ w.T + 1, points, count=None)
        torch.testing.assert_close(everything, exact.expand(9, -1))


def test_values_equal_the_whole_jacobians_through_group_norm_and_attention():
    module, points = Attention().eval().double(), random(3, 2, 4, 4).double()
    found = local_singular_values(module, points, count=2, iterations=500, tolerance=1e-8)
    for point, values in zip(points, found, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda x: module(x[None])[0], point)
        exact = torch.linalg.svdvals(jacobian.reshape(-1, 32))[:2]
        torch.testing.assert_close(values, exact, rtol=1e-4, atol=0)


def test_values_never_exceed_the_true_ones_and_grow_with_iterations():
    module, points = Attention().eval().double(), random(3, 2, 4, 4).double()
    exact = local_singular_values(module, points, count=None)[:, :2]
    options = dict(count=2, tolerance=1e-12)
    found = [local_singular_values(module, points, iterations=n, **options) for n in (1, 2, 5, 20)]
    for fewer, more in zip(found, found[1:], strict=False):
        assert bool((more >= fewer * (1 - 1e-9)).all())
    assert bool((found[-1] <= exact * (1 + 1e-9)).all())


def test_float32_agrees_with_float64_and_batches_do_not_matter():
    module, points = Attention().eval(), random(6, 2, 4, 4)
    options = dict(iterations=300, tolerance=1e-7)
    double = local_singular_values(module, points, dtype=torch.float64, **options)
    single = local_singular_values(module, points, **options)
    torch.testing.assert_close(single.double(), double, rtol=1e-3, atol=0)
    assert next(module.parameters()).dtype == torch.float32
    parts = local_singular_values(module, points, dtype=torch.float64, batch_size=2, **options)
    torch.testing.assert_close(parts, double, rtol=1e-4, atol=0)


def test_curve_for_a_plot_is_sorted_and_of_a_closed_form():
    # f(x) = x^3 by component: the local constant is 3 max x^2.
    points = random(40, 4).double()
    found = local_lipschitz_values(lambda x: x**3, points, iterations=2000, tolerance=1e-10)
    exact = 3 * points.square().amax(1).sort().values
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=0)


def test_distance_ratios_equal_the_loop_and_leave_out_equal_inputs():
    inputs, outputs = random(7, 3), random(7, 2, seed=1)
    inputs[3] = inputs[2]
    expected = [
        float((outputs[i] - outputs[j]).norm() / (inputs[i] - inputs[j]).norm())
        for i in range(7)
        for j in range(i)
        if (i, j) != (3, 2)
    ]
    torch.testing.assert_close(distance_ratios(inputs, outputs), torch.tensor(sorted(expected)).double())


def test_all_figures_of_a_multiple_of_the_identity():
    found = lipschitz(lambda x: 3 * x, random(30, 5).double(), iterations=3)
    for key in ("lipschitz", "lipschitz_local_max", "lipschitz_local_min", "ratio_max", "ratio_median"):
        assert found[key] == pytest.approx(3, rel=1e-6)
    assert found["log_ratio_sd"] == pytest.approx(0, abs=1e-6)
    assert found["ratio_quantile_ratio"] == pytest.approx(1) and found["ratio_zeros"] == 0


def test_lipschitz_is_a_lower_bound_of_a_known_constant():
    # |sin| has slope 1 at most, the linear map its largest singular value.
    weight = random(6, 6).double()
    found = lipschitz(lambda x: torch.sin(x @ weight.T), random(100, 6).double(), iterations=500)
    norm = float(torch.linalg.matrix_norm(weight, 2))
    assert 0.5 * norm < found["lipschitz"] <= norm * (1 + 1e-9)
    assert found["lipschitz"] == max(found["lipschitz_local_max"], found["ratio_max"])


def test_figures_of_an_autoencoder_do_not_depend_on_the_scale_of_its_latent():
    gauge = 0.01
    f, g = (nn.Sequential(nn.Linear(*sizes), nn.Tanh()).double().eval() for sizes in ((8, 3), (3, 8)))
    images, options = random(40, 8).double(), dict(iterations=200, tolerance=1e-9)
    plain = lipschitz_pair(f, g, images, **options)
    scaled = lipschitz_pair(lambda x: gauge * f(x), lambda z: g(z / gauge), images, **options)
    assert scaled.pop("latent_scale") == pytest.approx(gauge * plain.pop("latent_scale"))
    assert scaled == pytest.approx(plain, rel=1e-5)
    raw = lipschitz(lambda x: gauge * f(x), images, **options)["lipschitz"]
    assert raw == pytest.approx(gauge * lipschitz(f, images, **options)["lipschitz"], rel=1e-5)  # the trap


def test_product_of_a_linear_autoencoder_is_that_of_its_norms_and_its_scale_is_1():
    f, g = random(3, 8).double(), random(8, 3, seed=1).double()
    images, options = random(50, 8).double(), dict(iterations=1000, tolerance=1e-11)
    found = lipschitz_pair(lambda x: x @ f.T, lambda z: z @ g.T, images, **options)
    product = float(torch.linalg.matrix_norm(f, 2) * torch.linalg.matrix_norm(g, 2))
    assert found["lipschitz_product"] == pytest.approx(product, rel=1e-5)
    assert found["lipschitz_product_median"] == pytest.approx(product, rel=1e-5)
    values = lipschitz_pair_values(lambda x: x @ f.T, lambda z: z @ g.T, images, **options)
    scale = torch.pdist(images @ f.T).mean() / torch.pdist(images).mean()
    assert float(values["latent_scale"]) == pytest.approx(float(scale))
    assert found["lipschitz_encoder"] == pytest.approx(float(torch.linalg.matrix_norm(f, 2) / scale), rel=1e-5)


def test_spread_of_log_ratios_tells_an_isometry_from_a_collapsed_map():
    images = random(60, 6)
    rotation = torch.linalg.qr(random(6, 6, seed=1)).Q
    flat = torch.diag(torch.tensor([1.0, 1, 1, 0.01, 0.01, 0.01]))
    kept, collapsed = (lipschitz(lambda x, m=m: x @ m, images)["log_ratio_sd"] for m in (rotation, flat))
    assert kept < 1e-5 and collapsed > 0.1


def test_pairs_that_become_one_point_are_counted():
    points = random(10, 3)
    found = lipschitz(lambda x: torch.relu(x[:, :1] - x[:, :1].detach().sort(0).values[4]), points, batch_size=10)
    assert found["ratio_zeros"] == pytest.approx(100 * 10 / 45)  # five points at 0: ten pairs
    assert math.isfinite(found["log_ratio_sd"])


def test_bad_input_is_refused():
    points = random(4, 3)
    with pytest.raises(ValueError, match="training mode"):
        lipschitz(nn.Linear(3, 3), points)
    with pytest.raises(ValueError, match="floating point"):
        lipschitz(lambda x: x, torch.zeros(4, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="count must be in"):
        local_singular_values(lambda x: x, points, count=4)
    with pytest.raises(ValueError, match="one floating point tensor"):
        lipschitz(lambda x: (x, x), points)
    with pytest.raises(ValueError, match="not finite"):
        local_singular_values(lambda x: x * math.nan, points)
    with pytest.raises(ValueError, match="all inputs are the same"):
        distance_ratios(torch.ones(4, 3), points)
    with pytest.raises(ValueError, match="all points to one"):
        lipschitz(lambda x: x * 0, points)
    with pytest.raises(ValueError, match="scale between them"):
        lipschitz_pair(lambda x: x * 0, lambda z: z, points)


def test_a_frozen_part_without_gradients_is_refused_not_measured_as_something_else():
    linear = nn.Linear(3, 3).eval()
    with pytest.raises(ValueError, match="no_grad"):
        local_singular_values(torch.no_grad()(linear.forward), random(4, 3))
