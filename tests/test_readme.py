"""The README's tables are what the measurements' files say, and its pictures and files exist."""

import re
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def generator():
    """training/evidence/readme.py as a module."""
    sys.path.insert(0, str(REPOSITORY / "training/evidence"))
    import readme

    return readme


def test_tables_equal_those_made_from_the_json_files(generator):
    blocks = generator.tables()
    assert set(blocks) == {"demo", "speed", "modes", "dimensions", "latents", "gan_latents", "dit", "solvers"}
    assert generator.fill(README, blocks) == README, "run python training/evidence/readme.py"


def test_missing_marker_is_an_error(generator):
    with pytest.raises(ValueError, match="<!-- demo:begin -->"):
        generator.fill("# nothing here\n", {"demo": "a table"})


def test_files_that_the_readme_names_exist():
    targets = re.findall(r"\]\(([^)#:]+)\)", README)
    assert len(targets) >= 10
    assert [target for target in targets if not (REPOSITORY / target).exists()] == []


def test_commands_of_the_readme_are_targets_of_the_makefile():
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    commands = set(re.findall(r"\bmake ([a-z-]+)\b", README))
    assert {"demo", "test"} <= commands
    assert all(re.search(rf"^{command}:", makefile, re.MULTILINE) for command in commands)
