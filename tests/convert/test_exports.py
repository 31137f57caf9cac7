"""`hf-dpssl export`: what other libraries load computes the same, or is refused and nothing is left."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from cases import for_each
from diffusers import AutoencoderKL, DiTPipeline, DPMSolverMultistepScheduler, VQModel
from foreign_processes import run_foreign
from huggingface_hub import constants
from safetensors.torch import load_file
from tiny_checkpoints import drift_pipeline, encoder_model, save_checkpoints
from tiny_pipelines import make_exportable

from hf_dpssl import ContrastiveConfig, ContrastiveEncoder, VQAutoencoder, VQConfig, VQDiTPipeline, VQDriftPipeline
from hf_dpssl.cli.commands import main
from hf_dpssl.convert.exports import export
from hf_dpssl.generation.latent_mlp import LatentMLP
from hf_dpssl.hub.publishing import push


def tiny_autoencoder(quantizer: str = "vq", **config) -> VQAutoencoder:
    """8 px, 4 x 4 latents, as few layers as there can be."""
    torch.manual_seed(0)
    settings = dict(
        image_size=8, encoder_block_out_channels=[4, 4], norm_num_groups=2, num_codes=16, quantizer=quantizer,
        latent_mean=[0.3, -0.2, 0.1, 0.5], latent_std=[1.7] * 4, encoder_layers_per_block=1, decoder_layers_per_block=1,
        mid_block_attention=False,
    )  # fmt: skip
    model = VQAutoencoder(VQConfig(**settings | config)).eval()
    if model.quantizer is not None:  # codes amid the latents, so that many are used
        latents = model.encode_latents(torch.rand(1, 3, 8, 8) * 2 - 1).detach()
        model.quantizer.codebook.copy_(latents[0].flatten(1).T + 0.01 * torch.randn(16, 4))
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Finished checkpoints by kind, and autoencoders without codebook."""
    folder = tmp_path_factory.mktemp("finished")
    found = save_checkpoints(folder)
    for quantizer in ("vq", "kl"):
        found[quantizer] = folder / f"autoencoder-{quantizer}"
        tiny_autoencoder(quantizer).save_pretrained(found[quantizer])
    return found


FOREIGN_ENCODER = """
import timm, torch
from transformers import AutoImageProcessor, AutoModel
images = torch.load("images.pt", weights_only=True)
model = AutoModel.from_pretrained("out", trust_remote_code=False).eval()
assert type(model).__name__ == "TimmWrapperModel", type(model)
assert AutoImageProcessor.from_pretrained("out").data_config["input_size"][-1] == 16
stock = timm.create_model("local-dir:out", pretrained=True).eval()
with torch.no_grad():
    print(json.dumps([model(images).pooler_output.tolist(), stock(images).tolist()]))
"""


@pytest.mark.extended
def test_timm_export_holds_no_code_and_gives_equal_features_where_hf_dpssl_cannot_be_imported(folders, tmp_path):
    report = export(folders["encoder"], tmp_path / "out", "timm")
    export(folders["encoder"] / "pretraining", tmp_path / "again", "timm")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert weights[0] == weights[1]
    assert set(report.files) == {"config.json", "model.safetensors"} and "resnet10t" in report.written
    assert "auto_map" not in json.loads((tmp_path / "out/config.json").read_text())
    images = torch.randn(3, 3, 16, 16)
    torch.save(images, tmp_path / "images.pt")
    with torch.no_grad():
        expected = ContrastiveEncoder.from_pretrained(folders["encoder"]).eval()(images).pooler_output
    assert expected.std() > 1e-3
    for found in run_foreign(FOREIGN_ENCODER, tmp_path):
        torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("quantizer", "stock_class"), [("vq", VQModel), ("kl", AutoencoderKL)])
def test_vqmodel_export_reconstructs_as_ours(folders, tmp_path, quantizer, stock_class):
    report = export(folders[quantizer], tmp_path / "out", "vqmodel")
    assert report.written == f"{stock_class.__name__} of diffusers" and max(report.differences.values()) < 1e-5
    ours, stock = (
        VQAutoencoder.from_pretrained(folders[quantizer]).eval(),
        stock_class.from_pretrained(tmp_path / "out"),
    )
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(stock(images).sample, ours(images).pixel_values, rtol=0, atol=1e-5)
    assert stock.config.scaling_factor == pytest.approx(1 / 1.7)


@for_each("quantizer, dtype", [("vq", torch.float16), ("vq", torch.bfloat16), ("kl", torch.bfloat16)])
def test_half_precision_is_exported_without_loss_and_stored_in_its_precision(quantizer, dtype, tmp_path):
    pipeline = make_exportable(quantizer)
    pipeline.to(dtype).save_pretrained(tmp_path / "ours")
    report = export(tmp_path / "ours", tmp_path / "out", "dit-pipeline")
    alone = export(tmp_path / "ours" / "vae", tmp_path / "vae", "vqmodel")
    assert max([*report.differences.values(), *alone.differences.values()]) < 1e-5
    stock, ours = DiTPipeline.from_pretrained(tmp_path / "out"), VQDiTPipeline.from_pretrained(tmp_path / "ours")
    ours.vae.float()
    for pipe in (stock, ours):
        pipe.set_progress_bar_config(disable=True)
    options = {"guidance_scale": 3.0, "num_inference_steps": 4, "output_type": "np"}
    found = stock(stock.get_label_ids(["dog", "cat"]), generator=torch.manual_seed(0), **options).images
    expected = ours(["dog", "cat"], generator=torch.manual_seed(0), quantize=quantizer == "vq", **options).images
    assert expected.std() > 0.02 and abs(found - expected).max() < 1e-4
    dtypes = {}
    for folder in (tmp_path / "out" / "transformer", tmp_path / "out" / "vae", tmp_path / "vae"):
        tensors = load_file(next(folder.glob("*.safetensors")))
        dtypes |= {f"{folder.name} {name}": tensor.dtype for name, tensor in tensors.items()}
    exact = {name.split()[1] for name, kept in dtypes.items() if kept == torch.float32}
    codebook = {"quantize.embedding.weight"} if quantizer == "vq" else set()
    convolutions = {f"{name}.{part}" for name in ("quant_conv", "post_quant_conv") for part in ("weight", "bias")}
    assert exact == convolutions | codebook and set(dtypes.values()) == {dtype, torch.float32}


def test_dit_export_draws_the_same_images_in_diffusers(tmp_path):
    pipeline = make_exportable()
    pipeline.save_pretrained(tmp_path / "ours")
    report = export(tmp_path / "ours", tmp_path / "out", "dit-pipeline")
    assert report.written == "DiTPipeline of diffusers with VQModel"
    assert set(report.differences) == {"prediction", "latents", "images"}
    stock = DiTPipeline.from_pretrained(tmp_path / "out")
    stock.set_progress_bar_config(disable=True)
    options = {"guidance_scale": 3.0, "num_inference_steps": 4, "output_type": "np"}
    found = stock(stock.get_label_ids(["dog", "cat"]), generator=torch.manual_seed(0), **options).images
    expected = pipeline(["dog", "cat"], generator=torch.manual_seed(0), **options).images
    assert expected.std() > 0.02 and abs(found - expected).max() < 1e-4


def test_dit_export_of_a_flow_takes_another_scheduler(tmp_path, capsys):
    pipeline = make_exportable(objective="flow")
    pipeline.save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="has no scale_model_input.*solver with flow sigmas"):
        export(tmp_path / "ours", tmp_path / "out", "dit-pipeline")
    assert not (tmp_path / "out").exists()
    changes = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    argv = ["export", tmp_path / "ours", "--format", "dit-pipeline", "--output_dir", tmp_path / "out"]
    argv += ["--scheduler", "DPMSolverMultistep", "--scheduler_config", json.dumps(changes), "--json"]
    assert main([str(part) for part in argv]) == 0
    assert json.loads(capsys.readouterr().out)["differences"]["prediction"] < 1e-5
    stock = DiTPipeline.from_pretrained(tmp_path / "out")
    stock.set_progress_bar_config(disable=True)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, **changes)
    options = {"guidance_scale": 1.0, "num_inference_steps": 4, "output_type": "np"}
    found = stock([1, 0], generator=torch.manual_seed(0), **options).images
    expected = pipeline([1, 0], generator=torch.manual_seed(0), **options).images
    assert expected.std() > 0.02 and abs(found - expected).max() < 1e-4


def run_onnx(file, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Outputs by name."""
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    given = {name: tensor.numpy() for name, tensor in inputs.items()}
    return dict(zip(names, map(torch.from_numpy, session.run(names, given)), strict=True))


@pytest.mark.extended
def test_onnx_encoder_gives_timms_features_for_any_batch(folders, tmp_path):
    pytest.importorskip("onnxscript")
    report = export(folders["encoder"], tmp_path / "out", "onnx")
    assert set(report.files) == {"encoder.onnx", "export.json"}
    stored = json.loads((tmp_path / "out/export.json").read_text())
    assert stored["mean"] == [0.5] * 3 and stored["differences_from_torch"] == report.differences
    assert report.differences["encoder.onnx: features"] < 1e-5 and stored["tolerance"] == report.tolerance == 1e-4
    stock = timm.create_model(f"local-dir:{folders['encoder']}", pretrained=True).eval()
    for batch in (1, 5):
        images = torch.randn(batch, 3, 16, 16)
        with torch.no_grad():
            expected = stock(images)
        found = run_onnx(tmp_path / "out/encoder.onnx", pixel_values=images)["features"]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.extended
def test_onnx_halves_of_an_autoencoder_give_our_latents_codes_and_images(folders, tmp_path):
    pytest.importorskip("onnxscript")
    report = export(folders["vq"], tmp_path / "out", "onnx")
    assert set(report.files) == {"encoder.onnx", "decoder.onnx", "export.json"}
    assert max(report.differences.values()) < 1e-5 and len(report.differences) == 4
    model, images = VQAutoencoder.from_pretrained(folders["vq"]).eval(), torch.rand(5, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        expected, encoded = model(images), model.encode(images)
    found = run_onnx(tmp_path / "out/encoder.onnx", pixel_values=images)
    torch.testing.assert_close(found["latents"], encoded.latents, rtol=0, atol=1e-5)
    assert torch.equal(found["codes"], encoded.codes) and len(encoded.codes.unique()) > 2
    found = run_onnx(tmp_path / "out/decoder.onnx", latents=found["quantized"])
    torch.testing.assert_close(found["pixel_values"], expected.pixel_values, rtol=0, atol=1e-5)


@pytest.mark.extended
def test_onnx_generator_draws_the_pipelines_images_for_any_batch_with_and_without_class(folders, tmp_path):
    pytest.importorskip("onnxscript")
    report = export(folders["drift"], tmp_path / "out", "onnx")
    assert set(report.files) == {"generator.onnx", "export.json"} and max(report.differences.values()) < 1e-5
    stored = json.loads((tmp_path / "out/export.json").read_text())
    assert stored["noise"] == [4, 8, 8] and stored["class_names"] == ["zero", "one"] and stored["no_class"] == 2
    weights = sum(path.stat().st_size for path in folders["drift"].rglob("*.safetensors"))
    content = (tmp_path / "out/generator.onnx").read_bytes()
    assert len(content) < weights and b"/" + __file__.encode().split(b"/")[1] not in content  # no folder of a machine
    pipeline = VQDriftPipeline.from_pretrained(folders["drift"])
    for labels in ([1], [0, 1, 1, 0, 1]):
        noise = torch.randn(len(labels), 4, 8, 8)
        found = run_onnx(tmp_path / "out/generator.onnx", noise=noise, class_labels=torch.tensor(labels))
        for output_type, name in (("latent", "latents"), ("pt", "images")):
            expected = pipeline(labels, latents=noise, output_type=output_type).images
            torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-4)
    unconditional = pipeline(num_images=5, latents=noise, output_type="pt").images
    found = run_onnx(tmp_path / "out/generator.onnx", noise=noise, class_labels=torch.full((5,), 2))
    torch.testing.assert_close(found["images"], unconditional, rtol=0, atol=1e-4)
    assert expected.std() > 0.02 and (unconditional - expected).abs().max() > 1e-3


@pytest.mark.slow  # the fast tests export a transformer by the same function
def test_onnx_of_a_generator_of_dense_layers_draws_its_images(tmp_path):
    pytest.importorskip("onnxscript")
    made = drift_pipeline()
    mlp = LatentMLP(in_channels=4, sample_size=8, num_layers=1, width=16, num_embeds_ada_norm=2).eval()
    torch.nn.init.normal_(mlp.class_embedder.embedding_table.weight)
    VQDriftPipeline(mlp, made.vae, made.config.id2label).save_pretrained(tmp_path / "ours")
    assert max(export(tmp_path / "ours", tmp_path / "out", "onnx").differences.values()) < 1e-5
    noise, labels = torch.randn(5, 4, 8, 8), [0, 1, 1, 0, 1]
    expected = VQDriftPipeline.from_pretrained(tmp_path / "ours")(labels, latents=noise, output_type="pt").images
    found = run_onnx(tmp_path / "out/generator.onnx", noise=noise, class_labels=torch.tensor(labels))["images"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"quantizer": "kl"}, {"quantizer": "none"}, {"code_distance": "cosine"}])
def test_onnx_of_other_latents_agrees_with_torch(tmp_path, change):
    pytest.importorskip("onnxscript")
    tiny_autoencoder(**change).save_pretrained(tmp_path / "ours")
    assert max(export(tmp_path / "ours", tmp_path / "out", "onnx").differences.values()) < 1e-5


@pytest.mark.extended
def test_an_onnx_file_that_computes_something_else_leaves_nothing_behind(folders, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    write = torch.onnx.export

    def spoiled(module, *args, **options):
        parameter = next(module.parameters())
        kept = parameter.data.clone()
        parameter.data += 0.1
        write(module, *args, **options)
        parameter.data = kept

    monkeypatch.setattr(torch.onnx, "export", spoiled)
    with pytest.raises(RuntimeError, match=r"encoder.onnx: features is .* off \(0.0001 is allowed\)"):
        export(folders["encoder"], tmp_path / "out", "onnx")
    assert list(tmp_path.iterdir()) == []


def test_onnx_without_its_libraries_names_the_install_command(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_dpssl.convert.onnx_exports.LIBRARIES", ("torch", "onnx_that_is_absent"))
    with pytest.raises(ImportError, match=r"need onnx_that_is_absent: pip install 'hf_dpssl\[onnx\]'"):
        export(folders["encoder"], tmp_path / "out", "onnx")


def small_stem_encoder(folder) -> None:
    """An encoder that stock timm cannot express."""
    config = ContrastiveConfig("resnet18", {"channels": [8, 8, 16, 16]}, stem="small_image")
    ContrastiveEncoder(config).save_pretrained(folder)


REFUSALS = [
    ("encoder", "vqmodel", "is an encoder, which can be exported as timm or onnx; vqmodel is of autoencoder"),
    ("dit", "onnx", "is a latent DiT, which can be exported as dit-pipeline"),
    ("token", "onnx", "token model, which cannot be exported; onnx is of encoder or autoencoder or one-step generator"),
    ("token", "timm", "is a token model, which cannot be exported; timm is of encoder"),
    ("gan", "onnx", "is a GAN, which cannot be exported"),
    ("stem", "timm", "stem is 'small_image'.*export it as onnx"),
    ("uneven", "vqmodel", "encoder and decoder differ in block_out_channels.*; its latents are scaled per channel"),
    ("stock", "vqmodel", "is diffusers' AutoencoderKL already. It loads with diffusers as it is"),
    ("stock", "onnx", "is diffusers' AutoencoderKL already. `hf-dpssl import` makes"),
]


@for_each("kind, format, reason", REFUSALS)
def test_a_refusal_names_the_reason_and_writes_nothing(folders, tmp_path, kind, format, reason):
    source = folders.get(kind, tmp_path / "source")
    if kind == "stem":
        small_stem_encoder(source)
    elif kind == "uneven":
        tiny_autoencoder(decoder_block_out_channels=[8, 8], latent_std=[1.0, 2.0, 1.0, 1.0]).save_pretrained(source)
    elif kind == "stock":
        AutoencoderKL(block_out_channels=(8,), norm_num_groups=2).save_pretrained(source)
    with pytest.raises(ValueError, match=reason):
        export(source, tmp_path / "out", format)
    assert not (tmp_path / "out").exists()


def test_an_export_replaces_only_an_earlier_one_and_only_when_told(folders, tmp_path):
    export(folders["encoder"], tmp_path / "out", "timm")
    with pytest.raises(FileExistsError, match="choose another folder, or pass --overwrite"):
        export(folders["encoder"], tmp_path / "out", "timm")
    (tmp_path / "out/notes.txt").touch()
    with pytest.raises(FileExistsError, match=r"1 files of others \(notes.txt\)"):
        export(folders["encoder"], tmp_path / "out", "timm", overwrite=True)
    (tmp_path / "out/notes.txt").unlink()
    (tmp_path / "out/model.safetensors").write_bytes(b"")
    export(folders["encoder"], tmp_path / "out", "timm", overwrite=True)
    assert (tmp_path / "out/model.safetensors").stat().st_size > 1000
    (tmp_path / "diary").mkdir()
    (tmp_path / "diary/monday.txt").touch()
    with pytest.raises(FileExistsError, match="is no exported model and is not replaced"):
        export(folders["encoder"], tmp_path / "diary", "timm", overwrite=True)


def test_export_takes_an_id_of_the_hub(hub, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    commit = push(folders["encoder"], "org/encoder").commit
    report = export(f"org/encoder@{commit}", tmp_path / "out", "timm")
    assert set(report.files) == {"config.json", "model.safetensors"}
    with pytest.raises(OSError, match="cannot pull org/nothing at revision 'main'.*Is the name right"):
        export("org/nothing", tmp_path / "nothing", "timm")
    with pytest.raises(FileNotFoundError, match="is no folder, and no id of the Hub"):
        export("a/b/c", tmp_path / "nothing", "timm")
    assert not (tmp_path / "nothing").exists()
    stock = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    ours = encoder_model().encoder.timm_model.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in stock.state_dict().items())
