"""The pages' tables are what the measurements' files say, their links exist, and their commands are known."""

import json
import re
import sys
from pathlib import Path

import pytest
from cases import for_each
from documents import steps_of

from hf_dpssl.cli.commands import command_module

REPOSITORY = Path(__file__).parent.parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", "training/README.md", "training/evidence/README.md", "tests/benchmarks/README.md"]
PAGES += ["spaces/README.md", "CONTRIBUTING.md"]
PAGES += [f"training/evidence/{name}.md" for name in ("claims", "claims_cpu", "dae", "domains", "one_step")]


@pytest.fixture(scope="module")
def generator():
    """training/evidence/readme.py as a module."""
    sys.path.insert(0, str(REPOSITORY / "training/evidence"))
    import readme

    return readme


def test_tables_equal_those_made_from_the_json_files(generator):
    blocks = generator.tables()
    assert set(blocks) == {name for names in generator.PAGES.values() for name in names}
    for page, names in generator.PAGES.items():
        text = (REPOSITORY / page).read_text(encoding="utf-8")
        wanted = {name: blocks[name] for name in names}
        assert generator.fill(text, wanted) == text, "run python training/evidence/readme.py"


def test_figures_said_of_dae_are_those_of_the_rows_they_speak_of():
    evidence = (REPOSITORY / "training/evidence/dae.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in evidence.splitlines() if line.startswith("|")]
    told = (REPOSITORY / "training/README.md").read_text(encoding="utf-8")
    told = " ".join(re.search(r"\n(\*\*No gain of DAE.*?)\n\n", told, re.DOTALL)[1].split())
    row_of = {  # words right before the figure: cells of its row, beside joint_encoder where none says otherwise
        "rFID": ("rFID", "`weak_dropout`"),
        "perceptual terms,": ("rFID", "`dropout_05`"),
        "and PSNR": ("8 x 8 of 256 codes, 150 + 150 steps", "`dropout_05`"),
        "prior as much,": ("nats per image, small prior", "`weak_dropout`"),
        "those of DiTs": ("Frechet distance, small DiT", "`dropout_05`"),
        "small) and": ("Frechet distance, large DiT", "`dropout_05`"),
        "one-step generators": ("Frechet distance, one step", "`dropout_05`"),
        "of a token model": ("Frechet distance, token model", "`weak_dropout`"),
        "latents of mnist,": ("Frechet distance, DiT *", "mnist", "`joint_dit_25`"),
        "those of photographs,": ("Frechet distance, DiT *", "cifar10-jpeg-small", "`joint_dit_25`"),
        "prior nats,": ("nats per image, small prior", "`noise_30`"),
        "large DiT's images lie": ("Frechet distance, large DiT", "`noise_30`"),
        "In GANs DAE's images lie": ("Frechet distance, GAN", "`joint`"),
        "claim 5), and": ("Frechet distance, GAN", "`joint_encoder`"),
    }
    figures = list(re.finditer(r"[+-][\d.]+(?: %)? \([+-][\d.]+ to [+-][\d.]+", told))
    assert len(figures) == len(row_of) == told.count(" to +") + told.count(" to -")
    for figure, (words, cells) in zip(figures, row_of.items(), strict=True):
        assert told[: figure.start()].endswith(f"{words} ")
        cells = {*cells, *([] if any(cell.startswith("`joint") for cell in cells) else ["`joint_encoder`"])}
        (row,) = [row for row in rows if cells <= {*row}]
        assert f"{figure[0]})" in row, (words, row)


def test_claims_of_other_numbers_than_their_scales_are_not_taken_over(generator, tmp_path, monkeypatch):
    result = {"stated": {"study": generator.read_study("dimensions", "quick")}}
    monkeypatch.setattr(generator, "CLAIMS", tmp_path / "kept")
    path = tmp_path / "run/dimensions.json"
    path.parent.mkdir()
    path.write_text(json.dumps(result), encoding="utf-8")
    generator.take_over_claims(path.parent)
    kept = tmp_path / "kept/quick/dimensions.json"
    assert json.loads(kept.read_text(encoding="utf-8")) == result
    result["stated"]["study"]["numbers"]["epochs"] = 1
    path.write_text(json.dumps(result), encoding="utf-8")
    with pytest.raises(ValueError, match="not of scale quick as it is stated: epochs: stored 1, now 8"):
        generator.take_over_claims(path.parent)
    assert json.loads(kept.read_text(encoding="utf-8")) != result
    with pytest.raises(FileNotFoundError, match="has no results"):
        generator.take_over_claims(tmp_path)


def test_missing_marker_is_an_error(generator):
    with pytest.raises(ValueError, match="<!-- demo:begin -->"):
        generator.fill("# nothing here\n", {"demo": "a table"})


def test_the_readme_is_read_in_one_go():
    assert len(README.splitlines()) <= 200


@for_each("page", PAGES)
def test_files_that_a_page_names_exist(page):
    path = REPOSITORY / page
    targets = re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8"))
    assert [target for target in targets if not (path.parent / target).exists()] == []


@for_each("page", PAGES)
def test_commands_of_a_page_stand_in_its_code(page):
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    assert re.findall(r"^(?:pip install|hf-dpssl|accelerate launch|make demo) .*", text, re.MULTILINE) == []


def test_commands_of_the_pages_parse_and_their_targets_are_in_the_makefile():
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    commands = [step.words for page in PAGES for step in steps_of(REPOSITORY / page) if step.words]
    targets = {words[1] for words in commands if words[0] == "make"}
    assert {"demo", "test"} <= targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    ours = [words[1:] for words in commands if words[0] == "hf-dpssl"]
    assert len(ours) > 20
    for name, *flags in ours:
        flags = ["--dataset", *flags] if name == "map" else flags  # as its main does
        command_module(name).parser().parse_args(flags)


def test_snippets_that_need_no_checkpoint_run():
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    for snippet in snippets:
        compile(snippet, "README.md", "exec")
    losses = next(snippet for snippet in snippets if "import info_nce" in snippet)
    names = {}
    exec("import torch\n" + losses, names)
    assert names["loss"].ndim == 0
