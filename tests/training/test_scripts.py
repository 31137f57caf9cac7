"""The scripts as a user starts them: what they write, precision, accumulation, trackers, bad input."""

import importlib.util
import json
import math

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from hf_dpssl import ContrastiveEncoder, MoCoForPreTraining, VQDiTPipeline

SMALL_DIT = ["--width", 32, "--num_layers", 2, "--sampling_steps", 1, "--grid_images_per_class", 1, "--batch_size", 32]
SHORT_STAGES = ["--stage_1_steps", 4, "--stage_2_steps", 4, "--num_codes", 32, "--norm_num_groups", 4]
SHORT_STAGES += ["--encoder_channels", 8, 16, "--decoder_channels", 8, 16, "--auxiliary_channels", 8, 8]
SHORT_STAGES += ["--evaluation_images", 64, "--validation_images", 32]
SMALL_ENCODER = ["--model_args", '{"channels": [8, 8, 16, 16]}', "--evaluation_images", 64]


def read(path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_contrastive_script_writes_a_complete_folder(run_script, drawn, tmp_path):
    flags = ["--max_train_steps", 4, "--batch_size", 64, "--log_with", "tensorboard", "--logging_steps", 1]
    run_script("contrastive", ["--output_dir", tmp_path, *flags])
    folder = tmp_path / "encoder"
    names = {
        "config.json",
        "model.safetensors",
        "pretraining",
        "results.json",
        "recipe.yaml",
        "curves.png",
        "README.md",
    }
    assert names <= {path.name for path in folder.iterdir()}
    results = read(folder / "results.json")
    assert 0 <= results["metrics"]["knn_top1"] <= 100
    shape = {f"{name}{kind}" for name in ("uniformity", "effective_rank") for kind in ("", "_embeddings")}
    assert shape | {"alignment_embeddings", "alignment_raw_embeddings"} <= set(results["metrics"])
    assert results["dataset"] == "digits" and results["samples"]["evaluation"] == 360 and results["seed"] == 0
    assert "torch" in results["environment"]["libraries"]
    assert results["command"].startswith("contrastive.py --output_dir") and "--max_train_steps 4" in results["command"]
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["batch_size"] == 64
    card = (folder / "README.md").read_text()
    assert f"{results['metrics']['knn_top1']:.4g}" in card and "AutoModel.from_pretrained" in card
    assert list((tmp_path / "logs").rglob("events.out.tfevents*"))
    curves = Image.open(folder / "curves.png")
    assert curves.width > 300 and curves.convert("L").getextrema()[0] < 128  # on the fixture `drawn`: with ink


@pytest.mark.extended
def test_run_starts_from_a_given_encoder_and_refuses_another_architecture(run_script, refusal, tmp_path):
    flags = [*SMALL_ENCODER, "--max_train_steps", 1, "--batch_size", 16, "--output_dir", tmp_path]
    run_script("contrastive", [*flags, "--name", "first"])
    start = ["--init_encoder", tmp_path / "first", "--learning_rate", 0, "--weight_decay", 0]
    queue = ["--negatives", "queue", "--normalization", "anchor", "--momentum", 0.5, "--queue_size", 64]
    run_script("contrastive", [*flags, "--name", "second", "--seed", 7, *start, *queue])
    first = dict(ContrastiveEncoder.from_pretrained(tmp_path / "first").named_parameters())
    second = MoCoForPreTraining.from_pretrained(tmp_path / "second" / "pretraining")
    for backbone in (second.encoder, second.key_encoder):
        assert all(first[name].equal(value) for name, value in backbone.named_parameters())
    message = refusal("contrastive", [*flags, "--name", "third", *start, "--architecture", "resnet18"])
    assert "pass its --architecture and --model_args" in message


@pytest.mark.extended
def test_bf16_on_the_cpu_trains_and_keeps_weights_and_codebook_float32(run_script, tmp_path):
    flags = ["--mixed_precision", "bf16", "--output_dir", tmp_path]
    arguments = " ".join(map(str, SHORT_STAGES))
    run_script("dae_dit", [*flags, *SMALL_DIT, "--max_train_steps", 4, "--autoencoder_args", arguments])
    transformer = load_file(tmp_path / "dit" / "transformer" / "diffusion_pytorch_model.safetensors")
    autoencoder = load_file(tmp_path / "dit" / "vae" / "model.safetensors")
    assert {tensor.dtype for tensor in transformer.values()} == {torch.float32}
    assert autoencoder["quantizer.codebook"].dtype == torch.float32


def test_bf16_on_the_cpu_trains_an_encoder(run_script, tmp_path):
    flags = ["--mixed_precision", "bf16", "--output_dir", tmp_path]
    run_script("contrastive", [*flags, *SMALL_ENCODER, "--max_train_steps", 3, "--batch_size", 16])
    losses = read(tmp_path / "checkpoints" / "encoder" / "step-00000003" / "meta.json")["history"]
    assert math.isfinite(losses[-1]["loss"])
    weights = load_file(tmp_path / "encoder" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()} == {torch.float32}


@pytest.mark.extended
@pytest.mark.parametrize("script", ["dae_dit", "dae_vq"])
def test_accumulation_leaves_the_trajectory_unchanged(script, run_script, starts, tmp_path):
    """Batch 32 and twice 16 see the same images, noise, timesteps and dropped labels."""
    if script == "dae_dit":
        run_script("dae_vq", ["--output_dir", tmp_path, *SHORT_STAGES])
        flags = [*SMALL_DIT, "--max_train_steps", 5, "--autoencoder", tmp_path / "autoencoder"]
        loop, flags = "dit", [*flags, "--lr_scheduler", "constant"]
    else:
        loop, flags = "autoencoder/stage-1", [*SHORT_STAGES, "--arm", "decoupled", "--batch_size", 32]
    run_script(script, [*flags, "--output_dir", tmp_path / "whole"])
    start = starts[loop]["model"].state_dict()
    halves = ["--batch_size", 16, "--gradient_accumulation_steps", 2, "--output_dir", tmp_path / "halves"]
    run_script(script, [*flags, *halves])
    assert all(starts[loop]["model"].state_dict()[name].equal(tensor) for name, tensor in start.items())
    whole, accumulated = (final_weights(tmp_path / run, loop) for run in ("whole", "halves"))
    for name, tensor in whole.items():
        torch.testing.assert_close(
            accumulated[name], tensor, rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )
    moved = [name for name, tensor in whole.items() if not tensor.equal(start[name])]
    assert len(moved) > 0.7 * len(whole)


def final_weights(folder, loop: str) -> dict:
    (last,) = (folder / "checkpoints" / loop).glob("step-*/state.pt")
    return torch.load(last, weights_only=True)["model"]


@pytest.mark.slow  # in the fast tests two processes train a VQGAN and encoders
def test_two_processes_follow_one_process_of_twice_the_batch(run_script, launch, tmp_path):
    flags = [*SHORT_STAGES, "--arm", "decoupled"]
    two = launch("dae_vq", [*flags, "--batch_size", 16, "--num_processes", 2, "--output_dir", tmp_path / "two"], 2)
    run_script("dae_vq", [*flags, "--batch_size", 32, "--output_dir", tmp_path / "one"])
    two.wait()
    one, two = (final_weights(tmp_path / run, "autoencoder/stage-1") for run in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_bad_input_ends_with_a_message_that_says_what_to_do(refusal, tmp_path):
    for flags, message in [
        (["--log_with", "wandb"], "wandb is not installed: pip install wandb"),
        (["--log_with", "notebook"], "'notebook' is no tracker"),
        (["--num_processes", 2], "2 processes were asked for, but this run has 1"),
        (["--dataset", "digitz"], "Did you mean digits?"),
        (["--batch_size", 5000], "lower --batch_size"),
        (["--streaming"], "--streaming needs --max_train_steps"),
        (["--normalization", "joint", "--negatives", "queue"], "takes 'anchor'"),
    ]:
        if "wandb" in flags and importlib.util.find_spec("wandb"):
            continue
        assert message in refusal("contrastive", ["--output_dir", tmp_path / "out", *flags])
    assert not (tmp_path / "out" / "encoder").exists()


def test_image_folder_without_labels_trains_and_bad_picture_is_named_or_skipped(run_script, refusal, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(24):
        pixels = torch.randint(0, 256, (20, 30, 3), generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(pictures / f"{number:02d}.png")
    (pictures / "07.png").write_bytes(b"not a picture")
    flags = ["--dataset", pictures, "--image_size", 16, "--max_train_steps", 2, "--batch_size", 8]
    message = refusal("contrastive", [*flags, "--output_dir", tmp_path / "error"])
    assert "07.png" in message and "not a readable picture" in message
    output = run_script("contrastive", [*flags, "--on_bad_image", "skip", "--output_dir", tmp_path / "skip"])
    assert "no labels, not evaluated" in output
    skipped = read(tmp_path / "skip" / "skipped_images.json")
    assert skipped["count"] == 1 and "07.png" in json.dumps(skipped)
    unlabelled = ["--dataset", pictures, "--on_bad_image", "skip", "--image_size", 16, "--output_dir", tmp_path / "dit"]
    arguments = " ".join(map(str, [*SHORT_STAGES, "--batch_size", 8]))
    run_script(
        "dae_dit", [*unlabelled, *SMALL_DIT, "--batch_size", 8, "--max_train_steps", 2, "--autoencoder_args", arguments]
    )
    images = VQDiTPipeline.from_pretrained(tmp_path / "dit" / "dit")(num_images=2, num_inference_steps=2).images
    assert len(images) == 2 and images[0].size == (16, 16)
