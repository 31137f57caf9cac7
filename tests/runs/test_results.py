"""Results files carry the circumstances of their numbers."""

import json
import sys
from importlib import metadata
from pathlib import Path

import torch

from hf_dpssl.runs.results import command_line, environment, write_results


def test_environment_names_machine_and_the_installed_versions():
    found = environment()
    assert found["libraries"]["torch"] == metadata.version("torch")
    assert found["libraries"]["hf_dpssl"] == metadata.version("hf_dpssl")
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["threads"] == torch.get_num_threads() and found["cpu_count"] >= 1
    assert all(found[name] for name in ("platform", "processor", "instructions", "accelerator"))


def test_results_hold_command_seed_samples_and_versions_and_no_folder_of_the_script(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/home/somebody/training/dae_vq.py", "--seed", "3"])
    write_results(
        tmp_path / "results.json", {"psnr": 30.5}, dataset="digits", seed=3, samples={"evaluation": 360}, knn={"k": 20}
    )
    content = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert content.pop("environment") == environment()
    assert content == {
        "metrics": {"psnr": 30.5}, "dataset": "digits", "seed": 3, "samples": {"evaluation": 360},
        "knn": {"k": 20}, "command": "dae_vq.py --seed 3",
    }  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_command_line_of_this_process_is_what_started_it():
    assert command_line().split()[0] == Path(sys.argv[0]).name
