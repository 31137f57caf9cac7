"""Spatial features of frozen encoders as latents: those of the encoder bit for bit, also after saving and elsewhere."""

import json

import pytest
import torch
from cases import for_each
from tiny_encoders import MEAN, RESNET, STD, encoder_folder

from hf_dpssl import VQAutoencoder
from hf_dpssl.convert.autoencoder_importers import convert_autoencoder
from hf_dpssl.models.backbone_encoder import BackboneEncoder, complete_backbone

CONVNEXT = {"patch_size": 1, "depths": [1, 1, 1, 1], "dims": [16, 16, 24, 32]}
VIT = {"img_size": 32, "patch_size": 4, "depth": 2, "embed_dim": 48, "num_heads": 3}
SWIN = {"img_size": 32, "patch_size": 2, "depths": [1, 1], "embed_dim": 16, "num_heads": [2, 2], "window_size": 4}


def normalized(pixel_values: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return ((pixel_values + 1) / 2 - mean) / std


def images(size: int = 32, channels: int = 3) -> torch.Tensor:
    return torch.rand(2, channels, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.extended
@for_each(
    "architecture, model_args, stem, reduction",
    [
        ("resnet18", RESNET, "small_image", 8),
        ("resnet18", RESNET, "small_image_linear", 8),
        ("convnext_atto", CONVNEXT, "timm", 8),
        ("vit_tiny_patch16_224", VIT, "timm", 4),
    ],
)
@torch.no_grad()
def test_latents_are_the_encoders_spatial_features_bit_for_bit(tmp_path, architecture, model_args, stem, reduction):
    encoder, x = encoder_folder(tmp_path / "encoder", architecture, model_args, stem), images()
    model = convert_autoencoder(tmp_path / "encoder")
    expected = encoder(normalized(x)).last_hidden_state
    if expected.ndim == 3:  # class token, then cells by rows
        expected = expected[:, 1:].mT.reshape(2, -1, 8, 8)
    latents = model.encode(x).latents
    assert torch.equal(latents, expected) and latents.shape[2] == 32 // reduction == model.config.latent_size
    assert model(x).pixel_values.shape == x.shape
    assert model.config.encoder_frozen and not any(p.requires_grad for p in model.encoder.parameters())
    model.save_pretrained(tmp_path / "autoencoder")
    again = VQAutoencoder.from_pretrained(tmp_path / "autoencoder").train()
    assert torch.equal(again.encode(x).latents, expected)  # batch norms stay in evaluation mode
    again.check_encoder_unchanged()
    assert again.fingerprint() == model.fingerprint()


@torch.no_grad()
def test_buffers_that_timm_recomputes_survive_saving(tmp_path):
    encoder, x = encoder_folder(tmp_path / "encoder", "swin_tiny_patch4_window7_224", SWIN), images()
    buffers = {name for name, _ in encoder.timm_model.named_buffers()}
    assert any("relative_position_index" in name for name in buffers - encoder.timm_model.state_dict().keys())
    model = convert_autoencoder(tmp_path / "encoder")
    model.save_pretrained(tmp_path / "autoencoder")
    expected = encoder(normalized(x)).last_hidden_state.permute(0, 3, 1, 2)
    assert torch.equal(VQAutoencoder.from_pretrained(tmp_path / "autoencoder").encode(x).latents, expected)


@torch.no_grad()
def test_a_lower_level_leaves_out_the_layers_above(tmp_path):
    encoder = encoder_folder(tmp_path, "resnet18", RESNET, size=64)
    model, x = convert_autoencoder(tmp_path, level=2), images(64)
    expected = encoder.timm_model.forward_intermediates(normalized(x), intermediates_only=True)[2]
    assert torch.equal(model.encode(x).latents, expected)
    assert model.config.downsampling_factor == 8 and model.config.latent_channels == 16
    assert not any("layer3" in name for name in model.state_dict())
    assert "layer4" in str(model.config.dpssl["imported"]["left_out"])


@torch.no_grad()
def test_codes_of_features_learn_while_the_encoder_stays(tmp_path):
    encoder_folder(tmp_path, "convnext_atto", CONVNEXT)
    model = convert_autoencoder(tmp_path, quantizer="vq", num_codes=6, decoder_block_out_channels=[16] * 4).train()
    assert not model.config.codebook_frozen and int(model.quantizer.is_initialized) == 0
    before = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    model(images())
    assert int(model.quantizer.is_initialized) == 1
    started = model.quantizer.codebook.clone()
    model(images().flip(0) * 0.5)
    assert not torch.equal(model.quantizer.codebook, started)
    torch.testing.assert_close(dict(model.encoder.state_dict()), before, rtol=0, atol=0)
    model.check_encoder_unchanged()
    codes = model.eval().encode(images()).codes
    assert codes.shape == (2, 4, 4) and model.decode_codes(codes).pixel_values.shape == (2, 3, 32, 32)


@torch.no_grad()
def test_grey_images_are_repeated_for_an_encoder_of_colour(tmp_path):
    encoder = encoder_folder(tmp_path, "convnext_atto", CONVNEXT)
    model, grey = convert_autoencoder(tmp_path, num_channels=1), images(channels=1)
    expected = encoder(normalized(grey.repeat(1, 3, 1, 1))).last_hidden_state
    assert torch.equal(model.encode(grey).latents, expected) and model(grey).pixel_values.shape == grey.shape
    with pytest.raises(ValueError, match=r"images of 3 channels, not 2"):
        convert_autoencoder(tmp_path, num_channels=2)


def test_gradients_reach_the_images_and_no_weight(tmp_path):
    encoder_folder(tmp_path, "convnext_atto", CONVNEXT)
    model, x = convert_autoencoder(tmp_path).train(), images().requires_grad_()
    model.encode_latents(x).sum().backward()
    assert x.grad.abs().max() > 0 and all(p.grad is None for p in model.encoder.parameters())


@pytest.mark.extended
def test_features_that_cannot_be_latents_are_refused(tmp_path):
    def refused(message: str, size: int = 32, channels: int = 3, **entry) -> None:
        with pytest.raises(ValueError, match=message):
            complete_backbone({"architecture": "resnet18"} | entry, size, channels)

    refused("level 4 of resnet18 is not spatial at 32 px.*one cell is left.*3: 256x2x2")
    refused("level=7 does not exist; resnet18 has 0: 64x16x16", level=7)
    refused("timm has no architecture 'resnet'", architecture="resnet")
    refused("stem must be one of", stem="tiny")
    refused(r"makes 3 x 3 cells of 72 px", size=72)
    refused(r"makes 5 x 5 cells of 32 px", stem="small_image_padded")
    refused("does not take images of 40 px", architecture="vit_tiny_patch16_224", size=40)
    refused("images of 3 channels, not 4", channels=4)
    refused("backbone takes .*got .*'width'", width=3)
    with pytest.raises(ValueError, match=r"backbone lacks \['level'"):
        BackboneEncoder({"architecture": "resnet18"})
    entry = complete_backbone({"architecture": "resnet18", "level": 1}, 32)
    with pytest.raises(ValueError, match="mean holds 2 numbers for 3 channels"):
        BackboneEncoder(entry | {"mean": [0.1, 0.2]})
    with pytest.raises(ValueError, match=r"gives \(64, 8, 8\).*not \(64, 4, 4\)"):
        BackboneEncoder(entry | {"reduction": 8})(images())
    encoder_folder(tmp_path, "convnext_atto", CONVNEXT)
    with pytest.raises(ValueError, match="latent_channels=32 follows from"):
        convert_autoencoder(tmp_path, latent_channels=8)
    with pytest.raises(ValueError, match="quantizer is 'vq' or 'none', not 'kl'"):
        convert_autoencoder(tmp_path, quantizer="kl")
    with pytest.raises(ValueError, match="3 levels give back a factor of 4"):
        convert_autoencoder(tmp_path, decoder_block_out_channels=[16] * 3)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "convnext_atto", "num_classes": 0}))
    with pytest.raises(ValueError, match="give image_size|lacks"):
        convert_autoencoder(tmp_path)
