"""Whatever takes a Hub id, through the real client in fresh processes, against the local server of hub_server.py."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from foreign_processes import run_client
from hub_server import HubServer

from hf_dpssl import ContrastiveConfig, SimCLRForPreTraining, VQAutoencoder, VQConfig, VQDiTPipeline
from hf_dpssl.data.image_data import load_digits
from hf_dpssl.latent_training.diffusion import make_scheduler, make_transformer

REPOSITORY = Path(__file__).parents[2]
TOKEN = "hf_only_for_tests"


def save_parquet(folder: Path, train: int, test: int) -> None:
    """A data set repository of the first digits, with two training shards and a test shard."""
    (folder / "data").mkdir(parents=True)
    for split, count, shards in (("train", train, 2), ("test", test, 1)):
        rows = load_digits()[split].select(range(count))
        for i in range(shards):
            rows.shard(shards, i).to_parquet(folder / "data" / f"{split}-{i:05d}-of-{shards:05d}.parquet")


def save_pictures(folder: Path, train: int, test: int) -> None:
    """A data set repository of the first digits as PNG files, one folder per split and class."""
    for split, count in (("train", train), ("test", test)):
        for i, row in enumerate(load_digits()[split].select(range(count))):
            file = folder / split / str(row["label"]) / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            row["image"].save(file)


def save_tars(folder: Path, train: int, test: int) -> None:
    """A data set repository of the first digits as WebDataset, with two training shards and a test shard."""
    folder.mkdir()
    for split, count, shards in (("train", train, 2), ("test", test, 1)):
        rows = load_digits()[split].select(range(count))
        for shard in range(shards):
            with tarfile.open(folder / f"{split}-{shard:05d}.tar", "w") as tar:
                for i, row in enumerate(rows.shard(shards, shard)):
                    picture = io.BytesIO()
                    row["image"].save(picture, "PNG")
                    for suffix, content in (("png", picture.getvalue()), ("cls", str(row["label"]).encode())):
                        member = tarfile.TarInfo(f"{i:05d}.{suffix}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))


def save_models(folder: Path) -> None:
    """Tiny encoder with its pretraining model, autoencoder and pipeline, as the training scripts save them."""
    torch.manual_seed(0)
    grey = [0.5, 0.5, 0.5]
    pretrained_cfg = {
        "input_size": [3, 16, 16], "mean": grey, "std": grey,
        "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center",
    }  # fmt: skip
    config = ContrastiveConfig("resnet10t", {"channels": [8, 8, 16, 16]}, pretrained_cfg, projection_dim=4)
    model = SimCLRForPreTraining(config)
    model.encoder.save_pretrained(folder / "encoder")
    model.save_pretrained(folder / "encoder" / "pretraining")
    latents = {"latent_mean": [0.0] * 4, "latent_std": [1.0] * 4}
    config = VQConfig(image_size=16, encoder_block_out_channels=[8, 16], norm_num_groups=4, num_codes=16, **latents)
    autoencoder = VQAutoencoder(config).eval()
    autoencoder.save_pretrained(folder / "autoencoder")
    size = {"num_layers": 1, "width": 16, "num_heads": 2, "patch_size": 2, "latent_channels": 4, "latent_size": 8}
    transformer = make_transformer(**size, num_classes=2).eval()
    for parameter in transformer.parameters():  # as initialised it predicts 0, whatever its weights
        torch.nn.init.normal_(parameter, std=0.1)
    names, fingerprint = {0: "zero", 1: "one"}, autoencoder.fingerprint()
    pipeline = VQDiTPipeline(transformer, autoencoder, make_scheduler("flow"), names, fingerprint)
    pipeline.save_pretrained(folder / "pipeline")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A server, the folders it serves, a client's cache and some commits.

    Data sets org/pictures (branches main, small and try/slash), org/folders, org/tars and org/private; three models.
    """
    folder = tmp_path_factory.mktemp("hub")
    save_parquet(folder / "pictures", 60, 20)
    save_parquet(folder / "small", 40, 10)
    save_pictures(folder / "folders", 40, 10)
    save_tars(folder / "tars", 40, 10)
    save_models(folder)
    with HubServer() as server:
        server.add_repo("dataset", "org/pictures", folder / "pictures")
        sha = {"small": server.add_repo("dataset", "org/pictures", folder / "small", revision="small")}
        server.add_repo("dataset", "org/pictures", folder / "small", revision="try/slash")
        server.add_repo("dataset", "org/folders", folder / "folders")
        server.add_repo("dataset", "org/tars", folder / "tars")
        server.add_repo("dataset", "org/private", folder / "small", private_token=TOKEN)
        for name in ("encoder", "autoencoder", "pipeline"):
            sha[name] = server.add_repo("model", f"org/{name}", folder / name)
        yield SimpleNamespace(server=server, folder=folder, home=tmp_path_factory.mktemp("home"), sha=sha)


DATA = """
    import hashlib
    from hf_dpssl.data.image_data import load_images
    from hf_dpssl.data.image_table import decode_row

    def load(name, **options):
        data = load_images(name, **options)
        raw = all(isinstance(row[data.image_column], dict) for row in data.train)
        def images(split):
            decoded = [decode_row(data, row, "a row") for row in split]
            names = data.class_names or {-1: "none"}
            return sorted([names[i], hashlib.sha256(image.tobytes()).hexdigest()] for image, i in decoded)
        return {"train": images(data.train), "evaluation": images(data.evaluation), "raw": raw}
"""
LOADED = """
    report["small"] = load("org/pictures@small")
    report["main"] = load("org/pictures")
    report["folders"] = load("org/folders")
"""
STREAMED_AND_REFUSED = """
    report["argument"] = load("org/pictures", revision="small")
    report["slash"] = attempt(lambda: load("org/pictures@try/slash"))
    report["commit"] = load("org/pictures@" + os.environ["COMMIT"])
    report["streamed"] = load("org/pictures@small", streaming=True)
    report["tars"] = load("org/tars")
    report["streamed tars"] = load("org/tars", streaming=True)
    report["streamed folders"] = load("org/folders", streaming=True)
    report["unknown"] = attempt(lambda: load("org/no-such-set"))
    report["unknown revision"] = attempt(lambda: load("org/pictures@no-such-branch"))
    report["private"] = attempt(lambda: load("org/private"))
"""
MODELS = """
    import timm, torch
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModel
    torch.set_grad_enabled(False)
    folder = os.environ["FOLDER"]
    picture = Image.linear_gradient("L").resize((20, 24)).convert("RGB")
    pixels = AutoImageProcessor.from_pretrained("org/encoder")(picture, return_tensors="pt")["pixel_values"]
    report["shape"], report["darkest"] = list(pixels.shape), pixels.min().item()
    features = report["features"] = {}
    features["AutoModel"] = AutoModel.from_pretrained("org/encoder").eval()(pixels).pooler_output[0].tolist()
    features["timm"] = timm.create_model("hf-hub:org/encoder", pretrained=True).eval()(pixels)[0].tolist()
    report["without us"] = not any(name.split(".")[0] == "hf_dpssl" for name in sys.modules)

    from hf_dpssl import ContrastiveEncoder, SimCLRForPreTraining, VQAutoencoder, VQDiTPipeline
    for key, source in (("ours", "org/encoder"), ("folder", folder + "/encoder")):
        features[key] = ContrastiveEncoder.from_pretrained(source).eval()(pixels).pooler_output[0].tolist()
        model = SimCLRForPreTraining.from_pretrained(source, subfolder="pretraining").eval()
        features["pretraining " + key] = model(pixels).features[0].tolist()
        report["embeddings " + key] = model(pixels).embeddings[0].tolist()
    report["fingerprint"] = VQAutoencoder.from_pretrained("org/autoencoder").fingerprint()

    def draw(source):
        generator = torch.Generator().manual_seed(0)
        options = dict(generator=generator, num_inference_steps=2, output_type="pt")
        return VQDiTPipeline.from_pretrained(source)(["zero", "one"], **options).images.flatten().tolist()

    report["drawn ours"] = attempt(lambda: draw("org/pipeline"))
    report["drawn folder"] = draw(folder + "/pipeline")
"""


@pytest.fixture(scope="module")
def data_report(hub):
    """What a client without a token gets for ids of data sets."""
    return run_client(DATA + LOADED + STREAMED_AND_REFUSED, hub.server, hub.home, COMMIT=hub.sha["small"])


@pytest.fixture(scope="module")
def model_report(hub):
    """What a client with a token gets for ids of models, and for the private data set."""
    code = MODELS + DATA + '    report["private"] = load("org/private")\n'
    return run_client(code, hub.server, hub.home, FOLDER=str(hub.folder), HF_TOKEN=TOKEN)


def digits(train: int, test: int) -> dict:
    """What `load` reports for the first digits of both splits."""

    def images(split: str, count: int) -> list[list[str]]:
        rows = load_digits()[split].select(range(count))
        pixels = [hashlib.sha256(row["image"].convert("RGB").tobytes()).hexdigest() for row in rows]
        return sorted([str(row["label"]), digest] for row, digest in zip(rows, pixels, strict=True))

    return {"train": images("train", train), "evaluation": images("test", test), "raw": True}


def test_dataset_by_id_and_revision_loads_through_the_real_client(data_report):
    assert data_report["main"] == digits(60, 20)
    assert data_report["small"] == digits(40, 10)
    assert data_report["argument"] == data_report["small"] == data_report["commit"]


def test_dataset_revision_may_hold_a_slash(data_report):
    assert data_report["slash"] == digits(40, 10)


def test_folders_of_pictures_by_id_load_with_the_folders_as_classes(data_report):
    assert data_report["folders"] == digits(40, 10)


def test_streamed_datasets_by_id_give_the_same_pictures(data_report):
    for name in ("streamed", "streamed folders"):
        assert data_report[name] | {"raw": True} == digits(40, 10), name


def test_tar_files_by_id_give_the_same_pictures_and_streamed_ones_no_classes(data_report):
    assert data_report["tars"] == digits(40, 10)
    for split, rows in digits(40, 10).items():
        if split != "raw":
            assert data_report["streamed tars"][split] == sorted(["none", digest] for _, digest in rows)


def test_streamed_rows_are_not_decoded_before_they_are_dealt_out(data_report):
    assert data_report["streamed"]["raw"]
    assert data_report["streamed folders"]["raw"]
    assert data_report["streamed tars"]["raw"]


def test_unknown_and_private_datasets_are_refused_with_their_id_and_the_endpoint(hub, data_report):
    for key, name in (("unknown", "org/no-such-set"), ("private", "org/private"), ("unknown revision", "org/pictures")):
        revision = "no-such-branch" if key == "unknown revision" else "main"
        expected = f"ValueError: cannot load the data set {name} at revision '{revision}' on {hub.server.endpoint}: "
        assert data_report[key].startswith(expected)
    assert "log in" in data_report["private"]


@pytest.mark.extended
def test_private_dataset_loads_with_the_token_of_its_owner(model_report):
    assert model_report["private"] == digits(40, 10)


def test_encoder_by_id_gives_equal_features_in_stock_libraries_and_in_ours(model_report):
    features = {name: np.array(values) for name, values in model_report["features"].items()}
    assert model_report["without us"]
    assert model_report["shape"] == [1, 3, 16, 16] and model_report["darkest"] < -0.5
    assert features["folder"].shape == (16,) and features["folder"].std() > 0.01
    for name, values in features.items():
        np.testing.assert_allclose(values, features["folder"], atol=1e-6, err_msg=name)
    np.testing.assert_array_equal(model_report["embeddings ours"], model_report["embeddings folder"])


def test_autoencoder_by_id_has_the_weights_of_its_folder(hub, model_report):
    assert model_report["fingerprint"] == VQAutoencoder.from_pretrained(hub.folder / "autoencoder").fingerprint()


def test_pipeline_by_id_draws_the_images_that_its_folder_draws(model_report):
    assert np.std(model_report["drawn folder"]) > 0.05
    assert model_report["drawn ours"] == model_report["drawn folder"]


@pytest.mark.extended
def test_what_was_loaded_once_loads_offline_without_a_request(hub, data_report, model_report):
    offline = run_client(MODELS + DATA + LOADED, hub.server, hub.home, FOLDER=str(hub.folder), HF_HUB_OFFLINE="1")
    assert offline["requests"] == []
    assert offline["folders"] == data_report["folders"]
    assert offline["main"] == data_report["main"]
    assert offline["small"] == data_report["small"]  # the revision asked for, not the one loaded last
    for name in ("features", "fingerprint", "drawn ours"):
        assert offline[name] == model_report[name], name


def test_server_answers_the_client_as_the_hub_does(hub, tmp_path):
    code = """
        from huggingface_hub import HfApi, HfFileSystem, hf_hub_download
        api, pictures = HfApi(), "datasets/org/pictures/data/test-00000-of-00001.parquet"
        report["sha"] = [api.model_info("org/encoder").sha, api.dataset_info("org/pictures", revision="small").sha]
        report["files"] = sorted(api.list_repo_files("org/encoder"))
        report["children"] = sorted(entry.path for entry in api.list_repo_tree("org/encoder"))
        report["ends"] = [HfFileSystem().cat_file(pictures, start=s, end=e).decode() for s, e in ((1, 4), (-4, None))]
        report["errors"] = [attempt(f).split(":")[0] for f in (
            lambda: api.model_info("org/none"),
            lambda: api.model_info("org/encoder", revision="none"),
            lambda: hf_hub_download("org/encoder", "none.txt"),
            lambda: api.dataset_info("org/private"),
        )]
        with open(hf_hub_download("org/encoder", "model.safetensors"), "rb") as file:
            report["weights"] = file.read().hex()
    """
    report = run_client(code, hub.server, tmp_path)
    folder = hub.folder / "encoder"
    assert report["sha"] == [hub.sha["encoder"], hub.sha["small"]]
    assert report["files"] == sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    assert report["children"] == sorted(path.name for path in folder.iterdir())
    assert report["ends"] == ["AR1", "PAR1"]
    private = "RepositoryNotFoundError"
    assert report["errors"] == [private, "RevisionNotFoundError", "RemoteEntryNotFoundError", private]
    assert bytes.fromhex(report["weights"]) == (folder / "model.safetensors").read_bytes()
