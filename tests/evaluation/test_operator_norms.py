"""Norms of convolutions against their own matrices, and against closed forms."""

import pytest
import torch
from torch import nn

from hf_dpssl.evaluation import operator_norms
from hf_dpssl.evaluation.operator_norms import circular_singular_values, operator_norm


def matrix(layer: nn.Module, channels: int, size: tuple[int, ...]) -> torch.Tensor:
    """The layer's matrix: its outputs for all unit vectors, without bias."""
    inputs = channels * torch.Size(size).numel()
    with torch.no_grad():
        columns = layer(torch.eye(inputs, dtype=torch.float64).reshape(inputs, channels, *size))
        zero = layer(torch.zeros(1, channels, *size, dtype=torch.float64))
    return (columns - zero).flatten(1).T


def test_circular_singular_values_are_those_of_the_convolutions_matrix():
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular").double()
    exact = torch.linalg.svdvals(matrix(layer, 2, (5, 4)))
    torch.testing.assert_close(circular_singular_values(layer.weight, (5, 4)), exact)
    assert operator_norm(layer, (5, 4)) == pytest.approx(float(exact[0]), rel=1e-9)


def test_a_kernel_larger_than_the_map_wraps_around():
    weight = torch.randn(1, 1, 5, generator=torch.Generator().manual_seed(0)).double()
    first, second = weight[0, 0, 0] + weight[0, 0, 2] + weight[0, 0, 4], weight[0, 0, 1] + weight[0, 0, 3]
    exact = torch.linalg.svdvals(torch.stack([first, second, second, first]).view(2, 2))
    torch.testing.assert_close(circular_singular_values(weight, (2,)), exact)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Conv2d(2, 3, 3, padding=1),
        lambda: nn.Conv2d(2, 3, 3),
        lambda: nn.Conv2d(2, 4, 4, stride=2, padding=1, bias=False),
        lambda: nn.Conv2d(2, 4, 3, padding="same", groups=2, dilation=2),
        lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"),
        lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1, padding_mode="circular"),
        lambda: nn.Conv2d(2, 3, 5, padding=1, padding_mode="circular"),
        lambda: nn.ConvTranspose2d(2, 3, 4, stride=2, padding=1),
    ],
)
def test_norms_of_all_kinds_of_convolutions_are_those_of_their_matrices(layer):
    torch.manual_seed(0)
    layer = layer().double()
    exact = float(torch.linalg.matrix_norm(matrix(layer, 2, (6, 6)), 2))
    found = operator_norm(layer, (6, 6), tolerance=1e-9)
    assert exact * (1 - 1e-4) <= found <= exact * (1 + 1e-9)


def test_norms_of_known_convolutions():
    mean = nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular", bias=False)
    nn.init.constant_(mean.weight, 1 / 9)
    assert operator_norm(mean, (8, 8)) == pytest.approx(1)  # constant images stay as they are
    difference = nn.Conv1d(1, 1, 2, bias=False)
    difference.weight.data = torch.tensor([[[1.0, -1.0]]])
    # x_i - x_(i+1) on n points: 2 cos(pi / 2n), the root of the largest eigenvalue of a path's Laplacian.
    expected = 2 * torch.cos(torch.tensor(torch.pi / 12))
    assert operator_norm(difference, (6,), tolerance=1e-10) == pytest.approx(float(expected), rel=1e-4)
    up = nn.ConvTranspose2d(1, 1, 2, stride=2, bias=False)
    nn.init.ones_(up.weight)
    assert operator_norm(up, (4, 4)) == pytest.approx(2)  # every pixel four times


def test_zero_padding_does_not_exceed_the_circular_norm_of_a_larger_torus():
    # With zeros around, the map is a part of the circular one on a torus larger by the padding.
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 3, 3, padding=1)
    assert operator_norm(layer, (8, 8)) <= float(circular_singular_values(layer.weight, (10, 10))[0]) * (1 + 1e-9)


def test_table_names_every_layer_with_the_size_it_meets():
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3, padding=1), nn.Flatten(),
        nn.Linear(64, 5),
    )  # fmt: skip
    found = operator_norms(module, torch.zeros(2, 1, 8, 8))
    assert list(found) == ["0", "2", "4"]
    assert found["0"] == operator_norm(module[0], (8, 8)) and found["2"] == operator_norm(module[2], (4, 4))
    assert found["4"] == pytest.approx(float(torch.linalg.matrix_norm(module[4].weight.detach(), 2)))


def test_a_normalised_network_can_stretch_more_than_the_product_of_its_norms():
    # Why the product is not called a bound: group normalization of a nearly constant input.
    linear = nn.Linear(4, 4, bias=False)
    linear.weight.data = 0.01 * torch.eye(4)
    module = nn.Sequential(linear, nn.LayerNorm(4, elementwise_affine=False)).eval()
    product = operator_norms(module, torch.zeros(1, 4))["0"]
    x = torch.tensor([[0.0, 0.01, 0.0, 0.01]])
    assert (module(1.5 * x) - module(x)).norm() / (0.5 * x).norm() > 10 * product


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="nn.Linear and convolutions"):
        operator_norm(nn.GroupNorm(1, 2), (4, 4))
    with pytest.raises(ValueError, match="size of 2 numbers"):
        operator_norm(nn.Conv2d(1, 1, 3), (4,))
    with pytest.raises(ValueError, match="size of 2 positive"):
        circular_singular_values(torch.zeros(1, 1, 3, 3), (4,))
    with pytest.raises(ValueError, match="no linear or convolutional layer"):
        operator_norms(nn.ReLU(), torch.zeros(1, 4))
