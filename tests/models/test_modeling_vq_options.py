"""Options of the VQ autoencoder: kinds of latents, quantiser, codebook beside a frozen encoder, older checkpoints."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import for_each
from tiny_autoencoders import SMALL, gradients, images, make, same, state, train_steps

from hf_dpssl import VQAutoencoder, VQConfig
from hf_dpssl.models import modeling_vq
from hf_dpssl.models.weight_hashes import combined_sha256

NEW_FIELDS = (
    "encoder_out_channels attention_levels code_distance codebook_update quantizer_gradient entropy_weight "
    "entropy_temperature kl_weight decoder_dropout_kind codebook_frozen backbone "
    "equivariance_weight equivariance_transforms"
).split()


# Kinds of latents.


def test_gaussian_latents_are_drawn_in_training_and_are_the_mean_elsewhere():
    model = make(quantizer="kl")
    with torch.no_grad():
        mean, log_variance = model.quant_conv(model.encoder(images())).chunk(2, 1)
        assert torch.equal(model.encode(images()).latents, mean) and model.encode(images()).codes is None
        assert torch.equal(model(images()).pixel_values, model.decode(mean).pixel_values)
        torch.manual_seed(4)
        drawn = model.train()(images())
        torch.manual_seed(4)
        sample = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        torch.testing.assert_close(drawn.pixel_values, model.decode(sample).pixel_values)
        assert torch.equal(drawn.latents, mean) and torch.equal(model.train().encode(images()).latents, mean)
        assert torch.equal(drawn.kl, model.eval()(images()).kl)


def test_variance_of_gaussian_latents_stays_finite_and_the_decoder_alone_trains_on_means():
    model = make(quantizer="kl")
    with torch.no_grad():
        model.quant_conv.bias[3:] = 1e4
        assert model(images()).kl.isfinite()
        model.quant_conv.bias[3:] = 0.0
    model.freeze_encoder()
    model.train()
    assert torch.equal(model(images()).pixel_values, model(images()).pixel_values)


@pytest.mark.extended
def test_kl_weight_pulls_the_latents_to_the_standard_normal():
    reached = {}
    for weight in (0.0, 10.0):
        model = make(quantizer="kl", kl_weight=weight).train()
        train_steps(model, 12)
        reached[weight] = model.eval()(images()).kl.item()
    assert reached[10.0] < 0.05 * reached[0.0]


# Options of the quantiser.


@for_each("distance", ["l2", "cosine"])
@for_each("gradient", ["straight_through", "rotation"])
@for_each("update", ["ema", "gradient"])
def test_codes_come_back_as_the_reconstruction_bit_for_bit_with_every_quantiser(distance, gradient, update, tmp_path):
    model = make(code_distance=distance, quantizer_gradient=gradient, codebook_update=update)
    model.save_pretrained(tmp_path)
    loaded = VQAutoencoder.from_pretrained(tmp_path)
    with torch.no_grad():
        output = model(images(1))
        assert torch.equal(output.codes, model.encode(images(1)).codes)
        for decoder in (model, loaded):
            assert torch.equal(decoder.decode_codes(output.codes).pixel_values, output.pixel_values)
        assert torch.equal(model.decode_codes(output.codes.int()).pixel_values, output.pixel_values)
    found = gradients(model.train(), images(1))
    of_encoder = [gradient for name, gradient in found.items() if name.startswith(("encoder.", "quant_conv."))]
    assert len(of_encoder) > 20 and all(gradient.abs().sum() > 0 for gradient in of_encoder)
    assert ("quantizer.codebook" in found) == (update == "gradient")


def test_loss_holds_codebook_and_entropy_terms_with_their_weights():
    model = make(codebook_update="gradient", entropy_weight=0.3, entropy_temperature=0.5, commitment_weight=0.4)
    output = model(images(1))
    vectors = output.latents.permute(0, 2, 3, 1).reshape(-1, 3)
    codebook = model.quantizer.codebook
    p = (-(vectors[:, None] - codebook).pow(2).sum(2) / 0.5).softmax(1)
    entropy = -(p * p.log()).sum(1).mean() + (p.mean(0) * p.mean(0).log()).sum()
    torch.testing.assert_close(output.entropy, entropy, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(output.codebook, F.mse_loss(codebook[output.codes.flatten()], vectors))
    torch.testing.assert_close(output.loss, output.recon + 0.4 * output.commit + output.codebook + 0.3 * output.entropy)


# Frozen encoder.


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_codebook_goes_on_learning_beside_a_frozen_encoder_if_the_config_says_so(update, tmp_path):
    model = make(codebook_frozen=False, codebook_update=update)
    model.freeze_encoder()
    before = state(model)
    train_steps(model.train())
    frozen = state(model, "encoder", "quant_conv")
    assert same(frozen, {name: before[name] for name in frozen})
    assert not torch.equal(model.quantizer.codebook, before["quantizer.codebook"])
    model.check_encoder_unchanged()
    model.save_pretrained(tmp_path)
    loaded = VQAutoencoder.from_pretrained(tmp_path)
    assert loaded.config.codebook_frozen is False and loaded.config.encoder_sha256 == model.hash_encoder()
    train_steps(loaded.train())
    assert not torch.equal(loaded.quantizer.codebook, model.quantizer.codebook)
    with torch.no_grad():
        loaded.quant_conv.bias += 1
    with pytest.raises(RuntimeError, match=r"1 frozen tensors.*quant_conv.bias"):
        loaded.check_encoder_unchanged()


def test_equivariance_is_the_distance_of_decoded_transformed_latents_to_transformed_images_in_turns():
    """Grids turned and halved cell by cell."""

    def turned(grid: list[list[float]], k: int) -> list[list[float]]:
        for _ in range(k):
            grid = [[row[column] for row in grid] for column in reversed(range(len(grid[0])))]
        return grid

    def halved(grid: list[list[float]]) -> list[list[float]]:
        return [
            [sum(grid[2 * i + a][2 * j + b] for a in (0, 1) for b in (0, 1)) / 4 for j in range(len(grid[0]) // 2)]
            for i in range(len(grid) // 2)
        ]

    turns = [lambda grid, k=k: turned(grid, k) for k in (1, 2, 3)]
    by_name = {"rotations": turns, "scales": [halved]}
    for options in ({}, {"equivariance_transforms": ["scales"]}, {"quantizer": "none", "reconstruction_loss": "l1"}):
        model = make(equivariance_weight=0.5, **options).double().train()
        if model.quantizer is not None:
            model.quantizer.defer_update = True
        x = images(count=6).double()
        output = model(x)
        transforms = [t for name in model.config.equivariance_transforms for t in by_name[name]]
        quantized = output.latents if model.quantizer is None else model.quantizer.lookup(output.codes)
        errors = []
        for place, (latent, image) in enumerate(zip(quantized, x, strict=True)):
            transform = transforms[place % len(transforms)]
            latent, image = (
                torch.tensor([transform(channel) for channel in grids.tolist()], dtype=x.dtype)
                for grids in (latent, image)
            )
            difference = model.decode(latent[None]).pixel_values[0] - image
            errors.append(difference.abs().mean() if "reconstruction_loss" in options else difference.square().mean())
        torch.testing.assert_close(output.equivariance.double(), torch.stack(errors).mean(), rtol=1e-6, atol=0)
        terms = output.recon + model.config.commitment_weight * output.commit + output.codebook
        torch.testing.assert_close(output.loss, terms + 0.5 * output.equivariance)
        (gradient,) = torch.autograd.grad(output.equivariance, [model.encoder.conv_in.weight])
        assert gradient.abs().max() > 0
        assert model.eval()(x).equivariance == 0 and make(**options).train()(images()).equivariance == 0
        model.freeze_encoder()
        assert model.train()(x).equivariance == 0


def test_fingerprint_changes_with_the_config_where_it_decides_codes_or_latents():
    model = make()
    assert model.fingerprint() == combined_sha256(model.hash_encoder() | {"norm_num_groups": "4"})
    found = {model.fingerprint()}
    for name, value in (("code_distance", "cosine"), ("norm_num_groups", 8)):
        other = VQAutoencoder(VQConfig(**(SMALL | {name: value})))
        other.load_state_dict(model.state_dict())
        found.add(other.fingerprint())
    assert len(found) == 3
    model.config.decoder_dropout, model.config.kl_weight = 0.5, 1.0
    assert model.fingerprint() in found


# Config and checkpoints.


def test_config_comes_back_with_every_field(tmp_path):
    config = VQConfig.preset(
        "f4", image_size=32, quantizer="kl", kl_weight=0.1, attention_levels=[2, 1], decoder_dropout=0.2,
        decoder_dropout_kind="depth", codebook_frozen=False, encoder_out_channels=6, entropy_weight=0.1,
        entropy_temperature=0.2, code_distance="cosine", codebook_update="gradient", quantizer_gradient="rotation",
        equivariance_weight=0.2, equivariance_transforms=["scales"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    loaded = VQConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict() and loaded.attention_levels == [1, 2]
    changed = {name for name in NEW_FIELDS if getattr(loaded, name) != getattr(VQConfig(), name)}
    assert changed == set(NEW_FIELDS) - {"backbone"}


def test_checkpoint_from_before_the_new_fields_loads_and_gives_the_same(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    entries = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in entries.items() if k not in NEW_FIELDS}))
    loaded = VQAutoencoder.from_pretrained(tmp_path)
    assert loaded.config.encoder_out_channels == 3 and loaded.config.code_distance == "l2"
    assert torch.equal(loaded(images(1)).pixel_values, model(images(1)).pixel_values)


BACKBONE = {"architecture": "resnet18", "channels": 64, "reduction": 2}


def test_config_refuses_what_is_not_defined_and_says_what_is():
    for options, message in [
        ({"code_distance": "l1"}, "'l2', 'cosine'"),
        ({"codebook_update": "sgd"}, "'ema', 'gradient'"),
        ({"quantizer_gradient": "gumbel"}, "'straight_through', 'rotation'"),
        ({"decoder_dropout_kind": "row"}, "'element', 'channel', 'depth'"),
        ({"attention_levels": [2]}, r"\[0, 1\], got \[2\]"),
        ({"kl_weight": -1.0}, "must not be negative"),
        ({"equivariance_weight": -1.0}, "must not be negative"),
        *[
            ({"equivariance_transforms": names}, "one or more of .'rotations', 'scales'.")
            for names in ([], ["shears"], ["scales"] * 2)
        ],
        ({"equivariance_weight": 1.0, "image_size": 6}, "whose side 3 is odd: take 'rotations'"),
        ({"entropy_temperature": 0.0}, "entropy_temperature > 0"),
        ({"encoder_out_channels": -1}, "encoder_out_channels must be at least 1"),
        ({"backbone": {"architecture": "resnet18"}}, "lacks .*channels.*complete_backbone"),
        ({"backbone": BACKBONE}, "latent_channels=3 must be 64"),
        ({"backbone": BACKBONE, "latent_channels": 64, "quantizer": "kl"}, "no variances"),
    ]:
        with pytest.raises(ValueError, match=message):
            VQConfig(**(SMALL | options))


def test_wrong_images_latents_and_codes_are_refused_by_what_is_allowed():
    for call, message in [
        (lambda model: model(torch.zeros(1, 3, 8, 0)), "a latent cell, got"),
        (lambda model: model(torch.zeros(1, 3, 1, 8)), "multiples of 2, the side of a latent cell"),
        (lambda model: model.decode(torch.zeros(1, 4, 4, 4)), r"\(B, 3, h, w\), got \(1, 4, 4, 4\)"),
        (lambda model: model.decode_codes(torch.zeros(4, 16).long()), r"\(B, h, w\).*reshape"),
        (lambda model: model.decode_codes(torch.zeros(1, 4, 4)), "torch.float32"),
        (lambda model: model.decode_codes(torch.zeros(1, 4, 4, dtype=torch.uint8)), "torch.uint8"),
    ]:
        with pytest.raises(ValueError, match=message):
            call(make())


def test_model_files_name_every_sibling_that_their_siblings_need():
    # transformers before 5.13 copies only these next to the weights.
    def named(module: str) -> set[str]:
        source = (Path(modeling_vq.__file__).parent / f"{module}.py").read_text(encoding="utf-8")
        return set(re.findall(r"^\s*from \.(\w+) import", source, re.MULTILINE))

    for module in ("modeling_vq", "modeling_contrastive", "modeling_vaegan", "modeling_discriminator"):
        direct = named(module)
        assert "complete_weights" in direct and set().union(*map(named, direct)) <= direct, module
