"""Pictures of another range or type than the one asked for are refused wherever pixel values come in."""

import pytest
import torch
from tiny_checkpoints import autoencoder_model, gan_model

from hf_dpssl import evaluation
from hf_dpssl.autoencoder import latent_codec
from hf_dpssl.embedding.feature_extractors import FeatureExtractor


def extractor() -> FeatureExtractor:
    def function(images):
        return images.flatten(1).float()[:, :4]

    return FeatureExtractor("pixels", function, weights={}, resize="none", device="cpu")


def pictures(count: int = 8) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_bytes_normalised_pictures_and_nan_are_refused_by_every_encoder_extractor_and_metric():
    good = pictures()
    judge, vae, gan = extractor(), autoencoder_model(), gan_model()
    takers = {
        "encode": vae.encode,
        "the pipelines' encode": lambda x: latent_codec.encode(vae, x),
        "VAEGAN.encode": gan.encode,
        "extractor": judge.features,
        "image_quality, real": lambda x: evaluation.image_quality(x, good, judge, measures=("fid",)),
        "image_quality, generated": lambda x: evaluation.image_quality(good, [x], judge, measures=("fid",)),
        "psnr": lambda x: evaluation.psnr(x, good),
        "ssim": lambda x: evaluation.ssim(good, x),
    }
    nan = good.clone()
    nan[1, 2, 3, 4] = torch.nan
    bad = {"0 to 255": (good + 1) * 127.5, "NaN": nan, "normalised": good / 0.229}
    for name, take in takers.items():
        take(good)
        for kind, images in bad.items():
            with pytest.raises(ValueError, match=r"finite and (lie in \[-1, 1\]|span at most value_range=2), got"):
                take(images)
                pytest.fail(f"{name} takes pictures of {kind}")
        if name not in ("psnr", "ssim"):
            with pytest.raises(ValueError, match=r"float \(B, C, H, W\) in \[-1, 1\], got uint8"):
                take(bad["0 to 255"].byte())


@pytest.mark.filterwarnings("ignore")
def test_pictures_from_0_to_1_are_refused_where_a_whole_set_shows_it():
    """They would pass for washed-out ones: the distance of both sets would be a quarter, that of one far too large."""
    good, judge = pictures(), extractor()
    half = good / 2 + 0.5
    for real, generated, name in [(half, half, "real"), (good, half, "generated"), (half, good, "real")]:
        with pytest.raises(ValueError, match=rf"no pixel of the {name} images is darker.*2 \* x - 1"):
            evaluation.image_quality(real, generated, judge, measures=("fid",))
    features = judge.features(half)  # the way out for pictures that are so bright
    assert evaluation.image_quality(good, features, judge, measures=("fid",))["fid_pixels"] > 0
    for measure in (evaluation.psnr, evaluation.ssim):
        with pytest.raises(ValueError, match="Give value_range=1"):
            measure(half, half.flip(0))
        with pytest.raises(ValueError, match="span at most value_range=1"):
            measure(good, good.flip(0), value_range=1.0)
    in_unit = evaluation.psnr(half, half.flip(0), value_range=1.0)["psnr"]
    assert in_unit == pytest.approx(evaluation.psnr(good, good.flip(0))["psnr"], abs=1e-4)
