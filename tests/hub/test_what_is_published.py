"""What leaves the machine and what came back: unknown files and folders stay, a damaged byte is noticed."""

import json
import re
import shutil

import dae_dit
import dae_gan
import pytest
import torch
import yaml
from hub_server import StoredFile
from hub_server_write import preceded_by
from tiny_checkpoints import dit_pipeline, save_checkpoints

from hf_dpssl import VQDiTPipeline
from hf_dpssl.hub.card_merge import marked_card
from hf_dpssl.hub.model_card import _code, render_card
from hf_dpssl.hub.published_files import publishable_files
from hf_dpssl.hub.publishing import PushError, push
from hf_dpssl.runs.atomic_files import write_json
from hf_dpssl.runs.recipe import save_recipe


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return save_checkpoints(tmp_path_factory.mktemp("finished"), ("gan",))["gan"]


def test_what_is_published_is_named_by_pattern_and_all_else_stays(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "gan")
    private = [".credentials.json", ".notes.md", ".recipe.yaml.123.tmp", "samples/.selection.png", "credentials.json"]
    private += ["token.txt", "notes.md", "mine.yaml", "secret.py", "faces.png", "data.json", "old/model.safetensors"]
    private += ["pretraining/config.json", "samples/second.png", "model.safetensors.bak"]
    for name in (*private, "samples/first.png", "LICENSE", "samples-guided.png", "modeling_vaegan.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"private")
    card = (folder / "README.md").read_text() + "\n![First](samples/first.png) ![x](.credentials.json) [c](data.json)\n"
    (folder / "README.md").write_text(card + "![up](../outside.png) ![web](https://x.org/faces.png)\n")
    (tmp_path / "outside.png").write_bytes(b"private")
    files, left_out = publishable_files(folder)
    shown = {"samples/first.png", "LICENSE", "samples-guided.png"}
    run = {"README.md", "curves.png", "recipe.yaml", "results.json", "config.json", "model.safetensors"}
    assert {name for name in files if not name.endswith(".py")} == run | shown and set(private) <= set(left_out)
    assert "modeling_vaegan.py" in files  # of this package


def test_links_that_lead_out_of_the_folder_are_refused(finished, tmp_path):
    (tmp_path / "secret").write_text("private")
    for name in ("results.json", "LICENSE", "model.safetensors"):
        folder = shutil.copytree(finished, tmp_path / name / "gan")
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(tmp_path / "secret")
        with pytest.raises(ValueError, match=f"{name} is a link that leads out of the folder"):
            publishable_files(folder)
    (folder / "model.safetensors").unlink()
    (folder / "inside.safetensors").write_bytes((finished / "model.safetensors").read_bytes())
    (folder / "model.safetensors").symlink_to("inside.safetensors")
    assert "model.safetensors" in publishable_files(folder)[0]
    pipeline = save_checkpoints(tmp_path / "pipelines", ("dit",))["dit"]
    (pipeline / "vae").rename(tmp_path / "vae")
    (pipeline / "vae").symlink_to(tmp_path / "vae")
    with pytest.raises(ValueError, match="vae is a link: copy the folder"):
        publishable_files(pipeline)


def test_no_folder_of_the_machine_is_published(hub, tmp_path):
    """Blanks and commas in names, paths of another system, a pipeline that was loaded and saved again."""
    home = tmp_path / "some one, private"
    first = save_checkpoints(home / "My runs, 2024", ("dit",))["dit"]
    folder = home / "again" / "dit"
    VQDiTPipeline.from_pretrained(first).save_pretrained(folder)
    names = {0: "/m/04rky", 1: "one"}  # a class of Open Images is no path
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"id2label": names}))
    results = {"metrics": {}, "dataset": f"{home}/faces+/data/x", "seed": 0, "samples": {"train": 1}}
    evaluation = {"options": {"extractor": f"{home}/e", "samples_dir": r"D:\some one, private\s"}}
    about = {"command": f"dae_dit.py --autoencoder '{first}'", "lineage": [{"part": "autoencoder", "name": f"{first}"}]}
    write_json(folder / "results.json", results | about | {"evaluations": [evaluation]})
    recipe = dae_dit.DiTArguments(output_dir=str(home / "x"), autoencoder=r"C:\Users\some one, private\vq")
    save_recipe(recipe, folder / "recipe.yaml")
    push(folder, "org/dit")
    for name, content in hub.files("org/dit").items():
        assert b"some one" not in content and str(tmp_path).encode() not in content, name
    published = {n: c for n, c in hub.files("org/dit").items() if n.endswith((".json", ".yaml"))}
    assert json.loads(published["model_index.json"])["id2label"] == {"0": "/m/04rky", "1": "one"}
    assert json.loads(published["results.json"])["dataset"] == "faces+x"
    assert yaml.safe_load(published["recipe.yaml"])["autoencoder"] == "vq"


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


def test_a_folder_with_a_persons_own_card_is_pushed_again_and_again(hub, finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "gan")
    for text in ("---\nlicense: mit\n---\n# My own\n", "---\nlicense: mit\n---\n# My own\n", "Other words.\n"):
        (folder / "README.md").write_bytes(text.encode())
        push(folder, "org/own")
        assert hub.files("org/own")["README.md"] == text.encode()
    generated = marked_card({"license": "mit"}, "Figures.")
    (folder / "README.md").write_text(generated)
    push(folder, "org/own")
    assert hub.files("org/own")["README.md"].decode().startswith("---\nlicense: mit\n---\n\nOther words.\n")
    before = hub.history("org/own")
    (folder / "README.md").write_text("Other words.\n")
    with pytest.raises(
        ValueError, match="on the Hub holds a generated part .* would be lost: write it below your text"
    ):
        push(folder, "org/own")
    assert hub.history("org/own") == before


def test_shards_of_a_variant_are_published_with_their_index(hub, tmp_path):
    pipeline, folder = dit_pipeline(), tmp_path / "dit"
    pipeline.save_pretrained(folder)
    pipeline.save_pretrained(folder, variant="fp16", max_shard_size="20KB")
    assert push(folder, "org/variant").left_out == []
    loaded = VQDiTPipeline.from_pretrained("org/variant", variant="fp16", cache_dir=tmp_path / "cache")
    for name, tensor in pipeline.transformer.state_dict().items():
        assert torch.equal(loaded.transformer.state_dict()[name], tensor), name
    index = "vae/model.safetensors.index.fp16.json"
    shards = set(json.loads((folder / index).read_text())["weight_map"].values())
    pipeline.save_pretrained(tmp_path / "whole")
    assert {index, *(f"vae/{shard}" for shard in shards)} <= set(push(tmp_path / "whole", "org/variant").removed)
    (folder / "vae" / min(shards)).unlink()
    with pytest.raises(FileNotFoundError, match=f"incomplete: {index} names {min(shards)}"):
        publishable_files(folder)


def test_a_bar_or_a_line_in_a_value_stays_within_its_cell_of_the_card(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "gan")
    results = {"metrics": {}, "dataset": "digits", "seed": 0, "samples": {"train": 1, "generated": 1, "evaluation": 0}}
    about = {"latent": "dae", "sampled_from": "prior", "densities": {}, "licence_of_data": "CC | custom\nterms"}
    write_json(folder / "results.json", results | about)
    save_recipe(dae_gan.GANArguments(), folder / "recipe.yaml")
    row = next(line for line in render_card(folder).splitlines() if line.startswith("| licence of the images"))
    cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", row.strip().strip("|"))]
    assert len(cells) == 2 and cells[1].replace("\\|", "|") == "CC | custom terms"
    assert _code("a|b\nc `d`") == r"`a\|b c 'd'`"
