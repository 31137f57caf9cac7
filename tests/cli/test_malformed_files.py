"""Damaged and hostile files of checkpoints through every command that reads them: one line, and never a traceback."""

import json
import random
import re
import shutil
from pathlib import Path

import pytest
from load_space import load_app
from pictures import encoded, noise
from tiny_checkpoints import save_checkpoints

from hf_dpssl.cli.commands import main

CASES = 36
FILES = {
    "encoder": ["config.json", "results.json", "recipe.yaml"],
    "autoencoder": ["config.json", "results.json", "recipe.yaml", "README.md"],
    "dit": ["model_index.json", "vae/config.json", "transformer/config.json", "scheduler/scheduler_config.json"],
    "token": ["model_index.json", "language_model/config.json"],
    "embeddings": ["manifest.json"],
}
TEXTS = [
    *(
        "",
        "null",
        "[]",
        "7",
        '"x"',
        "{",
        "[" * 100_000,
        '{"a":' * 9999,
        "\0",
        "\xff\xfe{}",
        "a: [",
        "- a",
        "a: &a [*a]",
    ),
    *("!!python/object:os.system {}", "---\n---\n---", "a:\n\tb: 1", "\x1b[2J", "<script>alert(1)</script>"),
]
VALUES = [
    *(None, True, 0, -1, 2.5, 1e308, 10**400, 2**63, "", "x", "../../etc/passwd", "\0", "\x1b[2J\x1b]0;title\x07"),
    *("<script>alert(1)</script>", "| a | [x](javascript:1)", "a: b\n- c", "\u202e", [], {}, [[]], [None], {"a": 1}),
]


def damaged(draw: random.Random, content: bytes) -> bytes:
    """The content with a wrong value, cut off, or replaced."""
    chance = draw.random()
    try:
        entries = json.loads(content)
    except ValueError:
        entries = None
    if chance < 0.25 or entries is None:
        return draw.choice(TEXTS).encode("latin-1")
    if chance < 0.35:
        return content[: draw.randrange(len(content))]
    key = draw.choice(sorted(entries))
    if chance < 0.45:
        del entries[key]
    else:
        entries[key] = draw.choice(VALUES)
    return json.dumps(entries).encode()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Checkpoints, pictures and their embeddings."""
    folder = tmp_path_factory.mktemp("finished")
    save_checkpoints(folder, ("encoder", "autoencoder", "dit", "token"))
    (folder / "pictures").mkdir()
    for i in range(4):
        (folder / "pictures" / f"{i}.png").write_bytes(encoded(noise(i, 16, 16)))
    argv = ["embed", folder / "encoder", folder / "pictures", "--output_dir", folder / "embeddings"]
    assert main([str(item) for item in argv]) == 0
    return folder


def commands(kind: str, folder: Path, finished: Path) -> list[list]:
    """What reads a folder of this kind; a Space is given by its name and that of the model."""
    new = ["--output_dir", folder.parent / "new"]
    if kind == "embeddings":
        return [["search", folder, finished / "pictures" / "0.png", "--k", "2"]]
    few = ["--dataset", finished / "pictures", "--batch_size", "2"]
    reads = {
        "encoder": [["embed", folder, finished / "pictures", *new]],
        "autoencoder": [["evaluate", folder, *few], ["report", folder, *new], ["Space", "latent_lab", "DPSSL_DAE"]],
        "dit": [["sample", folder, "--num_images", "1", *new], ["Space", "image_generator", "DPSSL_DIT"]],
        "token": [["sample", folder, "--num_images", "1", *new], ["Space", "image_generator", "DPSSL_TOKENS"]],
    }
    return [["info", folder], ["card", folder], *reads[kind]]


@pytest.mark.slow
def test_every_answer_to_a_damaged_file_is_one_line(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DPSSL_DEMO", str(tmp_path / "none"))
    refused = 0
    for case in range(CASES):
        draw = random.Random(case)
        kind = draw.choice(sorted(FILES))
        folder = shutil.copytree(finished / kind, tmp_path / str(case) / kind)
        file = folder / draw.choice(FILES[kind])
        content = damaged(draw, file.read_bytes())
        command = draw.choice(commands(kind, folder, finished))
        file.write_bytes(content)
        about = (case, kind, file.name, content[:60], command[0])
        capsys.readouterr()
        if command[0] == "Space":
            try:
                with monkeypatch.context() as patch:
                    patch.setenv(command[2], str(folder))
                    load_app(command[1]).Models()
            except (OSError, ValueError):  # which the page's `main` answers in one line
                refused += 1
            continue
        try:
            status = main([str(item) for item in command])
        except BaseException as error:
            error.add_note(f"in the case {about}")
            raise
        printed = capsys.readouterr()
        said = [line for line in printed.err.splitlines() if line.startswith("hf-dpssl ")]
        assert status in (0, 1, 2) and len(said) == bool(status), (about, said)
        assert "Traceback" not in printed.err, about
        assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u202e]", printed.out + "".join(said)), about
        refused += status != 0
    assert refused > CASES / 3
