"""Images decoded beside latents of images: iFID between neighbours, pFID of near codes, and nats per pixel value."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from hf_dpssl import VQAutoencoder, VQConfig
from hf_dpssl.autoencoder import measures
from hf_dpssl.autoencoder.latent_neighbours import (
    CODE_NEIGHBOURS,
    CODE_SHARE,
    decoded_interpolations,
    decoded_perturbations,
    interpolated_latents,
    perturbed_codes,
)
from hf_dpssl.autoencoder.measures import Encoded, Pictures, description_length, encode_and_decode, measure_autoencoder
from hf_dpssl.embedding.feature_extractors import FeatureExtractor

SMALL = {"image_size": 16, "encoder_block_out_channels": [8, 16], "norm_num_groups": 4, "mid_block_attention": False}


def make(**options) -> VQAutoencoder:
    torch.manual_seed(0)
    return VQAutoencoder(VQConfig(**SMALL | {"num_codes": 32} | options)).eval()


def pictures(count: int, seed: int) -> Pictures:
    drawn = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return Pictures(drawn, torch.full((count,), -1))


def pixels_of(images: torch.Tensor) -> torch.Tensor:
    return images[:, :, ::8, ::8].flatten(1).float()


EXTRACTOR = FeatureExtractor("pixels", pixels_of, weights={}, resize="none")


def test_latents_are_interpolated_with_their_nearest_as_by_a_loop():
    random = torch.Generator().manual_seed(0)
    latents, bank = torch.randn(300, 2, 2, 2, generator=random), torch.randn(40, 2, 2, 2, generator=random)
    found = interpolated_latents(latents, bank, share=0.25)
    for latent, between in zip(latents.numpy(), found.numpy(), strict=True):
        distances = [np.square(latent - other).sum() for other in bank.numpy()]
        np.testing.assert_allclose(between, 0.75 * latent + 0.25 * bank[int(np.argmin(distances))].numpy(), atol=1e-6)
    for wrong in (bank[:0], bank[:, :1]):
        with pytest.raises(ValueError, match="the bank must be"):
            interpolated_latents(latents, wrong)


def test_a_share_of_the_codes_becomes_one_of_their_nearest_others():
    random = torch.Generator().manual_seed(0)
    codebook = torch.randn(20, 3, generator=random)
    codes = torch.randint(20, (500, 4, 4), generator=random)
    changed = perturbed_codes(codes, codebook, share=0.3, neighbours=4, seed=1)
    moved = changed != codes
    assert float(moved.float().mean()) == pytest.approx(0.3, abs=0.02)
    seen: dict[int, list[int]] = {code: [] for code in range(20)}
    for old, new in zip(codes[moved].tolist(), changed[moved].tolist(), strict=True):
        seen[old].append(new)
    for code, others in seen.items():
        order = sorted(range(20), key=lambda other: float((codebook[other] - codebook[code]).square().sum()))
        shares = np.bincount(others, minlength=20)[order[1:5]] / len(others)
        assert set(others) == set(order[1:5]) and shares == pytest.approx(np.full(4, 0.25), abs=0.12)
    assert torch.equal(perturbed_codes(codes, codebook, share=0.0, neighbours=4, seed=1), codes)
    assert torch.equal(perturbed_codes(codes, codebook, share=0.3, neighbours=4, seed=1), changed)
    for share, neighbours in ((1.1, 4), (0.3, 0), (0.3, 20)):
        with pytest.raises(ValueError, match="share lies in"):
            perturbed_codes(codes, codebook, share=share, neighbours=neighbours, seed=0)


def test_measures_are_of_the_images_that_the_decoder_makes_of_them():
    model = make()
    train, test = pictures(40, 0), pictures(30, 1)
    found, _ = measure_autoencoder(model, train, test, extractor=EXTRACTOR, parts=("reconstruction", "neighbours"))
    own, _ = measure_autoencoder(model, test, test, extractor=EXTRACTOR, parts=("reconstruction", "neighbours"))
    assert own["ifid_pixels"] == pytest.approx(own["rfid_pixels"])  # the nearest to a latent is itself
    assert {"ifid_pixels", "pfid_pixels"} <= found.keys() and found["ifid_pixels"] != found["rfid_pixels"]
    latents = [encode_and_decode(model, part.pixel_values).latents for part in (test, train)]
    between = interpolated_latents(*latents)
    with torch.no_grad():
        nearest = torch.cdist(between.permute(0, 2, 3, 1).flatten(0, 2), model.quantizer.codebook).argmin(1)
        images = model.decode_codes(nearest.view(30, 8, 8)).pixel_values.clamp(-1, 1)
        torch.testing.assert_close(decoded_interpolations(model, *latents, batch_size=7), images, atol=1e-5, rtol=0)
        codes = model.encode(test.pixel_values).codes
        near = {"share": CODE_SHARE, "neighbours": round(CODE_NEIGHBOURS * 31)}
        changed = perturbed_codes(codes, model.quantizer.codebook, **near, seed=5)
        images = model.decode_codes(changed).pixel_values.clamp(-1, 1)
        torch.testing.assert_close(decoded_perturbations(model, codes, 5, batch_size=7), images, atol=1e-5, rtol=0)


def test_without_codes_there_is_no_pfid_and_without_extractor_neither():
    model = make(quantizer="kl")
    train, test = pictures(20, 0), pictures(20, 1)
    found, _ = measure_autoencoder(model, train, test, extractor=EXTRACTOR, parts=("neighbours",))
    assert found.keys() == {"ifid_pixels"}
    assert measure_autoencoder(model, train, test, parts=("neighbours",))[0] == {}


def test_nats_per_pixel_are_those_of_codes_and_of_normal_residuals():
    random = np.random.default_rng(0)
    test = pictures(400, 2)
    residuals = torch.from_numpy(random.normal(0, 0.2, size=test.pixel_values.shape))
    encoded = Encoded(torch.zeros(1), None, test.pixel_values + residuals)
    found = description_length(test, encoded, prior_nats=96.0)["nats_per_pixel"]
    by_density = -norm.logpdf(residuals.numpy(), scale=0.2).mean()
    assert found == pytest.approx(96 / 768 + by_density, abs=1e-3)
    whole = Encoded(torch.zeros(1), None, test.pixel_values)
    assert math.isfinite(description_length(test, whole, 1.0)["nats_per_pixel"])


def test_the_report_adds_nats_per_pixel_to_those_of_the_prior(monkeypatch):
    monkeypatch.setattr(measures.evaluation, "code_prior", lambda *codes, seed: {"prior_nats": 768.0})
    test = pictures(20, 1)
    found, _ = measure_autoencoder(make(), pictures(20, 0), test, parts=("prior",))
    error = float((encode_and_decode(make(), test.pixel_values).reconstructions - test.pixel_values).square().mean())
    assert found["nats_per_pixel"] == pytest.approx(1 + 0.5 * math.log(2 * math.pi * math.e * error), rel=1e-5)
