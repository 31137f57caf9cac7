"""Folders of a machine are cut off from values, whatever characters they hold; ids, addresses and names are not."""

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_dpssl.runs.redaction import command_text, command_without_folders, redacted, without_folders

VALUES = {
    "/home/me/My pictures, 2024": "My pictures, 2024",
    "/home/me/run/": "run",
    "~/pictures": "pictures",
    "~me/pictures": "pictures",
    "../../runs/a/b": "b",
    r"C:\Users\me\My pictures": "My pictures",
    "C:/Users/me/x": "x",
    r"\\server\share\x y": "x y",
    "/home/me/a+/data/b c": "a+b c",
    "mnist+/home/me/c": "mnist+c",
    "/home/c++/x": "x",
    "--output_dir=/scratch/my run": "--output_dir=my run",
    "--dataset=vlcs=/scratch/my set": "--dataset=vlcs=my set",
    "vlcs=~/set": "vlcs=set",
    "local-dir:/home/me/encoder": "local-dir:encoder",
    "file:///home/me/x": "file:x",
    "--init_from /home/b --seed 1": "--init_from b --seed 1",
    "cannot read /home/me/x: gone": "cannot read x: gone",
} | dict.fromkeys(  # which are no folders of a machine
    ["org/vq", "outputs/demo", "https://example.org/a", "/", "~", "a ratio 1/2", "timm:resnet50", "1/2", "s3://b/x"]
    + ["a=b/c", ""]
)  # fmt: skip


def test_values_lose_their_folders_and_ids_do_not():
    for value, expected in VALUES.items():
        assert redacted({"a": [value]}) == {"a": [value if expected is None else expected]}, value
    assert redacted({"id2label": {"0": "/m/04rky"}, "x": [1, None, True]}) == {
        "id2label": {"0": "/m/04rky"},
        "x": [1, None, True],
    }


def test_a_home_folder_does_not_name_its_user(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert without_folders("/home/someone") == "~" == without_folders("/home/someone/")


_NAME = st.text(st.characters(exclude_characters="/\\+", exclude_categories=["Cs", "Cc"]), min_size=1).filter(
    lambda name: name not in (".", "..") and not name.startswith("~")
)


@given(st.lists(_NAME, min_size=2, max_size=5), st.sampled_from(["/", "~/", "./", "D:\\", "\\\\"]))
def test_of_any_path_the_last_part_alone_is_left(names, start):
    separator = "\\" if "\\" in start else "/"
    assert without_folders(start + separator.join(["secret", *names])) == names[-1]


def test_a_command_is_one_for_a_shell_and_its_arguments_are_cut_one_by_one():
    text = command_text(["dae_dit.py", "--autoencoder", "/home/me/My run, 2/vq", "--seed", "1", "--recipe=/a/b.yaml"])
    assert shlex.split(text) == ["dae_dit.py", "--autoencoder", "vq", "--seed", "1", "--recipe=b.yaml"]


@pytest.mark.parametrize("text", ["x --output_dir=/scratch/run", "x --output_dir /scratch/run"])
def test_text_of_older_results_is_cut_as_far_as_can_be_told(text):
    assert command_without_folders(text) == text.replace("/scratch/", "")
