"""training/dae_gan.py: every latent trains for two steps and leaves a complete folder."""

import json
from types import SimpleNamespace

import pytest
import torch
from foreign_processes import run_foreign
from safetensors.torch import save_file
from transformers.dynamic_module_utils import get_imports

from hf_dpssl import VAEGAN, ContrastiveConfig, ContrastiveEncoder, VAEGANConfig
from hf_dpssl.data.batches import ordered_batches
from hf_dpssl.data.decoding import decode_image, to_square_tensor
from hf_dpssl.data.image_data import load_images
from hf_dpssl.data.image_table import ImageTable
from hf_dpssl.embedding.embedder import ImageEmbedder
from hf_dpssl.latent_training.gan_training import FeatureBank
from hf_dpssl.models import latent_density

COMMON = ["--max_train_steps", 2, "--stage_1_steps", 2, "--batch_size", 16, "--num_generated", 20, "--width", 8]
FILES = {"config.json", "model.safetensors", "recipe.yaml", "results.json", "samples.png", "curves.png", "README.md"}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """An untrained encoder folder of 16-px images."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder")
    options = {"channels": [8, 16, 16, 24], "stem_width": 8}
    seen = {"input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.5] * 3}
    ContrastiveEncoder(ContrastiveConfig("resnet10t", options, seen)).save_pretrained(folder)
    return folder


@pytest.mark.extended
def test_features_of_a_frozen_encoder_are_latents_whose_density_is_fitted(encoder, run_script, tmp_path):
    flags = ["--latent", "simclr", "--encoder", encoder, "--sample_from", "mixture", "--components", 2]
    flags += ["--compare_densities", "--max_train_steps", 1]
    output = run_script("dae_gan", [*COMMON, *flags, "--extractor", encoder, "--output_dir", tmp_path])
    model = VAEGAN.from_pretrained(tmp_path / "gan").eval()
    assert model.config.latent_dim == 24 and model.config.features == "features"
    assert model.density.means.shape == (2, 24) and float(model.density.means.abs().sum()) > 0
    results = json.loads((tmp_path / "gan" / "results.json").read_text())
    metrics, densities = results["metrics"], results["densities"]
    name = next(key for key in metrics if key.startswith("fid_"))
    assert metrics[f"ceiling_{name}"] < metrics[name], output
    assert set(densities) == {"diagonal", "full", "held_out"} and all(name in found for found in densities.values())
    card = (tmp_path / "gan" / "README.md").read_text()
    assert r"| held\_out | images suspiciously close to a training image, % |" in card
    embedder, data = ImageEmbedder(str(encoder)), load_images("digits")
    features = embedder.embed_pictures([decode_image(row["image"]) for row in data.train])
    latents = model.standardize(features)
    torch.testing.assert_close(latents.mean(0), torch.zeros(24), rtol=0, atol=1e-4)
    assert model.config.dpssl["encoder"]["fingerprint"] == embedder.fingerprint


@pytest.mark.extended
def test_latents_of_a_batch_are_the_standardised_features_of_its_images():
    def features_of(pictures) -> torch.Tensor:
        return torch.stack([to_square_tensor(picture, 4).flatten().float() for picture in pictures])

    data = load_images("digits")
    table = ImageTable(data, data.train, 16)
    embedder = SimpleNamespace(embed_pictures=features_of, kind="features", fingerprint="")
    bank = FeatureBank(embedder, table, None)
    batch = next(bank.with_latents(ordered_batches(table, 16, seed=0)))
    pictures = [decode_image(row["image"]) for row in data.train]
    assert torch.equal(batch["images"][3], to_square_tensor(pictures[batch["sample_ids"][3]], 16))
    features = features_of(pictures)
    standardised = (features - features.mean(0)) / features.std(0).clamp_min(1e-6)
    torch.testing.assert_close(batch["latents"], standardised[batch["sample_ids"]])


def test_every_latent_leaves_a_folder_that_generates_and_starts_from_the_same_discriminator(
    run_script, starts, tmp_path
):
    discriminators, shapes = [], []
    for latent, more, sampled_from in [
        ("noise", [], "prior"),
        ("vae", ["--sample_from", "full", "--reconstruction", "discriminator"], "full"),
        ("dae", ["--sample_from", "held_out", "--r1_weight", 0.1, "--stage_1_dropout", 0], "held_out"),
    ]:
        run_script("dae_gan", [*COMMON, "--latent", latent, *more, "--output_dir", tmp_path / latent])
        folder = tmp_path / latent / "gan"
        assert {file.name for file in folder.iterdir()} >= FILES
        model = VAEGAN.from_pretrained(folder).eval()
        assert (model.config.latent, model.density.kind) == (latent, sampled_from)
        assert model.generate(3, torch.Generator().manual_seed(0)).shape == (3, 3, 16, 16)
        results = json.loads((folder / "results.json").read_text())
        assert results["sampled_from"] == sampled_from and 0 <= results["metrics"]["copies"] <= 100
        assert f"with latents of kind `{latent}`" in (folder / "README.md").read_text()
        discriminators.append(starts["gan/generator"]["discriminator"].state_dict())
        generator = starts["gan/generator"]["model"].generator
        shapes.append({name: tuple(tensor.shape) for name, tensor in generator.state_dict().items()})
    for discriminator, shape in zip(discriminators, shapes, strict=True):
        assert [n for n, t in discriminators[0].items() if not t.equal(discriminator[n])] == []
        assert shape == shapes[0]


@pytest.mark.extended
def test_run_in_bfloat16_leaves_a_float32_model(run_script, tmp_path):
    flags = ["--latent", "dae", "--mixed_precision", "bf16", "--r1_weight", 0.1, "--reconstruction", "discriminator"]
    run_script("dae_gan", [*COMMON, *flags, "--output_dir", tmp_path])
    model = VAEGAN.from_pretrained(tmp_path / "gan").eval()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert bool(torch.isfinite(model.generate(2, torch.Generator().manual_seed(0))).all())


@pytest.mark.extended
def test_checkpoint_generates_where_neither_this_package_nor_scikit_learn_is_installed(tmp_path):
    torch.manual_seed(0)
    model = VAEGAN(VAEGANConfig(image_size=16, width=8, latent_dim=6, latent="dae", density="mixture", components=2))
    model.density.fit_(torch.randn(40, 6))
    model.eval().save_pretrained(tmp_path / "model")
    save_file({"images": model.generate(3, torch.Generator().manual_seed(0))}, tmp_path / "ours.safetensors")
    found = run_foreign(
        f"""
import os
os.environ["HF_HOME"] = {str(tmp_path / "home")!r}
from transformers import AutoModel
model = AutoModel.from_pretrained("model", trust_remote_code=True).eval()
images = model.generate(3, torch.Generator().manual_seed(0))
print(json.dumps({{"same": torch.equal(images, load_file("ours.safetensors")["images"])}}))
""",
        tmp_path,
    )
    assert found["same"]
    # transformers refuses remote code whose unguarded imports are not installed.
    assert set(get_imports(latent_density.__file__)) - {"__future__", "math"} == {"torch"}


def test_flags_that_do_not_fit_are_refused(refusal, tmp_path):
    for flags, message in [
        (["--latent", "simclr"], "needs --encoder"),
        (["--latent", "noise", "--sample_from", "full"], "sampled from the prior"),
        (["--latent", "simclr", "--encoder", "x", "--sample_from", "prior"], "have no prior"),
        (["--latent", "simclr", "--encoder", "x", "--streaming"], "leave out --streaming"),
        (["--num_generated", 0], "at least 1"),
    ]:
        assert message in refusal("dae_gan", [*flags, "--output_dir", tmp_path])
