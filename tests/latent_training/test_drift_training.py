"""Training of a one-step generator: its sets, guidance, a plain loop, feature spaces, progress, and bad input."""

import json
import logging
import pickle

import dae_drift
import numpy as np
import pytest
import timm
import torch
from plain_loop import Average, all_digits
from safetensors.torch import load_file
from tiny_checkpoints import encoder_model
from tiny_pipelines import make_dit

from hf_dpssl import ContrastiveConfig, ContrastiveEncoder, VQAutoencoder, VQDriftPipeline, drift_loss
from hf_dpssl.data import keyed_random
from hf_dpssl.generation.latent_mlp import LatentMLP
from hf_dpssl.latent_training.drift_arguments import DriftArguments
from hf_dpssl.latent_training.drift_training import (
    DecodedFeatures,
    DriftSets,
    Progress,
    encoder_features,
    generate,
    initial_transformer,
    progress,
)
from hf_dpssl.latent_training.latent_cache import LatentTable
from hf_dpssl.models.choices import FIELD_KERNELS
from hf_dpssl.runs.atomic_files import write_json

SMALL = ["--width", 32, "--num_layers", 1, "--num_heads", 2, "--grid_images_per_class", 1, "--logging_steps", 1]
SMALL += ["--batch_size", 32, "--images_per_set", 8, "--real_per_set", 6, "--warmup_steps", 0, "--ema_decay", 0]


def make_table(folder, counts=(12, 9, 15)) -> LatentTable:
    """A finished cache: the first channel of a latent is its row, the labels come in turns."""
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    labels = labels[torch.randperm(len(labels))]
    latents = torch.randn(len(labels), 4, 8, 8)
    latents[:, 0] = torch.arange(len(labels)).view(-1, 1, 1)
    np.save(folder / "latents-00000.npy", latents.numpy())
    np.save(folder / "labels.npy", labels.numpy())
    shards = [{"name": "latents-00000.npy", "rows": len(labels)}]
    write_json(folder / "index.json", {"fingerprint": "x", "flipped": False, "content": "latents", "shards": shards})
    return LatentTable(folder)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory) -> str:
    """Folder of an untrained autoencoder of 16 px."""
    folder = tmp_path_factory.mktemp("autoencoder")
    make_dit().vae.save_pretrained(folder)
    return str(folder)


def test_sets_are_of_one_class_distinct_and_a_function_of_seed_epoch_and_set(tmp_path):
    table = make_table(tmp_path)
    args = DriftArguments(batch_size=8, images_per_set=4, real_per_set=6, guidance_scale=3.0, negatives_per_set=5)
    sets = DriftSets(table, 3, args, least=300)
    assert len(sets) == 300
    batch = sets.__getitems__([(2, number) for number in range(300)])
    rows = batch["latents"][:, :, 0, 0, 0].long()  # (300, 6)
    assert all(len(set(of_set.tolist())) == 6 for of_set in rows)
    dropped = batch["labels"] == 3
    assert 0.04 < float(dropped.float().mean()) < 0.2
    assert torch.equal(batch["labels"][~dropped], (torch.arange(300) % 3)[~dropped])
    of_class = table.labels[rows]
    assert (of_class[~dropped] == batch["labels"][~dropped, None]).all()
    assert (
        len(of_class[dropped].unique()) == 3
        and len(table.labels[batch["negatives"][:, :, 0, 0, 0].long()].unique()) == 3
    )
    assert (batch["weights"][:, :6] == 1).all() and not batch["weights"][dropped, 6:].any()
    share = batch["weights"][~dropped, 6:].sum(1) / (batch["weights"][~dropped, 6:].sum(1) + 3)
    torch.testing.assert_close(share, torch.full_like(share, 2 / 3))  # (s - 1) / s of what repels
    again = sets.__getitems__([(2, 7), (2, 250)])
    assert torch.equal(again["latents"], batch["latents"][[7, 250]])
    assert not torch.equal(sets.__getitems__([(3, 7)])["latents"], batch["latents"][[7]])
    alone = DriftSets(table, 0, DriftArguments(batch_size=8, images_per_set=4, real_per_set=6))
    assert alone.__getitems__([(0, 0), (0, 1)])["labels"].tolist() == [1, 1]


def test_sets_are_sent_to_a_worker_in_few_bytes_and_are_the_same_there(tmp_path):
    args = DriftArguments(batch_size=8, images_per_set=4, real_per_set=6)
    sets = DriftSets(make_table(tmp_path, (4000, 1000, 5000)), 3, args)
    items = [(1, number) for number in range(40)]
    expected = sets.__getitems__(items)["latents"]
    for number, rows in enumerate(sets.rows):
        assert rows.tolist() == (sets.table.labels == number).nonzero()[:, 0].tolist()
    sent = pickle.dumps(sets)
    assert len(sent) < 10_000
    assert torch.equal(pickle.loads(sent).__getitems__(items)["latents"], expected)


def test_a_run_is_that_of_a_plain_loop(run_script, starts, autoencoder, tmp_path):
    flags = [
        *SMALL,
        "--max_train_steps",
        3,
        "--lr_scheduler",
        "constant",
        "--learning_rate",
        0.01,
        "--max_grad_norm",
        0,
    ]
    flags += ["--kernel", "student_t", "--symmetric", "false", "--guidance_scale", 1.5, "--autoencoder", autoencoder]
    flags += ["--ema_decay", 0.2]
    run_script("dae_drift", [*flags, "--output_dir", tmp_path])
    model = starts["drift"]["model"].train()
    vae = VQAutoencoder.from_pretrained(autoencoder).eval()
    args = dae_drift.DriftArguments(batch_size=32, images_per_set=8, real_per_set=6, guidance_scale=1.5)
    sets = DriftSets(LatentTable(tmp_path / "latents"), 10, args)
    order = keyed_random.permutation(len(sets), seed=0, epoch=0).tolist()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, (0.9, 0.99), weight_decay=0)
    average = Average(model.parameters(), 0.2)
    for step in range(3):
        loss = 0
        batch = sets.__getitems__([(0, number) for number in order[4 * step : 4 * step + 4]])
        for i in range(4):  # set by set, image by image
            ids = batch["sample_ids"][i] * 8 + torch.arange(8)
            noise = keyed_random.normal(ids, (4, 8, 8), seed=0, stream="noise", epoch=0)
            if step == 0:
                first = noise - model(noise, torch.full((8,), 1000.0), batch["labels"][i].expand(8)).sample
                assert torch.equal(first, noise)
            images = noise - model(noise, torch.full((8,), 1000.0), batch["labels"][i].expand(8)).sample
            real, others = (vae.normalize_latents(batch[name][i])[None] for name in ("latents", "negatives"))
            options = {"kernel": "student_t", "dof": 1.0, "symmetric": False}
            options |= {"negatives": others, "weights": batch["weights"][i, None]}
            loss = loss + drift_loss(images[None], real, **options).loss / 4
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.step(model.parameters())
    saved = load_file(tmp_path / "drift" / "transformer" / "diffusion_pytorch_model.safetensors")
    for (name, _), mean in zip(model.named_parameters(), average.values, strict=True):
        torch.testing.assert_close(saved[name], mean, rtol=0, atol=2e-5)
    apart = [float((mean - p.detach()).abs().max()) for mean, p in zip(average.values, model.parameters(), strict=True)]
    assert max(apart) > 1e-3


def test_what_tells_progress_falls_in_a_training_that_works_while_the_loss_does_not(run_script, autoencoder, tmp_path):
    vae = VQAutoencoder.from_pretrained(autoencoder)
    with torch.no_grad():
        latents = vae.encode_latents(all_digits()[0][:500])
    vae.config.latent_mean, vae.config.latent_std = latents.mean((0, 2, 3)).tolist(), latents.std((0, 2, 3)).tolist()
    vae.save_pretrained(tmp_path / "autoencoder")
    flags = ["--architecture", "mlp", "--num_layers", 2, "--width", 128, "--learning_rate", 3e-3, "--warmup_steps", 0]
    flags += ["--batch_size", 128, "--images_per_set", 16, "--real_per_set", 24, "--logging_steps", 1, "--ema_decay", 0]
    flags += ["--max_train_steps", 60, "--grid_images_per_class", 1, "--output_dir", tmp_path]
    run_script("dae_drift", [*flags, "--autoencoder", tmp_path / "autoencoder"])
    (state,) = (tmp_path / "checkpoints" / "drift").rglob("*.json")
    history = json.loads(state.read_text())["history"]
    first, last = (
        {name: np.mean([entry[name] for entry in part]) for name in part[0]} for part in (history[:5], history[-5:])
    )
    assert last["field_square"] < 0.5 * first["field_square"]
    assert last["two_sample"] < 0.5 * first["two_sample"]
    assert last["loss"] > 0.8 * first["loss"]


def test_no_arguments_train_dense_layers_and_a_given_autoencoder_or_data_set_a_dit():
    for given, architecture in (
        ({}, "mlp"),
        ({"autoencoder": "folder"}, "dit"),
        ({"dataset": "mnist"}, "dit"),
        ({"preset": "dit-s-2"}, "dit"),
        ({"patch_size": 1}, "dit"),
        ({"autoencoder": "folder", "architecture": "mlp"}, "mlp"),
        ({"architecture": "dit"}, "dit"),
    ):
        assert DriftArguments(**given).architecture == architecture


def test_samples_of_a_new_generator_have_unit_deviation_and_are_driven_by_the_noise():
    vae = make_dit().vae
    noise, other = torch.randn(2, 500, 4, 8, 8).unbind()
    labels = torch.arange(500) % 10
    for architecture in ("dit", "mlp"):
        args = DriftArguments(architecture=architecture, width=256, num_layers=3)
        model = initial_transformer(args, vae, 10).eval()
        with torch.no_grad():
            first = generate(model, noise, labels)
            of_class = generate(model, noise, (labels + 1) % 10) - first
            of_noise = generate(model, other, labels) - first
        assert 0.9 < float(first.std()) < 1.1
        assert float(of_class.std()) < 0.1 * float(of_noise.std())
        assert 0.8 < float(of_noise.std()) / 2**0.5 < 1.2


def test_dense_generators_train_are_loaded_blend_classes_and_are_no_dit(run_script, refusal, autoencoder, tmp_path):
    flags = ["--architecture", "mlp", *SMALL, "--max_train_steps", 2, "--autoencoder", autoencoder]
    flags += ["--output_dir", tmp_path]
    run_script("dae_drift", flags)
    pipeline = VQDriftPipeline.from_pretrained(tmp_path / "drift")
    assert type(pipeline.transformer) is LatentMLP
    images = pipeline([0, 1, (0, 1, 0.0), (0, 1, 1.0)], generator=[5, 5, 5, 5], output_type="latent").images
    torch.testing.assert_close(images[2:], images[:2])
    assert not torch.equal(images[0], images[1])
    index = (tmp_path / "drift" / "model_index.json").read_text()
    assert "latent_mlp" not in index
    for changed in (["--gradient_checkpointing", True], ["--init_from", tmp_path / "dit"]):
        message = refusal("dae_drift", [*flags, "--overwrite", *changed])
        assert f"{changed[0]} is of a DiT" in message


def test_a_finished_folder_has_a_card_its_progress_and_a_pipeline(run_script, autoencoder, tmp_path):
    flags = [*SMALL, "--max_train_steps", 2, "--autoencoder", autoencoder, "--mixed_precision", "bf16"]
    encoder_model().encoder.save_pretrained(tmp_path / "encoder")
    flags += ["--features", "latent", tmp_path / "encoder", "--unconditional", "--output_dir", tmp_path]
    run_script("dae_drift", [*flags, "--gradient_checkpointing", True])
    folder = tmp_path / "drift"
    assert {"samples.png", "curves.png", "recipe.yaml"} <= {path.name for path in folder.iterdir()}
    card = (folder / "README.md").read_text()
    assert "VQDriftPipeline.from_pretrained" in card and "kernel `exponential`" in card
    about = dae_drift.Path(folder / "results.json").read_text()
    assert '"two_sample_noise"' in about and "features of the field, 1" in about
    assert VQDriftPipeline.from_pretrained(folder)(num_images=2, output_type="pt").images.shape == (2, 3, 16, 16)


@pytest.mark.extended
def test_training_starts_from_a_flow_and_refuses_what_does_not_fit(run_script, refusal, starts, tmp_path):
    flow = make_dit([str(digit) for digit in range(10)])
    flow.save_pretrained(tmp_path / "dit")
    flags = ["--init_from", tmp_path / "dit", "--autoencoder", tmp_path / "dit" / "vae", *SMALL]
    size = ["--num_layers", 2, "--width", 32]
    flags += [*size, "--max_train_steps", 1, "--output_dir", tmp_path / "run"]
    run_script("dae_drift", flags)
    for name, tensor in flow.transformer.state_dict().items():
        assert torch.equal(starts["drift"]["model"].state_dict()[name], tensor)
    make_dit([str(digit) for digit in range(10)], objective="epsilon").save_pretrained(tmp_path / "epsilon")
    make_dit(seed=1).vae.save_pretrained(tmp_path / "other")
    flow.vae.config.latent_std = [3.0] * 4
    flow.vae.save_pretrained(tmp_path / "rescaled")
    flags = [*flags, "--overwrite"]
    for changed, message in [
        (["--num_layers", 3], "pass --num_layers 2 --width 32 --num_heads 2 --patch_size 2"),
        (["--unconditional"], "has 10 classes, this run has 0"),
        (["--init_from", tmp_path / "epsilon"], "made of a flow only"),
        (["--autoencoder", tmp_path / "other"], "was trained on another autoencoder"),
        (["--autoencoder", tmp_path / "rescaled"], "latent_std is [3, 3, 3, 3] and was [1, 2, 0.5, 1.5]"),
        (["--real_per_set", 500], "training images, fewer than the 500 of a set: lower --real_per_set to at most"),
        (["--unconditional", "--guidance_scale", 2], "leave it out with --unconditional"),
        (["--batch_size", 33], "must be a multiple of --images_per_set 8"),
        (["--images_per_set", 1], "must be at least 2"),
        (["--scales", 0.1, -1], "must be positive and finite, got -1.0"),
        (["--guidance_scale", 0.5], "at least 1"),
        (["--streaming"], "leave out --streaming"),
    ]:
        assert message in refusal("dae_drift", [*flags, *changed])
    assert (tmp_path / "run" / "drift" / "model_index.json").exists(), "a refused run leaves the finished one"


def test_a_class_of_one_image_is_refused_with_advice_that_can_be_followed(tmp_path):
    with pytest.raises(ValueError, match="class 1 has 1 training images.*: a set has at least two: add images"):
        DriftSets(make_table(tmp_path, (40, 1, 50)), 3, DriftArguments(real_per_set=6))


def test_unlabelled_data_with_guidance_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is between classes, and this data set has none"):
        DriftSets(make_table(tmp_path), 0, DriftArguments(guidance_scale=2.0))


def test_decoded_features_are_those_of_the_pictures_and_have_a_gradient():
    vae = make_dit().vae
    encoder = encoder_model().encoder.eval()
    space = DecodedFeatures(encoder, vae)
    latents = torch.randn(3, 4, 8, 8, requires_grad=True)
    pictures = vae.decode(vae.denormalize_latents(latents)).pixel_values / 2 + 0.5
    expected = encoder((pictures - 0.5) / 0.5).pooler_output
    found = space(latents)
    torch.testing.assert_close(found, expected)
    assert torch.autograd.grad(found.sum(), latents)[0].abs().min() > 0


def test_a_model_of_timm_sees_decoded_pictures_as_timm_runs_it(tmp_path):
    torch.manual_seed(0)
    network = timm.create_model("test_resnet").eval()
    timm.models.save_for_hf(network, tmp_path)
    vae = make_dit().vae
    latents = torch.randn(2, 4, 8, 8)
    pictures = vae.decode(vae.denormalize_latents(latents)).pixel_values / 2 + 0.5
    side = network.pretrained_cfg["input_size"][1:]
    large = torch.nn.functional.interpolate(pictures, side, mode="bicubic", antialias=True)
    mean, std = (torch.tensor(network.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    expected = network.forward_head(network.forward_features((large - mean) / std), pre_logits=True)
    torch.testing.assert_close(encoder_features(str(tmp_path), vae)(latents), expected)


def test_an_encoder_of_other_channels_than_the_pictures_is_refused():
    cfg = encoder_model().encoder.config.pretrained_cfg | {"input_size": [1, 16, 16], "mean": [0.5], "std": [0.5]}
    grey = ContrastiveEncoder(ContrastiveConfig("resnet10t", {"channels": [8, 8, 16, 16], "in_chans": 1}, cfg))
    with pytest.raises(
        ValueError, match="takes pictures of 1 channels, the autoencoder makes 3: choose another encoder"
    ):
        DecodedFeatures(grey, make_dit().vae)


def test_the_two_sample_statistic_is_the_formula_and_its_noise_that_of_equal_distributions():
    draws = torch.randn(400, 4, 14, 3, generator=torch.Generator().manual_seed(1)).double()
    for kernel in FIELD_KERNELS:
        options = {"kernel": kernel, "dof": 2.0, "seed": 0}
        found = [progress(sets[:, :6], sets[:, 6:], **options) for sets in draws]
        values = torch.tensor([part["two_sample"] for part in found])
        noise = torch.tensor([part["two_sample_noise"] for part in found])
        assert abs(float(values.mean())) < 4 * float(values.std()) / 20
        assert 0.85 < float(noise.square().mean().sqrt() / values.std()) < 1.15
        moved = progress(draws[0, :, :6] + 2, draws[0, :, 6:], **options)
        assert moved["two_sample"] > 10 * moved["two_sample_noise"]
    x, y = draws[0, :1, :6], draws[0, :1, 6:]
    pooled = torch.cat([x, y], 1)[0]
    d = torch.tensor([[float((a - b).norm()) for b in pooled] for a in pooled])
    k = (-d / (d.sum() / (14 * 13))).exp()
    k.fill_diagonal_(0)
    expected = k[:6, :6].sum() / 30 + k[6:, 6:].sum() / 56 - 2 * k[:6, 6:].mean()
    assert abs(progress(x, y, kernel="exponential", dof=1.0, seed=0)["two_sample"] - float(expected)) < 1e-6


def test_collapsed_samples_are_told_once_with_what_to_do(caplog):
    real = torch.randn(3, 8, 4, 2, 2)
    collapsed = real.mean(1, keepdim=True) + 0.1 * torch.randn(3, 8, 4, 2, 2)
    watch = Progress(DriftArguments(logging_steps=5, max_train_steps=12))
    with caplog.at_level(logging.WARNING):
        assert watch(4, collapsed, real) == {}
        assert abs(watch(5, real, real)["spread"] - 1) < 1e-6 and not caplog.records
        assert watch(10, collapsed, real)["spread"] < 0.2
        assert watch(12, collapsed, real)
    assert len(caplog.records) == 1 and "--images_per_set" in caplog.text
