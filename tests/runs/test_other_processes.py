"""A run goes on with another number of processes at the same batch of all of them, or says why it does not."""

import json
import shutil

import pytest
import torch
from launches import variables
from safetensors.torch import load_file
from tiny_autoencoders import make

ENCODER = ["--model_args", '{"channels": [8, 8, 16, 16]}', "--optimizer", "sgd", "--learning_rate", 0.05]
ENCODER += ["--max_train_steps", 6, "--projection_batch_norm", "--batch_norm", "global"]
MOCO = ["--negatives", "queue", "--normalization", "anchor", "--feature_norm", "batch"]
STAGES = ["--encoder_channels", 8, "--decoder_channels", 8, "--auxiliary_channels", 8, "--num_codes", 16]
# With a channel to a group, biases before group norms have no gradient but rounding, of which AdamW makes steps.
STAGES += ["--norm_num_groups", 1]
STAGES += ["--stage_1_steps", 6, "--stage_2_steps", 6, "--arm", "weak_width"]
DIT = ["--max_train_steps", 6, "--width", 16, "--num_layers", 1, "--num_heads", 2, "--sampling_steps", 1]
DIT += ["--grid_images_per_class", 1, "--image_size", 8]
OTHER_PROCESSES = {  # script, flags, loops
    "contrastive": ("contrastive", ENCODER, ["encoder"]),
    "moco": ("contrastive", [*ENCODER, *MOCO], ["encoder"]),
    "dae_vq": ("dae_vq", STAGES, ["autoencoder/stage-1", "autoencoder/stage-2"]),
    "dae_dit": ("dae_dit", DIT, ["dit"]),
}


FAST = "contrastive"
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in OTHER_PROCESSES if name != FAST]


@pytest.mark.parametrize("name", [FAST, *SLOW])
def test_one_process_then_two_then_one_end_with_the_weights_of_one(name, run_script, launch, tmp_path):
    """At the same batch of all; up to the order of sums."""
    script, flags, loops = OTHER_PROCESSES[name]
    flags = [*flags, "--dataset", "digits", "--evaluation_images", 16, "--checkpointing_steps", 2]
    flags += ["--checkpoints_total_limit", 9, "--resume_from_checkpoint", "latest"]
    if script == "dae_dit":
        make(latent_mean=[0.0] * 3, latent_std=[1.0] * 3).save_pretrained(tmp_path / "autoencoder")
        flags += ["--autoencoder", tmp_path / "autoencoder"]

    def go_on(run: str, earlier: str, step: int) -> list:
        """Flags of a run that finds the checkpoints of an earlier one, of its last loop up to a step."""
        for loop in loops:
            for number in (2, 4, 6):
                if loop != loops[-1] or number <= step:
                    place = f"checkpoints/{loop}/step-{number:08d}"
                    shutil.copytree(tmp_path / earlier / place, tmp_path / run / place)
        return [*flags, "--output_dir", tmp_path / run]

    run_script(script, [*flags, "--batch_size", 32, "--output_dir", tmp_path / "whole"])
    two = launch(script, [*go_on("two", "whole", 2), "--batch_size", 16, "--num_processes", 2], 2)
    assert "resumed at step 2" in two.wait()
    printed = run_script(script, [*go_on("one", "two", 4), "--batch_size", 32])
    assert "with 1 processes, where it had 2" in printed and "resumed at step 4" in printed
    found, expected = (
        torch.load(tmp_path / run / f"checkpoints/{loops[-1]}/step-00000006/state.pt")["model"]
        for run in ("one", "whole")
    )
    largest = max(float((found[key] - value).abs().max()) for key, value in expected.items())
    print(f"{name}: largest difference {largest:.2g}")
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.slow
def test_sharded_run_of_one_process_goes_on_with_two_and_with_one_again(launch, run_script, tmp_path):
    """Each reads its part of what others have written; the run ends with the averages of one that was never sharded."""
    make(latent_mean=[0.0] * 3, latent_std=[1.0] * 3).save_pretrained(tmp_path / "autoencoder")
    flags = [*DIT, "--autoencoder", tmp_path / "autoencoder", "--dataset", "digits", "--evaluation_images", 16]
    flags += ["--checkpointing_steps", 2, "--checkpoints_total_limit", 9]
    run_script("dae_dit", [*flags, "--batch_size", 32, "--output_dir", tmp_path / "whole"])
    flags += ["--output_dir", tmp_path / "run", "--resume_from_checkpoint", "latest"]
    for steps, processes in ((0, 1), (2, 2), (4, 1)):
        for step in range(steps + 2, 7, 2):  # as if the run had been killed after so many steps
            shutil.rmtree(tmp_path / f"run/checkpoints/dit/step-{step:08d}", ignore_errors=True)
        environment = variables("fsdp_8_bf16.yaml", "--num_processes", processes, "--mixed_precision", "no")
        batch = ["--batch_size", 32 // processes]
        printed = launch("dae_dit", [*flags, *batch], processes, **environment).wait()
        assert not steps or f"resumed at step {steps}" in printed, printed
        parts = tmp_path / f"run/checkpoints/dit/step-{steps + 2:08d}/parts"
        assert len(list(parts.glob("*.distcp"))) == processes
    found, expected = (
        load_file(tmp_path / run / "dit/transformer/diffusion_pytorch_model.safetensors") for run in ("run", "whole")
    )
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.extended
def test_another_number_of_processes_is_refused_where_the_weights_depend_on_it(run_script, refusal, tmp_path):
    flags = ["--dataset", "digits", "--evaluation_images", 16, "--batch_size", 8, "--lr_scheduler", "constant"]
    flags += ["--max_train_steps", 1, "--output_dir", tmp_path]
    run_script("contrastive", flags)
    file = next(tmp_path.rglob("meta.json"))
    record = json.loads(file.read_text())
    resume = [*flags, "--resume_from_checkpoint", "latest"]
    own = "its batch norms are those of --batch_norm local, whose statistics are each process's own"
    kinds = "it was sharded (FSDP), and is not sharded now"
    for changed, message in (({"num_processes": 2}, own), ({"sharded": True}, kinds)):
        file.write_text(json.dumps(record | changed))
        assert message in refusal("contrastive", resume), changed
    file.write_text(json.dumps(record | {"readers": [{}, {}], "num_processes": 2}))
    message = refusal("contrastive", resume)
    assert "was read by 2 processes x 1 workers" in message and "now there are 1 x 1" in message
    record["arguments"]["batch_norm"] = "global"
    file.write_text(json.dumps(record | {"num_processes": 4}))
    message = refusal("contrastive", [*resume, "--batch_norm", "global"])
    assert "was 32 (4 x 8) and now is 8 (1 x 8)" in message and "give --batch_size 32" in message
