"""A Space on the Hub: what `hf-dpssl space NAME --push` publishes, through the real client on the local Hub."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import huggingface_hub
import pytest
import yaml

from hf_dpssl.cli.commands import main
from hf_dpssl.cli.space import push_space, space_names
from hf_dpssl.runs.shipped_folders import shipped_folder


def published(hub, repo_id: str) -> dict[str, bytes]:
    repo = hub.store.repos["space", repo_id]
    return {path: file.content for path, file in repo.commits[repo.branches["main"]].files.items()}


@pytest.mark.parametrize("name", space_names())
def test_pushed_space_holds_the_files_of_its_folder(hub, name):
    push_space(name, "org/page")
    expected = {path.name: path.read_bytes() for path in (shipped_folder("spaces") / name).iterdir() if path.is_file()}
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


def test_pushed_space_starts_in_a_fresh_folder_as_its_front_matter_says(hub, tmp_path):
    pytest.importorskip("gradio", minversion="6.0")
    push_space("matching_lab", "org/page")
    folder = Path(huggingface_hub.snapshot_download("org/page", repo_type="space", local_dir=tmp_path / "page"))
    front = yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert (front["sdk"], front["app_file"]) == ("gradio", "app.py")
    assert (folder / "requirements.txt").read_text(encoding="utf-8").split() == ["hf_dpssl[demo]"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {"GRADIO_SERVER_PORT": str(port), "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, front["app_file"]]  # as a Space's machine does
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, cwd=folder, env=os.environ | variables, stdout=log, stderr=log)
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # urlopen keeps its first call's proxies
        answer, end = "", time.monotonic() + 240
        while not answer and process.poll() is None and time.monotonic() < end:
            try:
                answer = opener.open(f"http://127.0.0.1:{port}/config", timeout=10).read().decode()
            except OSError:
                time.sleep(0.2)
        assert '"Matching lab"' in answer, (tmp_path / "log").read_text()
    finally:
        process.terminate()
        process.wait(30)
