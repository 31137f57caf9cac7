"""The scripts as a user starts them: what they write, precision, accumulation, trackers, bad input."""

import json
import math

import pytest
import torch
import yaml
from PIL import Image

from hf_dpssl import ContrastiveEncoder, MoCoForPreTraining, VQAutoencoder, VQDiTPipeline

SMALL_DIT = ["--width", 32, "--num_layers", 2, "--sampling_steps", 2, "--batch_size", 32]
SHORT_STAGES = ["--stage_1_steps", 4, "--stage_2_steps", 4]


def read(path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_contrastive_script_writes_a_complete_folder(launch, tmp_path):
    flags = ["--max_train_steps", 4, "--batch_size", 64, "--log_with", "tensorboard", "--logging_steps", 1]
    launch("contrastive", ["--output_dir", tmp_path, *flags]).wait()
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
    assert Image.open(folder / "curves.png").width > 300


def test_moco_trains_and_fills_its_queue(launch, tmp_path):
    flags = ["--negatives", "queue", "--normalization", "anchor", "--kernel", "cosine", "--feature_norm", "l2"]
    more = ["--temperature", 0.2, "--queue_size", 200, "--max_train_steps", 3, "--batch_size", 64]
    launch("contrastive", ["--output_dir", tmp_path, *flags, *more]).wait()
    model = MoCoForPreTraining.from_pretrained(tmp_path / "encoder" / "pretraining")
    assert int(model.queue_filled) == 192
    torch.testing.assert_close(model.queue[:192].norm(dim=1), torch.ones(192))
    assert bool((model.queue[192:] == 0).all())


def test_run_starts_from_a_given_encoder_and_refuses_another_architecture(launch, tmp_path):
    flags = ["--max_train_steps", 1, "--batch_size", 16, "--output_dir", tmp_path]
    launch("contrastive", [*flags, "--name", "first"]).wait()
    start = ["--init_encoder", tmp_path / "first", "--learning_rate", 0, "--weight_decay", 0]
    queue = ["--negatives", "queue", "--normalization", "anchor", "--momentum", 0.5, "--queue_size", 64]
    launch("contrastive", [*flags, "--name", "second", "--seed", 7, *start, *queue]).wait()
    first = dict(ContrastiveEncoder.from_pretrained(tmp_path / "first").named_parameters())
    second = MoCoForPreTraining.from_pretrained(tmp_path / "second" / "pretraining")
    for backbone in (second.encoder, second.key_encoder):
        assert all(first[name].equal(value) for name, value in backbone.named_parameters())
    with pytest.raises(AssertionError, match="pass its --architecture and --model_args"):
        launch("contrastive", [*flags, "--name", "third", *start, "--architecture", "resnet18"]).wait()


def test_bf16_on_the_cpu_trains_and_keeps_weights_and_codebook_float32(launch, tmp_path):
    flags = ["--mixed_precision", "bf16", "--output_dir", tmp_path]
    arguments = " ".join(map(str, SHORT_STAGES))
    launch("dae_dit", [*flags, *SMALL_DIT, "--max_train_steps", 4, "--autoencoder_args", arguments]).wait()
    pipeline = VQDiTPipeline.from_pretrained(tmp_path / "dit")
    assert {p.dtype for p in pipeline.transformer.parameters()} == {torch.float32}
    assert pipeline.vae.quantizer.codebook.dtype == torch.float32


def test_bf16_on_the_cpu_trains_an_encoder(launch, tmp_path):
    flags = ["--mixed_precision", "bf16", "--output_dir", tmp_path]
    launch("contrastive", [*flags, "--max_train_steps", 3, "--batch_size", 32]).wait()
    losses = read(tmp_path / "checkpoints" / "encoder" / "step-00000003" / "meta.json")["history"]
    assert math.isfinite(losses[-1]["loss"])


def test_decoupled_training_freezes_the_encoder_and_stores_its_hashes(launch, tmp_path):
    launch("dae_vq", ["--output_dir", tmp_path, *SHORT_STAGES]).wait()
    model = VQAutoencoder.from_pretrained(tmp_path / "autoencoder")
    assert model.config.encoder_frozen and model.config.encoder_sha256 == model.hash_encoder()
    state = torch.load(tmp_path / "checkpoints/autoencoder/stage-1/step-00000004/state.pt", weights_only=True)["model"]
    for name, tensor in model.state_dict().items():
        if name.startswith(("encoder.", "quant_conv.", "quantizer.")):
            assert torch.equal(tensor, state[name]), name
    assert model.config.decoder_block_out_channels == [24, 48] and model.config.decoder_dropout == 0
    assert state["decoder.conv_in.weight"].shape[0] == 32  # the weak decoder of stage 1
    assert len(model.config.latent_mean) == len(model.config.latent_std) == 4
    metrics = read(tmp_path / "autoencoder" / "results.json")["metrics"]
    assert {"psnr", "ssim", "code_usage", "code_perplexity", "dead_codes"} == set(metrics)


def final_weights(launch, script, flags, folder, name) -> dict:
    launch(script, [*flags, "--output_dir", folder]).wait()
    checkpoints = sorted((folder / "checkpoints").rglob("state.pt"))
    return torch.load(next(p for p in checkpoints if name in str(p)), weights_only=True)["model"]


@pytest.mark.parametrize("name", ["dit", "autoencoder/stage-1"])
def test_accumulation_leaves_the_trajectory_unchanged(name, launch, tmp_path):
    """Batch 32 and twice 16 see the same images, noise, timesteps and dropped labels."""
    if name == "dit":
        launch("dae_vq", ["--output_dir", tmp_path, *SHORT_STAGES]).wait()
        flags = [
            *SMALL_DIT,
            "--max_train_steps",
            5,
            "--autoencoder",
            tmp_path / "autoencoder",
            "--lr_scheduler",
            "constant",
        ]
        script = "dae_dit"
    else:
        script, flags = "dae_vq", [*SHORT_STAGES, "--auxiliary_dropout", 0, "--batch_size", 32]
    whole = final_weights(launch, script, flags, tmp_path / "whole", name)
    halves = [*flags, "--batch_size", 16, "--gradient_accumulation_steps", 2]
    accumulated = final_weights(launch, script, halves, tmp_path / "halves", name)
    moved = 0.0
    for key, tensor in whole.items():
        torch.testing.assert_close(accumulated[key], tensor, rtol=0, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")
        moved = max(moved, float(tensor.float().abs().max()))
    assert moved > 0


def test_two_processes_follow_one_process_of_twice_the_batch(launch, tmp_path):
    flags = [*SHORT_STAGES, "--auxiliary_dropout", 0]
    one = final_weights(launch, "dae_vq", [*flags, "--batch_size", 32], tmp_path / "one", "stage-1")
    folder = tmp_path / "two"
    launch("dae_vq", [*flags, "--batch_size", 16, "--num_processes", 2, "--output_dir", folder], 2).wait()
    two = torch.load(next((folder / "checkpoints").rglob("stage-1/*/state.pt")), weights_only=True)["model"]
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=0, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--log_with", "wandb"], "wandb is not installed: pip install wandb"),
        (["--log_with", "notebook"], "'notebook' is no tracker"),
        (["--num_processes", 2], "2 processes were asked for, but this run has 1"),
        (["--dataset", "digitz"], "Did you mean digits?"),
        (["--batch_size", 5000], "lower --batch_size"),
        (["--streaming"], "--streaming needs --max_train_steps"),
        (["--normalization", "joint", "--negatives", "queue"], "takes 'anchor'"),
    ],
)
def test_bad_input_ends_with_a_message_that_says_what_to_do(flags, message, launch, tmp_path):
    if "wandb" in flags:
        pytest.importorskip("tensorboard")
        try:
            import wandb  # noqa: F401

            pytest.skip("wandb is installed here")
        except ImportError:
            pass
    with pytest.raises(AssertionError) as error:
        launch("contrastive", ["--output_dir", tmp_path / "out", *flags]).wait()
    assert message in str(error.value)
    assert not (tmp_path / "out" / "encoder").exists()


def test_image_folder_without_labels_trains_and_bad_picture_is_named_or_skipped(launch, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(24):
        pixels = torch.randint(0, 256, (20, 30, 3), generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(pictures / f"{number:02d}.png")
    (pictures / "07.png").write_bytes(b"not a picture")
    flags = ["--dataset", pictures, "--image_size", 16, "--max_train_steps", 2, "--batch_size", 8]
    with pytest.raises(AssertionError, match=r"07\.png.*not a readable picture"):
        launch("contrastive", [*flags, "--output_dir", tmp_path / "error"]).wait()
    output = launch("contrastive", [*flags, "--on_bad_image", "skip", "--output_dir", tmp_path / "skip"]).wait()
    assert "no labels, not evaluated" in output
    skipped = read(tmp_path / "skip" / "skipped_images.json")
    assert skipped["count"] == 1 and "07.png" in json.dumps(skipped)
    unlabelled = ["--dataset", pictures, "--on_bad_image", "skip", "--image_size", 16, "--output_dir", tmp_path / "dit"]
    arguments = " ".join(map(str, [*SHORT_STAGES, "--batch_size", 8]))
    launch(
        "dae_dit", [*unlabelled, *SMALL_DIT, "--batch_size", 8, "--max_train_steps", 2, "--autoencoder_args", arguments]
    ).wait()
    images = VQDiTPipeline.from_pretrained(tmp_path / "dit" / "dit")(num_images=2, num_inference_steps=2).images
    assert len(images) == 2 and images[0].size == (16, 16)
