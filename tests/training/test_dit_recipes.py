"""Recipes of the latent DiT: the paper's settings, costs that are computed and said to be, a start at full size."""

import importlib.util
import json
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
import torch
from diffusers import DiTTransformer2DModel
from dit_operations import multiplications
from PIL import Image

from hf_dpssl import VQAutoencoder, VQConfig
from hf_dpssl.latent_training.dit_arguments import DiTArguments
from hf_dpssl.latent_training.dit_sizes import PRESETS
from hf_dpssl.runs.recipe import find_recipe, parse

RECIPES = {"dit-b2-imagenet": "dit-b-2", "dit-xl2-imagenet": "dit-xl-2"}
# Peebles and Xie 2023, section 4: no warm-up, no decay, flips alone, EMA 0.9999, batch 256, dropped classes 10 %.
PAPER = {
    "objective": "epsilon", "learned_variance": True, "learning_rate": 1e-4, "lr_scheduler": "constant",
    "warmup_steps": 0, "weight_decay": 0.0, "adam_beta2": 0.999, "max_grad_norm": 0.0, "ema_decay": 0.9999,
    "class_dropout": 0.1, "flip_cache": True, "max_train_steps": 400_000, "sampling_steps": 250, "streaming": True,
}  # fmt: skip
GIBIBYTES = {"dit-b2-imagenet": 8, "dit-xl2-imagenet": 20}  # weights, gradients, moments, averages, what is being saved


def arguments(name: str) -> DiTArguments:
    return parse(DiTArguments, ["--recipe", name], "")


@pytest.fixture(scope="module")
def costs():
    """training/evidence/recipe_costs.py as a module."""
    path = Path(__file__).parents[2] / "training/evidence/recipe_costs.py"
    specification = importlib.util.spec_from_file_location("recipe_costs", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_xl_recipe_has_the_papers_settings():
    values = asdict(arguments("dit-xl2-imagenet"))
    assert {key: values[key] for key in PAPER} == PAPER
    assert values["batch_size"] * 8 == 256


@pytest.mark.parametrize(("name", "size"), RECIPES.items())
def test_recipe_has_the_size_of_its_name_and_says_what_it_costs(name, size, costs):
    args, known = arguments(name), PRESETS[size]
    assert {key: getattr(args, key) for key in asdict(known)} == asdict(known)
    figures = json.loads((costs.EVIDENCE / "results/recipe_costs.json").read_text(encoding="utf-8"))["metrics"][name]
    lines = [line for line in find_recipe(name).read_text(encoding="utf-8").splitlines() if costs.COMMENT in line]
    assert costs.comment_of_times(figures) in find_recipe(name).read_text(encoding="utf-8").splitlines()
    assert lines == [costs.comment(figures)], "run python training/evidence/recipe_costs.py --write_recipes"
    # A forward and a backward pass are three; the last embedder and the patches need no gradient of their input.
    shape = dict(latent_size=32, in_channels=4, out_channels=8 if args.learned_variance else 4)
    forward = multiplications(known, **shape, embedders=known.num_layers + 1)
    assert figures["operations_per_image"] == pytest.approx(6 * forward, rel=0.02)
    images = args.max_train_steps * args.batch_size * 8
    expected = 6 * forward * images / (8 * 312e12 * 0.2) / 3600
    assert figures["hours"]["A100"]["0.2"] == pytest.approx(expected, rel=0.02)
    # Before: 32 x 32 x 4 float32 of each image, and of its mirror image. After: ten pictures of ten classes, with and
    # without guidance, which the eight GPUs share.
    assert figures["start"]["bytes"] == 1_281_167 * (1 + args.flip_cache) * 4 * 32 * 32 * 4
    drawn = 100 * args.sampling_steps * (2 + 1) * 2 * forward / (8 * 312e12 * 0.2)
    assert figures["end"]["seconds"]["A100"]["0.2"] == pytest.approx(drawn, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), RECIPES.items())
def test_recipe_starts_for_two_steps_at_full_size_on_one_image(name, size, launch, tmp_path):
    if psutil.virtual_memory().available < GIBIBYTES[name] * 2**30:
        pytest.skip(f"{name} needs {GIBIBYTES[name]} GiB of free memory")
    (tmp_path / "images/thing").mkdir(parents=True)
    for i in range(2):  # one of them is held out
        pixels = torch.randint(256, (256, 256, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"images/thing/{i}.png")
    channels = dict(encoder_block_out_channels=[8] * 4, decoder_block_out_channels=[8] * 4, norm_num_groups=4)
    statistics = dict(latent_mean=[0] * 4, latent_std=[1] * 4)
    vae = VQAutoencoder(VQConfig(image_size=256, latent_channels=4, num_codes=16, **channels, **statistics))
    vae.save_pretrained(tmp_path / "autoencoder")
    flags = ["--recipe", name, "--dataset", tmp_path / "images", "--autoencoder", tmp_path / "autoencoder"]
    flags += ["--batch_size", 1, "--max_train_steps", 2, "--num_workers", 0, "--mixed_precision", "no"]
    flags += ["--sampling_steps", 1, "--grid_images_per_class", 1, "--output_dir", tmp_path / "run"]
    launch("dae_dit", flags).wait(1800)
    transformer = DiTTransformer2DModel.from_pretrained(tmp_path / "run/dit", subfolder="transformer")
    config = transformer.config
    assert (config.num_layers, config.num_attention_heads) == (PRESETS[size].num_layers, PRESETS[size].num_heads)
    # It starts at 0, and is the first that the zero initialisation lets learn.
    assert bool((transformer.proj_out_2.weight != 0).any())
    assert (tmp_path / "run/dit/samples.png").exists()
