"""`hf-dpssl card` and `hf-dpssl info` as a user calls them."""

import json
import shutil
from pathlib import Path

import contrastive
import pytest
from hub_server import HubServer
from huggingface_hub import ModelCard, constants
from tiny_checkpoints import save_checkpoints

from hf_dpssl import ContrastiveEncoder, MoCoForPreTraining, VQDiTPipeline
from hf_dpssl.cli.commands import main
from hf_dpssl.embedding.evaluation_entries import Measured, evaluation_entry
from hf_dpssl.runs.lineage import fingerprint_of
from hf_dpssl.runs.recipe import save_recipe


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints by kind; the encoder has the recipe of a run."""
    folders = save_checkpoints(tmp_path_factory.mktemp("made"), ("encoder", "dit"))
    save_recipe(contrastive.ContrastiveArguments(negatives="queue"), folders["encoder"] / "recipe.yaml")
    return folders


@pytest.fixture
def checkpoints(made, tmp_path) -> dict[str, Path]:
    """Copies that a test may change."""
    return {kind: shutil.copytree(folder, tmp_path / kind) for kind, folder in made.items()}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A local Hub that is this process's Hub, with an empty cache."""
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


def info(capsys, *argv) -> dict:
    assert main(["info", *map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *argv) -> str:
    """The one line that a refused command prints."""
    assert main(list(map(str, argv))) == 2
    printed = capsys.readouterr()
    assert not printed.out and printed.err.count("\n") == 1 and "Traceback" not in printed.err
    return printed.err


def test_card_is_written_anew_and_keeps_a_persons_words(checkpoints, capsys):
    folder = checkpoints["encoder"]
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage: da\n---\nBy me.\n")
    assert main(["card", str(folder), "--title", "My encoder", "--dataset_license", "research only"]) == 0
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.language) == ("mit", "da") and "By me.\n" in card.text
    assert "# My encoder\n" in card.text and "> `digits`: research only." in card.text
    first = (folder / "README.md").read_text()
    assert main(["card", str(folder), "--title", "My encoder", "--dataset_license", "research only"]) == 0
    assert (folder / "README.md").read_text() == first
    assert main(["card", str(folder), "--output", str(folder / "other.md")]) == 0
    assert (folder / "README.md").read_text() == first and "on digits" in (folder / "other.md").read_text()
    assert "other.md: written" in capsys.readouterr().out


def test_card_refuses_what_is_no_finished_checkpoint_in_one_line(checkpoints, tmp_path, capsys):
    folder = checkpoints["encoder"]
    assert "does not exist" in refused(capsys, "card", tmp_path / "none")
    assert "is a file" in refused(capsys, "card", folder / "config.json")
    assert "Did you mean one of its folders ['dit', 'encoder']?" in refused(capsys, "card", tmp_path)
    assert "is a folder: give a file" in refused(capsys, "card", folder, "--output", tmp_path)
    damaged = (folder / "README.md").read_text().replace("generated:end", "generated")
    (folder / "README.md").write_text(damaged)
    assert "put them back" in refused(capsys, "card", folder) and (folder / "README.md").read_text() == damaged
    (folder / "results.json").unlink()
    assert "no results.json" in refused(capsys, "card", folder)


def test_info_counts_what_the_weights_hold_and_reads_no_weights(checkpoints, capsys, monkeypatch):
    encoder, dit = checkpoints["encoder"], checkpoints["dit"]
    models = ContrastiveEncoder.from_pretrained(encoder), MoCoForPreTraining.from_pretrained(encoder / "pretraining")
    pipeline = VQDiTPipeline.from_pretrained(dit)
    sizes = [sum(t.numel() for t in m.state_dict().values()) for m in (*models, pipeline.vae, pipeline.transformer)]
    monkeypatch.setattr("torch.nn.Module.__init__", None)  # no model can be made from here on
    found = info(capsys, encoder)
    assert found["parameters"] == {"model": sizes[0], "pretraining": sizes[1]}
    assert (found["kind"], found["class"], found["image_size"]) == ("encoder", "ContrastiveEncoder", 16)
    assert found["dataset"] == "digits" and found["metrics"] == {"knn_top1": 50.0}
    found = info(capsys, dit)
    assert found["parameters"] == {"vae": sizes[2], "transformer": sizes[3]} and found["classes"] == ["zero", "one"]
    assert {k: found["latents"][k] for k in ("channels", "side", "codes")} == {"channels": 4, "side": 8, "codes": 16}
    assert main(["info", str(dit)]) == 0
    printed = capsys.readouterr().out
    assert (
        "latents        4 x 8 x 8 (vq, 16 codes)\n" in printed and "Fréchet distance, lower is better: not" in printed
    )


def test_info_lists_later_evaluations_and_does_not_call_them_not_measured(checkpoints, capsys):
    made = Measured({"knn_top1": 81.25}, {"evaluation": 360}, model="0", data="1", resize="none")
    entry = evaluation_entry("encoder", made, dataset="mnist", seed=3, options={})
    results = {"dataset": "digits", "metrics": {}, "evaluations": [entry]}
    (checkpoints["encoder"] / "results.json").write_text(json.dumps(results))
    assert info(capsys, checkpoints["encoder"])["evaluations"] == [entry]
    assert main(["info", str(checkpoints["encoder"])]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if line.startswith("evaluated on"))
    assert "mnist, seed 3: " in line and line.endswith(" 81.25")
    label = line.partition("seed 3: ")[2].removesuffix(" 81.25")
    assert not any(label in other for other in lines if other.startswith("result"))


@pytest.mark.parametrize("kind", ["encoder", "dit"])
def test_info_by_id_says_the_same_as_by_folder_and_downloads_no_weights(kind, checkpoints, hub, capsys):
    commit = hub.add_repo("model", f"org/{kind}", checkpoints[kind])
    found = info(capsys, f"org/{kind}")
    assert found.pop("revision") == commit and found == info(capsys, checkpoints[kind])
    assert found["fingerprint"] == fingerprint_of(checkpoints[kind])
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.safetensors"))
    assert info(capsys, f"org/{kind}@{commit}")["revision"] == commit


def test_info_refuses_what_it_cannot_read_in_one_line(checkpoints, hub, tmp_path, capsys):
    hub.add_repo("model", "org/encoder", checkpoints["encoder"])
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "README.md").write_text("no model")
    hub.add_repo("model", "org/notes", tmp_path / "notes")
    assert "org/nothing" in refused(capsys, "info", "org/nothing")
    assert "cannot read" in refused(capsys, "info", "org/encoder@no-such-branch")
    assert "org/notes is no checkpoint" in refused(capsys, "info", "org/notes")
    assert "does not exist" in refused(capsys, "info", "./nowhere")
    (checkpoints["encoder"] / "config.json").write_text("{")
    assert "config.json is no JSON" in refused(capsys, "info", checkpoints["encoder"])
