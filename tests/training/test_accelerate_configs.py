"""The files of training/accelerate: read by accelerate's own launcher, and started on CPU processes at tiny size."""

import os
import random
import shutil
import socket
import subprocess
import sys
import time

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from launches import REPOSITORY, variables
from safetensors.torch import load_file
from tiny_autoencoders import make

CHANCE = random.SystemRandom()  # of ports: two runs of these tests on one machine take different ones

FOLDER = REPOSITORY / "training/accelerate"
WEIGHTS = "dit/transformer/diffusion_pytorch_model.safetensors"
TINY = ["--dataset", "digits", "--batch_size", 8, "--max_train_steps", 2, "--evaluation_images", 32]
DIT = [*TINY, "--width", 16, "--num_layers", 2, "--num_heads", 2, "--sampling_steps", 1, "--grid_images_per_class", 1]
ENCODER = [*TINY, "--model_args", '{"channels": [8, 8, 16, 16]}', "--image_size", 16]


@pytest.fixture
def autoencoder(tmp_path):
    model = make(latent_mean=[0.0] * 3, latent_std=[1.0] * 3)
    model.save_pretrained(tmp_path / "autoencoder")
    return ["--autoencoder", tmp_path / "autoencoder", "--image_size", 8]


@pytest.mark.extended
def test_sharded_configuration_shards_on_cpus_too_and_trains_what_one_process_trains(
    launch, run_script, autoencoder, tmp_path
):
    flags = [*DIT, *autoencoder, "--checkpointing_steps", 2, "--validation_steps", 2]
    environment = variables("fsdp_8_bf16.yaml", "--num_processes", 2, "--mixed_precision", "no")
    two = launch("dae_dit", [*flags, "--output_dir", tmp_path / "two"], 2, **environment)
    run_script("dae_dit", [*flags, "--batch_size", 16, "--output_dir", tmp_path / "one"])
    two.wait()
    # Each process wrote its part of the model, and no process the whole.
    checkpoint = tmp_path / "two/checkpoints/dit/step-00000002"
    assert len(list((checkpoint / "parts").glob("*.distcp"))) == 2
    assert torch.load(checkpoint / "state.pt")["model"] == {}
    sharded, alone = (load_file(tmp_path / run / WEIGHTS) for run in ("two", "one"))
    for name, value in alone.items():
        torch.testing.assert_close(sharded[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_scripts_that_cannot_be_sharded_say_so_before_they_write(refusal, monkeypatch, tmp_path):
    folder = tmp_path / "run"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    for script in ("contrastive", "dae_vq", "dae_gan", "dae_ar", "dae_dit"):  # a DiT's autoencoder is trained first
        message = refusal(script, ["--output_dir", folder])
        assert "trains whole copies" in message and "--autoencoder" in message, script
    monkeypatch.setenv("FSDP_VERSION", "1")
    assert "fsdp_version: 2" in refusal("dae_dit", ["--output_dir", folder, "--autoencoder", tmp_path])
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert "DEEPSPEED" in refusal("contrastive", ["--output_dir", folder])
    assert not folder.exists()


def test_command_in_the_file_of_four_machines_lets_them_meet_at_a_rendezvous():
    path = FOLDER / "gpu_32_bf16.yaml"
    comments = [line.strip("#\\\n ") for line in path.read_text().splitlines() if line.startswith("# ")]
    first = next(i for i, line in enumerate(comments) if line.startswith("accelerate launch"))
    command = " ".join(comments[first : first + 2]).replace("RANK", "3").replace("HOST", "node-0").split()
    command[command.index(f"training/accelerate/{path.name}")] = str(path)
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(command[2:]))
    prepare_multi_gpu_env(args)
    assert (args.nnodes, args.nproc_per_node, args.rdzv_backend) == ("4", "8", "c10d")
    assert args.rdzv_endpoint == "node-0:29500" and args.node_rank == 3


def start(*command, **environment) -> subprocess.Popen:
    known = {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    options = dict(cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    return subprocess.Popen([str(word) for word in command], env=os.environ | known | environment, **options)


def ended(process: subprocess.Popen) -> str:
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 0, output
    return output


def wait_for(port: int, process: subprocess.Popen) -> None:
    """Until the first machine has opened it: here the others have its address, and would do so in its place."""
    while process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)


def accelerate(config: str, *words) -> subprocess.Popen:
    return start("accelerate", "launch", "--config_file", FOLDER / config, *words)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_configuration_starts_by_accelerate_launch_with_fewer_processes(autoencoder, tmp_path):
    """On one machine; of several, two that are this one."""
    script, port = REPOSITORY / "training/contrastive.py", CHANCE.randint(20_000, 40_000)
    two = ["--num_processes", 2, "--main_process_port", port]
    for config, words in {"gpu_1_bf16": [], "cpu_2_processes": two[2:], "gpu_8_bf16": two}.items():
        flags = [*ENCODER, "--output_dir", tmp_path / config]
        ended(accelerate(f"{config}.yaml", *words, script, *flags))
    generator = [REPOSITORY / "training/dae_dit.py", *DIT, *autoencoder]
    generator += ["--output_dir", tmp_path / "fsdp_8_bf16", "--checkpointing_steps", 1]
    ended(accelerate("fsdp_8_bf16.yaml", *two, *generator))
    weights = (tmp_path / "fsdp_8_bf16" / WEIGHTS).read_bytes()
    shutil.rmtree(tmp_path / "fsdp_8_bf16/checkpoints/dit/step-00000002")
    resumed = ended(accelerate("fsdp_8_bf16.yaml", *two, *generator, "--resume_from_checkpoint", "latest"))
    assert "resumed at step 1" in resumed and (tmp_path / "fsdp_8_bf16" / WEIGHTS).read_bytes() == weights
    four = [
        "--rdzv_backend",
        "c10d",
        "--num_machines",
        2,
        "--num_processes",
        4,
        "--main_process_ip",
        "127.0.0.1",
        *two[2:],
    ]
    flags = [*ENCODER, "--num_processes", 4, "--output_dir", tmp_path / "gpu_32_bf16"]
    machines = [accelerate("gpu_32_bf16.yaml", "--machine_rank", 0, *four, script, *flags)]
    wait_for(port, machines[0])
    machines.append(accelerate("gpu_32_bf16.yaml", "--machine_rank", 1, *four, script, *flags))
    for machine in machines:
        ended(machine)
    started = {path.stem for path in FOLDER.glob("*.yaml")}
    assert {path.parent.parent.name for path in tmp_path.glob("*/*/results.json")} == started


# What Slurm does, on one machine: `scontrol` lists the machines, `srun` runs a command once on each.
SCONTROL = "#!/bin/bash\nprintf '127.0.0.1\\n127.0.0.2\\n'\n"
SRUN = """#!/bin/bash
shift  # --kill-on-bad-exit=1
for node in $(seq 0 $((SLURM_JOB_NUM_NODES - 1))); do
    SLURM_NODEID=$node "$@" &
    started+=($!)
    # Here every machine has the address of the first, which must be the one to open the port.
    until (exec 3<>/dev/tcp/127.0.0.1/$PORT_OF_TEST) 2>/dev/null || ! kill -0 "${started[0]}"; do sleep 0.2; done
done
for process in "${started[@]}"; do
    wait "$process" || failed=1
done
exit ${failed:-0}
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_slurm_script_starts_a_process_per_gpu_on_each_machine_and_goes_on_when_it_is_run_again(tmp_path):
    """Slurm's two commands are stand-ins; the job and accelerate are real."""
    for name, text in {"scontrol": SCONTROL, "srun": SRUN}.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    slurm = {"SLURM_JOB_NODELIST": "node[0-1]", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_PER_NODE": "h100:1"}
    job_id = CHANCE.randint(1, 19_999)
    slurm |= {"SLURM_JOB_ID": str(job_id), "PORT_OF_TEST": str(20_000 + job_id), "PATH": path}
    flags = [*ENCODER, "--num_processes", 2, "--output_dir", tmp_path / "run"]
    job = [shutil.which("bash"), FOLDER / "slurm.sh", "training/contrastive.py", *flags]
    assert "starting afresh" in ended(start(*job, **slurm))
    assert "resumed at step 2" in ended(start(*job, **slurm))
