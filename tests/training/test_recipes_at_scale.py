"""Recipes at paper scale: published settings, costs that are computed and said to be, and a start at full size."""

import importlib.util
import json
from dataclasses import asdict
from pathlib import Path

import contrastive
import numpy as np
import pytest
import timm
import torch
from cases import for_each
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from hf_dpssl import ContrastiveConfig, ContrastiveEncoder, MoCoForPreTraining, info_nce
from hf_dpssl.data.image_data import TABLE
from hf_dpssl.data.views import PRESETS
from hf_dpssl.domains.hyperparameters import hyperparameters
from hf_dpssl.runs.contrastive_arguments import MapArguments
from hf_dpssl.runs.recipe import find_recipe, parse

REPOSITORY = Path(__file__).parents[2]
# Published settings: scripts and defaults of wrhuang/t-SimCLR, facebookresearch/moco and Capricious-Liu/t-MoCo-v2.
BOTH = {"architecture": "resnet50", "projection_dim": 128, "projection_layers": 2, "optimizer": "sgd"}
CIFAR = BOTH | {"dataset": "cifar10", "stem": "small_image", "num_train_epochs": 1000, "warmup_steps": 10 * 48}
IMAGENET = BOTH | {
    "dataset": "imagenet-1k", "stem": "timm", "num_train_epochs": 200, "queue_size": 65536, "momentum": 0.999,
    "projection_hidden_dim": 2048, "learning_rate": 0.03, "weight_decay": 1e-4, "negatives": "queue",
}  # fmt: skip
STUDENT = {"kernel": "student_t", "feature_norm": "batch"}
PUBLISHED = {
    "simclr-resnet50-cifar10": CIFAR | {"kernel": "cosine", "feature_norm": "l2", "temperature": 0.5},
    "t-simclr-resnet50-cifar10": CIFAR
    | {"kernel": "student_t", "normalization": "joint", "feature_norm": "none", "temperature": 8.0, "dof": 5.0}
    | {"learning_rate": 0.4, "weight_decay": 1e-4},
    "moco-v2-resnet50-imagenet": IMAGENET | {"kernel": "cosine", "feature_norm": "l2", "temperature": 0.2},
    "t-moco-v2-resnet50-imagenet": IMAGENET | STUDENT | {"temperature": 5.0, "dof": 10.0},
    "t-moco-v2-dof5-resnet50-imagenet": IMAGENET | STUDENT | {"temperature": 0.2, "dof": 5.0},
}


def arguments(name: str) -> contrastive.ContrastiveArguments:
    return parse(contrastive.ContrastiveArguments, ["--recipe", name], "")


@pytest.fixture(scope="module")
def costs():
    """training/evidence/recipe_costs.py as a module."""
    path = REPOSITORY / "training/evidence/recipe_costs.py"
    specification = importlib.util.spec_from_file_location("recipe_costs", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def results(costs):
    return json.loads((costs.EVIDENCE / "results" / "recipe_costs.json").read_text(encoding="utf-8"))


@for_each("name", PUBLISHED)
def test_recipe_has_the_published_settings(name):
    values = asdict(arguments(name))
    assert {key: values[key] for key in PUBLISHED[name]} == PUBLISHED[name]
    assert values["batch_size"] * (values["num_processes"] or 1) == (256 if "imagenet" in name else 1024)
    views = PRESETS[values["augmentation"]]
    assert (views.crop_scale, views.jitter, views.grey, views.flip) == ((0.2, 1.0), 0.8, 0.2, 0.5)
    assert (views.brightness, views.contrast, views.saturation, views.hue) == (0.4, 0.4, 0.4, 0.1)
    assert values["augmentation_mode"] == "exact"
    assert views.blur == (0.5 if "imagenet" in name else 0.0)


def test_backbone_starts_as_the_codes_do_and_not_as_timm_does():
    model_args = json.loads(arguments("t-simclr-resnet50-cifar10").model_args)
    ours = timm.create_model("resnet18", num_classes=0, **model_args)
    assert all(block.bn2.weight.min() == 1 for block in ours.layer4)
    assert all(block.bn2.weight.max() == 0 for block in timm.create_model("resnet18", num_classes=0).layer4)


def test_simclr_recipe_takes_the_steps_of_the_codes_scaled_loss():
    ours, temperature, base = arguments("simclr-resnet50-cifar10"), 0.5, 0.07
    trained = []
    for scale, rate, decay in ((1.0, ours.learning_rate, ours.weight_decay), (temperature / base, 0.5, 1e-4)):
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(8, 4, generator=generator, dtype=torch.float64).requires_grad_()
        optimizer = torch.optim.SGD([weight], lr=rate, momentum=0.9, weight_decay=decay)
        for _ in range(5):
            view_1, view_2 = torch.randn(2, 6, 8, generator=generator, dtype=torch.float64)
            loss = scale * info_nce(view_1 @ weight, view_2 @ weight, temperature=temperature)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        trained.append(weight.detach())
    torch.testing.assert_close(trained[0], trained[1], rtol=1e-4, atol=1e-4)  # the recipe gives five digits


def forward_operations(args: contrastive.ContrastiveArguments) -> int:
    """Of a real encoder of a recipe for one image, counted while it runs."""
    model_args = json.loads(args.model_args) if args.model_args else None
    encoder = ContrastiveEncoder(ContrastiveConfig(args.architecture, model_args, stem=args.stem)).eval()
    side = TABLE[args.dataset].image_size
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(torch.zeros(1, 3, side, side))
    return counter.get_total_flops()


def test_recipes_say_what_they_cost_and_that_this_is_computed(costs, results):
    """Hours on A100 (312e12 operations per second, a fifth of them used) of two views: both are trained, of MoCo one
    passes forward only; a backward pass is two forward ones."""
    counted = {}
    for name in PUBLISHED:
        args, figures = arguments(name), results["metrics"][name]
        lines = [line for line in find_recipe(name).read_text(encoding="utf-8").splitlines() if costs.COMMENT in line]
        assert costs.comment_of_times(figures) in find_recipe(name).read_text(encoding="utf-8").splitlines()
        assert lines == [costs.comment(figures)], "run python training/evidence/recipe_costs.py --write_recipes"
        kind = (args.architecture, args.model_args, args.stem)
        counted[kind] = counted.get(kind) or forward_operations(args)
        passes = 3 + 1 if args.negatives == "queue" else 3 + 3
        images = {"cifar10": 50_000, "imagenet-1k": 1_281_167}[args.dataset] * args.num_train_epochs
        hours = passes * counted[kind] * images / ((args.num_processes or 1) * 312e12 * 0.2) / 3600
        assert figures["hours"]["A100"]["0.2"] == pytest.approx(hours, rel=0.03), name


def test_recipes_of_a_map_and_of_domains_say_what_they_cost(costs, results):
    for name in (*costs.MAPS, *costs.DOMAINS):
        lines, figures = find_recipe(name).read_text(encoding="utf-8").splitlines(), results["metrics"][name]
        assert costs.comment(figures) in lines and costs.comment_of_times(figures) in lines, name
    settings = parse(MapArguments, ["--recipe", "map-cifar10"], "")
    one = forward_operations(settings)
    # Two views: trained in stages 1 and 3, and passed forward by the frozen layers of stage 2.
    expected = 50_000 * one * (6 * (settings.stage_1_epochs + settings.stage_3_epochs) + 2 * settings.stage_2_epochs)
    figures = results["metrics"]["map-cifar10"]
    assert figures["operations"] == pytest.approx(expected, rel=0.03)
    assert figures["hours"]["A100"]["0.2"] == pytest.approx(expected / (312e12 * 0.2) / 3600, rel=0.03)

    figures = results["metrics"]["domains-pacs-resnet50"]
    resnet = timm.create_model("resnet50", num_classes=0).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        resnet(torch.zeros(1, 3, 224, 224))
    one, per_image = counter.get_total_flops(), figures["operations_per_image"]
    assert per_image["erm"] == pytest.approx(3 * one, rel=0.03)  # but for the gradient by the pictures
    assert per_image["sagnet"] == pytest.approx(9 * one, rel=0.03)  # three passes forward and backward
    trained = sum(
        per_image[name] * 5001 * 3 * hyperparameters(name, "fine_tune", draw, seed).batch_size
        for name in per_image for draw in range(20) for seed in range(3)
    )  # fmt: skip
    # At steps 0, 300, ..., 4800 and 5000, a fifth of three domains and all of the fourth; each is the fourth once.
    measured = len(per_image) * 20 * 3 * 18 * 9_991 * (0.2 * 3 + 1) * one
    assert figures["operations"] == pytest.approx(4 * trained + measured, rel=0.01)
    assert figures["hours"]["A100"]["0.2"] == pytest.approx(2 * figures["operations"] / (312e12 * 0.2) / 3600)
    assert figures["bytes_per_gpu"]["optimizer"] == pytest.approx(2 * figures["bytes_per_gpu"]["parameters"], rel=0.01)


def test_operations_are_those_published_for_resnet_50(results):
    # He et al. 2016 count 3.8e9 multiplications and additions for the variant with stride in the first convolution;
    # torchvision documents 4.09e9 for the one used here. The backward pass takes twice the forward pass.
    encoder = ContrastiveEncoder(ContrastiveConfig("resnet50")).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(torch.randn(1, 3, 224, 224))
    forward = counter.get_total_flops()
    assert forward == pytest.approx(2 * 4.09e9, rel=0.005)
    per_image = results["metrics"]["moco-v2-resnet50-imagenet"]["operations_per_image"]  # one view trained, one passed
    assert per_image == pytest.approx(4 * forward, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe_starts_at_full_size_on_synthetic_images(name, launch, tmp_path):
    entry = TABLE[arguments(name).dataset]
    generator = np.random.default_rng(0)
    for i in range(12):
        folder = tmp_path / "images" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        side = entry.image_size + (32 if entry.image_size > 32 else 0)
        Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    argv = ["--recipe", name, "--dataset", tmp_path / "images", "--image_size", entry.image_size, "--batch_size", 4]
    argv += ["--max_train_steps", 2, "--num_processes", 1, "--num_workers", 0, "--output_dir", tmp_path / "run"]
    launch("contrastive", argv).wait()
    encoder = ContrastiveEncoder.from_pretrained(tmp_path / "run/encoder")
    assert encoder.num_features == 2048 and sum(p.numel() for p in encoder.parameters()) > 23_000_000
    if arguments(name).negatives == "queue":
        model = MoCoForPreTraining.from_pretrained(tmp_path / "run/encoder", subfolder="pretraining")
        assert model.queue.shape == (65536, 128) and int(model.queue_filled) == 8
