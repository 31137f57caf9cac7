"""Saved checkpoints name classes by public names only, so that rooms and modules may be rebuilt after a release."""

import json
import re
from pathlib import Path

from tiny_checkpoints import save_checkpoints

import hf_dpssl


def test_no_file_of_a_saved_checkpoint_holds_a_module_path(tmp_path):
    rooms = "|".join(path.parent.name for path in Path(hf_dpssl.__file__).parent.glob("*/__init__.py"))
    module_path = re.compile(rf"hf_dpssl[./]({rooms})\b")
    for folder in save_checkpoints(tmp_path).values():
        read = 0
        for path in folder.rglob("*"):
            if path.is_file() and path.suffix != ".py":  # those transformers copies for auto_map
                read += 1
                assert not module_path.search(path.read_bytes().decode("utf-8", "replace")), path
        assert read > 3


def test_model_index_names_the_package_and_the_class(tmp_path):
    index = json.loads((save_checkpoints(tmp_path, ("dit",))["dit"] / "model_index.json").read_text())
    assert index["vae"] == ["hf_dpssl", "VQAutoencoder"] and index["transformer"][0] == "diffusers"
    assert getattr(hf_dpssl, index["vae"][1]).__name__ == "VQAutoencoder"
