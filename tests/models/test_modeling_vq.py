"""The VQ autoencoder: parts and whole, decoder exchange, frozen encoder, latent statistics, checkpoints."""

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import for_each
from diffusers.models.autoencoders.vae import Decoder, Encoder
from safetensors.torch import load_file, save_file
from tiny_autoencoders import SMALL, images, make, same, state, train_steps
from transformers import AutoConfig, AutoModel

from hf_dpssl import VQAutoencoder, VQConfig
from hf_dpssl.models.modeling_vq import FROZEN_MODULES

# Construction.


def diffusers_decoder(block_out_channels: tuple[int, ...], layers_per_block: int) -> Decoder:
    return Decoder(
        in_channels=3, out_channels=3, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=block_out_channels, layers_per_block=layers_per_block, norm_num_groups=4,
    )  # fmt: skip


def test_encoder_and_decoder_start_with_diffusers_own_weights():
    torch.manual_seed(3)
    encoder = Encoder(
        in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 2, block_out_channels=(8, 16),
        layers_per_block=1, norm_num_groups=4, double_z=False,
    )  # fmt: skip
    torch.nn.Conv2d(3, 3, 1), torch.randn(12, 3), torch.nn.Conv2d(3, 3, 1)  # as many random numbers as between them
    decoder = diffusers_decoder((8, 16), 1)
    torch.manual_seed(3)
    model = VQAutoencoder(VQConfig(**SMALL))
    assert same(state(model.encoder), state(encoder))
    assert same(state(model.decoder), state(decoder))


def test_config_refuses_what_is_not_defined_and_says_what_is():
    for options, message in [
        ({"quantizer": "gumbel"}, "'vq', 'kl', 'none'"),
        ({"reconstruction_loss": "huber"}, "'l2', 'l1'"),
        ({"decoder_block_out_channels": [8, 8, 16]}, "same number of levels"),
        ({"norm_num_groups": 3}, "norm_num_groups=3 must divide every width"),
        ({"image_size": 9}, "multiple of the downsampling factor 2"),
        *[({"decoder_dropout": value}, r"\[0, 1\)") for value in (1.0, -0.1)],
        *[({name: 0}, f"{name} must be at least 1") for name in ("norm_num_groups", "latent_channels", "num_codes")],
        *[({name: 0}, f"{name} must be at least 1") for name in ("image_size", "num_channels")],
        *[({"encoder_layers_per_block": value}, "at least 1") for value in (0, -1)],
    ]:
        with pytest.raises(ValueError, match=message):
            VQConfig(**(SMALL | options))


# Parts and whole.


def test_encode_quantize_decode_and_forward_agree():
    model = make()
    with torch.no_grad():
        output, encoded = model(images(1)), model.encode(images(1))
        quantized = model.quantize(encoded.latents)
        assert encoded.latents.shape == (4, 3, 4, 4) and encoded.codes.shape == (4, 4, 4)
        assert torch.equal(encoded.latents, output.latents) and torch.equal(encoded.codes, output.codes)
        assert torch.equal(quantized.codes, encoded.codes)
        assert torch.equal(quantized.quantized, model.quantizer.lookup(encoded.codes))
        assert torch.equal(model.decode(quantized.quantized).pixel_values, output.pixel_values)
        assert torch.equal(model.decode_codes(encoded.codes).pixel_values, output.pixel_values)
        assert not torch.equal(model.decode(encoded.latents).pixel_values, output.pixel_values)


def test_loss_terms_are_those_of_the_formula():
    for name, power in [("l2", 2), ("l1", 1)]:
        model = make(reconstruction_loss=name, commitment_weight=0.4)
        output = model(images(1))
        recon = (output.pixel_values - images(1)).abs().pow(power).mean()
        commit = (output.latents - model.quantizer.lookup(output.codes)).pow(2).mean()
        torch.testing.assert_close((output.recon, output.commit), (recon, commit))
        torch.testing.assert_close(output.loss, recon + 0.4 * commit)
        usage = torch.bincount(output.codes.flatten(), minlength=12) / output.codes.numel()
        torch.testing.assert_close(output.perplexity.log(), -(usage * usage.clamp_min(1e-9).log()).sum())


def test_gradient_reaches_the_encoder_through_the_quantiser_and_not_the_codebook():
    model = make()
    encoder = [*model.encoder.parameters(), *model.quant_conv.parameters()]
    found = torch.autograd.grad(model(images()).recon, encoder)
    # Straight through: the gradient of the quantised value is put on the latents.
    latents = model.encode(images()).latents
    quantized = model.quantize(latents).quantized.detach().requires_grad_()
    recon = (model.decode(quantized).pixel_values - images()).pow(2).mean()
    expected = torch.autograd.grad(latents, encoder, torch.autograd.grad(recon, quantized))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
        assert other.abs().sum() > 0
    assert not any(name.startswith("quantizer") for name, _ in model.named_parameters())


def test_autoencoder_without_quantiser_decodes_its_latents_and_has_no_codes():
    model = make(quantizer="none")
    output = model(images())
    assert output.codes is None and output.perplexity is None and float(output.commit) == 0
    assert torch.equal(output.loss, F.mse_loss(output.pixel_values, images()))
    assert model.encode(images()).codes is None
    for call in (lambda: model.quantize(output.latents), lambda: model.decode_codes(torch.zeros(1, 4, 4).long())):
        with pytest.raises(ValueError, match="no codebook"):
            call()


def test_images_of_wrong_size_are_refused():
    for shape in [(4, 1, 8, 8), (3, 8, 8), (4, 3, 7, 8), (4, 3, 8, 9)]:
        with pytest.raises(ValueError, match=r"must be \(B, 3, H, W\)|multiples of 2"):
            make()(torch.zeros(shape))


def test_codes_outside_the_codebook_are_refused():
    with pytest.raises(IndexError, match=r"\[0, 11\]"):
        make().decode_codes(torch.full((1, 4, 4), 12))


def test_images_of_another_size_than_the_configs_are_encoded_and_decoded():
    assert make()(torch.zeros(1, 3, 16, 4)).pixel_values.shape == (1, 3, 16, 4)


# Decoupled training.


def test_replaced_decoder_is_fresh_and_nothing_else_changes():
    model = make(decoder_dropout=0.5)
    old = state(model)
    torch.manual_seed(5)
    model.replace_decoder([8, 24], 2, dropout=0.1)
    assert same(state(model, *FROZEN_MODULES), {k: v for k, v in old.items() if k.split(".")[0] in FROZEN_MODULES})
    torch.manual_seed(5)
    post_quant_conv, decoder = torch.nn.Conv2d(3, 3, 1), diffusers_decoder((8, 24), 2)
    assert same(state(model.post_quant_conv), state(post_quant_conv)) and same(state(model.decoder), state(decoder))
    assert model.config.decoder_block_out_channels == [8, 24] and model.config.decoder_layers_per_block == 2
    assert {m.p for m in model.decoder.modules() if isinstance(m, torch.nn.Dropout)} >= {0.1}
    assert 0.5 not in {m.p for m in model.decoder.modules() if isinstance(m, torch.nn.Dropout)}
    assert model(images()).pixel_values.shape == (4, 3, 8, 8) and not model.decoder.training


def test_refused_decoder_leaves_model_and_config_as_they_were():
    model = make()
    before, config = state(model), model.config.to_dict()
    for arguments in (([8], 1), ([8, 15], 1), ([8, 16], 0), ([8, 16], 1, 1.0)):
        with pytest.raises(ValueError):
            model.replace_decoder(*arguments)
    assert same(state(model), before) and model.config.to_dict() == config


def test_decoder_dropout_is_only_in_the_decoder_and_only_in_train_mode():
    model = make(decoder_dropout=0.5)
    assert {m.p for m in model.encoder.modules() if isinstance(m, torch.nn.Dropout)} <= {0.0}
    codes = model.encode(images()).codes
    assert torch.equal(model.decode_codes(codes).pixel_values, model.decode_codes(codes).pixel_values)
    model.train()
    assert not torch.equal(model.decode_codes(codes).pixel_values, model.decode_codes(codes).pixel_values)


def test_frozen_encoder_takes_no_update_in_train_mode_also_after_loading(tmp_path):
    model = make()
    hashes = model.freeze_encoder()
    assert hashes.keys() == state(model, *FROZEN_MODULES).keys()
    model.save_pretrained(tmp_path)
    loaded = VQAutoencoder.from_pretrained(tmp_path)
    for frozen in (model.train(), loaded.train()):
        before = state(frozen)
        train_steps(frozen)
        assert same(state(frozen, *FROZEN_MODULES), {k: before[k] for k in hashes})
        assert not any(torch.equal(value, before[name]) for name, value in state(frozen, "decoder").items())
        assert not frozen.encoder.training and frozen.decoder.training
        assert frozen.config.encoder_sha256 == hashes
        frozen.check_encoder_unchanged()


def test_unfrozen_encoder_and_codebook_are_updated_in_train_mode():
    model = make().train()
    before = state(model)
    train_steps(model)
    changed = {name for name, value in state(model).items() if not torch.equal(value, before[name])}
    assert {name for name, _ in model.named_parameters()} | {"quantizer.codebook", "quantizer.sums"} <= changed


def test_tampering_with_a_frozen_tensor_is_detected_by_name():
    for name in ["encoder.conv_in.bias", "quant_conv.weight", "quantizer.codebook", "quantizer.counts"]:
        model = make()
        model.freeze_encoder()
        model.state_dict()[name].view(-1)[0] += 1e-3
        with pytest.raises(RuntimeError, match=f"1 frozen tensors.*{name}"):
            model.check_encoder_unchanged()


def test_decoder_is_not_part_of_the_fingerprint_and_the_codebook_is():
    model = make()
    before = model.fingerprint()
    model.freeze_encoder()
    model.replace_decoder([8, 16], 1)
    assert model.fingerprint() == before
    model.quantizer.codebook[0, 0] += 1
    assert model.fingerprint() != before


# Latent statistics.


def test_normalised_latents_have_zero_mean_and_unit_variance_and_come_back():
    model = make()
    latents = model.encode(images(1)).latents.detach()
    with pytest.raises(ValueError, match="latent_mean and latent_std"):
        model.normalize_latents(latents)
    model.config.latent_mean = latents.mean((0, 2, 3)).tolist()
    with pytest.raises(ValueError, match="latent_mean and latent_std"):
        model.denormalize_latents(latents)
    model.config.latent_std = latents.std((0, 2, 3)).tolist()
    normalized = model.normalize_latents(latents)
    torch.testing.assert_close(normalized.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(normalized.std((0, 2, 3)), torch.ones(3))
    torch.testing.assert_close(model.denormalize_latents(normalized), latents)


# Checkpoints.


@pytest.mark.parametrize("quantizer", ["vq", "none"])
def test_saved_autoencoder_comes_back_bit_equal(quantizer, tmp_path):
    model = make(quantizer=quantizer, latent_mean=[0.1, 0.2, 0.3], latent_std=[1.0, 2.0, 3.0], decoder_dropout=0.25)
    model.replace_decoder([16, 24], 2, 0.125)
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is VQConfig
    for loaded in (VQAutoencoder.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert type(loaded) is VQAutoencoder and not loaded.training
        assert same(state(loaded), state(model))
        assert torch.equal(loaded(images(1)).pixel_values, model(images(1)).pixel_values)
        assert loaded.config.latent_std == [1.0, 2.0, 3.0] and loaded.fingerprint() == model.fingerprint()


@for_each("missing", ["quantizer.codebook", "encoder.conv_in.weight", "decoder.conv_out.bias"])
def test_incomplete_checkpoint_is_refused_by_name(missing, tmp_path):
    make().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[missing]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks 1 tensors of VQAutoencoder .*{missing}"):
        VQAutoencoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_codebook_in_float32_and_the_fingerprint(dtype, tmp_path):
    model = make()
    model.freeze_encoder()
    model.save_pretrained(tmp_path)
    for half in (VQAutoencoder.from_pretrained(tmp_path, dtype=dtype), copy.deepcopy(model).to(dtype)):
        assert half.encoder.conv_in.weight.dtype == dtype
        assert half.quantizer.codebook.dtype == torch.float32
        assert torch.equal(half.quantizer.codebook, model.quantizer.codebook)
        assert half.fingerprint() == model.fingerprint()
        output = half(images())
        assert output.pixel_values.dtype == dtype and output.loss.dtype == torch.float32
        assert F.mse_loss(output.pixel_values.float(), images()) < 2 * model(images()).recon
