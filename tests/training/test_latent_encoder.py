"""contrastive.py --autoencoder: an encoder of latents beside a plain loop, resumed, loaded, and kept from pictures."""

import copy
import itertools
import json
import re
import shutil

import dae_drift
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from plain_loop import all_digits, assert_same, cosine, descend, digits
from safetensors.torch import load_file
from sklearn.neighbors import KNeighborsClassifier
from tiny_pipelines import make_dit
from transformers import AutoModel

from hf_dpssl import ContrastiveEncoder, SimCLRForPreTraining
from hf_dpssl.autoencoder import latent_codec
from hf_dpssl.cli.commands import main
from hf_dpssl.convert.autoencoder_importers import convert_autoencoder
from hf_dpssl.data.batches import ImageSource
from hf_dpssl.data.image_data import load_images
from hf_dpssl.data.views import PRESETS, TwoViews
from hf_dpssl.latent_training.drift_training import DecodedFeatures, LatentFeatures, feature_spaces
from hf_dpssl.latent_training.token_alignment import SpatialFeatures

STEPS, BATCH = 4, 16
FLAGS = ["--model_args", '{"channels": [8, 8, 16, 16]}', "--projection_dim", 8, "--batch_size", BATCH]
FLAGS += ["--max_train_steps", STEPS, "--evaluation_images", 64, "--checkpointing_steps", 2, "--kernel", "cosine"]


@pytest.fixture
def vae(tmp_path):
    """An untrained autoencoder of 16 px, whose latents are of neither zero mean nor unit deviation; and its folder."""
    model = make_dit().vae
    model.save_pretrained(tmp_path / "autoencoder")
    return model, tmp_path / "autoencoder"


@pytest.fixture
def trained(run_script, starts, vae, tmp_path):
    """Folder of a finished encoder of latents, and the model as it was before its first step."""
    run_script("contrastive", [*FLAGS, "--autoencoder", vae[1], "--output_dir", tmp_path / "run"])
    return tmp_path / "run" / "encoder", starts["encoder"]["model"]


@torch.no_grad()
def latents_of(model, pixels: torch.Tensor) -> torch.Tensor:
    mean, std = (
        torch.tensor(values).view(1, 4, 1, 1) for values in (model.config.latent_mean, model.config.latent_std)
    )
    return (model.quant_conv(model.encoder(pixels)) - mean) / std


def test_it_is_that_of_a_plain_loop_on_latents_of_the_views_measured_there_and_loads_with_stock_classes(trained, vae):
    folder, model = trained
    optimizer = torch.optim.AdamW([*model.encoder.parameters(), *model.head.parameters()], weight_decay=1e-4)
    views = TwoViews(PRESETS["digits"], [0.5] * 3, [0.5] * 3, seed=0)
    model.train()
    for step, batch in enumerate(digits(BATCH, STEPS)):
        first, second = views(batch["images"], batch["sample_ids"], batch["epoch"])
        embeddings = F.normalize(
            model.head(model.encoder(latents_of(vae[0], torch.cat([first, second]))).pooler_output)
        )
        logits = (embeddings @ embeddings.T / 0.2).fill_diagonal_(-torch.inf)
        partners = torch.arange(2 * BATCH).roll(BATCH)
        descend(F.cross_entropy(logits, partners), optimizer, cosine(2e-3, step, STEPS))
    saved = SimCLRForPreTraining.from_pretrained(folder / "pretraining")
    assert_same(saved.state_dict().values(), model.state_dict().values())
    encoder = ContrastiveEncoder.from_pretrained(folder).eval()
    assert encoder.config.vae_fingerprint == vae[0].fingerprint()
    assert encoder.config.latent_statistics == latent_codec.statistics(vae[0])
    latents = latents_of(vae[0], all_digits()[0])
    with torch.no_grad():
        torch.testing.assert_close(
            AutoModel.from_pretrained(folder).eval()(latents[:4]).pooler_output, encoder(latents[:4]).pooler_output
        )
    results = json.loads((folder / "results.json").read_text())
    assert results["samples"]["evaluation"] == 64 and "autoencoder of its latents" in str(results["lineage"])
    source = ImageSource(load_images("digits"), image_size=16, batch_size=BATCH, seed=0)
    parts = []
    for table in (source.training_table(), source.evaluation_table()):
        batch = table.readable_batch(table.random_rows(64))
        with torch.no_grad():
            features = encoder(latents_of(vae[0], batch["images"].float() / 127.5 - 1)).pooler_output
        parts.append((F.normalize(features).numpy(), batch["labels"].numpy()))
    (bank, labels), (query, expected) = parts
    _, rows = KNeighborsClassifier(20, metric="cosine").fit(bank, labels).kneighbors(query)
    votes = np.stack([np.bincount(labels[row], minlength=10) for row in rows])
    right = votes[np.arange(len(expected)), expected] == votes.max(1)  # a tie is right at best
    found = results["metrics"]["knn_top1"]
    alone = right & ((votes == votes.max(1, keepdims=True)).sum(1) == 1)
    assert 100 * alone.mean() <= found <= 100 * right.mean()


@pytest.mark.extended
def test_it_resumes_bit_by_bit_and_not_on_another_autoencoder(run_script, refusal, trained, vae, tmp_path):
    weights = load_file(trained[0] / "model.safetensors")
    shutil.rmtree(trained[0])
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "encoder" / f"step-{STEPS:08d}")
    resume = [*FLAGS, "--output_dir", tmp_path / "run", "--resume_from_checkpoint", "latest", "--autoencoder", vae[1]]
    make_dit(seed=1).vae.save_pretrained(vae[1])
    assert "its autoencoder (fingerprint" in refusal("contrastive", resume)
    rescaled = copy.deepcopy(vae[0])
    rescaled.config.latent_std = [3.0] * 4
    rescaled.save_pretrained(vae[1])
    assert "its latent normalization (fingerprint" in refusal("contrastive", resume)
    vae[0].save_pretrained(vae[1])
    run_script("contrastive", resume)
    again = load_file(trained[0] / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())


def test_a_field_in_its_features_is_that_of_the_encoder_on_latents_of_its_autoencoder_alone(
    run_script, refusal, trained, vae, tmp_path
):
    encoder = ContrastiveEncoder.from_pretrained(trained[0]).eval()
    args = dae_drift.DriftArguments(features=["latent", str(trained[0])])
    _, space = feature_spaces(args, vae[0])
    assert type(space) is LatentFeatures
    latents = torch.randn(3, 4, 8, 8, requires_grad=True)

    def plainly(image: torch.Tensor) -> torch.Tensor:
        values = []
        network = encoder.timm_model
        stage = network.maxpool(network.act1(network.bn1(network.conv1(image[None]))))
        for layer in (network.layer1, network.layer2, network.layer3, network.layer4):
            stage = layer(stage)
            channels, side, _ = stage.shape[1:]
            for c, i, j in itertools.product(range(channels), range(side), range(side)):
                values.append(stage[0, c, i, j] / stage[0, :, i, j].norm() / side)
        return torch.stack(values)

    expected = torch.stack([plainly(image) for image in latents])
    torch.testing.assert_close(space(latents), expected)
    weights = torch.randn(expected.shape)
    found, wanted = (torch.autograd.grad((weights * part).sum(), latents)[0] for part in (space(latents), expected))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert found.abs().amin() > 0 and not any(p.requires_grad for p in space.encoder.parameters())
    flags = ["--architecture", "mlp", "--width", 16, "--num_layers", 1, "--batch_size", 16, "--images_per_set", 8]
    flags += ["--real_per_set", 8, "--max_train_steps", 2, "--grid_images_per_class", 1, "--output_dir", tmp_path / "g"]
    flags += ["--features", trained[0]]
    make_dit(seed=1).vae.save_pretrained(tmp_path / "other")
    assert "not trained on latents of this autoencoder" in refusal(
        "dae_drift", [*flags, "--autoencoder", tmp_path / "other"]
    )
    rescaled = copy.deepcopy(vae[0])
    rescaled.config.latent_std = [3.0] * 4
    rescaled.save_pretrained(tmp_path / "rescaled")
    others = ["--autoencoder", tmp_path / "rescaled"]
    assert "latent_std is [3, 3, 3, 3] and was [1, 2, 0.5, 1.5]" in refusal("dae_drift", [*flags, *others])
    start = ["--init_encoder", trained[0], "--output_dir", tmp_path / "warm"]
    assert "another latent_mean and latent_std" in refusal("contrastive", [*FLAGS, *others, *start])
    assert "this run would train another" in refusal("dae_drift", flags)
    assert not (tmp_path / "g").exists(), "nothing is encoded or trained before"
    run_script("dae_drift", [*flags, "--autoencoder", vae[1]])
    results = json.loads((tmp_path / "g" / "drift" / "results.json").read_text())
    assert "features of the field, 1" in str(results["lineage"])


def test_pictures_and_what_does_not_fit_are_refused_and_its_card_shows_how_latents_are_made(
    refusal, trained, vae, tmp_path, capsys
):
    folder = str(trained[0])
    for command in (
        ["embed", folder, "digits", "--output_dir", str(tmp_path / "e")],
        ["evaluate", folder],
    ):
        assert main(command) != 0
        assert "takes an autoencoder's latents" in " ".join(capsys.readouterr().err.split())
    encoder = ContrastiveEncoder.from_pretrained(folder)
    for build in (
        lambda: SpatialFeatures(encoder, 4),
        lambda: convert_autoencoder(folder),
        lambda: DecodedFeatures(encoder, vae[0]),
    ):
        with pytest.raises(ValueError, match="takes an autoencoder's latents"):
            build()
    pictures = ContrastiveEncoder(encoder.config.__class__("resnet10t", {"channels": [8, 8, 16, 16]}))
    pictures.save_pretrained(tmp_path / "pictures")
    with pytest.raises(ValueError, match="was not trained on latents of this autoencoder"):
        LatentFeatures(pictures, vae[0])
    flags = [*FLAGS, "--autoencoder", vae[1], "--output_dir", tmp_path / "out"]
    for changed, message in [
        (["--image_size", 32], "is of pictures of 16 px, --image_size is 32: leave it out"),
        (
            ["--architecture", "vit_tiny_patch16_224", "--model_args", '{"img_size": 16}'],
            "does not take latents of 4 x 8 x 8",
        ),
        (["--model_args", '{"in_chans": 4}'], "latents have their autoencoder's; leave it out"),
        (["--autoencoder", tmp_path / "nowhere"], "nowhere"),
        (["--init_encoder", tmp_path / "pictures"], "holds an encoder of pictures, the run trains one of latents"),
    ]:
        assert message in refusal("contrastive", [*flags, *changed])
    assert not (tmp_path / "out" / "encoder").exists()
    card = (trained[0] / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict = {}
    exec(snippet.replace("AUTOENCODER", str(vae[1])).replace("REPO_OR_FOLDER", str(trained[0])), names)
    with torch.no_grad():
        expected = encoder.eval()(latents_of(vae[0], torch.zeros(1, 3, 16, 16))).pooler_output
    torch.testing.assert_close(names["features"], expected)
    assert "8 x 8 cells, 4 channels" in card and "ImageEmbedder" not in card and "at 16 px" in card
