"""Validation while training: its figures against images drawn from the kept pipeline, the best, exact resume."""

import json
import shutil
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import load_file, save_file

from hf_dpssl import ContrastiveConfig, ContrastiveEncoder, VQAutoencoder, VQConfig, VQDiTPipeline
from hf_dpssl.data.batches import ImageSource
from hf_dpssl.data.image_data import load_images
from hf_dpssl.data.keyed_random import derive_seed
from hf_dpssl.embedding.feature_extractors import CifarResNet, load_extractor
from hf_dpssl.evaluation.frechet import frechet_distance
from hf_dpssl.latent_training.diffusion import make_scheduler, make_transformer
from hf_dpssl.latent_training.dit_arguments import DiTArguments
from hf_dpssl.latent_training.generation_monitor import GenerationMonitor, sample_grid

SHAPE = dict(image_size=16, latent_channels=2, encoder_block_out_channels=[8, 8], decoder_block_out_channels=[8, 8])
NUM_IMAGES = 25
# The encoder's features are few, so that so few images have a covariance of full rank.
RESNET = dict(model_args={"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]})
PICTURES = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    """Folder of a small random encoder."""
    folder = tmp_path_factory.mktemp("encoder") / "judge"
    torch.manual_seed(0)
    ContrastiveEncoder(ContrastiveConfig("resnet18", pretrained_cfg=PICTURES, **RESNET)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def images():
    data = load_images("digits")
    return ImageSource(data, image_size=16, batch_size=8, seed=0).training_table()


@pytest.fixture
def classifier(tmp_path, monkeypatch) -> str:
    """Name of a random classifier of ten classes."""
    torch.manual_seed(0)
    (tmp_path / "data").mkdir()
    save_file(CifarResNet(20).state_dict(), tmp_path / "data" / "cifar10-resnet20.safetensors")
    monkeypatch.setenv("DPSSL_DATA", str(tmp_path / "data"))
    return "resnet20-cifar10"


def make_pipeline(objective: str = "epsilon", num_classes: int = 10) -> VQDiTPipeline:
    torch.manual_seed(0)
    learned = objective == "epsilon"
    size = dict(num_layers=1, width=16, num_heads=2, patch_size=2, latent_channels=2, latent_size=8)
    transformer = make_transformer(**size, num_classes=num_classes, learned_variance=learned)
    vae = VQAutoencoder(VQConfig(**SHAPE, num_codes=8, norm_num_groups=4, latent_mean=[0, 0], latent_std=[1, 1])).eval()
    names = {i: f"digit {i}" for i in range(num_classes)}
    return VQDiTPipeline(transformer, vae, make_scheduler(objective, learned), names, vae.fingerprint())


def arguments(folder, **options) -> DiTArguments:
    few = dict(validation_images=NUM_IMAGES, sampling_steps=2, grid_images_per_class=1, batch_size=8)
    return DiTArguments(**few | dict(output_dir=str(folder), validation_steps=2, max_train_steps=5) | options)


def averaged(pipeline: VQDiTPipeline, seed: int) -> EMAModel:
    """Averages that are not the transformer's own weights."""
    ema = EMAModel(pipeline.transformer.parameters(), decay=0.9)
    generator = torch.Generator().manual_seed(seed)
    for value in ema.shadow_params:
        value += 0.1 * torch.randn(value.shape, generator=generator)
    return ema


def test_figures_are_those_of_images_that_the_kept_pipeline_draws(tmp_path, encoder, classifier, images):
    pipeline = make_pipeline()
    args = arguments(tmp_path, validation_extractor=encoder, validation_classifier=classifier, evaluation_images=100)
    monitor, ema = GenerationMonitor(args, Accelerator(cpu=True), pipeline, images), averaged(pipeline, 1)
    before = {name: value.clone() for name, value in pipeline.transformer.state_dict().items()}
    pipeline.transformer.train()
    found = monitor.validate(2, ema)
    assert pipeline.transformer.training
    assert all(torch.equal(value, before[name]) for name, value in pipeline.transformer.state_dict().items())

    kept = VQDiTPipeline.from_pretrained(tmp_path / "dit-best")
    assert all(torch.equal(a, b) for a, b in zip(kept.transformer.parameters(), ema.shadow_params, strict=True))
    labels = [i % 10 for i in range(NUM_IMAGES)]
    generators = [torch.Generator().manual_seed(derive_seed(0, "validation", i)) for i in range(NUM_IMAGES)]
    options = dict(guidance_scale=1.0, num_inference_steps=2, output_type="pt")
    drawn = kept(labels, generator=generators, **options).images * 2 - 1  # all at once, where the monitor drew eight
    judge, real = load_extractor(encoder, device="cpu"), images.images[images.random_rows(100)].float() / 127.5 - 1
    moments = [(f.mean(0).numpy(), f.T.cov().numpy()) for f in (judge.features(x).double() for x in (real, drawn))]
    assert found["fid_judge"] == pytest.approx(frechet_distance(*moments[0], *moments[1]), rel=1e-3)
    logits = load_extractor(classifier, device="cpu").logits(drawn)
    assert found["class_consistency"] == pytest.approx(
        100 * float((logits.argmax(1) == torch.tensor(labels)).double().mean())
    )
    kept_results = json.loads((tmp_path / "dit-best/results.json").read_text())
    assert kept_results["metrics"] == found
    judged = {"samples": {"generated": NUM_IMAGES, "reference": 100}, "reference": "train"}
    assert monitor.judged() == judged == {name: kept_results[name] for name in judged}
    picture = Image.open(tmp_path / "dit-progress/step-00000002.png")
    assert picture.width >= 64 and len(picture.convert("L").getcolors()) > 10


@pytest.mark.extended
def test_best_is_replaced_by_a_better_one_alone_also_after_a_resume(tmp_path, encoder, images):
    pipeline = make_pipeline("flow")
    args = arguments(tmp_path, validation_extractor=encoder, evaluation_images=100, validation_images=40)
    monitors = [GenerationMonitor(args, Accelerator(cpu=True), pipeline, images) for _ in range(2)]
    values = [monitors[0].validate(2 * i, averaged(pipeline, i))["fid_judge"] for i in range(1, 4)]
    best = min(range(3), key=values.__getitem__)
    assert (monitors[0].best, monitors[0].best_step) == (values[best], 2 * best + 2) and len(set(values)) == 3
    kept = load_file(tmp_path / "dit-best/transformer/diffusion_pytorch_model.safetensors")
    expected = dict(
        zip(dict(pipeline.transformer.named_parameters()), averaged(pipeline, best + 1).shadow_params, strict=True)
    )
    assert all(torch.equal(kept[name], value) for name, value in expected.items())
    monitors[1].load_state_dict(monitors[0].state_dict())
    worst = max(range(3), key=values.__getitem__)
    monitors[1].validate(8, averaged(pipeline, worst + 1))
    assert (monitors[1].best, monitors[1].best_step) == (values[best], 2 * best + 2)
    assert [step for step in range(1, 6) if monitors[0].is_due(step)] == [2, 4]


class Process:
    """One of the processes that have met, as accelerate shows it."""

    def __init__(self, index: int = 0, count: int = 1, autocast=nullcontext):
        self.process_index, self.num_processes, self.autocast = index, count, autocast
        self.device = torch.device("cpu")


def _validation_of_a_process(folder: str, encoder: str, images: int) -> dict[str, torch.Tensor]:
    args = arguments(folder, validation_extractor=encoder, evaluation_images=101, validation_images=images)
    table = ImageSource(load_images("digits"), image_size=16, batch_size=8, seed=0).training_table()
    met = torch.distributed.is_initialized()
    place = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if met else ()
    monitor = GenerationMonitor(args, Process(*place), make_pipeline(), table)
    generated, labels, _ = monitor._generate()
    grid = sample_grid(monitor.pipeline, 2, args.grid | {"num_inference_steps": 2}, args, monitor.accelerator)
    return {"real": monitor.real, "generated": generated, "labels": labels, "grid": grid}


@pytest.mark.extended
def test_two_processes_share_a_validation_and_have_its_features_in_the_order_of_one(tmp_path, encoder, run_in_two):
    for count in (5, 2):
        alone = _validation_of_a_process(str(tmp_path), encoder, count)
        for found in run_in_two(_validation_of_a_process, str(tmp_path), encoder, count):
            torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


def test_grids_are_drawn_in_the_precision_of_the_run(tmp_path, monkeypatch):
    pipeline, seen = make_pipeline(), []
    forward = pipeline.transformer.forward

    def watched(*given, **options):
        seen.append(torch.is_autocast_enabled("cpu"))
        return forward(*given, **options)

    monkeypatch.setattr(pipeline.transformer, "forward", watched)
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    args = arguments(tmp_path)
    rounded = sample_grid(pipeline, 1, args.grid, args, Process(autocast=autocast))
    exact = sample_grid(pipeline, 1, args.grid, args, Process())
    assert seen == [True] * (len(seen) // 2) + [False] * (len(seen) // 2) and seen
    assert rounded.dtype == torch.float32 and 0 < float((rounded - exact).abs().max()) < 0.5


def test_without_extractor_the_grid_alone_is_drawn_also_without_classes(tmp_path):
    pipeline = make_pipeline("v_prediction", num_classes=0)
    monitor = GenerationMonitor(arguments(tmp_path), Accelerator(cpu=True), pipeline, None)
    assert monitor.validate(2, averaged(pipeline, 1)) == {} and monitor.metric is None
    assert (tmp_path / "dit-progress/step-00000002.png").exists() and not (tmp_path / "dit-best").exists()


def test_classifiers_that_cannot_judge_are_refused(tmp_path, encoder, classifier):
    with pytest.raises(ValueError, match="'judge' has no classifier"):
        GenerationMonitor(
            arguments(tmp_path, validation_classifier=encoder), Accelerator(cpu=True), make_pipeline(), None
        )
    args = arguments(tmp_path, validation_classifier=classifier)
    with pytest.raises(ValueError, match="knows 10 classes, the data set has 3"):
        GenerationMonitor(args, Accelerator(cpu=True), make_pipeline(num_classes=3), None)


def tensors(folder) -> dict[str, torch.Tensor]:
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{file.relative_to(folder)} {k}": v for file in files for k, v in load_file(file).items()}


@pytest.mark.extended
def test_validated_and_aligned_run_resumes_bit_identically_with_its_best(launch, tmp_path, encoder):
    make_pipeline().vae.save_pretrained(tmp_path / "autoencoder")
    flags = ["--autoencoder", tmp_path / "autoencoder", "--width", 16, "--num_heads", 2, "--num_layers", 2]
    flags += ["--objective", "epsilon", "--learned_variance", True, "--min_snr_gamma", 5, "--batch_size", 32]
    flags += ["--sampling_steps", 2, "--grid_images_per_class", 1, "--gradient_checkpointing", True]
    flags += ["--validation_steps", 2, "--validation_images", 20, "--validation_extractor", encoder]
    flags += ["--align_encoder", encoder, "--align_width", 8, "--evaluation_images", 100, "--log_with", "tensorboard"]
    flags += [
        "--max_train_steps",
        5,
        "--checkpointing_steps",
        3,
        "--logging_steps",
        1,
        "--output_dir",
        tmp_path / "run",
    ]
    launch("dae_dit", flags).wait()
    whole = shutil.copytree(tmp_path / "run", tmp_path / "whole")
    for place in ("dit", "dit-best", "dit-progress", "checkpoints/dit/step-00000005"):
        shutil.rmtree(tmp_path / "run" / place)
    shutil.copytree(whole / "dit-best", tmp_path / "run" / "dit-best")
    assert "resumed at step 3" in launch("dae_dit", [*flags, "--resume_from_checkpoint", "latest"]).wait()
    for place in ("dit", "dit-best"):
        found, expected = tensors(tmp_path / "run" / place), tensors(whole / place)
        assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in expected)
    results = [json.loads((run / "dit/results.json").read_text()) for run in (tmp_path / "run", whole)]
    assert results[0]["validations"] == results[1]["validations"]
    assert [entry["step"] for entry in results[0]["validations"]] == [2, 4, 5]
    states = [
        torch.load(run / "checkpoints/dit/step-00000005/state.pt", weights_only=True)
        for run in (tmp_path / "run", whole)
    ]
    assert states[0]["monitor"] == states[1]["monitor"] and states[0]["monitor"]["best"] is not None
    assert all(torch.equal(a, b) for a, b in zip(*(state["ema"]["shadow_params"] for state in states), strict=True))
    meta = [
        json.loads((run / "checkpoints/dit/step-00000005/meta.json").read_text()) for run in (tmp_path / "run", whole)
    ]
    assert meta[0]["history"] == meta[1]["history"]
    assert {"loss", "simple", "vlb", "alignment", "fid_judge"} <= {
        name for entry in meta[0]["history"] for name in entry
    }
    grids = [(run / "dit-progress/step-00000005.png").read_bytes() for run in (tmp_path / "run", whole)]
    assert grids[0] == grids[1]
    events = b"".join(path.read_bytes() for path in (whole / "logs").rglob("events.out.tfevents*"))
    assert b"dit/samples" in events and b"dit/fid_judge" in events
