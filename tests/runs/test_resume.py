"""A run killed with SIGKILL at any moment and resumed ends with weights bit-identical to the uninterrupted run."""

import random

import pytest
from kills import assert_identical, run_with_kills

STEPS = 10
COMMON = ["--checkpointing_steps", 2, "--logging_steps", 2]
CONTRASTIVE = [*COMMON, "--batch_size", 32, "--max_train_steps", STEPS]
MOCO = ["--negatives", "queue", "--normalization", "anchor", "--queue_size", 100, "--feature_norm", "batch"]
COSINE_MOMENTUM = ["--momentum", 0.9, "--momentum_schedule", "cosine"]
TWO_WORKERS = ["--preload_gb", 0, "--num_workers", 2]
STAGES = [*COMMON, "--arm", "dae", "--auxiliary_dropout", 0.2]
STAGES += ["--stage_1_steps", 8, "--stage_2_steps", 8, "--batch_size", 16]
VQGAN = ["--adversarial", "hinge", "--adversarial_start", 3, "--discriminator_warmup", 1, "--validation_steps", 2]
VQGAN += ["--discriminator_width", 8, "--guard_factor", 1.01, "--codebook_update", "gradient"]
GAN = [*COMMON, "--max_train_steps", 8, "--stage_1_steps", 6, "--num_generated", 16, "--batch_size", 16]
GAN += ["--r1_weight", 0.1, "--r1_interval", 3, "--reconstruction", "discriminator"]
DIT = [*COMMON, "--max_train_steps", STEPS, "--width", 32, "--num_layers", 2, "--sampling_steps", 1]
DIT += ["--autoencoder_args", "--stage_1_steps 4 --stage_2_steps 4 --checkpointing_steps 2"]
DIT_OPTIONS = ["--objective", "epsilon", "--learned_variance", True, "--min_snr_gamma", 5, "--validation_steps", 3]
DIT_OPTIONS += ["--grid_images_per_class", 1, "--gradient_accumulation_steps", 2, "--gradient_checkpointing", True]
DRIFT = [*DIT[: DIT.index("--sampling_steps")], *DIT[DIT.index("--autoencoder_args") :], "--batch_size", 32]
DRIFT += ["--images_per_set", 8, "--real_per_set", 8, "--grid_images_per_class", 1, "--architecture", "dit"]
RUNS = {  # script, flags, processes
    "t_simclr": ("contrastive", CONTRASTIVE, 1),
    "t_simclr_calibrated": ("contrastive", [*CONTRASTIVE, "--temperature", "auto", "--learnable_dof"], 1),
    "t_moco": ("contrastive", [*CONTRASTIVE, *MOCO, *COSINE_MOMENTUM, "--projection_batch_norm"], 1),
    "t_moco_two_processes": ("contrastive", [*CONTRASTIVE, *MOCO, "--batch_norm", "global"], 2),
    "t_simclr_two_processes": ("contrastive", [*CONTRASTIVE, "--num_processes", 2], 2),
    "t_simclr_two_workers": ("contrastive", [*CONTRASTIVE, *TWO_WORKERS], 1),
    "t_simclr_stream_two_workers": ("contrastive", [*CONTRASTIVE, *TWO_WORKERS, "--streaming"], 1),
    "dae_vq": ("dae_vq", STAGES, 1),
    "vqgan": ("dae_vq", [*STAGES, *VQGAN], 1),
    "vqgan_two_processes": ("dae_vq", [*STAGES, *VQGAN], 2),
    "kl_joint": ("dae_vq", [*STAGES, "--arm", "joint", "--quantizer", "kl"], 1),
    "dae_vq_two_processes": ("dae_vq", STAGES, 2),
    "dae_vq_two_workers": ("dae_vq", [*STAGES, *TWO_WORKERS], 1),
    "dae_gan": ("dae_gan", GAN, 1),
    "dae_gan_two_processes": ("dae_gan", [*GAN, "--validation_steps", 3], 2),
    "dae_dit": ("dae_dit", DIT, 1),
    "dae_dit_two_processes": ("dae_dit", DIT, 2),
    "dae_dit_options_two_processes": ("dae_dit", [*DIT, *DIT_OPTIONS, "--batch_size", 16], 2),
    "dae_drift": ("dae_drift", DRIFT, 1),
    "dae_drift_two_processes": ("dae_drift", [*DRIFT, "--guidance_scale", 1.5, "--validation_steps", 3], 2),
    "dae_dit_two_workers": ("dae_dit", [*DIT, *TWO_WORKERS], 1),
}
FEW = ["t_simclr_two_processes", "t_simclr_stream_two_workers", "dae_gan"]


@pytest.mark.parametrize(
    ("name", "kills"),
    [("dae_dit", 1)]
    + [pytest.param(name, 1, marks=pytest.mark.extended) for name in FEW]
    + [pytest.param(name, 10, marks=pytest.mark.slow) for name in RUNS],
)
def test_killed_and_resumed_run_is_bit_identical(name, kills, launch, tmp_path):
    script, flags, processes = RUNS[name]
    launch(script, [*flags, "--output_dir", tmp_path / "whole"], processes).wait()
    struck = run_with_kills(launch, script, flags, processes, tmp_path / "killed", kills, random.Random(name))
    assert struck >= max(1, kills // 2), "too few kills came in time"
    assert_identical(tmp_path / "killed", tmp_path / "whole")
    print(f"{name}: {struck} kills struck")


def test_resume_refuses_other_settings_and_a_second_run_needs_overwrite(run_script, refusal, tmp_path):
    flags = ["--batch_size", 32, "--max_train_steps", 2, "--checkpointing_steps", 1, "--output_dir", tmp_path]
    resume = [*flags, "--resume_from_checkpoint", "latest"]
    assert "starting afresh" in run_script("contrastive", resume)
    assert "learning_rate: 0.002 -> 0.1" in refusal("contrastive", [*resume, "--learning_rate", "0.1"])
    assert "--overwrite" in refusal("contrastive", flags)
    run_script("contrastive", [*flags, "--overwrite"])
