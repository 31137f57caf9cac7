"""Colour operations against torchvision, per image of a batch, each with its own parameters."""

import torch
from pictures import each, unit
from torchvision.transforms.v2 import functional as F

from hf_dpssl.data.colour import ORDERS, apply_matrix, colour_matrix, grey_matrix, jitter_, to_grey

ADJUST = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


def factors(count=8, strength=0.8, hue=0.5):
    """Brightness, contrast, saturation, hue: (4, count)."""
    signed = 2 * torch.rand(4, count, generator=torch.Generator().manual_seed(0)) - 1
    return torch.cat([1 + strength * signed[:3], hue * signed[3:]])


def close(found, expected, tolerance=1e-5):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance


def test_jitter_in_every_order_equals_torchvision():
    for order in ORDERS:
        images, f = unit(), factors()
        expected = images
        for operation in order:
            expected = each(expected, ADJUST[operation], f[operation])
        close(jitter_(images.clone(), *f, order), expected, 1e-4)
        assert (expected - images).abs().mean() > 0.05


def test_each_operation_equals_torchvision_and_does_nothing_at_its_neutral_factor():
    for operation in range(4):
        images, f = unit(), factors(strength=1)
        f[operation, :2] = torch.tensor([-0.5, 0.5]) if operation == 3 else torch.tensor([0.0, 2.0])
        close(jitter_(images.clone(), *f, [operation]), each(images, ADJUST[operation], f[operation]))
        neutral = torch.ones(4, 8) - torch.eye(4)[3][:, None]
        close(jitter_(images.clone(), *neutral, [operation]), images)


def test_hue_of_grey_saturated_and_tied_colours_equals_torchvision():
    levels = torch.tensor([0.0, 0.25, 0.5, 1.0])
    colours = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, 8, 8)  # all ties of channels
    for turns in (-0.5, -1 / 3, -0.1, 0.0, 1 / 6, 0.25, 0.5):
        found = jitter_(colours.clone(), *torch.ones(3, 1), torch.tensor([turns]), [3])
        close(found, F.adjust_hue(colours, turns))


def test_grey_equals_torchvision():
    close(to_grey(unit()), F.rgb_to_grayscale(unit(), num_output_channels=3))
    close(apply_matrix(unit(), grey_matrix(unit()).expand(8, 3, 3), torch.zeros(8, 3)), to_grey(unit()))


def test_matrix_without_hue_equals_the_operations_where_nothing_is_clamped():
    for operations in [[0], [1], [2], [0, 1, 2]]:
        images, f = unit() * 0.2 + 0.4, factors(strength=0.3)
        f[[i for i in range(3) if i not in operations]], f[3] = 1, 0
        expected = jitter_(images.clone(), *f, operations)
        assert 0 < expected.min() and expected.max() < 1
        close(apply_matrix(images, *colour_matrix(*f, images.mean((2, 3)))), expected, 1e-4)


def test_hue_rotation_equals_the_hsv_circle_at_thirds_and_keeps_grey_and_the_mean():
    images = unit()
    for third in (-1, 1):
        turns = torch.full((8,), third / 3)
        matrix, offset = colour_matrix(*torch.ones(3, 8), turns, images.mean((2, 3)))
        close(apply_matrix(images, matrix, offset), each(images, F.adjust_hue, turns))
    matrix, offset = colour_matrix(*torch.ones(3, 8), factors()[3], images.mean((2, 3)))
    close(apply_matrix(images, matrix, offset).mean(1), images.mean(1))
    close(matrix @ torch.ones(3), torch.ones(8, 3))


def test_matrix_is_in_the_order_brightness_contrast_saturation_hue():
    images, f = unit() * 0.3 + 0.3, factors(strength=0.2, hue=0.1)
    expected = images
    for i in range(4):
        only = torch.ones(4, 8) - torch.eye(4)[3][:, None]
        only[i] = f[i]
        expected = apply_matrix(expected, *colour_matrix(*only, expected.mean((2, 3))))
    close(apply_matrix(images, *colour_matrix(*f, images.mean((2, 3)))), expected, 1e-4)
