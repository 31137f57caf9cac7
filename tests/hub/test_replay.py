"""Stored pairs that are damaged or of another model: said so, and replaced by a push."""

from __future__ import annotations

import pytest
import torch
from cases import for_each
from safetensors import safe_open
from tiny_checkpoints import autoencoder_model, gan_model

from hf_dpssl import VAEGAN, VAEGANConfig, VQAutoencoder, VQConfig
from hf_dpssl.hub import replay


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two GANs and two autoencoders whose inputs have other shapes or names."""
    folder = tmp_path_factory.mktemp("models")
    gan_model().save_pretrained(folder / "gan")
    autoencoder_model().save_pretrained(folder / "codes")
    torch.manual_seed(0)
    VAEGAN(VAEGANConfig(image_size=16, width=8, latent_dim=6, latent="noise")).save_pretrained(folder / "other-gan")
    options = {"encoder_block_out_channels": [8, 16], "norm_num_groups": 4, "quantizer": "kl"}
    options |= {"latent_mean": [0.5] * 4, "latent_std": [2.0] * 4}
    VQAutoencoder(VQConfig(image_size=16, **options)).save_pretrained(folder / "no-codes")
    return folder


@pytest.mark.extended
@for_each("first, second", [("gan", "other-gan"), ("codes", "no-codes"), ("codes", "gan")])
def test_a_pair_of_another_model_is_refused_and_replaced(folders, tmp_path, first, second):
    path = tmp_path / replay.FILE_NAME
    for owner, other in ((first, second), (second, first)):
        pair = replay.record(folders / owner)
        path.write_bytes(pair)
        assert replay.replay(folders / owner, path) == 0
        with pytest.raises(ValueError, match="another model|other outputs|is a pair of|does not reproduce"):
            replay.replay(folders / other, path)
        assert replay.fitting_pair(folders / owner, [None, pair]) == pair
        fresh = replay.fitting_pair(folders / other, [pair])
        assert fresh == replay.record(folders / other) != pair


def test_a_damaged_pair_is_refused_and_replaced(folders, tmp_path):
    path = tmp_path / replay.FILE_NAME
    path.write_bytes(replay.record(folders / "gan")[:-100])
    with pytest.raises(ValueError, match="no stored pair, or damaged"):
        replay.replay(folders / "gan", path)
    path.write_bytes(replay.fitting_pair(folders / "gan", [path.read_bytes()]))
    assert replay.replay(folders / "gan", path) == 0


def test_latents_of_a_model_without_codebook_are_those_of_its_statistics(folders, tmp_path):
    path = tmp_path / replay.FILE_NAME
    path.write_bytes(replay.record(folders / "no-codes"))
    with safe_open(path, "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}
    model = VQAutoencoder.from_pretrained(folders / "no-codes").eval()
    with torch.no_grad():
        latents = (model.encode(stored["input.pixel_values"]).latents - 0.5) / 2
        images = model.decode(stored["input.latents"] * 2 + 0.5).pixel_values
    torch.testing.assert_close(stored["output.latents"], latents, atol=1e-5, rtol=0)
    torch.testing.assert_close(stored["output.images"], images, atol=1e-5, rtol=0)


def test_another_librarys_checkpoint_has_no_pair_and_no_checkpoint_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert replay.checkpoint_kind(tmp_path) == "other" and replay.record(tmp_path) is None
    with pytest.raises(FileNotFoundError, match="no finished checkpoint"):
        replay.checkpoint_kind(tmp_path / "nowhere")
