"""What a push publishes, through the real client and Git LFS, on the local Hub of hub_server_write.py."""

from __future__ import annotations

import hashlib
import io
import json
import shutil

import pytest
import timm
import torch
from cases import for_each
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import disable_progress_bars
from safetensors.torch import load, load_file, save_file
from tiny_checkpoints import (
    autoencoder_model,
    dit_pipeline,
    drift_pipeline,
    encoder_model,
    gan_model,
    save_checkpoints,
    token_pipeline,
)

from hf_dpssl import ContrastiveEncoder, VQAutoencoder
from hf_dpssl.cli.commands import main
from hf_dpssl.hub.publishing import push, replay

PRIVATE = {
    ".cache/x.json", ".token", "__pycache__/x.py", "checkpoints/step-00000002/meta.json",
    "checkpoints/step-00000002/state.pt", "logs/events.json", "optimizer.pt", "train.log", "trainer_state.json",
}  # fmt: skip
FROM_A_RUN = {"README.md", "curves.png", "recipe.yaml", "results.json"}
KINDS = ("encoder", "autoencoder", "dit", "drift", "token", "gan")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A finished checkpoint folder of each kind; tests that change one make a copy."""
    disable_progress_bars()
    return save_checkpoints(tmp_path_factory.mktemp("finished"))


def contents(folder) -> dict[str, bytes]:
    """Bytes of all files of a folder but the private ones."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if name not in PRIVATE}


@pytest.mark.extended
@for_each("kind", KINDS)
def test_push_to_hub_of_every_class_gives_the_repository_of_its_folder(hub, folders, kind):
    made = {"encoder": encoder_model, "autoencoder": autoencoder_model, "dit": dit_pipeline}
    made |= {"drift": drift_pipeline, "token": token_pipeline}
    report = made.get(kind, gan_model)().push_to_hub(f"org/{kind}")
    saved = contents(folders[kind])
    expected = {name: content for name, content in saved.items() if name not in FROM_A_RUN}
    published = hub.files(f"org/{kind}")
    assert report.difference == 0 and {n: published[n] for n in expected} == expected
    assert set(published) - set(expected) - FROM_A_RUN == {".gitattributes", replay.FILE_NAME}


@for_each("kind", KINDS)
def test_a_push_is_one_commit_of_exactly_the_publishable_files_and_a_replayed_pair(hub, folders, kind):
    report = push(folders[kind], f"org/{kind}")
    published = hub.files(f"org/{kind}")
    assert published.pop(".gitattributes") and replay.FILE_NAME in published
    assert published == contents(folders[kind]) | {replay.FILE_NAME: published[replay.FILE_NAME]}
    assert hub.history(f"org/{kind}")[0] == report.commit and len(hub.history(f"org/{kind}")) == 2
    assert report.files == {name: len(content) for name, content in published.items()}
    assert set(report.left_out) == PRIVATE
    assert report.difference == 0 and 0 < report.seconds < 60


def test_the_stored_pair_of_an_encoder_is_what_timm_computes(hub, folders):
    push(folders["encoder"], "org/encoder")
    pair = load(hub.files("org/encoder")[replay.FILE_NAME])
    model = timm.create_model(f"local-dir:{folders['encoder']}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(pair["input.pixel_values"]), pair["output.features"], atol=1e-6, rtol=0)
    assert pair["output.features"].std() > 0.01 and pair["output.embeddings"].shape == (2, 4)


def test_the_stored_pair_of_an_autoencoder_covers_both_halves(folders, tmp_path):
    pair = tmp_path / replay.FILE_NAME
    pair.write_bytes(replay.record(folders["autoencoder"]))
    assert replay.replay(folders["autoencoder"], pair) == 0
    for part, name in (("encoder.conv_in.bias", "latents"), ("quantizer.codebook", "images"), ("decoder", "images")):
        model = VQAutoencoder.from_pretrained(folders["autoencoder"])
        tensor = next(tensor for key, tensor in model.state_dict().items() if key.startswith(part))
        tensor.add_(0.1)
        model.save_pretrained(tmp_path / part)
        with pytest.raises(ValueError, match=f"does not reproduce the stored {name}"):
            replay.replay(tmp_path / part, pair)


def test_a_second_push_sends_no_blob_twice_and_makes_no_commit(hub, folders):
    first = push(folders["encoder"], "org/encoder")
    blobs = [name for name in first.files if name.endswith((".safetensors", ".png"))]
    assert hub.bytes_of("_lfs_put") == sum(first.files[name] for name in blobs)
    sent = len(hub.received)
    second = push(folders["encoder"], "org/encoder")
    assert second.commit == first.commit and len(hub.history("org/encoder")) == 2
    assert [route for route, _ in hub.received[sent:]] == ["_create_repo"]
    assert sum(size for _, size in hub.received[sent:]) < 100


def test_a_push_of_other_weights_sends_only_them_and_their_pair(hub, folders, tmp_path):
    folder = shutil.copytree(folders["autoencoder"], tmp_path / "autoencoder")
    push(folder, "org/autoencoder")
    before = hub.bytes_of("_lfs_put")
    autoencoder_model(seed=1).save_pretrained(folder)
    report = push(folder, "org/autoencoder")
    sent = report.files["model.safetensors"] + report.files[replay.FILE_NAME]
    assert hub.bytes_of("_lfs_put") - before == sent
    assert report.difference == 0 and len(hub.history("org/autoencoder")) == 3


def test_a_pair_that_another_machine_rounded_otherwise_stays(hub, folders, tmp_path):
    folder = shutil.copytree(folders["gan"], tmp_path / "gan")
    (folder / replay.FILE_NAME).write_bytes(replay.record(folder))
    metadata = {"replay": json.dumps({"kind": "gan"})}
    pair = load_file(folder / replay.FILE_NAME)
    save_file({name: tensor + 1e-6 for name, tensor in pair.items()}, folder / replay.FILE_NAME, metadata)
    rounded = (folder / replay.FILE_NAME).read_bytes()
    assert 0 < push(folder, "org/gan").difference < 1e-5
    (folder / replay.FILE_NAME).unlink()
    push(folder, "org/gan")
    assert hub.files("org/gan")[replay.FILE_NAME] == rounded and len(hub.history("org/gan")) == 2


def test_a_pushed_card_names_its_repository(hub, folders, tmp_path):
    folder = shutil.copytree(folders["gan"], tmp_path / "gan")
    card = (folder / "README.md").read_text().replace("Not trained.", 'Load it: from_pretrained("REPO_OR_FOLDER")')
    (folder / "README.md").write_text(card)
    listed = push(folder, "org/gan", dry_run=True)
    assert push(folder, "org/gan").files == listed.files
    assert hub.files("org/gan")["README.md"].decode() == card.replace("REPO_OR_FOLDER", "org/gan")


def test_what_a_person_wrote_into_the_card_stays(hub, folders, tmp_path):
    folder = shutil.copytree(folders["gan"], tmp_path / "gan")
    push(folder, "org/gan")
    card = hub.files("org/gan")["README.md"].decode()
    (tmp_path / "edit").mkdir()
    (tmp_path / "edit" / "README.md").write_text(card.replace("Not trained.", "Typo.") + "\nWrite to me.\n")
    edited = {path: content for path, content in hub.files("org/gan").items() if path != "README.md"}
    for path, content in edited.items():
        (tmp_path / "edit" / path).write_bytes(content)
    hub.add_repo("model", "org/gan", tmp_path / "edit")
    (folder / "README.md").write_text((folder / "README.md").read_text().replace("Not trained.", "Trained."))
    push(folder, "org/gan")
    assert hub.files("org/gan")["README.md"].decode() == card.replace("Not trained.", "Trained.") + "\nWrite to me.\n"


def test_a_private_repository_opens_for_its_owner_only(hub, folders, tmp_path, monkeypatch):
    push(folders["gan"], "org/gan", private=True)
    assert (tmp_path / "owner").mkdir() is None
    snapshot_download("org/gan", cache_dir=tmp_path / "owner")
    for token in (False, "hf_another"):
        with pytest.raises(RepositoryNotFoundError):
            snapshot_download("org/gan", cache_dir=tmp_path / "stranger", token=token)


def test_a_revision_becomes_a_branch_and_main_stays(hub, folders):
    report = push(folders["gan"], "org/gan", revision="try/this")
    assert set(hub.files("org/gan")) == {".gitattributes"}
    assert set(hub.files("org/gan", "try/this")) == {".gitattributes", *report.files}
    assert hub.history("org/gan", "try/this") == [report.commit, *hub.history("org/gan")]
    push(folders["gan"], "org/gan", revision="try/this")
    assert len(hub.history("org/gan", "try/this")) == 2


def test_a_pull_request_leaves_the_branch_alone(hub, folders):
    report = push(folders["gan"], "org/gan", create_pr=True)
    assert set(hub.files("org/gan")) == {".gitattributes"}
    assert hub.history("org/gan", "refs/pr/1") == [report.commit, *hub.history("org/gan")]
    assert report.pull_request == f"{hub.endpoint}/org/gan/discussions/1" and report.difference == 0


def test_a_dry_run_lists_what_a_push_sends_and_makes_no_request(hub, folders):
    listed = push(folders["encoder"], "org/encoder", dry_run=True)
    assert hub.requests == [] and listed.commit is None
    assert push(folders["encoder"], "org/encoder").files == listed.files


def test_weights_that_the_model_no_longer_has_are_removed_and_other_files_stay(hub, folders, tmp_path):
    VQAutoencoder.from_pretrained(folders["autoencoder"]).save_pretrained(tmp_path, max_shard_size="50KB")
    shards = {path.name for path in tmp_path.glob("model*.safetensors*")}
    assert len(shards) > 3
    (tmp_path / "LICENSE.md").write_text("Mine.")
    push(tmp_path, "org/autoencoder")
    report = push(folders["autoencoder"], "org/autoencoder")
    published = hub.files("org/autoencoder")
    assert set(report.removed) == shards and not shards & set(published)
    assert {"LICENSE.md", "model.safetensors"} < set(published) and len(hub.history("org/autoencoder")) == 3


def test_an_encoder_alone_takes_away_the_pretraining_model_of_another(hub, folders, tmp_path):
    push(folders["encoder"], "org/encoder")
    ContrastiveEncoder.from_pretrained(folders["encoder"]).save_pretrained(tmp_path)
    report = push(tmp_path, "org/encoder")
    assert report.removed == sorted(path for path in contents(folders["encoder"]) if path.startswith("pretraining/"))
    assert report.difference == 0 and not any(path.startswith("pretraining/") for path in hub.files("org/encoder"))


def test_large_files_come_in_parts_where_the_hub_wants_it(hub, folders):
    hub.chunk_size = 50_000
    push(folders["autoencoder"], "org/autoencoder")
    expected = (folders["autoencoder"] / "model.safetensors").read_bytes()
    assert hub.files("org/autoencoder")["model.safetensors"] == expected
    name = hashlib.sha256(expected).hexdigest()
    parts = [len(content) for (sha256, _), content in sorted(hub.parts.items()) if sha256 == name]
    assert parts == [50_000] * (len(expected) // 50_000) + [len(expected) % 50_000]


@for_each("missing", ["config.json", "model.safetensors", "shard"])
def test_an_unfinished_folder_is_refused_before_any_request(hub, folders, tmp_path, missing):
    folder = tmp_path / "run" / "autoencoder"
    VQAutoencoder.from_pretrained(folders["autoencoder"]).save_pretrained(folder, max_shard_size="50KB")
    patterns = {"shard": "model-00002*", "model.safetensors": "model*.safetensors*"}
    for path in list(folder.glob(patterns.get(missing, missing))):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="no config.json|no weights|names model-00002"):
        push(folder, "org/autoencoder")
    with pytest.raises(FileNotFoundError, match="no finished checkpoint"):
        push(tmp_path, "org/autoencoder")
    assert hub.requests == []


def test_a_run_folder_is_refused_with_the_checkpoints_in_it(folders):
    with pytest.raises(FileNotFoundError, match=r"one of its folders \['autoencoder', 'dit', 'drift', 'encoder'"):
        push(folders["dit"].parent, "org/x")


def test_commands_push_and_pull_bring_a_folder_there_and_back(hub, folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert main(["push", str(folders["gan"]), "org/gan", "--dry_run"]) == 0
    assert "model.safetensors" in capsys.readouterr().out and hub.requests == []
    assert main(["push", str(folders["gan"]), "org/gan", "--private", "--revision", "one", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["commit"] == hub.history("org/gan", "one")[0] and report["difference"] == 0
    assert main(["push", str(folders["gan"]), "org/gan", "--revision", "one", "--message", "again"]) == 0
    assert f"commit {report['commit']} on one" in capsys.readouterr().out
    target = tmp_path / "pulled"
    pull = ["pull", "org/gan", "--revision", "one", "--output_dir", str(target)]
    assert main(pull) == 0 and "is reproduced up to 0 " in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in target.iterdir()} == {
        name: content for name, content in hub.files("org/gan", "one").items() if name != ".gitattributes"
    }
    assert main(pull) == 2 and "is there already" in capsys.readouterr().err


@for_each(
    "argv, words",
    [
        (["push", "{gan}", "org/a/b"], "Repo id must be in the form"),
        (["push", "{gan}", "elsewhere/gan"], "may not write to elsewhere/gan"),
        (["pull", "org/nothing", "--output_dir", "{new}"], "cannot pull org/nothing at revision 'main'"),
    ],
)
def test_a_users_mistake_is_one_line_and_status_2(hub, folders, tmp_path, capsys, argv, words):
    argv = [text.format(gan=folders["gan"], new=tmp_path / "new") for text in argv]
    assert main(argv) == 2
    message = io.StringIO(capsys.readouterr().err).readlines()[-1]
    assert message.startswith(f"hf-dpssl {argv[0]}: ") and words in message
    assert not (tmp_path / "new").exists()
