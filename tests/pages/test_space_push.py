"""A Space on the Hub: what `hf-dpssl space NAME --push` publishes, through the real client on the local Hub."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from cases import for_each
from forked_processes import Forked
from packaging.requirements import Requirement

from hf_dpssl.cli.commands import main
from hf_dpssl.cli.space import push_space, requirement, space_names
from hf_dpssl.runs.shipped_folders import shipped_folder

WHEEL = "https://example.org/hf_dpssl-0.1.0-py3-none-any.whl"


def published(hub, repo_id: str) -> dict[str, bytes]:
    repo = hub.store.repos["space", repo_id]
    return {path: file.content for path, file in repo.commits[repo.branches["main"]].files.items()}


@for_each("name", space_names())
def test_pushed_space_holds_the_files_of_its_folder(hub, name):
    push_space(name, f"org/{name}", package=WHEEL)
    expected = {path.name: path.read_bytes() for path in (shipped_folder("spaces") / name).iterdir() if path.is_file()}
    expected["requirements.txt"] = f"hf_dpssl[demo] @ {WHEEL}\n".encode()
    found = published(hub, f"org/{name}")
    assert {file: found[file] for file in expected} == expected
    assert set(found) - set(expected) <= {".gitattributes"}


def test_second_push_of_the_same_space_makes_no_commit(hub, capsys):
    assert main(["space", "matching_lab", "--push", "org/page", "--private", "--package", WHEEL]) == 0
    before = len(hub.store.repos["space", "org/page"].commits)
    assert main(["space", "matching_lab", "--push", "org/page", "--package", WHEEL]) == 0
    assert len(hub.store.repos["space", "org/page"].commits) == before
    assert "spaces/org/page/commit/" in capsys.readouterr().out


def test_refused_push_is_one_line_with_the_way_out_and_status_2(hub, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert main(["space", "matching_lab", "--push", "org/page", "--package", WHEEL]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "hf auth login" in error and "hf_wrong" not in error


def test_pushed_space_gets_its_models_as_variables_and_in_its_front_matter(hub, tmp_path, capsys):
    flags = ["--model", "dit=org/dit@v2", "--model", "token transformer=org/tokens", "--package", WHEEL]
    assert main(["space", "image_generator", "--push", "org/page", *flags]) == 0
    assert hub.variables["org/page"] == {"DPSSL_DIT": "org/dit@v2", "DPSSL_TOKENS": "org/tokens"}
    card = published(hub, "org/page")["README.md"].decode()
    ours = (shipped_folder("spaces") / "image_generator" / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---")[1])
    assert front == yaml.safe_load(ours.split("---")[1]) | {"models": ["org/dit", "org/tokens"]}
    assert card.split("---", 2)[2] == ours.split("---", 2)[2]
    capsys.readouterr()
    assert main(["space", "image_generator", "--push", "org/other", "--model", f"dit={tmp_path}"]) == 2
    assert "sees no folder of this machine" in capsys.readouterr().err
    assert ("space", "org/other") not in hub.store.repos


def test_requirements_name_where_the_package_was_installed_from(monkeypatch, tmp_path):
    git = {"url": "https://github.com/org/x", "vcs_info": {"vcs": "git", "commit_id": "a" * 40}}
    known = {
        "": "hf_dpssl[demo]==7.1",
        json.dumps(git): f"hf_dpssl[demo] @ git+https://github.com/org/x@{'a' * 40}",
        json.dumps({"url": "https://x.org/a.whl", "archive_info": {}}): "hf_dpssl[demo] @ https://x.org/a.whl",
        json.dumps({"url": "file:///home/me/x", "dir_info": {"editable": True}}): None,
    }
    folder = tmp_path / "hf_dpssl-7.1.dist-info"  # as pip writes it
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: hf_dpssl\nVersion: 7.1\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for origin, expected in known.items():
        (folder / "direct_url.json").write_text(origin)
        if not origin:
            (folder / "direct_url.json").unlink()
        if expected is None:
            with pytest.raises(ValueError, match="name with --package"):
                requirement()
        else:
            assert str(Requirement(requirement())) == str(Requirement(expected))


@pytest.mark.extended
def test_pushed_space_starts_as_its_front_matter_says_and_leaves_no_temporary_folder_however_it_ends(hub, tmp_path):
    pytest.importorskip("gradio", minversion="6.0")
    push_space("matching_lab", "org/page", package="hf_dpssl[demo]")
    folder = Path(huggingface_hub.snapshot_download("org/page", repo_type="space", local_dir=tmp_path / "page"))
    front = yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert (front["sdk"], front["app_file"]) == ("gradio", "app.py")
    assert (folder / "requirements.txt").read_text(encoding="utf-8").split() == ["hf_dpssl[demo]"]
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # urlopen keeps its first call's proxies
    for number in (signal.SIGTERM, signal.SIGINT):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        variables = {"GRADIO_SERVER_PORT": str(port), "PYTHONPATH": str(Path(__file__).parents[2])}
        variables["TMPDIR"] = str(temporary)
        if number == signal.SIGTERM:
            command = [sys.executable, front["app_file"]]  # as a Space's machine does
            with open(tmp_path / "log", "w") as log:
                process = subprocess.Popen(command, cwd=folder, env=os.environ | variables, stdout=log, stderr=log)
        else:
            outputs = tmp_path / "log", tmp_path / "err"
            process = Forked([front["app_file"]], folder, os.environ | variables, *outputs)
        try:
            answer, end = "", time.monotonic() + 240
            while not answer and process.poll() is None and time.monotonic() < end:
                try:
                    answer = opener.open(f"http://127.0.0.1:{port}/config", timeout=10).read().decode()
                except OSError:
                    time.sleep(0.2)
            assert '"Matching lab"' in answer, (tmp_path / "log").read_text()
            assert list(temporary.glob("space-*"))  # it keeps files while it runs
            process.send_signal(number)
            assert process.wait(60) == 0, number
            assert not list(temporary.glob("space-*")), number
        finally:
            process.kill()
            process.wait(30)
