"""`hf-dpssl evaluate` of Hub ids: one commit into results.json and the card, through the real client on a local Hub."""

import json
import shutil

import pytest
import yaml
from hub_server_write import TOKEN
from huggingface_hub import HfApi, ModelCard, constants, parse_eval_result_entries
from huggingface_hub.utils import disable_progress_bars
from tiny_checkpoints import save_checkpoints

from hf_dpssl.cli.commands import main
from hf_dpssl.hub.publishing import push

FEW = ["--evaluation_images", "60", "--protocol", "geometry"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Finished checkpoints."""
    disable_progress_bars()
    return save_checkpoints(tmp_path_factory.mktemp("finished"), ("encoder", "autoencoder", "dit"))


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    """What another test has downloaded is not there."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def card_results(hub, repo_id: str) -> list:
    return ModelCard(hub.files(repo_id)["README.md"].decode()).data.eval_results


def test_a_pushed_evaluation_is_one_commit_into_results_and_card(hub, folders, capsys):
    push(folders["encoder"], "org/tiny")
    before, commits = hub.files("org/tiny"), len(hub.history("org/tiny"))
    capsys.readouterr()
    assert main(["evaluate", "org/tiny", *FEW, "--push", "--json"]) == 0
    entry = json.loads(capsys.readouterr().out)
    after = hub.files("org/tiny")
    assert len(hub.history("org/tiny")) == commits + 1
    assert {name for name in after if after[name] != before.get(name)} == {"results.json", "README.md"}
    results = json.loads(after["results.json"])
    assert results == json.loads(before["results.json"]) | {"evaluations": [entry]}
    found = card_results(hub, "org/tiny")
    assert [result.metric_value for result in found] == [float(f"{v:.4g}") for v in entry["metrics"].values()]
    sha256 = entry["fingerprint"]["sha256"]
    assert {result.metric_args["fingerprint"] for result in found} == {sha256[:16]}
    assert {(result.dataset_name, result.dataset_split) for result in found} == {("digits", "test")}
    text = before["README.md"].decode().split("---\n", 2)[2]
    assert after["README.md"].decode().endswith(text) and "- encoder" in after["README.md"].decode()
    # The same numbers again are no second entry; others are.
    assert main(["evaluate", "org/tiny", *FEW, "--push"]) == 0
    assert len(json.loads(hub.files("org/tiny")["results.json"])["evaluations"]) == 1
    assert len(card_results(hub, "org/tiny")) == len(found)
    assert main(["evaluate", "org/tiny", *FEW[:2], "--protocol", "views", "--push"]) == 0
    assert len(json.loads(hub.files("org/tiny")["results.json"])["evaluations"]) == 2
    assert len(card_results(hub, "org/tiny")) == len(found) + 2


@pytest.mark.extended
def test_a_pull_request_leaves_the_branch_and_figures_on_a_data_set_of_the_hub_have_a_file(
    hub, folders, capsys, monkeypatch, tmp_path
):
    from hf_dpssl.hub import card_data

    push(folders["encoder"], "org/asked")
    before = hub.files("org/asked")
    monkeypatch.setattr(card_data, "hub_dataset", lambda name: "org/pictures")  # as if digits were one of the Hub's
    capsys.readouterr()
    assert main(["evaluate", "org/asked", *FEW, "--push", "--create_pr"]) == 0
    assert f"{hub.endpoint}/org/asked/discussions/1" in capsys.readouterr().out
    assert hub.files("org/asked") == before
    entries = parse_eval_result_entries(
        yaml.safe_load(hub.files("org/asked", "refs/pr/1")[".eval_results/org--pictures.yaml"])
    )
    assert {entry.task_id for entry in entries} == {"uniformity", "effective_rank"}
    assert all("split test; seed 0" in entry.notes for entry in entries)
    assert main(["evaluate", "org/asked", *FEW, "--push"]) == 0
    local = shutil.copytree(folders["encoder"], tmp_path / "encoder")
    (local / ".eval_results").mkdir()
    own = {"dataset": {"id": "org/pictures", "task_id": "knn"}, "value": 1.0, "notes": "of the training"}
    (local / ".eval_results/org--pictures.yaml").write_text(yaml.safe_dump([own]))
    push(local, "org/asked")
    merged = yaml.safe_load(hub.files("org/asked")[".eval_results/org--pictures.yaml"])
    assert len(merged) == len(entries) + 1 and own in merged
    assert main(["evaluate", "org/asked", *FEW, "--create_pr"]) == 2
    assert "--create_pr is for --push" in capsys.readouterr().err


@pytest.mark.extended
def test_the_next_push_of_the_folder_keeps_what_the_card_was_given(hub, folders):
    push(folders["encoder"], "org/kept")
    assert main(["evaluate", "org/kept", *FEW, "--push"]) == 0
    found = card_results(hub, "org/kept")
    push(folders["encoder"], "org/kept")
    assert card_results(hub, "org/kept") == found and len(found) == 3


def test_a_repository_without_card_gets_one_and_a_branch_its_own(hub, folders, tmp_path):
    api = HfApi(endpoint=hub.endpoint, token=TOKEN)
    api.create_repo("org/bare")
    for name in ("config.json", "model.safetensors"):
        file = {"path_or_fileobj": folders["autoencoder"] / name, "path_in_repo": name}
        api.upload_file(repo_id="org/bare", **file)
    api.create_branch("org/bare", branch="second")
    output = tmp_path / "evaluation.json"
    command = ["evaluate", "org/bare@second", "--evaluation_images", "60", "--output", str(output), "--push"]
    assert main(command) == 0
    assert "README.md" not in hub.files("org/bare")
    results = json.loads(hub.files("org/bare", "second")["results.json"])
    assert results == json.loads(output.read_text(encoding="utf-8"))
    card = ModelCard(hub.files("org/bare", "second")["README.md"].decode())
    assert card.data.model_name == "bare" and {r.metric_type for r in card.data.eval_results} == {"psnr", "ssim"}


@pytest.mark.extended
def test_a_pipeline_by_id_gives_the_numbers_of_its_folder_and_writes_nothing_there(hub, folders, tmp_path, capsys):
    push(folders["dit"], "org/dit")
    files = hub.files("org/dit")
    flags = ["--extractor", str(folders["encoder"]), "--num_images", "20", "--num_inference_steps", "1", *FEW[:2]]
    found = {}
    for source in ("org/dit", str(folders["dit"])):
        capsys.readouterr()
        assert main(["evaluate", source, *flags, "--json", "--output", str(tmp_path / "out.json")]) == 0
        found[source] = json.loads(capsys.readouterr().out)
    first, second = found.values()
    assert first["metrics"] == second["metrics"] and first["fingerprint"] == second["fingerprint"]
    assert len(json.loads((tmp_path / "out.json").read_text())["evaluations"]) == 1 and hub.files("org/dit") == files


@pytest.mark.extended
def test_a_hub_that_cannot_be_read_or_written_is_said_in_one_line(hub, folders, capsys, monkeypatch):
    push(folders["encoder"], "org/tiny")
    assert main(["evaluate", "org/tiny", *FEW]) == 0
    HfApi(endpoint=hub.endpoint, token=TOKEN).create_repo("org/nothing")
    history = hub.history("org/tiny")

    def refused(source: str, *flags: str, status: int = 2) -> str:
        capsys.readouterr()
        assert main(["evaluate", source, *FEW, *flags]) == status
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("hf-dpssl evaluate: ") and TOKEN not in error
        return error

    assert "cannot read org/missing from the Hub" in refused("org/missing")
    assert "org/nothing holds no model (no config.json)" in refused("org/nothing")
    assert "neither a folder nor a Hub id" in refused("no such folder/")
    hub.tokens[TOKEN] = ()
    assert "may not write" in refused("org/tiny", "--push") and hub.history("org/tiny") == history
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "org/other is not in the cache, and the Hub cannot be reached" in refused("org/other", status=1)
    assert main(["evaluate", "org/tiny", *FEW]) == 0  # from the cache
