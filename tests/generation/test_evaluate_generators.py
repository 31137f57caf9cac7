"""`hf-dpssl evaluate` of autoencoders and generators, ours and diffusers', equals what is computed by hand."""

import json
import warnings

import numpy as np
import pytest
import timm
import torch
from cases import for_each
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel, VQModel
from PIL import Image
from scipy.linalg import LinAlgWarning, sqrtm
from timm.models import save_for_hf
from tiny_checkpoints import encoder_model, save_checkpoints

from hf_dpssl import VAEGAN, VQAutoencoder
from hf_dpssl.autoencoder.autoencoder_evaluation import reconstructions
from hf_dpssl.autoencoder.measures import load_pictures, measure_autoencoder
from hf_dpssl.cli.commands import main
from hf_dpssl.embedding.feature_extractors import load_extractor
from hf_dpssl.evaluation import frechet_extrapolation, frechet_interval

FEW = ["--evaluation_images", "90"]
LAYERS = {
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 8], "norm_num_groups": 4, "sample_size": 16, "latent_channels": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Checkpoints of every kind, a judge (features of 16 numbers) and a classifier of two classes."""
    root = tmp_path_factory.mktemp("checkpoints")
    found = {kind: str(path) for kind, path in save_checkpoints(root, ("autoencoder", "dit", "token", "gan")).items()}
    encoder_model().encoder.save_pretrained(root / "judge")
    torch.manual_seed(1)
    channels = {"channels": [8, 8, 8, 8]}
    save_for_hf(timm.create_model("resnet10t", num_classes=2, **channels), root / "two", model_args=channels)
    AutoencoderKL(**LAYERS).save_pretrained(root / "kl")
    VQModel(**LAYERS, num_vq_embeddings=16).save_pretrained(root / "vqmodel")
    size = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 2, "sample_size": 8}
    transformer = DiTTransformer2DModel(**size, in_channels=4, num_embeds_ada_norm=2)
    stock = DiTPipeline(transformer, AutoencoderKL(**LAYERS), DDIMScheduler())
    stock.save_pretrained(root / "stock")
    return found | {name: str(root / name) for name in ("judge", "two", "kl", "vqmodel", "stock")}


def evaluate(capsys, *argv: str) -> dict:
    capsys.readouterr()
    assert main(["evaluate", *argv, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def frechet(x, y) -> float:
    moments = [(z.mean(0), np.cov(z.T)) for z in (x.double().numpy(), y.double().numpy())]
    (mu_1, s_1), (mu_2, s_2) = moments
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LinAlgWarning)  # some features are always 0
        root = sqrtm(s_1 @ s_2).real
    return ((mu_1 - mu_2) ** 2).sum() + np.trace(s_1 + s_2 - 2 * root)


def real(limit: int = 90, seed: int = 0) -> torch.Tensor:
    return load_pictures("digits", 16, limit, seed=seed)["evaluation"].pixel_values


@pytest.mark.extended
def test_numbers_of_our_autoencoder_are_those_of_the_report(folders, capsys):
    found = evaluate(capsys, folders["autoencoder"], "--extractor", folders["judge"], *FEW)
    model, pictures = VQAutoencoder.from_pretrained(folders["autoencoder"]).eval(), load_pictures("digits", 16, 90)
    judge = load_extractor(folders["judge"])
    expected, _ = measure_autoencoder(
        model, pictures["train"], pictures["evaluation"], extractor=judge, parts=("reconstruction",)
    )
    assert found["kind"] == "autoencoder" and found["samples"] == {"evaluation": 90} and found["notes"] == []
    uncertain = {
        name: found["metrics"].pop(name) for name in ("rfid_judge_low", "rfid_judge_high", "rfid_judge_infinity")
    }
    assert set(found["metrics"]) == {"psnr", "ssim", "rfid_judge"}
    assert found["metrics"] == pytest.approx({name: expected[name] for name in found["metrics"]}, rel=1e-4)
    images = pictures["evaluation"].pixel_values
    clouds = [judge.features(part) for part in (images, reconstructions(model, images, 64))]
    interval, line = frechet_interval(*clouds), frechet_extrapolation(*clouds)
    ends = (interval["fid_low"], interval["fid_high"], line["fid_infinity"])
    assert tuple(uncertain.values()) == pytest.approx(ends, rel=1e-3)
    assert ends[0] < found["metrics"]["rfid_judge"] < ends[1]
    about = found["fingerprint"]
    assert about["extractor"] == {"name": "judge", "sha256": judge.fingerprint, "resize": judge.resize}
    assert about["resize"] == "shorter side to 16 pixels (bicubic), centre crop"
    again = evaluate(capsys, folders["autoencoder"], "--extractor", folders["judge"], *FEW, "--batch_size", "17")
    assert again["fingerprint"] == about and again["metrics"] == pytest.approx(found["metrics"] | uncertain, rel=1e-3)


@pytest.mark.extended
@pytest.mark.parametrize("name, model_class", [("kl", AutoencoderKL), ("vqmodel", VQModel)])
@torch.no_grad()
def test_autoencoders_of_diffusers_are_measured_as_diffusers_runs_them(folders, capsys, name, model_class):
    found = evaluate(capsys, folders[name], "--extractor", folders["judge"], *FEW)["metrics"]
    model, images = model_class.from_pretrained(folders[name]).eval(), real()
    decoded = model(images).sample.clamp(-1, 1)
    error = ((images - decoded).double() ** 2).mean((1, 2, 3))
    assert found["psnr"] == pytest.approx(float((10 * (4 / error).log10()).mean()), rel=1e-4)
    judge = load_extractor(folders["judge"])
    assert found["rfid_judge"] == pytest.approx(frechet(judge.features(images), judge.features(decoded)), rel=1e-3)
    without = evaluate(capsys, folders[name], *FEW)
    assert without["notes"] == ["rFID was not measured: it needs --extractor."]
    assert set(without["metrics"]) == {"psnr", "ssim"}


@pytest.mark.extended
@for_each("name", ["dit", "token", "stock"])
def test_numbers_of_a_pipeline_are_those_of_the_images_that_sample_draws(folders, capsys, tmp_path, name):
    steps = [] if name == "token" else ["--num_inference_steps", "2"]
    drawing = ["--num_images", "20", "--seed", "3", *steps]
    judges = ["--extractor", folders["judge"], "--classifier", f"timm:local-dir:{folders['two']}"]
    found = evaluate(capsys, folders[name], *drawing, *judges, *FEW)
    options = ["--output_dir", str(tmp_path / "drawn"), "--layout", "by_class", "--batch_size", "7"]
    assert main(["sample", folders[name], *drawing, *options]) == 0
    names = ("class 0", "class 1") if name == "stock" else ("zero", "one")
    classes = {label: sorted((tmp_path / "drawn/images" / names[label]).iterdir()) for label in (0, 1)}
    arrays = {label: [np.array(Image.open(path)) for path in paths] for label, paths in classes.items()}
    images = torch.from_numpy(np.stack([*arrays[0], *arrays[1]])).permute(0, 3, 1, 2).float() / 127.5 - 1
    judge = load_extractor(folders["judge"])
    # Pixels may differ by one level where batches of another size round otherwise.
    expected = frechet(judge.features(real(seed=3)), judge.features(images))
    assert found["metrics"]["fid_judge"] == pytest.approx(expected, rel=2e-2)
    logits = load_extractor(f"timm:local-dir:{folders['two']}").logits(images)
    right = sum(int(logit.argmax()) == i // 10 for i, logit in enumerate(logits))
    assert found["metrics"]["class_consistency"] == pytest.approx(100 * right / 20)
    p = logits.double().softmax(1)
    assert 1 <= found["metrics"]["inception_score_timm-two"] <= float((p * (p / p.mean(0)).log()).sum(1).exp().max())
    assert found["kind"] == {"token": "token"}.get(name, "dit")
    assert found["samples"] == {"generated": 20, "evaluation": 90}
    assert found["notes"] == ["fid_judge_infinity was not measured: it needs 4 x 16 images of either kind."]
    assert found["fingerprint"]["classifier"]["name"] == "timm-two"


@pytest.mark.extended
def test_drawn_images_are_kept_and_gone_on_with_by_two_processes(folders, capsys, forked_shares, tmp_path):
    flags = ["--extractor", folders["judge"], "--num_images", "18", "--num_inference_steps", "1", *FEW]
    alone = evaluate(capsys, folders["dit"], *flags, "--reference", "train", "--batch_size", "4")
    where = ["--samples_dir", str(tmp_path / "kept"), "--num_processes", "2", "--batch_size", "4"]
    shared = evaluate(capsys, folders["dit"], *flags, "--reference", "train", *where)
    assert shared["fingerprint"] == alone["fingerprint"] and shared["metrics"] == alone["metrics"]
    assert len(list((tmp_path / "kept").rglob("*.png"))) == 18 and shared["samples"]["train"] == 90
    held_out = evaluate(capsys, folders["dit"], *flags, *where[:2])
    assert held_out["metrics"] != shared["metrics"] and held_out["fingerprint"] != shared["fingerprint"]


@pytest.mark.extended
def test_numbers_of_a_gan_are_those_of_its_generate(folders, capsys):
    found = evaluate(capsys, folders["gan"], "--extractor", folders["judge"], "--num_images", "20", *FEW)
    model = VAEGAN.from_pretrained(folders["gan"]).eval()
    with torch.no_grad():
        images = model.generate(20, torch.Generator().manual_seed(0))
    judge = load_extractor(folders["judge"])
    expected = frechet(judge.features(real()), judge.features(images))
    interval = frechet_interval(judge.features(real()), judge.features(images))
    assert found["metrics"] == pytest.approx(
        {"fid_judge": expected, "fid_judge_low": interval["fid_low"], "fid_judge_high": interval["fid_high"]}, rel=1e-3
    )
    assert found["kind"] == "gan"
    few = evaluate(capsys, folders["gan"], "--extractor", folders["judge"], "--num_images", "9", *FEW)
    assert "9 images for features of 16 dimensions" in few["notes"][0]
    classifier = f"timm:local-dir:{folders['two']}"
    scored = evaluate(capsys, folders["gan"], "--classifier", classifier, "--num_images", "9")
    assert set(scored["metrics"]) == {"inception_score_timm-two", "inception_score_std_timm-two"}
    assert scored["notes"] == ["the generator has no classes: no class consistency."]


def test_what_is_wrong_is_said_in_one_line(folders, capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("DPSSL_DATA", raising=False)
    judge, draw = ["--extractor", folders["judge"], *FEW], ["--num_images", "4"]
    cases = [
        ([folders["dit"], *draw], "give --extractor (FID, and the inception score where it classifies), --classifier"),
        ([folders["dit"], *draw, "--classifier", folders["judge"]], "'judge' has no classifier: name one with a head"),
        ([folders["gan"], *judge, "--guidance_scale", "2"], "--guidance_scale is for pipelines, and "),
        ([folders["token"], *judge, "--num_inference_steps", "2"], "does not take ['num_inference_steps']"),
        ([folders["dit"], *judge, "--num_images", "1"], "--num_images must be at least 2, got 1"),
        ([folders["kl"], "--classifier", "inception"], "--classifier is for generators, and "),
        ([folders["kl"], "--knn_k", "3"], "is of kind 'autoencoder': leave it out"),
        ([folders["kl"], "--extractor", "resnet20-cifar10"], "DPSSL_DATA is not set"),
        ([folders["kl"], "--extractor", str(tmp_path)], "holds no image processor"),
        ([folders["kl"], "--dataset", str(tmp_path / "none")], "none"),
    ]
    for argv, message in cases:
        assert main(["evaluate", *argv, "--output", str(tmp_path / "out.json")]) == 2
        error = capsys.readouterr().err.strip()
        assert message in error.splitlines()[-1] and error.splitlines()[-1].startswith("hf-dpssl evaluate: ")
        assert "Traceback" not in error and not (tmp_path / "out.json").exists()
