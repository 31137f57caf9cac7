"""Weights of a finished training are in its folder before they are measured; the run goes on with the measures."""

import importlib
import json

import pytest
import torch
from cases import for_each
from kills import weights

from hf_dpssl import (
    VAEGAN,
    ContrastiveConfig,
    ContrastiveEncoder,
    VQAutoencoder,
    VQConfig,
    VQDiTPipeline,
    VQDriftPipeline,
    VQTokenPipeline,
)
from hf_dpssl.latent_training.generation_monitor import GenerationMonitor

SHORT = ["--batch_size", 16, "--evaluation_images", 32]
ENCODER = ["--model_args", '{"channels": [8, 8, 16, 16]}', "--max_train_steps", 1]
VQ = [word for part in ("encoder", "decoder", "auxiliary") for word in (f"--{part}_channels", 8, 8)]
VQ += ["--norm_num_groups", 4, "--num_codes", 16, "--arm", "dae", "--stage_1_steps", 1, "--stage_2_steps", 1]
GAN = ["--width", 8, "--max_train_steps", 1, "--num_generated", 8]
TOKENS = ["--width", 16, "--num_layers", 1, "--num_heads", 2, "--max_train_steps", 1, "--samples_per_class", 1]
RUNS = {  # folder, flags, what measures and the number of its call at the end, how the folder is loaded
    "contrastive": ("encoder", ENCODER, "evaluate", 1, ContrastiveEncoder),
    "dae_vq": ("autoencoder", VQ, "evaluate", 1, VQAutoencoder),
    "dae_gan": ("gan", GAN, "Judge", 1, VAEGAN),
    "dae_ar": ("ar", TOKENS, "nats_per_image", 2, VQTokenPipeline),
}


class Killed(BaseException):
    """Seen by no handler of errors."""


def killed_at(call: int, measure):
    """`measure`, in whose call of that number the run ends."""
    calls = []

    def measured(*given, **options):
        calls.append(given)
        if len(calls) == call:
            raise Killed
        return measure(*given, **options)

    return measured


def given_autoencoder(folder) -> None:
    shape = dict(image_size=16, encoder_block_out_channels=[8, 8], decoder_block_out_channels=[8, 8])
    statistics = dict(latent_mean=[0.0] * 4, latent_std=[1.0] * 4)
    VQAutoencoder(VQConfig(**shape, **statistics, norm_num_groups=4, num_codes=16)).save_pretrained(folder)


def run_with_kill(run_script, monkeypatch, script: str, flags: list, measure: str, call: int) -> None:
    module = importlib.import_module(script)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(module, measure, killed_at(call, getattr(module, measure)))
        run_script(script, flags)


@pytest.mark.parametrize(
    "script", ["contrastive", *(pytest.param(s, marks=pytest.mark.extended) for s in list(RUNS)[1:])]
)
def test_a_run_that_ends_while_it_measures_leaves_its_weights_and_goes_on(script, run_script, monkeypatch, tmp_path):
    name, flags, measure, call, kind = RUNS[script]
    flags = [*SHORT, *flags, "--output_dir", tmp_path]
    if script == "dae_ar":
        given_autoencoder(tmp_path / "given")
        flags += ["--autoencoder", tmp_path / "given"]
    run_with_kill(run_script, monkeypatch, script, flags, measure, call)
    folder = tmp_path / name
    kind.from_pretrained(folder)
    assert (folder / "recipe.yaml").exists() and not (folder / "results.json").exists()
    before = weights(folder)
    assert "resumed at step 1" in run_script(script, [*flags, "--resume_from_checkpoint", "latest"])
    assert json.loads((folder / "results.json").read_text())["metrics"] and (folder / "README.md").exists()
    after = weights(folder)
    assert after.keys() == before.keys() and all(after[key].equal(value) for key, value in before.items())


@pytest.mark.extended
def test_a_generator_that_goes_on_completes_an_autoencoder_that_was_not_measured(run_script, monkeypatch, tmp_path):
    short = " ".join(map(str, [*VQ, *SHORT]))
    flags = ["--autoencoder_args", short, *SHORT, "--output_dir", tmp_path, "--sampling_steps", 1]
    flags += [*TOKENS[:-2], "--grid_images_per_class", 1]
    run_with_kill(run_script, monkeypatch, "dae_vq", [*VQ, *SHORT, "--output_dir", tmp_path], "evaluate", 1)
    results = tmp_path / "autoencoder" / "results.json"
    assert not results.exists()
    run_script("dae_dit", [*flags, "--resume_from_checkpoint", "latest"])
    run_script("dae_vq", [*VQ, *SHORT, "--output_dir", tmp_path / "whole"])
    whole = json.loads((tmp_path / "whole/autoencoder/results.json").read_text())
    assert json.loads(results.read_text())["metrics"] == whole["metrics"]


@pytest.mark.extended
def test_the_last_checkpoint_is_there_before_its_validation_which_a_run_that_goes_on_takes_once(
    run_script, monkeypatch, tmp_path
):
    torch.manual_seed(0)
    seen = {"input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.5] * 3}
    config = ContrastiveConfig("resnet18", {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}, seen)
    ContrastiveEncoder(config).save_pretrained(tmp_path / "judge")
    given_autoencoder(tmp_path / "given")
    flags = [*SHORT, *TOKENS[:-4], "--max_train_steps", 3, "--autoencoder", tmp_path / "given", "--sampling_steps", 1]
    flags += ["--grid_images_per_class", 1, "--validation_steps", 2, "--validation_images", 20]
    flags += ["--validation_extractor", tmp_path / "judge", "--output_dir", tmp_path]
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(GenerationMonitor, "validate", killed_at(2, GenerationMonitor.validate))
        run_script("dae_dit", flags)
    assert (tmp_path / "checkpoints/dit/step-00000003/state.pt").exists() and not (tmp_path / "dit").exists()
    found = []
    for _ in range(2):
        assert "resumed at step 3" in run_script("dae_dit", [*flags, "--resume_from_checkpoint", "latest"])
        found.append(json.loads((tmp_path / "dit/results.json").read_text()))
    assert [entry["step"] for entry in found[0]["validations"]] == [2, 3]
    assert found[1]["validations"] == found[0]["validations"] and found[1]["best"] == found[0]["best"]
    assert found[0]["metrics"] == {"fid_judge": found[0]["validations"][1]["fid_judge"]}
    assert found[0]["reference"] == "train" and found[0]["samples"]["generated"] == 20
    assert found[0]["samples"]["reference"] == 32
    assert "20 generated images against 32 training images." in (tmp_path / "dit/README.md").read_text()


GENERATORS = {  # script: flags, folder, how it is loaded
    "dae_dit": (["--sampling_steps", 1], "dit", VQDiTPipeline),
    "dae_drift": (["--images_per_set", 8, "--real_per_set", 8], "drift", VQDriftPipeline),
}


@pytest.mark.parametrize("script", ["dae_dit", pytest.param("dae_drift", marks=pytest.mark.extended)])
def test_a_generator_that_ends_while_it_draws_its_pictures_leaves_its_weights_and_goes_on(
    script, run_script, monkeypatch, tmp_path
):
    more, name, kind = GENERATORS[script]
    given_autoencoder(tmp_path / "given")
    flags = [*SHORT, *TOKENS[:-2], *more, "--grid_images_per_class", 1, "--autoencoder", tmp_path / "given"]
    flags += ["--output_dir", tmp_path]
    run_with_kill(run_script, monkeypatch, script, flags, "sample_grid", 1)
    folder = tmp_path / name
    kind.from_pretrained(folder)
    before = weights(folder)
    assert not list(folder.glob("samples*.png")) and {"recipe.yaml", "README.md"} <= {f.name for f in folder.iterdir()}
    assert "resumed at step 1" in run_script(script, [*flags, "--resume_from_checkpoint", "latest"])
    assert (folder / "samples.png").exists() and "samples.png" in (folder / "README.md").read_text(encoding="utf-8")
    after = weights(folder)
    assert after.keys() == before.keys() and all(after[key].equal(value) for key, value in before.items())


LAST_VALIDATIONS = [  # script, what validates, loop, key of the figure
    ("dae_vq", "validate", "autoencoder/stage-2", "validation_psnr"),
    ("dae_ar", "nats_per_image", "ar", "nats_per_image"),
]


@pytest.mark.extended
@for_each("script, measure, loop, key", LAST_VALIDATIONS)
def test_a_stage_that_ends_in_its_last_validation_has_its_checkpoint_and_takes_the_validation_once(
    script, measure, loop, key, run_script, monkeypatch, tmp_path
):
    flags = [*SHORT, *RUNS[script][1], "--output_dir", tmp_path]
    if script == "dae_ar":
        given_autoencoder(tmp_path / "given")
        flags += ["--autoencoder", tmp_path / "given"]
    run_with_kill(run_script, monkeypatch, script, flags, measure, 2 if script == "dae_vq" else 1)
    checkpoint = tmp_path / f"checkpoints/{loop}/step-00000001"
    assert (checkpoint / "state.pt").exists() and f'"{key}"' not in (checkpoint / "meta.json").read_text()
    assert not (tmp_path / RUNS[script][0]).exists()
    found = []
    for _ in range(2):
        assert "resumed at step 1" in run_script(script, [*flags, "--resume_from_checkpoint", "latest"])
        history = json.loads((checkpoint / "meta.json").read_text())["history"]
        found.append([entry[key] for entry in history if key in entry])
    assert len(found[0]) == 1 and found[1] == found[0]
