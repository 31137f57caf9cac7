"""Code in a repository is not run: neither when a pipeline is loaded nor when a repository is pulled and replayed."""

import json
import shutil

import pytest
from huggingface_hub import constants
from tiny_checkpoints import save_checkpoints

from hf_dpssl import VQDiTPipeline, VQTokenPipeline
from hf_dpssl.cli.commands import main
from hf_dpssl.hub import replay

ATTACK = "import pathlib\npathlib.Path({marker!r}).write_text('ran')\nclass Evil:\n    pass\n"
# what model_index.json is made to say, the file of code in the repository, words of the refusal
ATTACKS = {
    "code beside a component": ({"vae": ["evil", "Evil"]}, "vae/evil.py", "its vae is of the class evil.Evil"),
    "code that has a library's name": ({}, "vae/hf_dpssl.py", "vae/hf_dpssl.py stands in the place of the library"),
    "a module of this machine": ({"vae": ["evil_here", "Evil"]}, None, "its vae is of the class evil_here.Evil"),
    "a pipeline class of its own": (
        {"_class_name": ["evil", "Evil"]},
        "evil.py",
        r"its pipeline class is \['evil', 'E",
    ),
    "no component class": ({"vae": ["transformers", "AutoModel"]}, None, "the class transformers.AutoModel, and only"),
    "a function": ({"vae": ["hf_dpssl", "push_to_hub"]}, None, "the class hf_dpssl.push_to_hub, and only"),
    "a malformed entry": ({"vae": "hf_dpssl"}, None, r"must give vae as \[library, class\], got 'hf_dpssl'"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folders = save_checkpoints(tmp_path_factory.mktemp("finished"), ("dit", "token"))
    for folder in folders.values():
        (folder / replay.FILE_NAME).write_bytes(replay.record(folder))
    return folders


@pytest.mark.parametrize("attack", ATTACKS)
def test_code_that_a_pipelines_repository_names_is_not_run(hub, folders, tmp_path, monkeypatch, capsys, attack):
    entries, file, words = ATTACKS[attack]
    marker = tmp_path / "marker"
    monkeypatch.syspath_prepend(tmp_path / "modules")
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "evil_here.py").write_text(ATTACK.format(marker=str(marker)))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for kind, pipeline_class in (("dit", VQDiTPipeline), ("token", VQTokenPipeline)):
        folder = shutil.copytree(folders[kind], tmp_path / kind)
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8")) | entries
        (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
        if file is not None:
            (folder / file).write_text(ATTACK.format(marker=str(marker)), encoding="utf-8")
        with pytest.raises(ValueError, match=words):
            pipeline_class.from_pretrained(folder)
        hub.add_repo("model", f"org/{kind}", folder)
        if file == "vae/hf_dpssl.py":  # which a download leaves on the Hub
            assert main(["pull", f"org/{kind}", "--output_dir", str(tmp_path / "pulled" / kind)]) == 0
        else:
            with pytest.raises(ValueError, match=words):
                pipeline_class.from_pretrained(f"org/{kind}")
            assert main(["pull", f"org/{kind}", "--output_dir", str(tmp_path / "pulled" / kind)]) == 2
            error = capsys.readouterr().err.strip().splitlines()
            assert len(error) == 1 and error[0].startswith(f"hf-dpssl pull: org/{kind}")
            assert not list((tmp_path / "pulled").iterdir())
        assert not marker.exists()


def test_a_repositorys_code_is_not_there_while_it_is_replayed_and_comes_along(hub, folders, tmp_path, monkeypatch):
    folder = shutil.copytree(folders["dit"], tmp_path / "dit")
    (folder / "vae" / "modeling_vq.py").write_text("raise SystemExit('ran')\n")
    (folder / "vae" / "transformers.py").write_text("raise SystemExit('ran')\n")
    hub.add_repo("model", "org/dit", folder)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    seen = []
    original = replay.replay
    monkeypatch.setattr(replay, "replay", lambda at, pair: (seen.extend(at.rglob("*.py")), original(at, pair))[1])
    assert main(["pull", "org/dit", "--output_dir", str(tmp_path / "pulled")]) == 0
    assert seen == [] and (tmp_path / "pulled" / "vae" / "modeling_vq.py").is_file()


def test_a_head_of_no_known_class_is_refused(tmp_path):
    folder = save_checkpoints(tmp_path, ("encoder",))["encoder"]
    config = json.loads((folder / "pretraining" / "config.json").read_text(encoding="utf-8"))
    for name in ("torch", "importlib", "nothing"):
        content = json.dumps(config | {"architectures": [name]})
        (folder / "pretraining" / "config.json").write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=f"is of the class '{name}', which is none of this package"):
            replay.record(folder)
