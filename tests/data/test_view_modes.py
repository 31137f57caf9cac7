"""Whole views against a pipeline of torchvision v2 with the same parameters, in both modes; what is drawn."""

import io
from dataclasses import fields, replace

import numpy as np
import pyarrow.parquet
import pytest
import torch
from pictures import batch, photograph_patches
from PIL import Image
from scipy.stats import chisquare, ks_2samp
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from hf_dpssl.data.colour import ORDERS
from hf_dpssl.data.views import DIGITS, IMAGENET, MODES, NATURAL, Augmentation, TwoViews

ADJUST = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
MEAN, STD = [0.49, 0.48, 0.44], [0.2, 0.25, 0.3]
STRONG = replace(IMAGENET, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, crop_scale=(0.08, 1))


def torchvision_view(image, p, i, kernel):
    """Row i of the parameters `p`, one operation of torchvision after the other, on a float image."""
    image = F.resized_crop(image, *p.boxes[i].tolist(), list(image.shape[1:]))
    if p.flip[i]:
        image = F.horizontal_flip(image)
    if p.jitter[i]:
        values = (p.brightness[i], p.contrast[i], p.saturation[i], p.hue[i])
        for operation in ORDERS[p.order[i]]:
            image = ADJUST[operation](image, values[operation].item())
    if p.grey[i]:
        image = F.rgb_to_grayscale(image, num_output_channels=3)
    if p.blur[i]:
        image = F.gaussian_blur(image, [kernel] * 2, [p.sigma[i].item()] * 2)
    return F.normalize(image, MEAN, STD)


def test_exact_views_are_torchvisions_pixels_with_the_same_parameters():
    for size, count, kernel in [(16, 100, 3), (64, 20, 7)]:
        images, ids = batch(count, size), torch.arange(count) + 7
        views = TwoViews(STRONG, MEAN, STD, seed=3, mode="exact")
        for number, found in enumerate(views(images, ids, epoch=2), start=1):
            p = views.parameters(ids, 2, number, size, size)
            expected = [torchvision_view(image / 255, p, i, kernel) for i, image in enumerate(images)]
            difference = (found - torch.stack(expected)) * torch.tensor(STD).view(3, 1, 1)
            assert difference.abs().max() < 1e-3  # of the range: a quarter of 1/255
            for name in ("flip", "jitter", "grey", "blur"):
                assert 0 < getattr(p, name).sum() < count


def differences(images, augmentation):
    """255 x the difference of fused and exact pixels."""
    fused, exact = (
        torch.cat(TwoViews(augmentation, [0.0] * 3, [1.0] * 3, 0, mode=mode)(images, torch.arange(len(images)), 0))
        for mode in MODES
    )
    return 255 * (fused - exact).abs()


def quantile(values, q):
    return values.flatten().kthvalue(round(q * values.numel())).values


@pytest.mark.extended
def test_fused_views_differ_from_exact_ones_by_what_is_stated():
    for size in [32, 96]:
        images = photograph_patches(100, size)
        found = differences(images, NATURAL)
        assert 2.5 < found.mean() < 4.2 and 20 < quantile(found, 0.99) < 32
        without_hue = differences(images, replace(NATURAL, hue=0))
        assert without_hue.mean() < 1 and quantile(without_hue, 0.99) < 15
        rounding = 0.01 if size == 32 else 1.01
        assert differences(images, replace(NATURAL, jitter=0, blur=0.5)).max() < rounding


def test_fused_views_of_cifar10_jpeg_differ_from_exact_ones_by_what_is_stated(data_folder):
    rows = pyarrow.parquet.read_table(data_folder / "cifar10-jpeg-small-train.parquet", columns=["image"])
    pictures = [Image.open(io.BytesIO(row["bytes"])).convert("RGB") for row in rows["image"].to_pylist()[:500]]
    images = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures])
    found = differences(images, NATURAL)
    assert 1.8 < found.mean() < 2.8 and 15 < quantile(found, 0.99) < 23


def test_parameters_are_distributed_as_torchvisions():
    count, strengths = 4000, dict(brightness=0.4, contrast=0.3, saturation=0.8, hue=0.2)
    transform, image = v2.ColorJitter(**strengths), torch.empty(3, 4, 4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = [transform.make_params([image]) for _ in range(count)]
        sigma = [v2.GaussianBlur(3, (0.1, 2.0)).make_params([image])["sigma"][0] for _ in range(count)]
    augmentation = replace(Augmentation(blur=0.5, grey=0.3, flip=0.4), **strengths)
    for view in (1, 2):
        ours = TwoViews(augmentation, MEAN, STD, 0).parameters(torch.arange(count), 0, view, 32, 32)
        for name in strengths:
            assert ks_2samp(getattr(ours, name), [p[f"{name}_factor"] for p in theirs]).pvalue > 1e-3
        assert ks_2samp(ours.sigma, sigma).pvalue > 1e-3
        orders = torch.bincount(ours.order, minlength=24)
        their_orders = torch.bincount(torch.tensor([ORDERS.index(tuple(p["fn_idx"].tolist())) for p in theirs]))
        assert len(orders) == len(their_orders) == 24
        assert min(chisquare(orders).pvalue, chisquare(their_orders).pvalue) > 1e-3
        for name, share in dict(flip=0.4, jitter=0.8, grey=0.3, blur=0.5).items():
            assert abs(getattr(ours, name).double().mean() - share) < 4 * (share * (1 - share) / count) ** 0.5


def test_parameters_are_drawn_independently_of_each_other_and_of_the_other_view():
    views, values = TwoViews(STRONG, MEAN, STD, 0), []
    for view in (1, 2):
        p = views.parameters(torch.arange(4000), 0, view, 64, 64)
        values += [p.boxes[:, 2] / p.boxes[:, 3], p.boxes[:, 2] * p.boxes[:, 3]]
        values += [getattr(p, field.name) for field in fields(p) if field.name != "boxes"]
    correlation = torch.corrcoef(torch.stack([v.double() for v in values]))
    assert (correlation - torch.eye(len(values))).abs().max() < 5 / 4000**0.5


def test_both_views_of_a_loader_that_cropped_get_the_colours_of_the_same_parameters():
    for mode in MODES:
        images, ids = batch(12), torch.arange(12)
        whole = replace(STRONG, crop_scale=(1, 1), crop_ratio=(1, 1))  # the crop is the image itself
        expected = TwoViews(whole, MEAN, STD, 0, crop=True, mode=mode)(images, ids, 4)
        found = TwoViews(whole, MEAN, STD, 0, crop=False, mode=mode)(torch.stack([images, images], 1), ids, 4)
        for a, b in zip(found, expected, strict=True):
            assert (a - b).abs().max() < 1e-4


def test_fused_views_stay_on_the_device_of_the_images_and_never_wait_for_it():
    """Tensors of the device "meta" hold no data: to read a value on the host is an error, so is a second device."""
    for augmentation in [NATURAL, DIGITS]:
        images = torch.zeros(8, 3, 32, 32, dtype=torch.uint8, device="meta")
        for view in TwoViews(augmentation, MEAN, STD, 0)(images, torch.arange(8, device="meta"), 0):
            assert view.device.type == "meta" and view.shape == (8, 3, 32, 32) and view.dtype == torch.float32


def test_images_of_another_kind_are_refused():
    for images, message in [
        (torch.zeros(2, 3, 8, 8), r"must be uint8 .*torch.float32 of shape \(2, 3, 8, 8\)"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), r"shape \(3, 8, 8\)"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "need images of 3 channels, got 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            TwoViews(NATURAL, MEAN, STD, 0)(images, torch.arange(len(images)), 0)


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="mode must be one of fused, exact, got 'fast'"):
        TwoViews(NATURAL, MEAN, STD, 0, mode="fast")
