"""Blocks of the autoencoder: diffusers' own layouts and weights, published sizes, and the three kinds of dropout."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, VQModel
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.autoencoders.vae import VectorQuantizer as DiffusersQuantizer
from diffusers.models.resnet import ResnetBlock2D

from hf_dpssl import VQAutoencoder, VQConfig
from hf_dpssl.models.autoencoder_blocks import build_decoder, build_encoder, weaken_
from hf_dpssl.models.choices import VQ_PRESETS

SMALL = {
    "image_size": 16,
    "encoder_block_out_channels": [8, 16, 16],
    "norm_num_groups": 4,
    "encoder_layers_per_block": 2,
    "attention_levels": [1, 2],
    "latent_channels": 5,
    "encoder_out_channels": 7,
    "num_codes": 12,
}
# The same, as diffusers' classes name it.
THEIRS = {
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    "block_out_channels": (8, 16, 16),
    "layers_per_block": 2,
    "norm_num_groups": 4,
}


def images(count: int = 4) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def make_vq_pair(commitment_weight: float = 0.25) -> tuple[VQAutoencoder, VQModel]:
    """Ours (eval mode) and diffusers' VQModel with the same weights."""
    torch.manual_seed(0)
    config = {name: value for name, value in SMALL.items() if name != "encoder_out_channels"}
    ours = VQAutoencoder(VQConfig(**config, commitment_weight=commitment_weight)).eval()
    theirs = VQModel(**THEIRS, latent_channels=5, num_vq_embeddings=12, sample_size=16).eval()
    state = {name: value for name, value in ours.state_dict().items() if not name.startswith("quantizer.")}
    theirs.load_state_dict(state | {"quantize.embedding.weight": ours.quantizer.codebook})
    return ours, theirs


# The same as diffusers'.


def test_encoder_and_decoder_are_diffusers_own_bit_for_bit():
    ours = VQAutoencoder(VQConfig(**SMALL)).eval()
    blocks = {name: THEIRS[name] for name in ("block_out_channels", "layers_per_block", "norm_num_groups")}
    encoder = Encoder(down_block_types=THEIRS["down_block_types"], out_channels=7, double_z=False, **blocks).eval()
    decoder = Decoder(up_block_types=THEIRS["up_block_types"], in_channels=7, **blocks).eval()
    encoder.load_state_dict(ours.encoder.state_dict())
    decoder.load_state_dict(ours.decoder.state_dict())
    with torch.no_grad():
        latents = ours.quant_conv(encoder(images()))
        assert torch.equal(ours.encode(images()).latents, latents) and latents.shape == (4, 5, 4, 4)
        quantized = ours.quantizer.lookup(ours.quantize(latents).codes)
        assert torch.equal(ours(images()).pixel_values, decoder(ours.post_quant_conv(quantized)))


def test_latents_codes_and_images_are_those_of_vqmodel_with_the_same_weights():
    # VQModel decodes z + (code - z), which is rounded; ours decodes the code itself.
    ours, theirs = make_vq_pair()
    assert sum(p.numel() for p in theirs.parameters()) == ours.num_parameters() + ours.quantizer.codebook.numel()
    with torch.no_grad():
        encoded, latents = ours.encode(images()), theirs.encode(images()).latents
        assert torch.equal(encoded.latents, latents)
        assert torch.equal(encoded.codes.flatten(), theirs.quantize(latents)[2][2])
        codes = ours.quantizer.lookup(encoded.codes)
        assert torch.equal(ours(images()).pixel_values, theirs.decode(codes, force_not_quantize=True).sample)
        torch.testing.assert_close(ours(images()).pixel_values, theirs(images()).sample, atol=2e-5, rtol=0)


def test_gradients_are_those_of_vqmodel_with_the_weight_that_its_flag_puts_on_the_commitment():
    for legacy, weight in [(True, 1.0), (False, 0.25)]:
        ours, theirs = make_vq_pair(weight)
        codebook = theirs.quantize.embedding
        theirs.quantize = DiffusersQuantizer(12, 5, beta=0.25, sane_index_shape=False, legacy=legacy)
        theirs.quantize.embedding = codebook
        ours(images()).loss.backward()
        output = theirs(images())
        (F.mse_loss(output.sample, images()) + output.commit_loss).backward()
        others = {name: p.grad for name, p in theirs.named_parameters() if not name.startswith("quantize.")}
        assert others.keys() == {name for name, _ in ours.named_parameters()}
        for name, parameter in ours.named_parameters():
            torch.testing.assert_close(parameter.grad, others[name], atol=1e-6, rtol=1e-5)


def test_gaussian_latents_and_images_are_those_of_autoencoder_kl_with_the_same_weights():
    config = {name: value for name, value in SMALL.items() if name != "encoder_out_channels"}
    ours = VQAutoencoder(VQConfig(**config, quantizer="kl")).eval()
    theirs = AutoencoderKL(**THEIRS, latent_channels=5, sample_size=16).eval()
    assert theirs.num_parameters() == ours.num_parameters()
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        gaussian, output = theirs.encode(images()).latent_dist, ours(images())
        assert torch.equal(ours.encode(images()).latents, gaussian.mean)
        assert torch.equal(output.pixel_values, theirs.decode(gaussian.mean).sample)
        standard = torch.distributions.Normal(0.0, 1.0)
        nats = torch.distributions.kl_divergence(torch.distributions.Normal(gaussian.mean, gaussian.std), standard)
        torch.testing.assert_close(output.kl, nats.sum() / images().numel())
        torch.testing.assert_close(output.kl, gaussian.kl().sum() / images().numel())
        torch.testing.assert_close(output.loss, output.recon + 1e-6 * output.kl)


# Published layouts.


def taming_size(ch: int, multiples: tuple[int, ...], z: int, embed: int, codes: int, attention: set[int]) -> int:
    """Parameters of the first stage of taming's code with two residual blocks per level, from its definition."""

    def block(c: int, d: int) -> int:  # two norms, two 3x3 convolutions, a 1x1 convolution where widths differ
        return 2 * c + 9 * c * d + d + 2 * d + 9 * d * d + d + (c * d + d if c != d else 0)

    def attend(c: int) -> int:  # a norm, four 1x1 convolutions
        return 2 * c + 4 * (c * c + c)

    widths, top = [ch * multiple for multiple in multiples], ch * multiples[-1]
    middle = 2 * block(top, top) + attend(top)
    encoder = 27 * ch + ch + middle + 2 * top + 9 * top * z + z
    decoder = 9 * z * top + top + middle + 2 * ch + 27 * ch + 3
    for level, width in enumerate(widths):
        below, above = widths[max(level - 1, 0)], widths[min(level + 1, len(widths) - 1)]
        encoder += block(below, width) + block(width, width) + 2 * attend(width) * (level in attention)
        decoder += block(above, width) + 2 * block(width, width) + 3 * attend(width) * (level in attention)
        encoder += (9 * width * width + width) * (level < len(widths) - 1)
        decoder += (9 * width * width + width) * (level > 0)
    return encoder + decoder + z * embed + embed + embed * z + z + codes * embed


def test_presets_have_as_many_parameters_as_the_published_first_stages():
    for preset, layout in [
        ("f4", (128, (1, 2, 4), 3, 3, 8192, set())),
        ("f8", (128, (1, 2, 2, 4), 4, 4, 16384, {3})),
        ("f16", (128, (1, 1, 2, 2, 4), 256, 256, 1024, {4})),
    ]:
        with torch.device("meta"):
            model = VQAutoencoder(VQConfig.preset(preset))
        assert model.num_parameters() + model.quantizer.codebook.numel() == taming_size(*layout)
        assert model.config.downsampling_factor == int(preset[1:])


@pytest.mark.extended
def test_presets_take_images_of_16_to_256_pixels():
    for size in [16, 256]:
        for preset in VQ_PRESETS:
            config = VQConfig.preset(preset, image_size=size, quantizer="kl")
            with torch.device("meta"):
                encoder, decoder = build_encoder(config), build_decoder(config)
                latents = encoder(torch.empty(1, 3, size, size))
                assert latents.shape == (1, 2 * config.encoder_out_channels, config.latent_size, config.latent_size)
                assert decoder(latents[:, : config.encoder_out_channels]).shape == (1, 3, size, size)


def test_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'f16', 'f2', 'f4', 'f8'.*'f3'"):
        VQConfig.preset("f3")


# Dropout: one residual block, whose eval mode is the reference.


def one_block(kind: str, rate: float, count: int) -> tuple[ResnetBlock2D, torch.Tensor]:
    torch.manual_seed(0)
    block = ResnetBlock2D(in_channels=8, out_channels=8, temb_channels=None, groups=4)
    weaken_(torch.nn.Sequential(block), rate, kind)
    return block, torch.randn(1, 8, 5, 5).expand(count, -1, -1, -1).contiguous()


def before_second_convolution(block: ResnetBlock2D, inputs: torch.Tensor) -> torch.Tensor:
    seen = []
    handle = block.conv2.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].detach()))
    block(inputs, None)
    handle.remove()
    return seen[0]


def test_dropout_is_nothing_in_eval_mode_and_keeps_the_expectation():
    for kind in ["element", "channel", "depth"]:
        block, inputs = one_block(kind, 0.3, 20_000)
        plain, _ = one_block(kind, 0.0, 1)
        with torch.no_grad():
            expected = plain.eval()(inputs[:1], None)
            assert torch.equal(block.eval()(inputs[:1], None), expected)
            drawn = block.train()(inputs, None)
            error = (drawn.mean(0) - expected[0]) / (drawn.std(0) / len(drawn) ** 0.5)
        assert error.abs().max() < 5 and drawn.std(0).min() > 0  # 200 normal deviates


def test_dropout_of_elements_and_channels_zeroes_what_it_says():
    for kind in ["element", "channel"]:
        block, inputs = one_block(kind, 0.3, 500)
        with torch.no_grad():
            reference = before_second_convolution(block.eval(), inputs)
            ratio = before_second_convolution(block.train(), inputs) / reference
        kept = ratio > 0.5
        torch.testing.assert_close(ratio[kept], torch.full_like(ratio[kept], 1 / 0.7))
        assert (ratio[~kept] == 0).all() and abs(kept.float().mean() - 0.7) < 0.03
        whole = kept.flatten(2).float().mean(2)
        assert set(whole.unique().tolist()) == {0, 1} if kind == "channel" else not (whole % 1 == 0).any()


def test_stochastic_depth_drops_the_branch_of_whole_images():
    block, inputs = one_block("depth", 0.3, 500)
    with torch.no_grad():
        branch = block.eval()(inputs, None) - inputs
        ratio = ((block.train()(inputs, None) - inputs) / branch).flatten(1).median(1).values
        out = block(inputs, None)
        dropped = torch.isclose(out, inputs, rtol=0, atol=0).flatten(1).all(1)
        torch.testing.assert_close(out[~dropped], (inputs + branch / 0.7)[~dropped], atol=1e-5, rtol=1e-5)
    assert 0.2 < dropped.float().mean() < 0.4
    assert set(ratio.mul(0.7).round(decimals=3).tolist()) == {0.0, 1.0}


def test_every_residual_block_of_the_decoder_and_none_of_the_encoder_is_weakened():
    for kind in ["element", "channel", "depth"]:
        model = VQAutoencoder(VQConfig(**SMALL, decoder_dropout=0.4, decoder_dropout_kind=kind)).train()
        for part, weakened in ((model.encoder, False), (model.decoder, True)):
            blocks = [module for module in part.modules() if isinstance(module, ResnetBlock2D)]
            assert len(blocks) == (8 if part is model.encoder else 11)
            for block in blocks:
                inputs = torch.randn(64, block.in_channels, 4, 4)
                assert torch.equal(block(inputs, None), block(inputs, None)) != weakened


def test_noise_and_masks_weaken_the_decoders_input_alone_and_keep_its_expectation():
    class Last:
        """The input of a decoder's first layer."""

        def __call__(self, module, inputs):
            (self.seen,) = inputs

    for kind, rate in (("noise", 0.3), ("mask", 0.4)):
        model = VQAutoencoder(VQConfig(**SMALL, decoder_dropout=rate, decoder_dropout_kind=kind)).train()
        last = Last()
        model.decoder.conv_in.register_forward_pre_hook(last)
        latents = 1 + 3 * torch.randn(1, *latent_shape(model)).expand(4000, -1, -1, -1)
        with torch.no_grad():
            model.decoder(latents)
            drawn = last.seen
            error = (drawn.mean(0) - latents[0]) / (drawn.std(0) / len(drawn) ** 0.5)
            assert error.abs().max() < 5 and drawn.std(0).min() > 0
            if kind == "noise":
                wanted = float(rate / (1 - rate) * latents[0].std())
                assert float((drawn - latents).std()) == pytest.approx(wanted, rel=0.02)
            else:
                ratio = drawn / latents
                kept = ratio != 0
                torch.testing.assert_close(ratio[kept], torch.full_like(ratio[kept], 1 / (1 - rate)))
                assert set(kept.float().mean(1).unique().tolist()) == {0, 1}  # all channels of a position
                assert float(kept.float().mean()) == pytest.approx(1 - rate, abs=0.02)
            model.eval().decoder(latents[:2])
        assert torch.equal(last.seen, latents[:2])
        blocks = [module for module in model.train().modules() if isinstance(module, ResnetBlock2D)]
        inputs = torch.randn(8, blocks[0].in_channels, 4, 4)
        assert torch.equal(blocks[0](inputs, None), blocks[0](inputs, None))


def latent_shape(model: VQAutoencoder) -> tuple[int, int, int]:
    return model.config.encoder_out_channels, 2, 2


def test_the_scale_of_latents_buys_no_freedom_from_noise():
    model = VQAutoencoder(VQConfig(**SMALL, decoder_dropout=0.5, decoder_dropout_kind="noise")).train()
    latents = torch.randn(2, *latent_shape(model), dtype=torch.float64, requires_grad=True)
    hook = next(iter(model.decoder._forward_pre_hooks.values()))
    found = []
    for scale in (1.0, 100.0):
        torch.manual_seed(0)
        found.append(hook(model.decoder, (scale * latents,))[0] / scale)
    torch.testing.assert_close(found[0], found[1])
    (gradient,) = torch.autograd.grad(found[0].sum(), latents)
    torch.testing.assert_close(gradient, torch.ones_like(gradient))  # the spread is a constant
