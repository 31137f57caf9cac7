"""What leaves the machine and what came back: hidden files stay, a damaged byte is noticed, bars keep to their cell."""

import re
import shutil

import dae_gan
import pytest
from hub_server import StoredFile
from hub_server_write import preceded_by
from tiny_checkpoints import save_checkpoints

from hf_dpssl.hub.model_card import render_card
from hf_dpssl.hub.published_files import publishable_files
from hf_dpssl.hub.publishing import PushError, push
from hf_dpssl.runs.atomic_files import write_json
from hf_dpssl.runs.recipe import save_recipe


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return save_checkpoints(tmp_path_factory.mktemp("finished"), ("gan",))["gan"]


def test_hidden_files_stay_whatever_their_kind(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "gan")
    hidden = [".credentials.json", ".notes.md", ".recipe.yaml.123.tmp", "samples/.selection.png"]
    (folder / "samples").mkdir()
    for name in (*hidden, "samples/first.png"):
        (folder / name).write_bytes(b"private")
    files, left_out = publishable_files(folder)
    assert set(hidden) <= set(left_out) and "samples/first.png" in files
    assert not [name for name in files if any(part.startswith(".") for part in name.split("/"))]


def test_a_byte_that_differs_in_what_is_pulled_back_is_noticed(hub, finished):
    """The Hub keeps the file's length and gives another content."""

    def damage():
        for commit in hub.store.repos["model", "org/gan"].commits.values():
            if (file := commit.files.get("recipe.yaml")) is not None:
                commit.files["recipe.yaml"] = StoredFile(file.content[:-2] + b"1\n", is_large=False)

    hub.faults["_resolve"] = [preceded_by(damage)]
    with pytest.raises(PushError, match=r"recipe\.yaml was not pulled back as it was sent: push again"):
        push(finished, "org/gan")
    assert push(finished, "org/again").difference is not None


def test_a_bar_or_a_line_in_a_value_stays_within_its_cell_of_the_card(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "gan")
    results = {"metrics": {}, "dataset": "digits", "seed": 0, "samples": {"train": 1, "generated": 1, "evaluation": 0}}
    about = {"latent": "dae", "sampled_from": "prior", "densities": {}, "licence_of_data": "CC | custom\nterms"}
    write_json(folder / "results.json", results | about)
    save_recipe(dae_gan.GANArguments(), folder / "recipe.yaml")
    row = next(line for line in render_card(folder).splitlines() if line.startswith("| licence of the images"))
    cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", row.strip().strip("|"))]
    assert len(cells) == 2 and cells[1].replace("\\|", "|") == "CC | custom terms"
