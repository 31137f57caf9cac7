"""Files and names from elsewhere: malformed configs are one line, and no name becomes markup, code or a cursor."""

import json
import re
import shutil

import dae_dit
import pytest
import yaml
from huggingface_hub import ModelCard
from tiny_checkpoints import save_checkpoints

from hf_dpssl.cli.commands import main
from hf_dpssl.hub.card_merge import merge_card
from hf_dpssl.hub.model_card import render_card, write_card
from hf_dpssl.runs.recipe import save_recipe

DEEP = "[" * 100_000
WRONG = {  # file and key of it, or the whole file: what stands there instead
    ("model_index.json", None): [DEEP, '{"a":' * 9999, "", "null", "[]", '"x"', "\xff"],
    ("results.json", None): [DEEP, '{"a":' * 9999, "7"],
    ("vae/config.json", None): [DEEP, "{}", "null"],
    ("transformer/config.json", None): [DEEP, "", "{}", "\xff"],
    ("recipe.yaml", None): ["a: [", "- a", "\0", "a: &a [*a]", "[" * 3000, "!!python/object:os.system {}", "a: \xff"],
    ("model_index.json", "id2label"): [[1], {"a": "b"}, "x", {"0": None}, {"0": ["x"]}, 5],
    ("model_index.json", "_class_name"): [["a", "b"], {}, 3],
    ("results.json", "metrics"): [[1], "x", {"fid": "low"}, {"fid": {"a": 1}}, {"fid": 10**400}],
    ("results.json", "lineage"): ["x", [1], [{}], [{"part": 1, "name": 2}]],
    ("results.json", "evaluations"): [{}, [1], [{"metrics": 3}], [{"metrics": {}}], "x"],
    ("results.json", "training"): [[], "x", {"seconds": "long"}, {"seconds": 1}],
    ("results.json", "environment"): [[1], "x", {"libraries": 3}],
    ("results.json", "dataset"): [3, ["a"], {}, {"a": "b"}],
    ("results.json", "samples"): [3, ["a"]],
    ("results.json", "splits"): [3, ["a"], "x"],
    ("results.json", "command"): [3, ["a"]],
    ("vae/config.json", "image_size"): ["x", None, [], -1],
    ("vae/config.json", "encoder_block_out_channels"): ["x", None, [], 3],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A DiT as a run leaves it."""
    folder = save_checkpoints(tmp_path_factory.mktemp("finished"), ("dit",))["dit"]
    (folder / "README.md").unlink()
    save_recipe(dae_dit.DiTArguments(), folder / "recipe.yaml")
    return folder


@pytest.mark.extended
def test_malformed_configs_are_answered_in_one_line_by_info_and_card(finished, tmp_path, capsys):
    folder, answered = shutil.copytree(finished, tmp_path / "dit"), []
    for file, key, wrong in [(file, key, wrong) for (file, key), values in WRONG.items() for wrong in values]:
        before = (folder / file).read_bytes()
        text = wrong if key is None else json.dumps(json.loads(before) | {key: wrong})
        (folder / file).write_bytes(text.encode("latin-1"))
        for command in ("info", "card"):
            capsys.readouterr()
            status = main([command, str(folder)])  # which raises what is not answered
            lines = capsys.readouterr().err.splitlines()
            assert (status, len(lines)) in ((0, 0), (2, 1)), (file, key, str(wrong)[:80], lines)
            answered.append(status)
        (folder / file).write_bytes(before)
        (folder / "README.md").unlink(missing_ok=True)
    assert len(answered) >= 120 and answered.count(2) > 100


NASTY = [
    "</script><script>alert(1)</script>", "a|b", "``` \n# heading", "[x](javascript:alert(1))", "*bold* _it_ `code`",
    "<!-- hf_dpssl:generated:end -->", "line\nbreak", "{0.__class__} {x} {{ 7 * 7 }} {% raw %}", "$x^2$ ~~gone~~ #1",
    "\x1b[2J\x1b]0;title\x07", "é \u202eevil", "'; DROP", 'quote" \\n', "---", "!img ![i](http://x)", "&amp; &lt;",
]  # fmt: skip


def test_no_name_of_data_breaks_the_card_its_front_matter_or_the_terminal(finished, tmp_path, capsys):
    markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable(["table", "strikethrough"])
    folder = shutil.copytree(finished, tmp_path / "dit", ignore=shutil.ignore_patterns("*.png"))
    index = json.loads((folder / "model_index.json").read_text())
    for nasty in NASTY:
        (folder / "model_index.json").write_text(json.dumps(index | {"id2label": {"0": nasty, "1": "one"}}))
        results = {
            "metrics": {f"fid_{nasty}": 1.0},
            "dataset": nasty,
            "seed": 0,
            "samples": {},
            "licence_of_data": nasty,
        }
        results |= {"lineage": [{"part": "autoencoder", "name": nasty, "dataset": nasty}], "command": f"x '{nasty}'"}
        (folder / "results.json").write_text(json.dumps(results))
        recipe = yaml.safe_load((finished / "recipe.yaml").read_text()) | {"dataset": nasty}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        card = render_card(folder, title=nasty)
        assert merge_card(card, card) == card, nasty  # the marks are found, once each
        values = ModelCard(card).data.to_dict()
        assert values["model-index"][0]["name"] == nasty and values["library_name"] == "hf_dpssl"
        page = markdown.render(card.split("---\n", 2)[2])
        assert not re.search(r"<script|<img|<del|<strong>bold|href=.javascript", page), nasty
        assert page.count("<h1") == 1 and page.count("<h2") == 7, nasty
        python = next(block for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL) if "class_labels" in block)
        compile(python, "card", "exec")
        rows = re.findall(r"(?m)^\|(?! *\d| channel|---\|---\|---).*$", card)  # but for the latents' three columns
        assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {3}
        capsys.readouterr()
        assert main(["info", str(folder)]) == 0
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", capsys.readouterr().out)


def test_a_file_name_with_braces_is_no_format(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "dit")
    for name in ("{0}.png", "samples-{x}.png", "{recipe.__class__}.png", "samples.png"):
        shutil.copyfile(finished / "curves.png", folder / name)
    text = write_card(folder).read_text()
    assert re.findall(r"!\[.*?\]\((.*?)\)", text) == ["samples.png", "curves.png"]
