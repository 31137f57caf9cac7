"""Views of autoencoders: PSNR, codes and ends of a morph against the model called by hand."""

import matplotlib
import numpy as np
import pytest
import torch
from pictures import noise
from PIL import Image
from tiny_pipelines import make_vae

from hf_dpssl.evaluation import psnr
from hf_dpssl.pages.latent_views import code_colours, cross_fade, morph, pixel_values, view


@pytest.fixture(scope="module")
def vae():
    return make_vae()


def picture(seed: int = 0, height: int = 16, width: int = 16) -> Image.Image:
    return Image.fromarray(noise(seed, height, width))


def test_view_holds_the_psnr_and_the_codes_of_the_model(vae):
    seen, images = view(picture(), vae), pixel_values(picture(), vae)
    with torch.no_grad():
        output = vae(images)
    expected = psnr(images, output.pixel_values.clamp(-1, 1))["psnr"]
    assert seen.psnr == pytest.approx(expected, abs=1e-3)
    assert seen.different_codes == len(output.codes.unique()) and seen.cells == 16
    assert seen.codes.size == (4, 4) and seen.errors.size == seen.reconstruction.size == (16, 16)


def test_cells_of_equal_codes_and_only_those_have_equal_colours(vae):
    colours = code_colours(vae)
    assert colours.shape == (16, 3) and 0 <= float(colours.min()) and float(colours.max()) <= 1
    seen = view(picture(), vae)
    with torch.no_grad():
        codes = vae.encode(pixel_values(picture(), vae)).codes[0].flatten().tolist()
    drawn = [tuple(colour) for colour in np.asarray(seen.codes).reshape(-1, 3).tolist()]
    shown = {code: colour for code, colour in zip(codes, drawn, strict=True)}
    assert [shown[code] for code in codes] == drawn


def test_errors_of_pixels_run_through_the_colours_up_to_15_percent(vae, monkeypatch):
    """A decoder that repeats a grey picture lighter column by column: an error of 0, 2, 4, ... 30 levels of 255."""
    grey = Image.new("RGB", (16, 16), (100, 100, 100))
    levels = 100 + 2 * torch.arange(16).expand(1, 3, 16, 16)
    lighter = type("Output", (), {"pixel_values": levels / 127.5 - 1})
    monkeypatch.setattr(vae, "decode", lambda latents: lighter)
    errors = np.asarray(view(grey, vae).errors).astype(int)
    wanted = matplotlib.colormaps["inferno"](2 * np.arange(16) / 255 / 0.15)[:, :3] * 255
    assert np.abs(errors - wanted[None]).max() <= 1.5


@pytest.mark.parametrize("quantize", [True, False])
def test_ends_of_a_morph_are_the_two_pictures_of_the_model(vae, quantize):
    way = morph(picture(0), picture(1), vae, 5, quantize=quantize)
    assert len(way) == 5
    with torch.no_grad():
        for end, seed in ((way[0], 0), (way[-1], 1)):
            latents = vae.encode(pixel_values(picture(seed), vae)).latents
            latents = vae.quantize(latents).quantized if quantize else latents
            expected = (vae.decode(latents).pixel_values[0].clamp(-1, 1) + 1) * 127.5
            expected = expected.round().permute(1, 2, 0).numpy()
            assert np.abs(np.asarray(end).astype(float) - expected).max() <= 1


def test_middle_of_a_cross_fade_is_the_mean_of_the_pixels(vae):
    middle = np.asarray(cross_fade(picture(0), picture(1), vae, 3)[1]).astype(float)
    mean = (noise(0, 16, 16).astype(float) + noise(1, 16, 16)) / 2
    assert np.abs(middle - mean).max() <= 1


def test_a_picture_of_any_shape_is_cropped_to_the_models_size_and_a_morph_of_one_is_refused(vae):
    assert pixel_values(picture(0, 40, 90), vae).shape == (1, 3, 16, 16)
    with pytest.raises(ValueError, match="at least 2"):
        morph(picture(0), picture(1), vae, 1)


def test_an_autoencoder_without_codebook_has_no_map_of_codes():
    seen = view(picture(), make_vae(quantizer="none"))
    assert seen.codes is None and seen.different_codes == 0
