"""VAEGAN and DCGAN: shapes, latents, what generate promises, and checkpoints."""

import copy

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from transformers import AutoModel

from hf_dpssl import VAEGAN, VAEGANConfig

SMALL = {"image_size": 16, "width": 8, "latent_dim": 6}


def make(**options) -> VAEGAN:
    torch.manual_seed(0)
    return VAEGAN(VAEGANConfig(**SMALL | options)).eval()


def images(number: int = 3, size: int = 16) -> torch.Tensor:
    return torch.rand(number, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_images_have_the_configured_size_and_range_and_encoder_undoes_the_shape():
    for size in [8, 16, 64]:
        model = make(latent="vae", image_size=size)
        output = model(images(size=size), torch.zeros(3, 6), torch.randn(2, 6))
        assert output.pixel_values.shape == (3, 3, size, size) and output.generated.shape == (2, 3, size, size)
        assert float(output.generated.detach().abs().max()) <= 1
        assert output.mean.shape == output.log_variance.shape == (3, 6)


def test_kl_and_reconstruction_equal_torch_s():
    model = make(latent="vae")
    output = model(images(), torch.ones(3, 6))
    posterior = Normal(output.mean, (output.log_variance / 2).exp())
    expected = kl_divergence(posterior, Normal(0.0, 1.0)).sum(1).mean()
    torch.testing.assert_close(output.kl, expected)
    latents = output.mean + (output.log_variance / 2).exp()
    torch.testing.assert_close(output.pixel_values, model.decode(latents))
    torch.testing.assert_close(output.recon, (output.pixel_values - images()).abs().mean())


def test_generated_images_do_not_depend_on_the_batch_size_and_repeat_with_the_generator():
    for density in ["prior", "mixture", "held_out"]:
        model = make(density=density, components=2, bank_size=9 if density == "held_out" else 0)
        model.density.fit_(torch.randn(30, 6, generator=torch.Generator().manual_seed(0)))
        whole = model.generate(7, torch.Generator().manual_seed(1))
        parts = model.generate(7, torch.Generator().manual_seed(1), batch_size=2)
        torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-5)
        assert not torch.equal(whole, model.generate(7, torch.Generator().manual_seed(2)))


def test_half_precision_generates_encodes_and_decodes_what_float32_does_up_to_its_rounding():
    for density in ("full", "mixture", "held_out"):
        model = make(latent="vae", density=density, components=2, bank_size=9 if density == "held_out" else 0)
        model.density.fit_(torch.randn(30, 6, generator=torch.Generator().manual_seed(0)))
        expected = model.generate(4, 1), model(images(), torch.zeros(3, 6)).pixel_values
        for dtype in (torch.bfloat16, torch.float16):
            half = copy.deepcopy(model).to(dtype)
            found = half.generate(4, 1), half(images(), torch.zeros(3, 6)).pixel_values
            for ours, exact in zip(found, expected, strict=True):
                assert ours.dtype == dtype and (ours.float() - exact).abs().mean() < 0.02


def test_a_seed_is_its_generator_and_an_image_with_its_own_does_not_depend_on_the_others():
    model = make()
    assert torch.equal(model.generate(3, 5), model.generate(3, torch.Generator().manual_seed(5)))
    together = model.generate(3, (5, torch.Generator().manual_seed(6), 7))
    torch.testing.assert_close(together[1:2], model.generate(1, [6]), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="2 images need one generator or 2, got 3"):
        model.generate(2, [1, 2, 3])


def test_given_latents_are_decoded_in_order():
    model, latents = make(), torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.generate(latents=latents, batch_size=2), model.decode(latents))
    for arguments in ({}, {"num_images": 3, "latents": latents}):
        with pytest.raises(ValueError, match="num_images"):
            model.generate(**arguments)


def test_features_are_standardised_by_the_checkpoint_s_statistics(tmp_path):
    model, features = make(latent="simclr", features="features"), 3 * torch.randn(50, 6) + 1
    model.feature_mean.copy_(features.mean(0))
    model.feature_std.copy_(features.std(0))
    model.save_pretrained(tmp_path)
    latents = VAEGAN.from_pretrained(tmp_path).standardize(features)
    torch.testing.assert_close(latents.mean(0), torch.zeros(6), rtol=0, atol=1e-5)
    torch.testing.assert_close(latents.std(0), torch.ones(6))
    with pytest.raises(ValueError, match="another encoder's features"):
        make().standardize(features)


@pytest.mark.parametrize("options", [{}, {"latent": "dae", "density": "mixture", "components": 3}], ids=str)
def test_checkpoint_keeps_weights_and_fitted_density_for_auto_model_too(options, tmp_path):
    model = make(**options)
    model.density.fit_(torch.randn(50, 6, generator=torch.Generator().manual_seed(0)))
    model.save_pretrained(tmp_path)
    expected = model.generate(4, torch.Generator().manual_seed(0))
    for loaded in (VAEGAN.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert torch.equal(loaded.eval().generate(4, torch.Generator().manual_seed(0)), expected)


def test_generators_of_all_latents_have_the_same_shape_and_dropout_changes_no_start_of_an_encoder():
    shapes = {}
    for latent in ("noise", "simclr", "vae", "dae"):
        shapes[latent] = {name: value.shape for name, value in make(latent=latent).generator.state_dict().items()}
    assert all(found == shapes["noise"] for found in shapes.values())
    encoders = [dict(make(latent="dae", dropout=rate).encoder.state_dict()) for rate in (0.0, 0.3)]
    torch.testing.assert_close(encoders[0], encoders[1], rtol=0, atol=0)


def test_dropout_of_a_weak_generator_drops_whole_channels_in_training_only():
    model = make(dropout=0.5)
    latents = torch.randn(2, 6)
    assert torch.equal(model.decode(latents), model.decode(latents))
    hidden = latents
    for layer in list(model.train().generator)[:5]:
        hidden = layer(hidden)
    whole = (hidden == 0).flatten(2).all(2)
    assert bool(whole.any()) and not bool(whole.all())


def test_bad_input_is_refused_with_what_is_allowed():
    for options in ({"image_size": 24}, {"latent": "pixels"}, {"density": "uniform"}, {"width": 12}):
        with pytest.raises(ValueError):
            VAEGANConfig(**SMALL | options)
    with pytest.raises(ValueError, match="no encoder"):
        make().encode(images())
    with pytest.raises(ValueError, match=r"\(B, 3, 16, 16\)"):
        make(latent="vae").encode(images(size=8))
    with pytest.raises(ValueError, match=r"\(B, 6\)"):
        make().decode(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="batch_size"):
        make().generate(2, batch_size=0)
