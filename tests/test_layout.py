"""The rooms of the package: what may import what, and what its files must not hold."""

import ast
import re
import subprocess
from pathlib import Path

import pytest
from cases import for_each

REPOSITORY = Path(__file__).parent.parent
PACKAGE = REPOSITORY / "hf_dpssl"
# From the ground up: a room imports rooms that stand before it only.
ROOMS = [
    "models",
    "contrastive",
    "data",
    "evaluation",
    "runs",
    "embedding",
    "domains",
    "zoo",
    "autoencoder",
    "generation",
    "latent_training",
    "pages",
    "hub",
    "convert",
    "cli",
]


def imported_rooms(path: Path) -> set[str]:
    """The rooms, other than its own, that a file of a room imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 2:
            found |= {node.module.split(".")[0]} if node.module else {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("hf_dpssl"):
            rest = node.module.split(".")[1:]
            found |= {rest[0]} if rest else {name.name for name in node.names}
        elif isinstance(node, ast.Import):
            found |= {name.name.split(".")[1] for name in node.names if name.name.startswith("hf_dpssl.")}
    return found - {path.relative_to(PACKAGE).parts[0], "__version__"}


def test_every_module_lives_in_a_room():
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py"}
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(ROOMS)


@for_each("room", ROOMS)
def test_rooms_import_lower_rooms_only(room):
    lower = set(ROOMS[: ROOMS.index(room)])
    wrong = {
        path.name: rooms - lower for path in (PACKAGE / room).rglob("*.py") if (rooms := imported_rooms(path)) - lower
    }
    assert not wrong


@for_each("room", [room for room in ROOMS if room != "cli"])  # which has a file for each subcommand
def test_a_room_has_at_most_twenty_files(room):
    names = sorted({path.name for path in (PACKAGE / room).glob("*.py")} - {"__init__.py"})
    assert len(names) <= 20, names


@for_each("room", ROOMS)
def test_no_module_bears_a_public_name_of_its_room(room):
    """An import of the module would hide the name, as public names are imported when they are first used."""
    public = set(re.findall(r"import (\w+) as", (PACKAGE / room / "__init__.pyi").read_text(encoding="utf-8")))
    modules = {path.stem for path in (PACKAGE / room).glob("*.py")}
    as_modules = set(re.findall(r"from \. import (\w+)", (PACKAGE / room / "__init__.pyi").read_text(encoding="utf-8")))
    assert public & modules == as_modules


@for_each("room", ROOMS)
def test_a_room_says_what_lives_in_it_in_ten_lines(room):
    text = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8")))
    assert text and len(text.splitlines()) <= 10 and ".py" in text


def test_no_folder_name_that_diffusers_takes_for_its_own():
    from diffusers import pipelines

    taken = {entry.name for entry in Path(pipelines.__file__).parent.iterdir() if entry.is_dir()}
    assert not taken & {path.parent.name for path in PACKAGE.rglob("*.py")}


def test_modules_that_tests_import_by_name_have_names_of_their_own():
    places = ["training/*.py", "training/evidence/*.py", "tests/*.py", "tests/*/*.py"]
    paths = [path for place in places for path in REPOSITORY.glob(place)]
    names = [path.stem for path in paths if path.parent.name != "benchmarks"]  # which no test imports
    assert not {name for name in names if names.count(name) > 1}


def test_nothing_large_is_committed():
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.split():
        path, limit = REPOSITORY / name, 200_000 if name.endswith(".png") else 50_000
        assert not path.exists() or path.stat().st_size <= limit, f"{name} is larger than {limit} bytes"
