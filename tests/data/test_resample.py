"""Crops and blur against torchvision, per image of a batch; the distribution of boxes against torchvision's."""

import torch
from pictures import batch, each, unit
from scipy.stats import ks_2samp
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from hf_dpssl.data.resample import CROP_TRIES, gaussian_blur, resized_crop, resized_crop_boxes


def close(found, expected, tolerance=1e-4):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def random_boxes(count, height, width, scale=(0.05, 1), ratio=(0.5, 2), seed=0):
    tries, place = uniform(count, CROP_TRIES, 2, seed=seed), uniform(count, 2, seed=seed + 1)
    return resized_crop_boxes(tries, place, height, width, scale=scale, ratio=ratio)


def torchvision_crops(images, boxes, flip, size):
    crops = (F.resized_crop(image, *box, list(size)) for image, box in zip(images, boxes.tolist(), strict=True))
    return torch.stack([F.horizontal_flip(c) if f else c for c, f in zip(crops, flip, strict=True)])


def areas(boxes):
    return boxes[:, 2] * boxes[:, 3]


def ratios(boxes):
    return boxes[:, 3] / boxes[:, 2]


def test_crop_equals_torchvision_enlarged_and_reduced():
    for size in [(16, 16), (24, 20), (60, 64)]:
        for height, width in [(16, 16), (40, 33), (100, 130)]:
            images, boxes, flip = batch(8, height, width), random_boxes(8, height, width), torch.arange(8) % 3 == 0
            boxes[0] = torch.tensor([0, 0, height, width])
            boxes[1] = torch.tensor([height - 1, width - 1, 1, 1])
            found = resized_crop(images, boxes, flip, size)
            close(found / 255, torchvision_crops(images.float() / 255, boxes, flip, size))
            whole_numbers = torchvision_crops(images, boxes, flip, size).float()
            close(found, whole_numbers, 1.001)
            close(resized_crop(images.float(), boxes, flip, size), found, 1e-3)
            rounded = resized_crop(images, boxes, flip, size, may_round=True)
            close(rounded, found, 1.001 if max(size) > 48 else 0)
            assert max(size) <= 48 or torch.equal(rounded, rounded.round())


def test_boxes_are_distributed_as_torchvisions():
    for height, width, scale, ratio in [
        (32, 32, (0.2, 1), (3 / 4, 4 / 3)),
        (224, 224, (0.08, 1), (3 / 4, 4 / 3)),
        (30, 80, (0.08, 1), (3 / 4, 4 / 3)),
        (80, 30, (0.2, 1), (3 / 4, 4 / 3)),
        (32, 32, (0.4, 1), (2, 3)),
    ]:
        count = 3000
        crop, image = v2.RandomResizedCrop(8, scale, ratio), torch.empty(3, height, width)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            drawn = [crop.make_params([image]) for _ in range(count)]
        theirs = torch.tensor([[p["top"], p["left"], p["height"], p["width"]] for p in drawn]).double()
        ours = random_boxes(count, height, width, scale, ratio, seed=2).double()
        for box in (0, 1, 2, 3):
            assert ks_2samp(ours[:, box], theirs[:, box]).pvalue > 1e-4
        for derive in (areas, ratios, lambda box: box[:, 0] - box[:, 1], lambda box: box[:, 0] - box[:, 2]):
            assert ks_2samp(derive(ours), derive(theirs)).pvalue > 1e-4
        central = theirs.mode(0).values  # where no try fits
        shares = [(boxes == central).all(1).double().mean() for boxes in (ours, theirs)]
        assert abs(shares[0] - shares[1]) < 4 * (2 * 0.25 / count) ** 0.5
        assert (shares[1] > 0.05) == (ratio == (2, 3))


def test_boxes_lie_in_images_of_different_sizes_at_the_extremes_of_the_draws():
    height, width = torch.tensor([5, 4097, 300]), torch.tensor([7, 12000, 1])
    for extreme in (0.0, 1 - 2**-24):
        for tried in (0.0, 1 - 2**-24):
            tries = torch.full((3, CROP_TRIES, 2), tried)
            place, ranges = torch.full((3, 2), extreme), dict(scale=(0.2, 1), ratio=(0.75, 1.4))
            boxes = resized_crop_boxes(tries, place, height, width, **ranges)
            top, left, crop_height, crop_width = boxes.unbind(1)
            assert min(top.min(), left.min()) >= 0 and min(crop_height.min(), crop_width.min()) >= 1
            assert (top + crop_height <= height).all() and (left + crop_width <= width).all()


def test_no_fitting_try_gives_torchvisions_central_crop():
    crop = v2.RandomResizedCrop(8, (1, 1), (1, 1))
    for height, width in ((10, 21), (21, 10), (7, 7)):
        expected = crop.make_params([torch.empty(3, height, width)])
        box = random_boxes(1, height, width, (1, 1), (1, 1))[0].tolist()
        assert box == [expected[name] for name in ("top", "left", "height", "width")]


def test_blur_equals_torchvision_with_a_kernel_of_a_tenth():
    for size, kernel in [(16, 3), (32, 3), (64, 7), (96, 11)]:
        images, sigma = unit(6, size), torch.tensor([0.1, 0.3, 0.5, 1.0, 1.5, 2.0])
        close(
            gaussian_blur(images, sigma),
            each(images, lambda image, s, kernel=kernel: F.gaussian_blur(image, kernel, s), sigma),
            1e-5,
        )
