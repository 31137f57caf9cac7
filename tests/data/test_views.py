"""Every operation against torchvision, per image of a batch; what the views depend on; how often they differ."""

import math
from dataclasses import replace

import pytest
import torch
from pictures import batch, each, unit
from torchvision.transforms.v2 import functional as F

from hf_dpssl.data.views import MODES, PRESETS, Augmentation, TwoViews, affine_resample, crop_boxes, to_model_range

OFF = Augmentation(
    crop_scale=(1, 1), crop_ratio=(1, 1), flip=0, jitter=0, brightness=0, contrast=0, saturation=0, hue=0, grey=0
)
BILINEAR = F.InterpolationMode.BILINEAR
IDS = torch.arange(4000)


def draws(count, width):
    return torch.rand(count, width, generator=torch.Generator().manual_seed(0))


def close(found, expected, tolerance=1e-5):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance


def test_flip_equals_torchvision():
    close(affine_resample(unit(), replace(OFF, flip=1), draws(8, 8), crop=False), F.horizontal_flip(unit()))


def test_rotation_equals_torchvision_where_no_border_is_seen():
    for crop in [False, True]:
        images, u = unit(8, 33), draws(8, 8)
        degrees = 30 * (2 * u[:, 5] - 1)
        expected = each(images, lambda image, angle: F.rotate(image, angle, BILINEAR), degrees)
        inside = (slice(None), slice(None), slice(7, -7), slice(7, -7))
        close(affine_resample(images, replace(OFF, rotation=30), u, crop)[inside], expected[inside], 1e-4)


def test_translation_equals_torchvision_with_black_outside():
    for right, down in [(3, -2), (-4, 4), (0, 1)]:
        for crop in [False, True]:
            images, u = unit(8, 20), draws(8, 8)
            u[:, 6], u[:, 7] = 0.5 - right / 8, 0.5 - down / 8  # of at most 4 pixels
            expected = F.affine(images, angle=0, translate=[right, down], scale=1, shear=[0], interpolation=BILINEAR)
            close(affine_resample(images, replace(OFF, translation=0.2, padding="zeros"), u, crop), expected, 1e-5)
            repeated = F.pad(images, [4], padding_mode="edge")[..., 4 - down : 24 - down, 4 - right : 24 - right]
            close(affine_resample(images, replace(OFF, translation=0.2), u, crop), repeated, 1e-5)


def draws_of_box(augmentation, left, top, width, height, size):
    """The uniform numbers that make this box, in pixels, of a square image."""
    (low, high), (narrow, wide) = augmentation.crop_scale, augmentation.crop_ratio
    area, ratio = width * height / size**2, width / height
    along = (math.log(ratio) - math.log(narrow)) / (math.log(wide) - math.log(narrow))
    place = [offset / (size - side) if side < size else 0 for offset, side in ((left, width), (top, height))]
    return torch.tensor([[(area - low) / (high - low), along, *place, 0.5, 0.5, 0.5, 0.5]])


BOXES = [(4, 8, 16, 16), (0, 0, 16, 16), (16, 16, 16, 16), (3, 5, 24, 20), (10, 2, 18, 24), (0, 0, 32, 32)]


def test_crop_equals_torchvision_resized_crop_inside():
    """At its edge torchvision repeats the last pixel, where we see the picture's next one."""
    for left, top, width, height in BOXES:
        images = unit(4, 32)
        augmentation = replace(OFF, crop_scale=(0.2, 1), crop_ratio=(3 / 4, 4 / 3))
        u = draws_of_box(augmentation, left, top, width, height, 32)
        box = torch.tensor([[left, top, left + width, top + height]]) / 32
        close(crop_boxes(augmentation, u[:, :4]), box)
        expected = F.resized_crop(images, top, left, height, width, [32, 32], BILINEAR, antialias=False)
        inside = (slice(None), slice(None), slice(1, -1), slice(1, -1))
        found = affine_resample(images, augmentation, u.expand(4, -1))
        close(found[inside], expected[inside], 1e-4)
        if width == height == 16:  # the whole picture at twice its size, then cut
            whole = F.resize(images, [64, 64], BILINEAR, antialias=False)
            close(found, whole[:, :, 2 * top : 2 * top + 32, 2 * left : 2 * left + 32], 1e-4)


def test_mirrored_crop_is_the_mirror_image_of_the_crop():
    images, u = unit(), draws(8, 8)
    augmentation = replace(OFF, crop_scale=(0.2, 1), crop_ratio=(3 / 4, 4 / 3))
    expected = F.horizontal_flip(affine_resample(images, augmentation, u))
    close(affine_resample(images, replace(augmentation, flip=1), u), expected)


def test_crop_boxes_lie_in_the_image_and_keep_area_and_ratio():
    for name in PRESETS:
        augmentation = PRESETS[name]
        left, top, right, bottom = crop_boxes(augmentation, draws(4000, 4)).double().T
        assert min(left.min(), top.min()) >= 0 and max(right.max(), bottom.max()) <= 1
        width, height = right - left, bottom - top
        whole = (width < 1 - 1e-6) & (height < 1 - 1e-6)  # not clipped
        area, ratio = (width * height)[whole], (width / height)[whole]
        (low, high), (narrow, wide) = augmentation.crop_scale, augmentation.crop_ratio
        assert low - 1e-6 <= area.min() < low + 0.01 and area.max() <= high + 1e-6
        assert narrow - 1e-6 <= ratio.min() < narrow + 0.02 and wide - 0.02 < ratio.max() <= wide + 1e-6
        assert whole.double().mean() > 0.6
        assert left[whole].min() < 0.01 and (right[whole] > 0.99).any()


@pytest.fixture(params=MODES)
def views_of(request):
    """views_of(augmentation, ...) -> both views, in each mode."""

    def views(augmentation, images=None, ids=None, epoch=0, seed=0, crop=True, mean=(0.0,) * 3, std=(1.0,) * 3):
        images = batch() if images is None else images
        ids = torch.arange(len(images)) if ids is None else ids
        return TwoViews(augmentation, list(mean), list(std), seed, crop, request.param)(images, ids, epoch)

    return views


def test_without_any_strength_both_views_are_the_normalised_image(views_of):
    mean, std = (0.1, 0.4, 0.7), (0.2, 0.5, 1.5)
    expected = F.normalize(F.to_dtype(batch(), torch.float32, scale=True), mean, std)
    for crop in (True, False):
        for view in views_of(OFF, crop=crop, mean=mean, std=std):
            close(view, expected, 1e-4 if crop else 1e-6)
    assert not torch.equal(expected, batch().float())


def test_each_view_takes_its_own_crop_of_a_loader_that_cropped(views_of):
    images = torch.stack([batch(), batch().flip(0)], dim=1)
    first, second = views_of(OFF, images, crop=False)
    assert torch.equal(first, images[:, 0] / 255) and torch.equal(second, images[:, 1] / 255)


EVERYTHING = Augmentation(rotation=15, jitter=0.9, grey=0.3, blur=0.5)


def test_views_do_not_depend_on_the_batch_or_its_order(views_of):
    images, ids = batch(12), torch.tensor([5, 17, 3, 2**40, 99, 1, 0, 8, 21, 77, 64, 2])
    together = views_of(EVERYTHING, images, ids, epoch=3)
    order = torch.tensor([3, 11, 0, 7])
    for part in (order, order[:1]):
        for view, whole in zip(views_of(EVERYTHING, images[part], ids[part], epoch=3), together, strict=True):
            close(view, whole[part])


def test_views_differ_between_each_other_samples_epochs_and_seeds(views_of):
    images, ids = batch(1).expand(40, -1, -1, -1), torch.arange(40)
    first, second = views_of(EVERYTHING, images, ids)
    others = [second, first.roll(1, 0), views_of(EVERYTHING, images, ids, epoch=1)[0]]
    others.append(views_of(EVERYTHING, images, ids, seed=1)[0])
    for other in others:
        assert (first - other).abs().mean((1, 2, 3)).min() > 1e-3
    assert torch.equal(views_of(EVERYTHING, images, ids)[0], first)


CHANGES = {
    "flip": lambda view, image: (view - image.flip(-1)).abs().amax((1, 2, 3)) < 1e-4,
    "grey": lambda view, image: (view[:, 0] - view[:, 2]).abs().amax((1, 2)) < 1e-4,
    "jitter": lambda view, image: (view - image).abs().amax((1, 2, 3)) > 1e-6,
}


def test_share_of_changed_images_is_the_probability_asked_for(views_of):
    for name in CHANGES:
        for probability in [0.2, 0.5, 1.0]:
            image = unit(1, 4) * 0.5 + 0.2
            images = (image * 255).round().to(torch.uint8)
            augmentation = replace(OFF, brightness=0.5 if name == "jitter" else 0, **{name: probability})
            views = views_of(augmentation, images.expand(len(IDS), -1, -1, -1), IDS, crop=False)
            changed = [CHANGES[name](view, images / 255).double() for view in views]
            sigma = (probability * (1 - probability) / len(IDS)) ** 0.5
            for view in changed:
                assert abs(view.mean() - probability) <= 4 * sigma
            if probability < 1:  # the two views are independent
                assert abs(torch.corrcoef(torch.stack(changed))[0, 1]) < 4 / len(IDS) ** 0.5


def test_share_of_images_blurred_with_sigma_above_a_half_is_the_one_asked_for(views_of):
    for probability in [0.5, 1.0]:
        point = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
        point[:, :, 1, 1] = 255
        blurred = F.gaussian_blur(point / 255, 3, 0.5)[0, 0, 1, 2]  # of its neighbour: more for every larger sigma
        expected = probability * (2 - 0.5) / (2 - 0.1)
        sigma = (expected * (1 - expected) / len(IDS)) ** 0.5
        for view in views_of(replace(OFF, blur=probability), point.expand(len(IDS), -1, -1, -1), IDS, crop=False):
            assert abs((view[:, 0, 1, 2] > blurred).double().mean() - expected) < 4 * sigma


def test_operations_are_chosen_independently_of_each_other_and_of_the_other_view(views_of):
    image = torch.tensor([[[40, 40, 160, 160]], [[60, 60, 180, 180]], [[20, 20, 80, 80]]], dtype=torch.uint8)
    halves = replace(OFF, flip=0.5, jitter=0.5, brightness=0.3, grey=0.5)
    luma, seen = F.rgb_to_grayscale(image / 255).sum(), []
    for view in views_of(halves, image.expand(len(IDS), -1, 4, -1), IDS, crop=False):
        seen.append(view[:, 0, 0, 0] > view[:, 0, 0, 3])  # mirrored
        seen.append((view[:, 0] - view[:, 2]).abs().amax((1, 2)) < 1e-4)  # grey, which keeps the luma
        seen.append((F.rgb_to_grayscale(view).sum((1, 2, 3)) / (4 * luma) - 1).abs() > 1e-3)  # brighter or darker
    seen = torch.stack(seen).double()
    assert (torch.corrcoef(seen) - torch.eye(6)).abs().max() < 4 / len(IDS) ** 0.5
    assert (seen.mean(1) - 0.5).abs().max() < 4 * 0.5 / len(IDS) ** 0.5


def test_digits_are_never_mirrored_recoloured_or_made_grey(views_of):
    digits = PRESETS["digits"]
    assert digits.flip == digits.hue == digits.grey == digits.jitter == 0
    images = torch.zeros(400, 3, 16, 16, dtype=torch.uint8)
    images[:, 0, :, :6], images[:, 2, :, 10:] = 200, 100  # red on the left, blue on the right
    for view in views_of(digits, images, torch.arange(400)):
        assert (view[:, 1] == 0).all() and view[:, 0].amax((1, 2)).min() > 0
        columns = torch.arange(16.0)
        red, blue = ((view[:, c].sum(1) * columns).sum(1) / view[:, c].sum((1, 2)).clamp(min=1e-6) for c in (0, 2))
        both = view[:, 2].amax((1, 2)) > 0
        assert both.sum() > 300 and (red < blue)[both].all()


def test_strength_out_of_range_is_refused():
    for strength, message in [
        (dict(crop_scale=(0, 1)), "crop_scale"),
        (dict(crop_scale=(0.5, 0.2)), "crop_scale"),
        (dict(crop_scale=(0.5, 1.5)), r"crop_scale .*\(0.5, 1.5\)"),
        (dict(crop_ratio=(0, 1)), "crop_ratio"),
        (dict(crop_ratio=(2, 1)), "crop_ratio"),
        (dict(flip=1.5), "flip .*1.5"),
        (dict(jitter=-0.1), "jitter"),
        (dict(grey=2), "grey"),
        (dict(blur=-1), "blur"),
        (dict(hue=0.6), "hue .*0.6"),
        (dict(hue=-0.1), "hue"),
        (dict(brightness=-0.4), "brightness"),
        (dict(contrast=1.1), "contrast"),
        (dict(saturation=2), "saturation"),
        (dict(rotation=-10), "rotation"),
        (dict(rotation=270), "rotation .*270"),
        (dict(flip=math.nan), "flip"),
        (dict(translation=1.5), "translation .*1.5"),
        (dict(padding="mirror"), "padding .*'mirror'"),
    ]:
        with pytest.raises(ValueError, match=message):
            Augmentation(**strength)


def test_model_range_equals_torchvision_normalisation():
    images = torch.arange(256).view(1, 1, 16, 16).expand(2, 3, 16, 16).to(torch.uint8)
    expected = F.normalize(F.to_dtype(images, torch.float32, scale=True), [0.5] * 3, [0.5] * 3)
    found = to_model_range(images, torch.arange(2), 0, seed=0, flip=0)
    close(found, expected, 1e-6)
    assert found.min() == -1 and found.max() == 1


def test_model_range_mirrors_the_share_asked_for_by_seed_epoch_and_sample():
    images = batch(1, 4).expand(len(IDS), -1, -1, -1)
    plain = to_model_range(images, IDS, 0, seed=0, flip=0)

    def mirrored(flip=0.5, epoch=0, seed=0, ids=IDS):
        found = to_model_range(images[: len(ids)], ids, epoch, seed=seed, flip=flip)
        is_mirror, is_plain = ((found == p[: len(ids)]).all((1, 2)).all(1) for p in (plain.flip(-1), plain))
        assert (is_mirror ^ is_plain).all()
        return is_mirror

    chosen = mirrored()
    assert abs(chosen.double().mean() - 0.5) < 4 * 0.5 / len(IDS) ** 0.5
    assert mirrored(flip=1).all()
    assert torch.equal(mirrored(ids=IDS.flip(0)[:50]), chosen.flip(0)[:50])
    for other in (mirrored(epoch=1), mirrored(seed=1)):
        assert abs((other == chosen).double().mean() - 0.5) < 4 * 0.5 / len(IDS) ** 0.5


def test_views_are_the_same_inside_of_autocast():
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    for mode in MODES:
        views = TwoViews(PRESETS["imagenet"], [0.5] * 3, [0.25] * 3, seed=0, mode=mode)
        expected = views(images, torch.arange(4), 0)
        with torch.autocast("cpu", torch.bfloat16):
            found = views(images, torch.arange(4), 0)
        assert all(view.dtype == torch.float32 for view in found)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
