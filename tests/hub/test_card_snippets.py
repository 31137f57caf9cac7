"""Every snippet of every card runs as it stands, by Hub id at a commit in a fresh process, and on a folder."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cases import for_each
from hub_server import HubServer
from huggingface_hub import ModelCard
from launches import REPOSITORY, Launched
from PIL import Image

SIZE = ["--num_layers", 1, "--width", 16, "--num_heads", 2, "--max_train_steps", 2, "--batch_size", 16]
STAGES = ["--stage_1_steps", 2, "--stage_2_steps", 2, "--batch_size", 16]
SMALL = ["--encoder_channels", 8, 8, "--decoder_channels", 8, 16, "--auxiliary_channels", 8, 8, "--norm_num_groups", 4]
SHORT = ["--max_train_steps", 2, "--batch_size", 16]
ENCODER = [*SHORT, "--model_args", '{"channels": [8, 8, 8, 8]}']
SMALL_STEM = [*ENCODER, "--architecture", "resnet18", "--stem", "small_image", "--name", "small-stem"]
RUNS = {  # folder: script, flags, snippets of its card
    "encoder": ("contrastive", ENCODER, 4),
    "small-stem": ("contrastive", SMALL_STEM, 2),
    "autoencoder": ("dae_vq", [*STAGES, *SMALL, "--num_codes", 16], 2),
    "kl": ("dae_vq", [*STAGES, *SMALL, "--quantizer", "kl", "--name", "kl"], 2),
    "dit": ("dae_dit", [*SIZE, "--sampling_steps", 2, "--grid_images_per_class", 1], 2),
    "drift": ("dae_drift", [*SIZE, "--images_per_set", 8, "--grid_images_per_class", 1], 2),
    "ar": ("dae_ar", [*SIZE, "--samples_per_class", 1], 2),
    "gan": ("dae_gan", ["--width", 8, "--latent_dim", 8, "--stage_1_steps", 2, *SHORT], 2),
}
# Each list of snippets in a process of its own, in which torch and timm are imported and nothing else.
RUNNER = """
import json, os, timm, torch, torchvision
for snippets in json.load(open("snippets.json")):
    child = os.fork()
    if child:
        if os.waitpid(child, 0)[1]:
            raise SystemExit(1)
        continue
    for number, snippet in enumerate(snippets):
        names = {"__name__": f"snippet_{number}"}
        exec(compile(snippet, f"snippet {number}", "exec"), names)
        made = [name for name in ("features", "embeddings", "images", "codes", "reconstructions") if name in names]
        values = {name: names[name] for name in made}
        shapes = {name: list(getattr(value, "shape", [len(value)])) for name, value in values.items()}
        print(json.dumps(shapes), flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def trained(fork_server, tmp_path_factory) -> Path:
    """A run's folder with a finished checkpoint of every kind, trained for two steps."""
    folder = tmp_path_factory.mktemp("trained")
    for script, flags, _ in RUNS.values():
        argv = [str(flag) for flag in [*flags, "--output_dir", folder, "--evaluation_images", 32]]
        Launched(fork_server, script, argv, 1, folder / "log").wait()
    return folder


def snippets_of(folder: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", ModelCard.load(folder / "README.md").text, re.DOTALL)


def run_snippets(snippets: list[list[str]], folder: Path, **hub: str) -> list[dict]:
    """Shapes of what each snippet makes, every list of them in a fresh process in `folder`."""
    folder.mkdir()
    Image.radial_gradient("L").convert("RGB").resize((40, 30)).save(folder / "picture.png")
    (folder / "snippets.json").write_text(json.dumps(snippets))
    variables = {"HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(REPOSITORY)}
    inherited = {name: value for name, value in os.environ.items() if not re.match("HF_|TRANSFORMERS_", name)}
    environment = inherited | variables | {"OMP_NUM_THREADS": "1"} | hub
    command = [sys.executable, "-c", RUNNER]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


EXPECTED = {  # shapes of what the snippets make
    "encoder": [{"features": [1, 8]}, {"features": [1, 8]}, {}, {"features": [1, 8], "embeddings": [1, 32]}],
    "small-stem": [{"features": [1, 8]}, {"features": [1, 8], "embeddings": [1, 32]}],
    "autoencoder": [{"images": [1, 3, 16, 16], "codes": [1, 8, 8]}, {"reconstructions": [1, 3, 16, 16]}],
    "kl": [{"images": [1, 3, 16, 16]}, {"reconstructions": [1, 3, 16, 16]}],
    "dit": [{"images": [3]}, {}],
    "drift": [{"images": [3]}, {}],
    "ar": [{"images": [3]}, {"codes": [1, 64]}],
    "gan": [{"images": [16, 3, 16, 16]}, {"images": [16, 3, 16, 16]}],
}


SHAPES = [shape for name in RUNS for shape in EXPECTED[name]]


@pytest.mark.slow  # the fast tests run them on folders
def test_snippets_run_by_id_at_a_commit_in_a_fresh_process(trained, tmp_path):
    given = []
    with HubServer() as hub:
        for name in RUNS:
            commit, texts = hub.add_repo("model", f"org/{name}", trained / name), snippets_of(trained / name)
            assert len(texts) == RUNS[name][2]
            given.append([t.replace("REPO_OR_FOLDER", f"org/{name}").replace("COMMIT", commit) for t in texts])
        assert run_snippets(given, tmp_path / "client", HF_ENDPOINT=hub.endpoint) == SHAPES


@pytest.mark.extended
def test_snippets_run_on_folders_without_a_network(trained, tmp_path):
    given = []
    for name in RUNS:
        texts = [text.replace("hf-hub:REPO", "local-dir:REPO") for text in snippets_of(trained / name)]
        given += [text.replace("REPO_OR_FOLDER", str(trained / name)) for text in texts]
    assert run_snippets([given], tmp_path / "client", HF_HUB_OFFLINE="1") == SHAPES


@for_each("name", RUNS)
@pytest.mark.extended
def test_remote_code_is_pinned_to_a_commit_and_really_trained_cards_are_clean(name, trained):
    calls = [call for text in snippets_of(trained / name) for call in re.findall(r"from_pretrained\(.*\)", text)]
    remote = [call for call in calls if "trust_remote_code" in call]
    assert all('revision="COMMIT"' in call for call in remote)
    assert bool(remote) == (name in ("small-stem", "autoencoder", "kl", "gan"))
    card = ModelCard.load(trained / name / "README.md")
    assert str(trained) not in str(card) and "Undefined" not in card.text
    results = json.loads((trained / name / "results.json").read_text())
    assert results["training"]["seconds"] > 0 and "| energy | about" in card.text
    if name in ("dit", "ar"):
        assert results["lineage"][0]["name"] == "autoencoder" and "local folder `autoencoder`" in card.text
