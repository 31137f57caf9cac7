"""Autoencoders of diffusers and of ours become a `VQAutoencoder`: same latents, codes, images; the rest is refused."""

import json

import pytest
import torch
from cases import for_each
from diffusers import AutoencoderKL, AutoencoderTiny, VQModel

from hf_dpssl import VQAutoencoder, VQConfig
from hf_dpssl.autoencoder import latent_codec
from hf_dpssl.cli.commands import main
from hf_dpssl.convert.autoencoder_importers import convert_autoencoder, is_autoencoder_source
from hf_dpssl.generation.stock_dit import stock_autoencoder

SIZE = 16
SMALL = {
    "block_out_channels": (16, 24),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "layers_per_block": 2,
    "sample_size": SIZE,
}
ATTENTION = {
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
}


def drawn(cls: type, seed: int = 0, **config):
    """A small model of diffusers, every tensor moved, norms and biases too, so that no layer is an identity."""
    torch.manual_seed(seed)
    model = cls(**SMALL | config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def images(channels: int = 3) -> torch.Tensor:
    return torch.rand(2, channels, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) * 2 - 1


@for_each(
    "config",
    [
        {"latent_channels": 6, "num_vq_embeddings": 40},
        {"latent_channels": 6, "num_vq_embeddings": 9, "vq_embed_dim": 5, "in_channels": 1, "out_channels": 1},
        ATTENTION | {"num_vq_embeddings": 30, "mid_block_add_attention": False},
    ],
)
@torch.no_grad()
def test_vq_model_gives_its_latents_codes_and_images(tmp_path, config):
    theirs, x = drawn(VQModel, **config), images(config.get("in_channels", 3))
    theirs.save_pretrained(tmp_path / "theirs")
    convert_autoencoder(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    ours = VQAutoencoder.from_pretrained(tmp_path / "ours").eval()
    latents, encoded = theirs.encode(x).latents, ours.encode(x)
    assert (encoded.latents - latents).abs().max() < 1e-5
    assert torch.equal(encoded.codes.flatten(), theirs.quantize(latents)[2][2])
    quantized = theirs.quantize.get_codebook_entry(encoded.codes.flatten(), (2, *latents.shape[2:], latents.shape[1]))
    expected = theirs.decode(quantized, force_not_quantize=True).sample
    assert (ours.decode_codes(encoded.codes).pixel_values - expected).abs().max() < 1e-5
    assert (ours(x).pixel_values - theirs(x).sample).abs().max() < 5e-5  # theirs adds and takes off the latent
    assert ours.config.latent_mean is None and ours.config.num_codes == config["num_vq_embeddings"]


@torch.no_grad()
def test_an_autoencoder_exported_to_vq_model_and_taken_back_has_latents_of_the_same_scale(tmp_path):
    torch.manual_seed(0)
    statistics = {"latent_mean": [0.5, -1.0, 2.0, 0.0], "latent_std": [4.0] * 4}
    config = VQConfig(image_size=SIZE, encoder_block_out_channels=[16, 16], num_codes=8, **statistics)
    ours = VQAutoencoder(config).eval()
    stock_autoencoder(ours).save_pretrained(tmp_path)
    back = convert_autoencoder(tmp_path)
    assert back.config.latent_std == pytest.approx([4.0] * 4)
    expected, found = (latent_codec.encode(model, images()) for model in (ours, back))
    assert (found - expected).abs().max() < 1e-5


@for_each("config, mean, std", [
        ({"scaling_factor": 0.25}, [0.0] * 4, [4.0] * 4),
        (ATTENTION | {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.5}, [0.5] * 4, None),
        ({"latents_mean": [1, 2] * 2, "latents_std": [5, 6] * 2, "scaling_factor": 0.5}, [1, 2] * 2, [10, 12] * 2),
    ])  # fmt: skip
@torch.no_grad()
def test_autoencoder_kl_gives_its_mean_variance_and_images(tmp_path, config, mean, std):
    theirs, x = drawn(AutoencoderKL, latent_channels=4, **config), images()
    theirs.save_pretrained(tmp_path)
    ours = convert_autoencoder(tmp_path)
    distribution, encoded = theirs.encode(x).latent_dist, ours.encode(x)
    assert (encoded.latents - distribution.mode()).abs().max() < 1e-5 and encoded.codes is None
    assert (ours._moments(x)[1] - distribution.logvar).abs().max() < 1e-5
    assert (ours.decode(encoded.latents).pixel_values - theirs.decode(distribution.mode()).sample).abs().max() < 1e-5
    kl = distribution.kl().mean() / x[0].numel()
    assert torch.allclose(ours(x).kl, kl, rtol=1e-5)
    assert ours.config.latent_mean == mean and ours.config.latent_std == (std or [1 / 0.18215] * 4)


def test_half_precision_weights_come_as_float32(tmp_path):
    drawn(AutoencoderKL).half().save_pretrained(tmp_path)
    assert {value.dtype for value in convert_autoencoder(tmp_path).parameters()} == {torch.float32}


def test_own_autoencoder_is_taken_as_it_is(tmp_path):
    config = VQConfig(encoder_block_out_channels=[16, 16, 16], image_size=16, num_codes=8, num_channels=1)
    model = VQAutoencoder(config)
    model.save_pretrained(tmp_path)
    found = convert_autoencoder(tmp_path, num_channels=1)
    assert found.hash_encoder() == model.hash_encoder() and found.config.image_size == 16
    assert convert_autoencoder(tmp_path, image_size=32).config.image_size == 32
    with pytest.raises(ValueError, match="image_size=18 must be a multiple of the downsampling factor 4"):
        convert_autoencoder(tmp_path, image_size=18)
    with pytest.raises(ValueError, match="num_codes=8 follows from .*, got num_codes=16: leave it out"):
        convert_autoencoder(tmp_path, num_codes=16)
    assert convert_autoencoder(tmp_path, num_codes=8).config.num_codes == 8
    with pytest.raises(ValueError, match="1-channel images, not of 3"):
        convert_autoencoder(tmp_path, num_channels=3)


def test_a_frozen_own_autoencoder_keeps_its_hashes(tmp_path):
    model = VQAutoencoder(VQConfig(encoder_block_out_channels=[16, 16], num_codes=8))
    model.freeze_encoder()
    model.save_pretrained(tmp_path)
    found = convert_autoencoder(tmp_path)
    found.check_encoder_unchanged()
    assert found.config.encoder_frozen and found.fingerprint() == model.fingerprint()


def test_decoder_stage_learns_on_a_converted_encoder_that_stays(tmp_path):
    drawn(VQModel, num_vq_embeddings=30).save_pretrained(tmp_path)
    model = convert_autoencoder(tmp_path, commitment_weight=0.5)
    assert model.config.commitment_weight == 0.5
    model.freeze_encoder()
    model.replace_decoder([16, 16], 1)
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses, plain = [], images()[:, :, :1, :1].expand(-1, -1, SIZE, SIZE)
    for _ in range(20):
        optimizer.zero_grad()
        output = model(plain)
        output.loss.backward()
        optimizer.step()
        losses.append(float(output.recon.detach()))
    assert losses[-1] < 0.7 * losses[0]
    model.check_encoder_unchanged()


def test_what_ours_does_not_have_is_refused_by_name(tmp_path):
    def refused(message: str, source="theirs", **options) -> None:
        with pytest.raises(ValueError, match=message):
            convert_autoencoder(tmp_path / source, **options)

    drawn(VQModel, norm_type="spatial", block_out_channels=(32, 32), norm_num_groups=32).save_pretrained(
        tmp_path / "spatial"
    )
    refused("norm_type='spatial' is not supported, only 'group'", "spatial")
    drawn(VQModel, act_fn="gelu").save_pretrained(tmp_path / "gelu")
    refused("act_fn='gelu'", "gelu")
    drawn(VQModel, out_channels=1).save_pretrained(tmp_path / "channels")
    refused("out_channels=1 is not supported, only 3", "channels")
    drawn(VQModel, up_block_types=ATTENTION["up_block_types"]).save_pretrained(tmp_path / "uneven")
    refused(r"attention at the same levels, got \[\] and \[1\]", "uneven")
    AutoencoderTiny().save_pretrained(tmp_path / "tiny")
    refused("holds AutoencoderTiny; supported are", "tiny")
    drawn(VQModel, down_block_types=("DownBlock2D",) * 2).save_pretrained(tmp_path / "blocks")
    refused(r"block types \['DownBlock2D'\] are not supported", "blocks")
    drawn(VQModel).save_pretrained(tmp_path / "theirs")
    refused("multiple of the downsampling factor 2", image_size=17)
    refused("3-channel images, not of 1", num_channels=1)
    refused("quantizer=vq follows from theirs", quantizer="none")
    refused("config_file is read for a file", config_file="x.yaml")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "weights.bin").write_bytes(b"")
    refused(r"has no config.json, only \['weights.bin'\]", "empty")
    (tmp_path / "pipeline" / "vae").mkdir(parents=True)
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    (tmp_path / "pipeline" / "vae" / "config.json").write_text("{}")
    refused(r"give the autoencoder's subfolder, one of \['vae'\]", "pipeline")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    refused("holds bert; supported are", "other")


def test_incomplete_weights_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    drawn(AutoencoderKL).save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file({n: v for n, v in tensors.items() if n != "decoder.conv_out.weight"}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 tensors? of AutoencoderKL.*decoder.conv_out.weight"):
        convert_autoencoder(tmp_path)
    save_file(tensors | {"quant_conv.bias": torch.full((8,), torch.inf)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="not finite: quant_conv.bias"):
        convert_autoencoder(tmp_path)


def test_command_writes_the_folder_and_says_what_it_took(tmp_path, capsys):
    drawn(AutoencoderKL).save_pretrained(tmp_path / "pipeline" / "vae")
    source, output = tmp_path / "pipeline", str(tmp_path / "ours")
    into = ["--output_dir", output]
    assert main(["import", str(source), *into, "--subfolder", "vae", "--image_size", "32"]) == 0
    printed = capsys.readouterr().out
    assert "autoencoder from diffusers AutoencoderKL" in printed and "taken: decoder (" in printed
    found = VQAutoencoder.from_pretrained(output).config
    assert (found.quantizer, found.image_size) == ("kl", 32) and found.dpssl["imported"]["source"] == "pipeline"
    assert main(["import", str(source), *into, "--subfolder", "vae"]) == 2 and "exists" in capsys.readouterr().err
    assert main(["import", str(source / "vae"), *into, "--overwrite", "--stem", "timm"]) == 2
    assert "--stem is read for encoder files" in capsys.readouterr().err
    torch.save({"state_dict": {"conv1.weight": torch.ones(2)}}, tmp_path / "last.pth")
    assert main(["import", str(tmp_path / "last.pth"), *into, "--overwrite", "--level", "2"]) == 2
    assert "--level is read for autoencoders" in capsys.readouterr().err
    assert not is_autoencoder_source(tmp_path / "missing.ckpt") and not is_autoencoder_source(tmp_path / "last.pth")
