"""A Space on the Hub: what `hf-dpssl space NAME --push` publishes, through the real client on the local Hub."""

import pytest

from hf_dpssl.cli import main
from hf_dpssl.space_command import push_space, space_names, spaces_folder


def published(hub, repo_id: str) -> dict[str, bytes]:
    repo = hub.store.repos["space", repo_id]
    return {path: file.content for path, file in repo.commits[repo.branches["main"]].files.items()}


@pytest.mark.parametrize("name", space_names())
def test_pushed_space_holds_the_files_of_its_folder(hub, name):
    push_space(name, "org/page")
    expected = {path.name: path.read_bytes() for path in (spaces_folder() / name).iterdir() if path.is_file()}
    found = published(hub, "org/page")
    assert {file: found[file] for file in expected} == expected
    assert set(found) - set(expected) <= {".gitattributes"}


def test_second_push_of_the_same_space_makes_no_commit(hub, capsys):
    assert main(["space", "matching_lab", "--push", "org/page", "--private"]) == 0
    before = len(hub.store.repos["space", "org/page"].commits)
    assert main(["space", "matching_lab", "--push", "org/page"]) == 0
    assert len(hub.store.repos["space", "org/page"].commits) == before
    assert "spaces/org/page/commit/" in capsys.readouterr().out


def test_refused_push_is_one_line_with_the_way_out_and_status_2(hub, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert main(["space", "matching_lab", "--push", "org/page"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "hf auth login" in error and "hf_wrong" not in error
    assert main(["space", "matching_lab", "--push", "org/page", "--model", "dit=org/dit"]) == 2
    assert "variables" in capsys.readouterr().err
