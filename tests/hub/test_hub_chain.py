"""From `hf-dpssl push` to whatever loads the result by its id, each step in a fresh process, against a local Hub.

The Hub is that of hub_server_write.py, by Git LFS; stock libraries run where hf_dpssl cannot be imported.
"""

from __future__ import annotations

import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from foreign_processes import BLOCK, run_client
from hub_server_write import TOKEN, WritableHub
from tiny_checkpoints import encoder_model, save_checkpoints

NAMES = {"encoder": "t-moco-v2", "autoencoder": "autoencoder", "dit": "dit", "token": "ar"}
PUSH = """
    import contextlib, io
    from hf_dpssl.cli.commands import main
    folder = os.environ["FOLDER"]

    def push(kind, *argv):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            status = main(["push", f"{folder}/{kind}", *argv, "--json"])
        return {"status": status, "sent": json.loads(out.getvalue())}

    report["encoder"] = push("encoder", "org/t-moco-v2")
    report["again"] = push("encoder", "org/t-moco-v2")
    report["revision"] = push("revision", "org/t-moco-v2", "--revision", "v2")
    report["private"] = push("encoder", "org/private", "--private")
    for kind, name in (("autoencoder", "autoencoder"), ("dit", "dit"), ("token", "ar")):
        report[kind] = push(kind, f"org/{name}")
"""
STOCK = """
    import timm, torch
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM
    picture = Image.linear_gradient("L").resize((20, 24)).convert("RGB")
    processor = AutoImageProcessor.from_pretrained("org/t-moco-v2")
    pixels = processor(picture, return_tensors="pt")["pixel_values"]
    report["pixels"], stock = pixels.tolist(), {}
    with torch.no_grad():
        def features(**options):
            model = AutoModel.from_pretrained("org/t-moco-v2", **options).eval()
            return [type(model).__name__, model(pixels).pooler_output.tolist()]
        stock["AutoModel"], stock["AutoModel v2"] = features(), features(revision="v2")
        for key, name in (("timm", "org/t-moco-v2"), ("timm v2", "org/t-moco-v2@v2")):
            stock[key] = timm.create_model(f"hf-hub:{name}", pretrained=True).eval()(pixels).tolist()
        language_model = AutoModelForCausalLM.from_pretrained("org/ar", subfolder="language_model").eval()
        stock["logits"] = language_model(torch.arange(8)[None]).logits.tolist()
    report["stock"] = stock
"""
PRIVATE = """
    report["private"] = attempt(lambda: AutoModel.from_pretrained("org/private"))
    report["private timm"] = attempt(lambda: timm.create_model("hf-hub:org/private", pretrained=True))
    model = AutoModel.from_pretrained("org/private", token=os.environ["OWNER"]).eval()
    report["owner"] = model(pixels).pooler_output.tolist()
"""
FINE_TUNE = """
    from sklearn.datasets import load_digits
    from transformers import AutoModelForImageClassification, Trainer, TrainingArguments
    digits = load_digits(n_class=2)

    def rows(chosen):
        pictures = [Image.fromarray((image * 15).astype("uint8")).convert("RGB") for image in digits.images[chosen]]
        tensors = processor(pictures, return_tensors="pt")["pixel_values"]
        return [{"pixel_values": x, "labels": int(y)} for x, y in zip(tensors, digits.target[chosen])]

    torch.manual_seed(0)
    classifier = AutoModelForImageClassification.from_pretrained("org/t-moco-v2", num_labels=2)
    # At a rate of .01 running statistics lag behind the weights: evaluated, the classifier was at chance at times.
    arguments = TrainingArguments(
        "tuned", max_steps=40, per_device_train_batch_size=32, learning_rate=0.003, lr_scheduler_type="constant",
        logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, seed=0,
    )
    trainer = Trainer(classifier, arguments, train_dataset=rows(slice(0, 96)), processing_class=processor)
    trainer.train()
    report["losses"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trainer.save_model("tuned")
    tuned, held_out = AutoModelForImageClassification.from_pretrained("tuned").eval(), rows(slice(96, 196))
    with torch.no_grad():
        logits = tuned(torch.stack([row["pixel_values"] for row in held_out])).logits
        kept = torch.tensor(trainer.predict(held_out).predictions)
        report["difference"] = (logits - kept).abs().max().item()
    report["accuracy"] = (logits.argmax(1) == torch.tensor([row["labels"] for row in held_out])).float().mean().item()
"""
OURS = """
    import torch
    from hf_dpssl import ContrastiveEncoder, MoCoForPreTraining, VQAutoencoder, VQDiTPipeline, VQTokenPipeline
    torch.set_grad_enabled(False)
    images = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)

    def ours(place):
        encoder = place("t-moco-v2")
        model = MoCoForPreTraining.from_pretrained(encoder, subfolder="pretraining").eval()
        autoencoder = VQAutoencoder.from_pretrained(place("autoencoder")).eval()
        noise = lambda: [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        dit, tokens = VQDiTPipeline.from_pretrained(place("dit")), VQTokenPipeline.from_pretrained(place("ar"))
        return {
            "features": ContrastiveEncoder.from_pretrained(encoder).eval()(images).pooler_output.tolist(),
            "embeddings": model(images).embeddings.tolist(),
            "codes": autoencoder.encode(images).codes.tolist(),
            "reconstruction": autoencoder(images).pixel_values.tolist(),
            "drawn": dit(["zero", "one"], generator=noise(), num_inference_steps=2, output_type="pt").images.tolist(),
            "tokens": tokens(["zero", "one"], generator=noise(), output_type="pt").images.tolist(),
        }

    report["by id"] = ours(lambda name: f"org/{name}")
"""
BESIDE = """
    folders = {"t-moco-v2": "encoder", "ar": "token"}
    report["by folder"] = ours(lambda name: os.path.join(os.environ["FOLDER"], folders.get(name, name)))
    report["private"] = ContrastiveEncoder.from_pretrained("org/private").eval()(images).pooler_output.tolist()
"""


def dedented(*parts: str) -> str:
    """Parts of code as one."""
    return "\n".join(textwrap.dedent(part) for part in parts)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The server, the folders that are pushed, the home of a client that has nothing yet, and what the pushes said."""
    folder = tmp_path_factory.mktemp("finished")
    save_checkpoints(folder, tuple(NAMES))
    changed = encoder_model()
    for parameter in changed.encoder.parameters():
        parameter.data *= 1.1
    changed.encoder.save_pretrained(folder / "revision")
    with WritableHub() as server:
        options = {"FOLDER": str(folder), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        pushed = run_client(PUSH, server, tmp_path_factory.mktemp("publisher"), **options)
        yield SimpleNamespace(server=server, folder=folder, home=tmp_path_factory.mktemp("home"), pushed=pushed)


@pytest.fixture(scope="module")
def stock(hub):
    """What transformers and timm do with the ids, without hf_dpssl, without remote code and without a token."""
    code = dedented(BLOCK, STOCK, PRIVATE, FINE_TUNE)
    return run_client(code, hub.server, hub.home, OWNER=TOKEN)


@pytest.fixture(scope="module")
def ours(hub):
    """What this package's classes do with the ids and with the folders, with the owner's token."""
    return run_client(dedented(OURS, BESIDE), hub.server, hub.home, FOLDER=str(hub.folder), HF_TOKEN=TOKEN)


def features_of(hub, kind: str, pixels: list) -> np.ndarray:
    """What timm computes from a folder that was pushed."""
    with torch.no_grad():
        return timm.create_model(f"local-dir:{hub.folder / kind}", pretrained=True).eval()(torch.tensor(pixels)).numpy()


@pytest.mark.extended
def test_the_command_publishes_each_checkpoint_pulls_it_back_and_replays_its_pair(hub):
    for kind in (*NAMES, "revision", "private"):
        status, sent = hub.pushed[kind].values()
        assert status == 0 and sent["difference"] == 0 and 0 < sent["seconds"] < 60, kind
        assert hub.server.history(sent["repo_id"], sent["revision"])[0] == sent["commit"], kind


def test_a_second_push_from_the_command_line_makes_no_commit(hub):
    first, again = hub.pushed["encoder"]["sent"], hub.pushed["again"]["sent"]
    assert again["commit"] == first["commit"] and len(hub.server.history("org/t-moco-v2")) == 2


def test_automodel_and_timm_load_the_encoder_by_id_without_this_package_and_without_remote_code(hub, stock):
    expected = features_of(hub, "encoder", stock["pixels"])
    name, features = stock["stock"]["AutoModel"]
    assert name == "TimmWrapperModel" and expected.std() > 0.01
    np.testing.assert_allclose(features, expected, atol=1e-6)
    np.testing.assert_allclose(stock["stock"]["timm"], expected, atol=1e-6)


def test_a_revision_gives_its_own_weights_in_automodel_and_timm(hub, stock):
    expected, main = (features_of(hub, kind, stock["pixels"]) for kind in ("revision", "encoder"))
    assert np.abs(expected - main).max() > 0.01
    np.testing.assert_allclose(stock["stock"]["AutoModel v2"][1], expected, atol=1e-6)
    np.testing.assert_allclose(stock["stock"]["timm v2"], expected, atol=1e-6)


@pytest.mark.extended
def test_a_private_repository_opens_with_its_owners_token_only(hub, stock, ours):
    assert "OSError: org/private is not a local folder and is not a valid model identifier" in stock["private"]
    assert "RepositoryNotFoundError" in stock["private timm"]
    np.testing.assert_allclose(stock["owner"], features_of(hub, "encoder", stock["pixels"]), atol=1e-6)
    assert ours["private"] == ours["by folder"]["features"]


def test_the_encoder_by_id_is_fine_tuned_with_the_trainer_of_transformers(stock):
    losses = stock["losses"]
    assert len(losses) == 40 and np.mean(losses[-3:]) < 0.5 * np.mean(losses[:3])
    assert stock["accuracy"] > 0.8 and stock["difference"] < 1e-5


def test_the_language_model_by_id_loads_with_stock_transformers(stock):
    logits = np.array(stock["stock"]["logits"])
    assert logits.shape[:2] == (1, 8) and np.isfinite(logits).all() and logits.std() > 0.01


def test_autoencoder_pipeline_and_token_model_by_id_compute_what_their_folders_do(ours):
    assert ours["by id"] == ours["by folder"]
    assert set(ours["by id"]) == {"features", "embeddings", "codes", "reconstruction", "drawn", "tokens"}
    for name, values in ours["by id"].items():
        assert np.std(values) > 0.01, name


def test_everything_loads_offline_from_the_cache_without_a_request(hub, stock, ours):
    offline = run_client(dedented(STOCK, OURS), hub.server, hub.home, HF_HUB_OFFLINE="1")
    assert offline["requests"] == []
    assert offline["stock"] == stock["stock"] and offline["by id"] == ours["by id"]
