"""push_to_hub beside the methods of transformers and diffusers that it replaces, and what the client logs of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from foreign_processes import run_client
from hub_server_write import TOKEN, WritableHub
from tiny_checkpoints import save_checkpoints

from hf_dpssl.hub import replay

PUSH = """
    os.dup2(os.open("output.txt", os.O_CREAT | os.O_WRONLY), 1)
    os.dup2(1, 2)
    from diffusers import DiffusionPipeline
    from transformers import PreTrainedModel
    from hf_dpssl import ContrastiveEncoder, MoCoForPreTraining, VQDiTPipeline
    folder = os.environ["FOLDER"]
    encoder = ContrastiveEncoder.from_pretrained(f"{folder}/encoder")
    model = MoCoForPreTraining.from_pretrained(f"{folder}/encoder", subfolder="pretraining")
    pipeline = VQDiTPipeline.from_pretrained(f"{folder}/dit")
    report["difference"] = [
        encoder.push_to_hub("org/encoder").difference,
        model.push_to_hub("org/pretraining", private=True).difference,
        pipeline.push_to_hub("org/dit", revision="v1").difference,
    ]
    PreTrainedModel.push_to_hub(encoder, "org/stock-encoder")
    PreTrainedModel.push_to_hub(model, "org/stock-pretraining")
    DiffusionPipeline.push_to_hub(pipeline, "org/stock-dit")
"""


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """A server to which a fresh process pushed three models by our methods and by the stock ones; what it printed."""
    folder, home = tmp_path_factory.mktemp("finished"), tmp_path_factory.mktemp("home")
    save_checkpoints(folder, ("encoder", "dit"))
    with WritableHub() as server:
        env = {"HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_DEBUG": "1", "FOLDER": str(folder)}
        report = run_client(PUSH, server, home, **env)
        output = (home / "output.txt").read_text(encoding="utf-8")
        yield SimpleNamespace(server=server, difference=report["difference"], output=output)


def files(pushed, name: str, revision: str = "main") -> dict[str, bytes]:
    """What a model's branch holds, without card and stored pair."""
    found = pushed.server.files(f"org/{name}", revision)
    return {path: content for path, content in found.items() if path not in ("README.md", replay.FILE_NAME)}


@pytest.mark.extended
def test_an_encoder_and_a_pipeline_have_the_files_of_the_stock_methods_and_a_replayed_pair(pushed):
    assert files(pushed, "encoder") == files(pushed, "stock-encoder")
    ours, stock = files(pushed, "dit", "v1"), files(pushed, "stock-dit")
    assert set(ours) == set(stock)
    weights = [path for path in ours if path.endswith(".safetensors")]
    assert len(weights) == 2 and all(ours[path] == stock[path] for path in weights)
    assert pushed.difference == [0, 0, 0]


def test_a_model_that_pretrains_goes_below_its_encoder_where_the_stock_method_puts_it_at_the_root(pushed):
    ours, stock = files(pushed, "pretraining"), files(pushed, "stock-pretraining")
    assert ours["pretraining/model.safetensors"] == stock["model.safetensors"]
    assert ours["model.safetensors"] == files(pushed, "encoder")["model.safetensors"]
    assert not any(path.startswith("pretraining/") for path in stock)


def test_no_empty_card_is_published_as_the_stock_methods_do(pushed):
    assert b"More Information Needed" in pushed.server.files("org/stock-encoder")["README.md"]
    card = pushed.server.files("org/encoder").get("README.md", b"")
    assert b"More Information Needed" not in card


def test_the_token_is_in_no_line_of_the_clients_debug_log(pushed):
    assert "Send: curl -X POST" in pushed.output and ": <TOKEN>" in pushed.output
    assert TOKEN not in pushed.output
