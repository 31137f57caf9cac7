"""Files of taming-transformers and latent diffusion become our autoencoder: same latents, codes and images.

`encode` and `decode` below are the architecture of Esser et al. 2021 written as functions over taming's key names; they
know neither diffusers nor our modules.
"""

import re
import sys
import types

import pytest
import torch
import torch.nn.functional as F
import yaml
from cases import for_each
from safetensors.torch import save_file
from torch import Tensor

from hf_dpssl.convert.autoencoder_importers import convert_autoencoder
from hf_dpssl.convert.pickled_tensors import UnknownPickledClassError

VQ = {"ch_mult": (1, 1, 2), "blocks": 2, "attention": {2}, "z": 10, "embed": 6, "codes": 40}
VQ_WIDE = {"ch_mult": (1, 2), "blocks": 1, "attention": {0, 1}, "z": 5, "embed": 5, "codes": 7}
KL = {"ch_mult": (1, 2, 2), "blocks": 2, "attention": set(), "z": 4, "embed": 3, "codes": 0}
CH, SIZE = 32, 16


def random_state(layout: dict, seed: int = 0) -> dict[str, Tensor]:
    """A state dict in taming's layout, every tensor drawn (norms around 1), so that no layer is an identity."""
    generator, state = torch.Generator().manual_seed(seed), {}
    widths = [CH * multiple for multiple in layout["ch_mult"]]

    def conv(name: str, inputs: int, outputs: int, side: int = 3) -> None:
        scale = (inputs * side * side) ** -0.5
        state[f"{name}.weight"] = torch.randn(outputs, inputs, side, side, generator=generator) * scale
        state[f"{name}.bias"] = torch.randn(outputs, generator=generator) * 0.1

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"] = 1 + torch.randn(width, generator=generator) * 0.3
        state[f"{name}.bias"] = torch.randn(width, generator=generator) * 0.3

    def block(name: str, inputs: int, outputs: int) -> None:
        norm(f"{name}.norm1", inputs), conv(f"{name}.conv1", inputs, outputs)
        norm(f"{name}.norm2", outputs), conv(f"{name}.conv2", outputs, outputs)
        if inputs != outputs:
            conv(f"{name}.nin_shortcut", inputs, outputs, 1)

    def attention(name: str, width: int) -> None:
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, 1)

    def level(name: str, index: int, inputs: int, blocks: int) -> int:
        for number in range(blocks):
            block(f"{name}.block.{number}", inputs, widths[index])
            inputs = widths[index]
            if index in layout["attention"]:
                attention(f"{name}.attn.{number}", inputs)
        return inputs

    factor = 1 if layout["codes"] else 2
    conv("encoder.conv_in", 3, CH), conv("decoder.conv_in", layout["z"], widths[-1])
    width = CH
    for index in range(len(widths)):
        width = level(f"encoder.down.{index}", index, width, layout["blocks"])
        if index < len(widths) - 1:
            conv(f"encoder.down.{index}.downsample.conv", width, width)
    for side in ("encoder", "decoder"):
        block(f"{side}.mid.block_1", width, width), block(f"{side}.mid.block_2", width, width)
        attention(f"{side}.mid.attn_1", width)
    for index in reversed(range(len(widths))):
        width = level(f"decoder.up.{index}", index, width, layout["blocks"] + 1)
        if index:
            conv(f"decoder.up.{index}.upsample.conv", width, width)
    norm("encoder.norm_out", widths[-1]), conv("encoder.conv_out", widths[-1], factor * layout["z"])
    norm("decoder.norm_out", width), conv("decoder.conv_out", width, 3)
    conv("quant_conv", factor * layout["z"], factor * layout["embed"], 1)
    conv("post_quant_conv", layout["embed"], layout["z"], 1)
    if layout["codes"]:
        state["quantize.embedding.weight"] = torch.randn(layout["codes"], layout["embed"], generator=generator)
    return state


class Functional:
    """taming's computation over a state dict, in float64."""

    def __init__(self, state: dict[str, Tensor]):
        self.state = {name: value.double() for name, value in state.items()}

    def conv(self, name: str, x: Tensor, **options) -> Tensor:
        return F.conv2d(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"], **options)

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.group_norm(x, 32, self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps=1e-6)

    def block(self, name: str, x: Tensor) -> Tensor:
        hidden = x
        for number in (1, 2):
            hidden = self.norm(f"{name}.norm{number}", hidden)
            hidden = self.conv(f"{name}.conv{number}", hidden * hidden.sigmoid(), padding=1)
        return hidden + (self.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.state else x)

    def attention(self, name: str, x: Tensor) -> Tensor:
        if f"{name}.q.weight" not in self.state:
            return x
        normed = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", normed).flatten(2) for part in "qkv")
        weights = (torch.einsum("bci,bcj->bij", q, k) * q.shape[1] ** -0.5).softmax(2)
        return x + self.conv(f"{name}.proj_out", torch.einsum("bij,bcj->bci", weights, v).view(x.shape))

    def blocks(self, name: str, x: Tensor) -> Tensor:
        for number in range(sum(bool(re.fullmatch(rf"{name}\.block\.\d+\.conv1\.bias", key)) for key in self.state)):
            x = self.attention(f"{name}.attn.{number}", self.block(f"{name}.block.{number}", x))
        return x

    def middle(self, side: str, x: Tensor) -> Tensor:
        return self.block(
            f"{side}.mid.block_2", self.attention(f"{side}.mid.attn_1", self.block(f"{side}.mid.block_1", x))
        )

    def end(self, side: str, x: Tensor) -> Tensor:
        x = self.norm(f"{side}.norm_out", x)
        return self.conv(f"{side}.conv_out", x * x.sigmoid(), padding=1)

    def encode(self, x: Tensor, levels: int) -> Tensor:
        x = self.conv("encoder.conv_in", x.double(), padding=1)
        for index in range(levels):
            x = self.blocks(f"encoder.down.{index}", x)
            if index < levels - 1:
                x = self.conv(f"encoder.down.{index}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
        return self.conv("quant_conv", self.end("encoder", self.middle("encoder", x)))

    def decode(self, z: Tensor, levels: int) -> Tensor:
        x = self.conv("decoder.conv_in", self.conv("post_quant_conv", z), padding=1)
        x = self.middle("decoder", x)
        for index in reversed(range(levels)):
            x = self.blocks(f"decoder.up.{index}", x)
            if index:
                x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
                x = self.conv(f"decoder.up.{index}.upsample.conv", x, padding=1)
        return self.end("decoder", x)


def images(size: int = SIZE) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def saved(folder, state: dict, **rest):
    torch.save({"state_dict": state, "global_step": 5} | rest, folder / "last.ckpt")
    return folder / "last.ckpt"


@for_each("layout", [VQ, VQ_WIDE, KL])
@torch.no_grad()
def test_latents_codes_and_images_equal_the_architecture_as_functions(tmp_path, layout):
    state, levels = random_state(layout), len(layout["ch_mult"])
    model = convert_autoencoder(saved(tmp_path, state), image_size=SIZE).double()  # the oracle's precision
    oracle, x = Functional(state), images().double()
    encoded, expected = model.encode(x), oracle.encode(x, levels)[:, : layout["embed"]]
    assert (encoded.latents - expected).abs().max() < 1e-5
    if layout["codes"]:
        distances = (expected.movedim(1, -1)[..., None, :] - oracle.state["quantize.embedding.weight"]).pow(2).sum(-1)
        assert torch.equal(encoded.codes, distances.argmin(-1))
        quantized = oracle.state["quantize.embedding.weight"][encoded.codes].movedim(-1, 1)
        reconstructed = model.decode_codes(encoded.codes).pixel_values
    else:
        assert encoded.codes is None and model.config.quantizer == "kl"
        quantized, reconstructed = expected, model.decode(encoded.latents).pixel_values
        log_variance = oracle.encode(x, levels)[:, layout["embed"] :]
        assert (model._moments(x)[1] - log_variance).abs().max() < 1e-5
    assert (reconstructed - oracle.decode(quantized, levels)).abs().max() < 1e-5
    assert model.config.attention_levels == sorted(layout["attention"])


def test_whole_latent_diffusion_file_and_safetensors_give_the_same_model_and_say_what_is_left_out(tmp_path):
    state = random_state(VQ)
    whole = {f"first_stage_model.{name}": value for name, value in state.items()}
    whole |= {"model.diffusion_model.x": torch.ones(2), "first_stage_model.loss.logvar": torch.ones(())}
    save_file(state, tmp_path / "vq.safetensors")
    first = convert_autoencoder(saved(tmp_path, whole), image_size=SIZE)
    second = convert_autoencoder(tmp_path / "vq.safetensors", image_size=SIZE)
    assert first.fingerprint() == second.fingerprint()
    imported = first.config.dpssl["imported"]
    assert imported["left_out"] == ["model (1 tensor)", "first_stage_model (1 tensor)", "global_step"]
    assert imported["source"] == "last.ckpt" and "decoder" in str(imported["taken"])


def test_running_means_of_an_ema_codebook_are_taken(tmp_path):
    state = random_state(VQ)
    counts = torch.arange(1.0, 41)
    state |= {"quantize.embedding.cluster_size": counts}
    state |= {"quantize.embedding.embed_avg": state["quantize.embedding.weight"] * counts[:, None]}
    model = convert_autoencoder(saved(tmp_path, state), image_size=SIZE)
    assert torch.equal(model.quantizer.counts, counts) and int(model.quantizer.is_initialized) == 1
    assert torch.allclose(model.quantizer.sums / counts[:, None], model.quantizer.codebook)


def test_lightning_callbacks_are_left_unread_and_other_classes_refused(tmp_path, monkeypatch):
    for package in ("pytorch_lightning", "pytorch_lightning.callbacks", "somewhere"):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    path = "pytorch_lightning.callbacks.model_checkpoint"
    for module, name in ((path, "ModelCheckpoint"), ("somewhere", "Strange")):
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
        setattr(sys.modules[module], name, type(name, (), {"__module__": module}))
    callback = sys.modules[path].ModelCheckpoint
    source = saved(tmp_path, random_state(VQ_WIDE), callbacks={callback: {"best": 1.0}})
    assert "callbacks" in convert_autoencoder(source, image_size=SIZE).config.dpssl["imported"]["left_out"]
    source = saved(tmp_path, random_state(VQ_WIDE), other=sys.modules["somewhere"].Strange())
    with pytest.raises(UnknownPickledClassError, match=r"somewhere\.Strange"):
        convert_autoencoder(source, image_size=SIZE)


def test_yaml_gives_the_size_and_a_wrong_one_is_refused(tmp_path):
    source, path = saved(tmp_path, random_state(VQ)), tmp_path / "project.yaml"
    dd = {"double_z": False, "z_channels": 10, "resolution": 64, "in_channels": 3, "out_ch": 3, "ch": 32}
    dd |= {"ch_mult": [1, 1, 2], "num_res_blocks": 2, "attn_resolutions": [16]}
    params = {"embed_dim": 6, "n_embed": 40, "ddconfig": dd}
    path.write_text(yaml.safe_dump({"model": {"params": {"first_stage_config": {"params": params}}}}))
    assert convert_autoencoder(source, config_file=path).config.image_size == 64
    path.write_text(yaml.safe_dump({"model": {"params": params | {"n_embed": 1024}}}))
    with pytest.raises(ValueError, match="n_embed: 1024 instead of 40"):
        convert_autoencoder(source, config_file=path)
    path.write_text(yaml.safe_dump({"model": {"params": params | {"ddconfig": dd | {"attn_resolutions": [32]}}}}))
    with pytest.raises(ValueError, match=r"attn_resolutions: \[32\] instead of \[16\]"):
        convert_autoencoder(source, config_file=path)
    path.write_text("data: 1")
    with pytest.raises(ValueError, match="no `ddconfig`"):
        convert_autoencoder(source, config_file=path)
    model = convert_autoencoder(source)
    assert model.config.image_size == 256 and "256 is assumed" in str(model.config.dpssl["imported"]["notes"])


def test_layouts_that_are_not_ours_and_broken_files_are_refused_by_name(tmp_path):
    def refused(state: dict, message: str, **options) -> None:
        with pytest.raises(ValueError, match=message):
            convert_autoencoder(saved(tmp_path, state), **{"image_size": SIZE} | options)

    state = random_state(VQ)
    gumbel = {name: value for name, value in state.items() if not name.startswith("quantize")}
    refused(gumbel | {"quantize.embed.weight": torch.ones(4, 6)}, "Gumbel")
    refused(gumbel | {"encoder.conv_out.weight": torch.ones(30, 64, 3, 3)}, "ends with 30 channels")
    refused({n: v for n, v in state.items() if "downsample" not in n}, "resamp_with_conv")
    refused({n: v for n, v in state.items() if n != "decoder.up.1.block.0.conv1.weight"}, "lacks decoder.up.1.block.0")
    refused({n: v for n, v in state.items() if n != "decoder.mid.block_2.norm1.bias"}, "missing: decoder.mid_block")
    refused(state | {"encoder.mid.attn_1.to_qkv.weight": torch.ones(3)}, "unexpected: encoder.mid_block.attentions.0")
    refused({n: v for n, v in state.items() if ".up.2.attn" not in n}, r"attention at the same levels, got \[2")
    refused(state | {"quant_conv.bias": torch.full((6,), torch.nan)}, "not finite: quant_conv.bias")
    refused(state | {"encoder.conv_in.weight": torch.ones(16, 3, 3, 3)}, "ch_mult starts with 2")
    refused(state | {"decoder.conv_out.weight": torch.ones(1, 64, 3, 3)}, "takes 3 channels and the decoder returns 1")
    refused({"backbone.conv1.weight": torch.ones(2)}, r"backbone \(1 tensor\).*supported are")
    refused(state, "multiple of the downsampling factor 4", image_size=18)
    refused(state, "3-channel images, not of 1", num_channels=1)
    refused(state, "num_codes=40 follows from last.ckpt", num_codes=41)
    refused(state, "flavour is no field", flavour=1)
