"""The token transformer's script: what it writes, its nats, resume, accumulation, unlabelled data, bad input."""

import json
import math
import random

import dae_ar
import pytest
import torch
import torch.nn.functional as F
from kills import assert_identical, run_with_kills
from PIL import Image
from transformers import AutoModelForCausalLM

from hf_dpssl import ContrastiveConfig, ContrastiveEncoder, VQAutoencoder, VQConfig, VQTokenPipeline
from hf_dpssl.autoencoder import measures
from hf_dpssl.data import batches
from hf_dpssl.data.image_data import load_images
from hf_dpssl.data.image_table import ImageTable
from hf_dpssl.generation.bulk_sampling import draw_images
from hf_dpssl.latent_training.token_arguments import ARArguments
from hf_dpssl.runs.recipe import parse

CODES, STEPS = 16, 6
SMALL = ["--width", 16, "--num_layers", 1, "--num_heads", 2, "--batch_size", 32, "--checkpointing_steps", 2]
SMALL += ["--max_train_steps", STEPS, "--logging_steps", 2, "--validation_steps", 3, "--learning_rate", 0.01]
SMALL += ["--samples_per_class", 1]


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """Folder of an autoencoder with random weights: 4 x 4 codes of 16 px."""
    torch.manual_seed(0)
    widths = dict(encoder_block_out_channels=[8, 8, 8], norm_num_groups=4, mid_block_attention=False)
    folder = tmp_path_factory.mktemp("autoencoder")
    VQAutoencoder(VQConfig(image_size=16, num_codes=CODES, **widths)).save_pretrained(folder)
    return folder


def read(path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@torch.no_grad()
def nats_by_hand(folder, split: str, unconditional: bool = False) -> float:
    """Mean nats per image of digits under a finished pipeline: images encoded anew, one code after the other."""
    pipeline = VQTokenPipeline.from_pretrained(folder)
    data, total = load_images("digits"), 0.0
    table = ImageTable(data, getattr(data, split), 16)
    batch = table.readable_batch(range(0, len(table)))
    codes = pipeline.vae.encode(batch["images"].float() / 127.5 - 1).codes.flatten(1)
    first = torch.full_like(batch["labels"], CODES) if unconditional else CODES + batch["labels"]
    tokens = torch.cat([first[:, None], codes], 1)
    for place in range(16):
        logits = pipeline.language_model(tokens[:, : place + 1]).logits[:, -1, :CODES]
        total -= float(logits.log_softmax(1).gather(1, codes[:, place : place + 1]).double().sum())
    return total / len(codes)


@pytest.mark.parametrize("architecture", ["llama", pytest.param("gpt2", marks=pytest.mark.extended)])
def test_script_writes_a_complete_folder_with_the_nats_of_its_weights(architecture, autoencoder, run_script, tmp_path):
    flags = [*SMALL, "--architecture", architecture, "--output_dir", tmp_path]
    output = run_script("dae_ar", [*flags, "--autoencoder", autoencoder])
    folder = tmp_path / "ar"
    names = "model_index.json vae language_model results.json recipe.yaml curves.png samples.png samples-guided.png"
    assert {*names.split(), "README.md"} <= {path.name for path in folder.iterdir()}
    results = read(folder / "results.json")
    metrics = results["metrics"]
    assert metrics["nats_per_image"] == pytest.approx(nats_by_hand(folder, "evaluation"), rel=1e-4)
    assert metrics["nats_per_image_train"] == pytest.approx(nats_by_hand(folder, "train"), rel=1e-4)
    assert metrics["nats_per_image"] < metrics["nats_per_image_uniform"] == pytest.approx(16 * math.log(CODES))
    assert results["samples"] == {"train": 1437, "evaluation": 360} and "nats_per_image" in output
    history = read(tmp_path / "checkpoints" / "ar" / f"step-{STEPS:08d}" / "meta.json")["history"]
    assert [entry["step"] for entry in history if "nats_per_image" in entry] == [4, 6]  # 3 is no log entry
    assert history[-1]["nats_per_image"] == pytest.approx(metrics["nats_per_image"], rel=1e-5)
    card = (folder / "README.md").read_text()
    assert f"{metrics['nats_per_image']:.4g}" in card and f"`{architecture}` of transformers" in card
    model = AutoModelForCausalLM.from_pretrained(folder, subfolder="language_model")
    assert model.config.model_type == architecture and model.config.vocab_size == CODES + 10 + 1


@pytest.mark.extended
def test_measuring_held_out_codes_leaves_training_alone(autoencoder, run_script, tmp_path):
    for name, every in (("often", 1), ("once", 1000)):
        more = ["--validation_steps", every, "--logging_steps", 1, "--output_dir", tmp_path / name]
        run_script("dae_ar", [*SMALL, "--autoencoder", autoencoder, *more])
    assert_identical(tmp_path / "often" / "ar", tmp_path / "once" / "ar")


@pytest.mark.parametrize(
    ("kills", "processes"),
    [
        pytest.param(1, 1, marks=pytest.mark.extended),
        pytest.param(10, 1, marks=pytest.mark.slow),
        pytest.param(4, 2, marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed_run_is_bit_identical(kills, processes, autoencoder, run_script, launch, tmp_path):
    flags = [*SMALL, "--max_train_steps", 16, "--autoencoder", autoencoder]
    if processes == 1:
        run_script("dae_ar", [*flags, "--output_dir", tmp_path / "whole"])
    else:
        launch("dae_ar", [*flags, "--output_dir", tmp_path / "whole"], processes).wait()
    struck = run_with_kills(launch, "dae_ar", flags, processes, tmp_path / "killed", kills, random.Random(kills))
    assert struck >= max(1, kills // 2), "too few kills came in time"
    assert_identical(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize("way", ["accumulation", pytest.param("two_processes", marks=pytest.mark.slow)])
def test_halves_of_a_batch_leave_the_trajectory_unchanged(way, autoencoder, run_script, launch, tmp_path):
    flags = [*SMALL, "--dropout", 0, "--autoencoder", autoencoder, "--lr_scheduler", "constant"]
    run_script("dae_ar", [*flags, "--output_dir", tmp_path / "whole"])
    halves = [*flags, "--batch_size", 16, "--output_dir", tmp_path / "halves"]
    if way == "accumulation":
        run_script("dae_ar", [*halves, "--gradient_accumulation_steps", 2])
    else:
        launch("dae_ar", halves, 2).wait()
    last = f"checkpoints/ar/step-{STEPS:08d}/state.pt"
    whole, halves = (torch.load(tmp_path / run / last, weights_only=True)["model"] for run in ("whole", "halves"))
    for key, tensor in whole.items():
        torch.testing.assert_close(halves[key], tensor, rtol=0, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.extended
def test_classes_can_be_ignored_and_images_are_judged(autoencoder, run_script, tmp_path):
    judge = tmp_path / "judge"
    seen = {"input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.5] * 3}
    ContrastiveEncoder(ContrastiveConfig("resnet10t", {"channels": [8, 16, 16, 24]}, seen)).save_pretrained(judge)
    flags = ["--autoencoder", autoencoder, "--unconditional", True, "--output_dir", tmp_path]
    run_script("dae_ar", [*SMALL, *flags, "--extractor", judge, "--num_generated", 70])
    results = read(tmp_path / "ar" / "results.json")
    assert results["metrics"]["gfid_judge"] > 0 and results["samples"]["generated"] == 70
    pipeline = VQTokenPipeline.from_pretrained(tmp_path / "ar")
    assert pipeline.class_names == [] and pipeline.language_model.config.vocab_size == CODES + 1
    assert not (tmp_path / "ar" / "samples-guided.png").exists()
    nats = read(tmp_path / "ar" / "results.json")["metrics"]["nats_per_image"]
    assert nats == pytest.approx(nats_by_hand(tmp_path / "ar", "evaluation", unconditional=True), rel=1e-4)


@pytest.mark.filterwarnings("ignore:.* images for features of")
def test_images_are_judged_beside_held_out_ones_of_the_data_that_was_trained_on(tmp_path, monkeypatch):
    seen = {"input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.5] * 3}
    ContrastiveEncoder(ContrastiveConfig("resnet10t", {"channels": [8, 16, 16, 24]}, seen)).save_pretrained(tmp_path)
    asked = []

    def opened(name, streaming=False, **options):
        asked.append({"name": name} | options)
        return load_images("digits")

    for module in (batches, measures):
        monkeypatch.setattr(module, "load_images", opened)
    given = ["--dataset", "org/data", "--dataset_revision", "v1", "--image_column", "picture", "--num_generated", "20"]
    args = parse(ARArguments, [*given, "--label_column", "kind", "--evaluation_images", "20"], "")
    batches.load_images_for(args)
    found = dae_ar.judged(torch.rand(20, 3, 16, 16) * 2 - 1, str(tmp_path), VQConfig(image_size=16), args, "cpu")
    assert any(name.startswith("gfid_") for name in found) and len(asked) == 2
    assert asked[1] == asked[0] and asked[0]["revision"] == "v1"


@pytest.mark.extended
def test_two_processes_share_measures_and_drawn_images_and_find_those_of_one(autoencoder, launch, tmp_path):
    judge = tmp_path / "judge"
    seen = {"input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.5] * 3}
    ContrastiveEncoder(ContrastiveConfig("resnet10t", {"channels": [8, 16, 16, 24]}, seen)).save_pretrained(judge)
    flags = [*SMALL, "--batch_size", 8, "--autoencoder", autoencoder, "--extractor", judge, "--num_generated", 35]
    launch("dae_ar", [*flags, "--output_dir", tmp_path], 2).wait()
    metrics = read(tmp_path / "ar" / "results.json")["metrics"]
    assert metrics["nats_per_image"] == pytest.approx(nats_by_hand(tmp_path / "ar", "evaluation"), rel=1e-4)
    history = read(tmp_path / "checkpoints" / "ar" / f"step-{STEPS:08d}" / "meta.json")["history"]
    assert history[-1]["nats_per_image"] == pytest.approx(metrics["nats_per_image"], rel=1e-5)
    pipeline = VQTokenPipeline.from_pretrained(tmp_path / "ar")
    images = draw_images(pipeline, list(range(35)), list(range(10)), seed=0, options={"guidance_scale": 1.0}) * 2 - 1
    given = ["--output_dir", str(tmp_path), "--autoencoder", str(autoencoder), "--extractor", str(judge)]
    args = parse(ARArguments, [*given, "--num_generated", "35"], "")
    expected = dae_ar.judged(images, str(judge), pipeline.vae.config, args, "cpu")
    assert metrics["gfid_judge"] == pytest.approx(expected["gfid_judge"], rel=1e-3)


def test_pictures_without_labels_train_in_bfloat16_and_broken_ones_are_skipped(autoencoder, run_script, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(40):
        pixels = torch.randint(0, 256, (16, 16, 3), generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(pictures / f"{number:02d}.png")
    (pictures / "07.png").write_bytes(b"not a picture")
    flags = [*SMALL, "--batch_size", 8, "--dataset", pictures, "--mixed_precision", "bf16", "--on_bad_image", "skip"]
    run_script("dae_ar", [*flags, "--autoencoder", autoencoder, "--output_dir", tmp_path / "run"])
    pipeline = VQTokenPipeline.from_pretrained(tmp_path / "run" / "ar")
    assert {p.dtype for p in pipeline.language_model.parameters()} == {torch.float32}
    assert len(pipeline(num_images=2).images) == 2
    assert read(tmp_path / "run" / "skipped_images.json")["count"] == 1


@pytest.mark.extended
def test_constant_codes_of_a_class_are_learned(autoencoder, run_script, tmp_path):
    """Classes that decide every code: the trained model draws them, and guidance does not break them."""
    for number in range(64):
        folder = tmp_path / "pictures" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), ["black", "white"][number % 2]).save(folder / f"{number:02d}.png")
    flags = [*SMALL, "--batch_size", 16, "--max_train_steps", 250, "--dropout", 0, "--ema_decay", 0.5]
    flags += ["--width", 32, "--checkpointing_steps", 250, "--validation_steps", 250]
    flags += ["--dataset", tmp_path / "pictures", "--autoencoder", autoencoder, "--output_dir", tmp_path / "run"]
    run_script("dae_ar", flags)
    pipeline = VQTokenPipeline.from_pretrained(tmp_path / "run" / "ar")
    with torch.no_grad():
        plain = torch.stack([torch.full((3, 16, 16), -1.0), torch.full((3, 16, 16), 1.0)])
        expected = pipeline.vae.encode(plain).codes
    for guidance in (1.0, 2.0):
        drawn = pipeline(["a", "b"], guidance_scale=guidance, temperature=0.0, output_type="codes").images
        assert torch.equal(drawn, expected) and not torch.equal(expected[0], expected[1])


def test_autoencoder_without_codes_is_refused(refusal, tmp_path):
    config = VQConfig(image_size=16, encoder_block_out_channels=[8, 8], norm_num_groups=4, quantizer="none")
    VQAutoencoder(config).save_pretrained(tmp_path / "plain")
    argv = [*SMALL, "--autoencoder", tmp_path / "plain", "--output_dir", tmp_path / "run"]
    assert "has no codes to cache" in refusal("dae_ar", argv)


def test_bad_flags_are_refused(refusal):
    for flags, message in [
        (["--architecture", "bert"], "invalid choice: 'bert'"),
        (["--dropout", "1"], "--dropout lies in [0, 1), got 1.0"),
        (["--class_dropout", "-0.1"], "--class_dropout lies in [0, 1), got -0.1"),
        (["--validation_steps", "0"], "--validation_steps must be at least 1, got 0"),
    ]:
        assert message in refusal("dae_ar", flags)


def test_embeddings_norms_and_biases_do_not_decay():
    model = dae_ar.make_language_model(
        "gpt2", num_layers=1, width=8, num_heads=1, num_codes=4, num_classes=0, num_tokens=4
    )
    decaying, free = dae_ar.parameter_groups(model, dae_ar.ARArguments(weight_decay=0.3))
    assert (decaying["weight_decay"], free["weight_decay"]) == (0.3, 0.0)
    shapes = sorted(tuple(p.shape) for p in decaying["params"])
    assert shapes == [(8, 8), (8, 24), (8, 32), (32, 8)]
    assert len(decaying["params"]) + len(free["params"]) == len(list(model.parameters()))


@pytest.mark.slow
def test_recipe_of_faces_starts_at_full_size(launch, tmp_path):
    """24 layers of width 1024 over 256 codes of 1024, batch 1: two steps on synthetic pictures."""
    widths = dict(encoder_block_out_channels=[8] * 5, norm_num_groups=4, mid_block_attention=False)
    VQAutoencoder(VQConfig(image_size=256, num_codes=1024, **widths)).save_pretrained(tmp_path / "autoencoder")
    (tmp_path / "pictures").mkdir()
    for number in range(12):
        colour = F.one_hot(torch.tensor(number % 3), 3).mul(20 * number).tolist()
        Image.new("RGB", (256, 256), tuple(colour)).save(tmp_path / "pictures" / f"{number:02d}.png")
    argv = ["--recipe", "ar-faceshq", "--dataset", tmp_path / "pictures", "--autoencoder", tmp_path / "autoencoder"]
    argv += ["--batch_size", 1, "--max_train_steps", 2, "--num_workers", 0, "--output_dir", tmp_path / "run"]
    argv += ["--evaluation_images", 2, "--mixed_precision", "no", "--samples_per_class", 1]
    launch("dae_ar", argv).wait(timeout=1500)
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "run/ar", subfolder="language_model").config
    sizes = (config.n_layer, config.n_head, config.n_embd, config.n_positions, config.vocab_size)
    assert sizes == (24, 16, 1024, 257, 1025)
