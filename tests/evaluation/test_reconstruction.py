"""Measures of reconstructions: loops and closed forms."""

import math

import pytest
import torch
import torchvision

from hf_dpssl.evaluation import lpips, psnr, reconstruction, ssim


def pair(*shape: int, noise: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(shape, generator=generator) * 2 - 1
    return images, (images + noise * torch.randn(shape, generator=generator)).clamp(-1, 1)


def ssim_by_loop(images: torch.Tensor, reconstructions: torch.Tensor, reach: int, sigma: float) -> float:
    """Of images in [-1, 1], window by window."""
    height, width = images.shape[2:]
    weights = [math.exp(-0.5 * (o / sigma) ** 2) for o in range(-reach, reach + 1)]

    def reflected(index: int, size: int) -> int:
        return -index if index < 0 else 2 * (size - 1) - index if index >= size else index

    values = []
    pairs = zip(images.flatten(0, 1).double().tolist(), reconstructions.flatten(0, 1).double().tolist(), strict=True)
    for x, y in pairs:
        for row in range(height):
            for column in range(width):
                window = []
                for i, a in enumerate(weights):
                    for j, b in enumerate(weights):
                        place = reflected(row + i - reach, height), reflected(column + j - reach, width)
                        window.append((a * b, x[place[0]][place[1]], y[place[0]][place[1]]))
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
    return sum(values) / len(values)


def test_ssim_equals_the_loop_and_of_tiny_images_says_its_window():
    for shape, noise in (((2, 1, 6, 9), 0.5), ((1, 3, 12, 8), 0.01)):
        images, reconstructions = pair(*shape, noise=noise)
        expected = pytest.approx(ssim_by_loop(images, reconstructions, 5, 1.5), abs=1e-5)
        assert ssim(images, reconstructions) == {"ssim": expected}
        halves = (images + 1) / 2, (reconstructions + 1) / 2
        shifted = [2 * half - 1 for half in halves]
        assert ssim(*shifted) == {"ssim": expected}
        bytes_ = [255 * half for half in halves]
        by_range = [ssim(*halves, value_range=1.0)["ssim"], ssim(*bytes_, value_range=255.0)["ssim"]]
        assert by_range[0] == pytest.approx(by_range[1], abs=1e-5)
    images, reconstructions = pair(2, 1, 3, 4)
    expected = ssim_by_loop(images, reconstructions, 2, 2 / 3.5)
    assert ssim(images, reconstructions) == {"ssim": pytest.approx(expected, abs=1e-5), "ssim_window": 5}


def test_many_images_are_the_mean_of_each():
    images, reconstructions = pair(70, 1, 8, 8)  # more than one chunk
    single = [ssim(x[None], y[None])["ssim"] for x, y in zip(images, reconstructions, strict=True)]
    assert ssim(images, reconstructions)["ssim"] == pytest.approx(sum(single) / 70, abs=1e-6)


def test_equal_images_have_ssim_1_and_infinite_psnr():
    images, _ = pair(2, 3, 16, 16)
    assert ssim(images, images)["ssim"] == pytest.approx(1, abs=1e-9)
    assert psnr(images, images)["psnr"] == math.inf


def test_psnr_is_the_mean_over_images_of_the_closed_form():
    images = torch.full((2, 1, 4, 4), -0.25)
    reconstructions = images + torch.tensor([0.2, 0.002])[:, None, None, None]
    assert psnr(images, reconstructions)["psnr"] == pytest.approx((20 + 60) / 2, rel=1e-5)
    for error, value_range in ((0.01, 2.0), (0.1, 1.0), (25.5, 255.0)):
        found = psnr(images.double(), images.double() + error, value_range=value_range)["psnr"]
        assert found == pytest.approx(20 * math.log10(value_range / error))


def test_lpips_without_weights_says_where_they_go(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for scheme in ("http", "https"):  # nobody listens there
        monkeypatch.setenv(f"{scheme}_proxy", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"'squeeze' failed.*checkpoints"):
        lpips(*pair(1, 3, 32, 32), network="squeeze")


def test_lpips_is_the_mean_over_images_and_grey_is_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr(reconstruction, "_CHUNK", 2)
    # Random weights under the name of the file that would be downloaded.
    name = torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1]
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(torchvision.models.squeezenet1_1().state_dict(), tmp_path / "hub" / "checkpoints" / name)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    images, reconstructions = pair(3, 1, 32, 32)
    found = lpips(images, reconstructions, network="squeeze")["lpips"]
    colour = [part.expand(-1, 3, -1, -1) for part in (images, reconstructions)]
    single = [lpips(x[None], y[None], network="squeeze")["lpips"] for x, y in zip(*colour, strict=True)]
    assert found == pytest.approx(sum(single) / 3, rel=1e-4) and found > 0
    assert lpips(images, images, network="squeeze")["lpips"] == pytest.approx(0, abs=1e-6)


def test_bad_input_is_refused_with_what_was_given():
    images, _ = pair(2, 3, 32, 32)
    for measure in (psnr, ssim, lpips):
        with pytest.raises(ValueError, match=r"\(2, 3, 32, 32\) and \(2, 3, 32, 31\)"):
            measure(images, images[..., :31])
        with pytest.raises(ValueError, match="not empty"):
            measure(images[:0], images[:0])
    for measure in (psnr, ssim):
        with pytest.raises(ValueError, match="value_range must be positive"):
            measure(images, images, value_range=0.0)
    with pytest.raises(ValueError, match="network must be one of"):
        lpips(images, images, network="resnet")
    with pytest.raises(ValueError, match="at least 32"):
        lpips(images[..., :16, :16], images[..., :16, :16])
