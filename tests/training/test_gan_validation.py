"""A GAN that is watched while it trains: its curve of Frechet distances, weights that do not notice, exact resume."""

import json
import shutil

import dae_gan
import numpy as np
import pytest
import torch
from kills import assert_identical

from hf_dpssl import VAEGAN, ContrastiveConfig, ContrastiveEncoder
from hf_dpssl.data.decoding import decode_image, to_square_tensor
from hf_dpssl.data.image_data import load_images
from hf_dpssl.data.keyed_random import derive_seed
from hf_dpssl.embedding.feature_extractors import load_extractor

FLAGS = ["--stage_1_steps", 3, "--max_train_steps", 5, "--batch_size", 16, "--num_generated", 8, "--width", 8]
FLAGS += ["--learning_rate", 0.01, "--checkpointing_steps", 1, "--checkpoints_total_limit", 9, "--logging_steps", 1]
NUM_IMAGES = 40


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> str:
    """Folder of a small random encoder, of so few features that so few images have a covariance of full rank."""
    folder = tmp_path_factory.mktemp("encoder") / "judge"
    torch.manual_seed(0)
    seen = {"input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.5] * 3}
    config = ContrastiveConfig("resnet18", {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}, seen)
    ContrastiveEncoder(config).save_pretrained(folder)
    return str(folder)


def watched(judge: str) -> list:
    return ["--validation_steps", 2, "--validation_images", NUM_IMAGES, "--validation_extractor", judge]


def state_of(folder, step: int) -> dict:
    """The checkpoint of a generator's step."""
    return torch.load(folder / f"checkpoints/gan/generator/step-{step:08d}/state.pt", weights_only=True)


def history_of(folder, step: int) -> list[dict]:
    return json.loads((folder / f"checkpoints/gan/generator/step-{step:08d}/meta.json").read_text())["history"]


def pixels(split) -> torch.Tensor:
    """Pictures of a data set's split (N, 3, 16, 16) in [-1, 1]."""
    return torch.stack([to_square_tensor(decode_image(row["image"]), 16) for row in split]).float() / 127.5 - 1


def frechet(real: torch.Tensor, generated: torch.Tensor) -> float:
    """Of features (N, D); the trace of a root is the sum of the roots of the eigenvalues."""
    clouds = [features.double().numpy() for features in (real, generated)]
    means, (first, second) = [c.mean(0) for c in clouds], [np.cov(c, rowvar=False) for c in clouds]
    roots = np.sqrt(np.linalg.eigvals(first @ second).real.clip(0))
    return float(((means[0] - means[1]) ** 2).sum() + np.trace(first + second) - 2 * roots.sum())


def test_curve_is_of_images_that_the_averaged_generator_of_a_checkpoint_draws_beside_held_out_ones(
    run_script, judge, tmp_path, monkeypatch
):
    plotted = []
    monkeypatch.setattr(dae_gan, "plot_curves", lambda history, path, title: plotted.append((history, path.touch())))
    flags = [*FLAGS, *watched(judge), "--log_with", "tensorboard", "--output_dir", tmp_path]
    run_script("dae_gan", flags)
    results = json.loads((tmp_path / "gan/results.json").read_text())
    extractor, data = load_extractor(judge, device="cpu"), load_images("digits")
    real = pixels(data.evaluation)
    seeds = [derive_seed(0, "validation", i) for i in range(NUM_IMAGES)]
    latents = torch.cat([torch.randn(1, 32, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    model, expected = VAEGAN.from_pretrained(tmp_path / "gan").eval(), []
    for step in (2, 4, 5):  # of stage 2
        averages = state_of(tmp_path, step)["ema"]["shadow_params"]
        with torch.no_grad():
            for parameter, average in zip(model.generator.parameters(), averages, strict=True):
                parameter.copy_(average)
            images = model.decode(latents)
        features = [extractor.features(pictures) for pictures in (real, images)]
        expected.append([step, pytest.approx(frechet(*features), rel=1e-4)])
    assert results["validation_fid"] == expected
    values = [value for _, value in results["validation_fid"]]
    assert len({round(value, 3) for value in values}) == 3
    best = min(range(3), key=values.__getitem__)
    assert results["best"] == {"step": [2, 4, 5][best], "fid": values[best]}

    assert json.loads((tmp_path / "gan-best/results.json").read_text())["reference"] == "evaluation"
    kept = VAEGAN.from_pretrained(tmp_path / "gan-best").eval()
    averages = state_of(tmp_path, [2, 4, 5][best])["ema"]["shadow_params"]
    assert all(a.equal(b) for a, b in zip(kept.generator.parameters(), averages, strict=True))
    logged = [(entry["step"], entry["fid_judge"]) for entry in history_of(tmp_path, 5) if "fid_judge" in entry]
    assert [list(point) for point in logged] == results["validation_fid"]
    drawn = [(entry["step"] - 3, entry["fid_judge"]) for entry in plotted[-1][0] if "fid_judge" in entry]
    assert drawn == logged and {"adv_d", "recon"} <= {name for entry in plotted[-1][0] for name in entry}
    assert results["curve"][-1][0] == 8 and (tmp_path / "gan-progress/step-00000004.png").exists()
    events = b"".join(path.read_bytes() for path in (tmp_path / "logs").rglob("events.out.tfevents*"))
    assert b"gan/generator/fid_judge" in events


def test_a_watched_gan_has_the_weights_of_one_that_nobody_watches(run_script, judge, tmp_path):
    flags = [*FLAGS, "--latent", "vae", "--sample_from", "full", "--stage_1_dropout", 0.2]
    for name, more in (("alone", []), ("watched", watched(judge))):
        run_script("dae_gan", [*flags, *more, "--output_dir", tmp_path / name])
    assert_identical(tmp_path / "watched/gan", tmp_path / "alone/gan")
    states = [state_of(tmp_path / name, 5) for name in ("alone", "watched")]
    assert states[1].pop("monitor")["best"] is not None and states[0].keys() == states[1].keys()
    sides = [state["discriminator"] for state in states]
    assert all(sides[0][name].equal(value) for name, value in sides[1].items())
    results = [json.loads((tmp_path / name / "gan/results.json").read_text()) for name in ("alone", "watched")]
    assert results[0]["metrics"] == results[1]["metrics"] and "validation_fid" not in results[0]
    kept, means = VAEGAN.from_pretrained(tmp_path / "watched/gan-best").eval(), []
    for split in (pixels(load_images("digits").train)).split(256):
        means.append(kept.encode(split)[0].detach())
    means = torch.cat(means).mean(0)  # what its latents were drawn from is of the encoder as it was then
    torch.testing.assert_close(kept.density.means[0], means, rtol=0, atol=0.1)
    assert float(means.abs().max()) > 0.3


def test_a_watched_gan_goes_on_with_its_curve_and_its_best(run_script, judge, tmp_path):
    flags = [*FLAGS, *watched(judge), "--output_dir", tmp_path / "run"]
    run_script("dae_gan", flags)
    whole = shutil.copytree(tmp_path / "run", tmp_path / "whole")
    for place in ("gan", "checkpoints/gan/generator/step-00000004", "checkpoints/gan/generator/step-00000005"):
        shutil.rmtree(tmp_path / "run" / place)
    assert "gan/generator: resumed at step 3" in run_script("dae_gan", [*flags, "--resume_from_checkpoint", "latest"])
    for place in ("gan", "gan-best"):
        assert_identical(tmp_path / "run" / place, whole / place)
    results = [json.loads((folder / "gan/results.json").read_text()) for folder in (tmp_path / "run", whole)]
    for key in ("validation_fid", "validations", "best", "curve"):
        assert results[0][key] == results[1][key]
    assert history_of(tmp_path / "run", 5) == history_of(whole, 5)
    assert state_of(tmp_path / "run", 5)["monitor"] == state_of(whole, 5)["monitor"]


@pytest.mark.extended
def test_two_processes_share_the_validations_of_a_gan_and_find_those_of_one(launch, judge, tmp_path):
    flags = [*FLAGS, *watched(judge), "--latent", "vae", "--sample_from", "full"]
    for count in (1, 2):
        own = ["--batch_size", 16 // count, "--output_dir", tmp_path / str(count)]
        launch("dae_gan", [*flags, *own], count).wait()
    curves = [json.loads((tmp_path / f"{n}/gan/results.json").read_text())["validation_fid"] for n in (1, 2)]
    assert [step for step, _ in curves[1]] == [2, 4, 5]
    assert [value for _, value in curves[1]] == pytest.approx([value for _, value in curves[0]], rel=0.02)


def test_a_validation_that_could_not_be_taken_is_refused_before_the_first_step(refusal, judge, tmp_path):
    (tmp_path / "stream").mkdir()
    load_images("digits").train.select(range(40)).to_parquet(tmp_path / "stream" / "train.parquet")
    stream = ["--dataset", tmp_path / "stream", "--image_size", 16, "--streaming"]
    for flags, message in [
        (["--validation_extractor", judge], "--validation_extractor needs --validation_steps"),
        (["--validation_steps", -1], "--validation_steps must be 0 (none) or more, got -1"),
        ([*watched(judge), "--validation_images", 1], "--validation_images of at least 2"),
        ([*watched(judge), *stream], "no held-out images to validate with"),
    ]:
        assert message in refusal("dae_gan", [*flags, "--output_dir", tmp_path])
    assert not (tmp_path / "checkpoints").exists()
