"""What results files say of the making of a checkpoint."""

import hashlib
import json
from types import SimpleNamespace

import pytest
from cases import for_each
from huggingface_hub import constants
from tiny_checkpoints import save_checkpoints

from hf_dpssl import VQAutoencoder
from hf_dpssl.data.image_data import load_images
from hf_dpssl.runs.lineage import describe_ancestor, fingerprint_of, lineage_of_run, read_json

ACCELERATOR = SimpleNamespace(num_processes=2, device=SimpleNamespace(type="cpu"), mixed_precision="bf16")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict:
    """Finished checkpoints by kind."""
    return save_checkpoints(tmp_path_factory.mktemp("checkpoints"))


def test_time_is_that_of_all_loops_and_unknown_where_one_is(folders):
    data = load_images("digits")
    found = lineage_of_run(ACCELERATOR, data, [1.5, 2.25], {"autoencoder": None})
    training = {"seconds": 3.75, "processes": 2, "device": "cpu", "precision": "bf16"}
    account = "1437 images in 10 classes (train), 360 images in 10 classes (evaluation); left out: nothing"
    about = {"licence_of_data": data.entry.licence, "hub_datasets": [], "images": account}
    splits = {"train": "train", "evaluation": "test"}
    assert found == about | {"splits": splits, "training": training, "lineage": []}
    assert lineage_of_run(ACCELERATOR, data, [1.5, None], {})["training"]["seconds"] is None


def test_an_ancestor_is_named_by_folder_and_fingerprint_with_its_own_data_and_ancestors(folders):
    results = {"dataset": "/home/me/faces", "licence_of_data": "research", "lineage": [{"part": "x", "name": "org/y"}]}
    (folders["autoencoder"] / "results.json").write_text(json.dumps(results))
    about = describe_ancestor(folders["autoencoder"])
    expected = {"name": "autoencoder", "dataset": "faces", "licence_of_data": "research"}
    assert {name: about[name] for name in expected} == expected and about["lineage"] == results["lineage"]
    assert about["fingerprint"] == VQAutoencoder.from_pretrained(folders["autoencoder"]).fingerprint()


def test_fingerprints_are_read_from_files_alone_and_link_generators_to_their_autoencoder(folders):
    autoencoder = VQAutoencoder.from_pretrained(folders["autoencoder"]).fingerprint()
    assert fingerprint_of(folders["dit"]) == fingerprint_of(folders["token"]) == autoencoder
    weights = (folders["encoder"] / "model.safetensors").read_bytes()
    assert fingerprint_of(folders["encoder"]) == hashlib.sha256(weights).hexdigest()


def test_an_ancestor_that_is_gone_is_named_and_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert describe_ancestor("org/never-seen") == {"name": "org/never-seen"}
    (tmp_path / "model.ckpt").write_bytes(b"")
    assert describe_ancestor(tmp_path / "model.ckpt") == {"name": "model.ckpt"}


@for_each("content", ["{", "[1]", "\x00"])
def test_damaged_json_is_named(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="config.json .*damaged"):
        read_json(tmp_path / "config.json")
