"""Measures of reconstructions: torchmetrics, loops, closed forms."""

import math

import pytest
import torch
import torchvision

from hf_dpssl.evaluation import lpips, psnr, ssim


def pair(*shape: int, noise: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(shape, generator=generator) * 2 - 1
    return images, (images + noise * torch.randn(shape, generator=generator)).clamp(-1, 1)


@pytest.mark.parametrize("shape", [(3, 3, 32, 40), (70, 1, 16, 16), (2, 1, 6, 9)])
@pytest.mark.parametrize("noise", [0.01, 0.5])
def test_ssim_equals_torchmetrics(shape, noise):
    functional = pytest.importorskip("torchmetrics.functional.image")
    images, reconstructions = pair(*shape, noise=noise)
    theirs = functional.structural_similarity_index_measure
    expected = float(theirs(reconstructions.double(), images.double(), data_range=2.0))
    assert ssim(images, reconstructions) == {"ssim": pytest.approx(expected, abs=1e-5)}
    half = ssim((images + 1) / 2, (reconstructions + 1) / 2, value_range=1.0)["ssim"]
    expected = float(theirs((reconstructions.double() + 1) / 2, (images.double() + 1) / 2, data_range=1.0))
    assert half == pytest.approx(expected, abs=1e-5)


def test_ssim_of_tiny_images_says_its_window_and_equals_the_loop():
    images, reconstructions = pair(2, 1, 3, 4)
    found = ssim(images, reconstructions, sigma=0.8)
    assert found["ssim_window"] == 5
    weights = [math.exp(-0.5 * (o / 0.8) ** 2) for o in range(-2, 3)]

    def reflected(index: int, size: int) -> int:
        return -index if index < 0 else 2 * (size - 1) - index if index >= size else index

    values = []
    for x, y in zip(images[:, 0].double().tolist(), reconstructions[:, 0].double().tolist(), strict=True):
        for row in range(3):
            for column in range(4):
                window = [
                    (a * b, x[reflected(row + i - 2, 3)][reflected(column + j - 2, 4)],
                     y[reflected(row + i - 2, 3)][reflected(column + j - 2, 4)])
                    for i, a in enumerate(weights) for j, b in enumerate(weights)
                ]  # fmt: skip
                total = sum(w for w, _, _ in window)
                mean_x, mean_y = (sum(v[0] * v[k] for v in window) / total for k in (1, 2))
                var_x = sum(w * (p - mean_x) ** 2 for w, p, _ in window) / total
                var_y = sum(w * (q - mean_y) ** 2 for w, _, q in window) / total
                cov = sum(w * (p - mean_x) * (q - mean_y) for w, p, q in window) / total
                c_1, c_2 = 0.02**2, 0.06**2
                values.append(
                    (2 * mean_x * mean_y + c_1) * (2 * cov + c_2)
                    / ((mean_x**2 + mean_y**2 + c_1) * (var_x + var_y + c_2))
                )  # fmt: skip
    assert found["ssim"] == pytest.approx(sum(values) / len(values), abs=1e-9)


def test_equal_images_have_ssim_1_and_infinite_psnr():
    images, _ = pair(2, 3, 16, 16)
    assert ssim(images, images)["ssim"] == pytest.approx(1, abs=1e-9)
    assert psnr(images, images)["psnr"] == math.inf


def test_psnr_is_the_mean_over_images_of_the_closed_form():
    images = torch.zeros(2, 1, 4, 4)
    reconstructions = torch.stack([torch.full((1, 4, 4), 0.2), torch.full((1, 4, 4), 0.02)])
    assert psnr(images, reconstructions)["psnr"] == pytest.approx((20 + 40) / 2, rel=1e-5)


def test_psnr_of_one_image_equals_torchmetrics():
    functional = pytest.importorskip("torchmetrics.functional.image")
    images, reconstructions = pair(1, 3, 9, 9)
    expected = float(functional.peak_signal_noise_ratio(reconstructions, images, data_range=2.0))
    assert psnr(images, reconstructions)["psnr"] == pytest.approx(expected, rel=1e-5)


def test_lpips_without_weights_says_where_they_go(tmp_path, monkeypatch):
    pytest.importorskip("torchmetrics")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for scheme in ("http", "https"):  # nobody listens there
        monkeypatch.setenv(f"{scheme}_proxy", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"'squeeze' failed.*checkpoints"):
        lpips(*pair(1, 3, 32, 32), network="squeeze")


def test_lpips_is_the_mean_over_images_and_grey_is_repeated(tmp_path, monkeypatch):
    pytest.importorskip("torchmetrics")
    # Random weights under the name of the file that would be downloaded.
    name = torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1]
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(torchvision.models.squeezenet1_1().state_dict(), tmp_path / "hub" / "checkpoints" / name)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    images, reconstructions = pair(70, 1, 32, 32)
    found = lpips(images, reconstructions, network="squeeze")["lpips"]
    colour = [part.expand(-1, 3, -1, -1) for part in (images, reconstructions)]
    single = [lpips(x[None], y[None], network="squeeze")["lpips"] for x, y in zip(*colour, strict=True)]
    assert found == pytest.approx(sum(single) / 70, rel=1e-4) and found > 0
    assert lpips(images, images, network="squeeze")["lpips"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("measure", [psnr, ssim, lpips])
def test_bad_input_is_refused_with_what_was_given(measure):
    images, _ = pair(2, 3, 32, 32)
    with pytest.raises(ValueError, match=r"\(2, 3, 32, 32\) and \(2, 3, 32, 31\)"):
        measure(images, images[..., :31])
    with pytest.raises(ValueError, match="not empty"):
        measure(images[:0], images[:0])


def test_options_outside_their_range_are_refused():
    images, _ = pair(2, 3, 32, 32)
    for options in ({"window": 8}, {"value_range": 0.0}, {"sigma": -1.0}):
        with pytest.raises(ValueError, match="window must be odd"):
            ssim(images, images, **options)
    with pytest.raises(ValueError, match="network must be one of"):
        lpips(images, images, network="resnet")
    with pytest.raises(ValueError, match="at least 32"):
        lpips(images[..., :16, :16], images[..., :16, :16])
