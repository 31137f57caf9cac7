"""Recipes of autoencoders and GANs: published settings, and a start at full size on the CPU."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from hf_dpssl import ContrastiveConfig, ContrastiveEncoder, VQAutoencoder
from hf_dpssl.autoencoder.arguments import CONFIG_FLAGS, VQArguments
from hf_dpssl.latent_training.gan_training import GANArguments
from hf_dpssl.models.configuration_vq import VQConfig
from hf_dpssl.runs.recipe import find_recipe, parse

FACES = ["vq-gan-f16-faceshq", "vq-dae-f16-faceshq"]
# configs/faceshq_vqgan.yaml of taming-transformers.
PUBLISHED = {
    "adversarial": "hinge", "adversarial_start": 30001, "adversarial_weight": 0.8, "perceptual": "lpips",
    "perceptual_weight": 1.0, "commitment_weight": 0.25, "reconstruction_loss": "l1", "batch_size": 3,
    "dataset": "celeba-hq+ffhq", "learning_rate": 1.08e-4, "lr_scheduler": "constant", "adam_betas": [0.5, 0.9],
    "weight_decay": 0.0, "max_grad_norm": 0.0, "discriminator_width": 64, "discriminator_layers": 3,
}  # fmt: skip


@pytest.mark.parametrize("name", FACES)
def test_faces_recipes_are_the_published_set_up_decoupled_and_joint(name):
    args = parse(VQArguments, ["--recipe", name], "")
    assert {key: getattr(args, key) for key in PUBLISHED} == PUBLISHED
    assert (args.arm, args.steps_of_joint_arm) == (("weak_dropout", None) if "dae" in name else ("joint", "total"))
    options = {key: getattr(args, key) for key in CONFIG_FLAGS}
    config = VQConfig(
        **options, image_size=256, encoder_block_out_channels=args.encoder_channels,
        decoder_block_out_channels=args.decoder_channels, encoder_layers_per_block=args.layers_per_block,
    )  # fmt: skip
    preset = VQConfig.preset("f16")
    for key in ("attention_levels", "num_codes", "latent_channels", "encoder_block_out_channels", "norm_num_groups"):
        assert getattr(config, key) == getattr(preset, key)


def test_the_other_recipes_are_read():
    args = parse(VQArguments, ["--recipe", "vq-dae-f8-imagenet"], "")
    assert (args.arm, args.encoder_channels) == ("dae", [128, 256, 256, 512])
    assert parse(GANArguments, ["--recipe", "gan-cifar10-jpeg"], "").max_train_steps == 4000


@pytest.fixture(scope="module")
def costs():
    """training/evidence/recipe_costs.py as a module."""
    path = Path(__file__).parents[2] / "training/evidence/recipe_costs.py"
    specification = importlib.util.spec_from_file_location("recipe_costs", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_recipes_say_what_they_cost_and_that_this_is_computed(costs):
    results = json.loads((costs.EVIDENCE / "results" / "recipe_costs.json").read_text(encoding="utf-8"))["metrics"]
    for name in (*FACES, "vq-dae-f8-imagenet"):
        lines = [line for line in find_recipe(name).read_text(encoding="utf-8").splitlines() if costs.COMMENT in line]
        assert costs.comment_of_times(results[name]) in find_recipe(name).read_text(encoding="utf-8").splitlines()
        assert lines == [costs.comment(results[name])], "run python training/evidence/recipe_costs.py --write_recipes"


@pytest.mark.extended
def test_hours_are_those_of_real_steps_at_full_width(costs):
    """Of both stages of the faces' recipe: an eighth of the side, a 64th of the pixels; attention is a trifle."""
    args = parse(VQArguments, ["--recipe", "vq-dae-f16-faceshq"], "")
    model = VQAutoencoder(VQConfig.preset("f16", image_size=32)).train()
    model.quantizer.is_initialized.fill_(1)
    operations = 0
    for steps, frozen in ((args.stage_1_steps, False), (args.stage_2_steps, True)):
        if frozen:
            model.freeze_encoder()
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, 32, 32)).loss.backward()
        operations += 64 * counter.get_total_flops() * steps * args.batch_size * 8
    results = json.loads((costs.EVIDENCE / "results" / "recipe_costs.json").read_text(encoding="utf-8"))["metrics"]
    hours = operations / (8 * 312e12 * 0.2) / 3600
    assert results["vq-dae-f16-faceshq"]["hours"]["A100"]["0.2"] == pytest.approx(hours, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", FACES)
def test_faces_recipe_starts_for_two_steps_at_full_size(name, launch, tmp_path):
    """Two unions of noise stand for the faces, a small encoder for LPIPS, whose weights need a network."""
    for part in "ab":
        for i in range(4):
            pixels = torch.randint(256, (256, 256, 3), dtype=torch.uint8)
            (tmp_path / part).mkdir(exist_ok=True)
            Image.fromarray(pixels.numpy()).save(tmp_path / part / f"{i}.png")
    encoder = tmp_path / "encoder"
    ContrastiveEncoder(ContrastiveConfig("resnet10t", {"channels": [8, 16, 16, 24]})).save_pretrained(encoder)
    flags = ["--recipe", name, "--dataset", f"{tmp_path / 'a'}+{tmp_path / 'b'}", "--perceptual", encoder]
    flags += ["--batch_size", 1, "--stage_1_steps", 1, "--stage_2_steps", 1, "--num_workers", 0]
    flags += ["--adversarial_start", 0, "--validation_steps", 10, "--output_dir", tmp_path / "run"]
    launch("dae_vq", flags).wait(560)
    folder = tmp_path / "run" / "autoencoder"
    assert sum(p.numel() for p in VQAutoencoder.from_pretrained(folder).parameters()) > 71_000_000
    assert sum(json.loads((folder / "results.json").read_text())["stages"].values()) == 2
