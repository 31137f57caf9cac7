"""`hf-dpssl space NAME --static`: a folder that holds a model and all that runs it, or a refusal and nothing."""

import json

import numpy as np
import pytest
import torch
import yaml
from cases import for_each
from static_pages import facts_of_page, parts_of, runtime_package
from tiny_checkpoints import drift_pipeline, finish, save_checkpoints

from hf_dpssl import VQDriftPipeline
from hf_dpssl.cli.commands import main
from hf_dpssl.convert import static_spaces
from hf_dpssl.pages import browser_runtime
from hf_dpssl.runs.written_folders import RECORD

HOSTILE = "</script><b onclick=x>__APP__"
FILES = {"index.html", "README.md", "LICENSE-onnxruntime-web.txt", "model-packed.js", "runtime-packed.js"}


@pytest.fixture
def runtime(tmp_path, monkeypatch):
    monkeypatch.setenv(browser_runtime.VARIABLE, str(runtime_package(tmp_path / "package")))


@pytest.mark.extended
def test_generator_page_holds_the_pipeline_and_names_nothing_elsewhere(runtime, tmp_path, capsys):
    pytest.importorskip("onnxscript")
    onnx, onnxruntime = (pytest.importorskip(name) for name in ("onnx", "onnxruntime"))
    made = drift_pipeline()
    torch.nn.init.normal_(made.vae.quantizer.codebook, std=2.0)
    VQDriftPipeline(made.transformer, made.vae, {0: HOSTILE, 1: "one"}).save_pretrained(tmp_path / "drift")
    finish(tmp_path / "drift", "drift")
    out = tmp_path / "page"
    argv = ["space", "image_generator", "--static", str(out), "--model", str(tmp_path / "drift")]
    assert main(argv) == 0
    assert {path.name for path in out.iterdir()} == FILES | {browser_runtime.SCRIPT, RECORD}
    assert (
        f"{sum(path.stat().st_size for path in out.iterdir() if path.name != RECORD):,} bytes"
        in capsys.readouterr().out
    )
    page = (out / "index.html").read_text(encoding="utf-8")
    facts = facts_of_page(page)
    assert facts == {"noise": [4, 8, 8], "image": [3, 16, 16], "classes": [HOSTILE, "one"], "noClass": 2}
    assert "<b onclick" not in page and page.count("</script>") == 5 and "trained on digits" in page
    assert "numbers in its checkpoint, here rounded to" in page
    assert yaml.safe_load((out / "README.md").read_text(encoding="utf-8").split("---")[1])["sdk"] == "static"
    assert "import(" not in page and "fetch(" not in page
    assert parts_of(out / "runtime-packed.js")["module"] == f"/* {browser_runtime.MODULE} */".encode()

    model = parts_of(out / "model-packed.js")["model"]
    weights = [np.frombuffer(one.raw_data, np.uint32) for one in onnx.load_from_string(model).graph.initializer]
    assert not (np.concatenate([one for one in weights if len(one) > 256]) & 0xFF).any()  # rounded to 16 bits or fewer
    session = onnxruntime.InferenceSession(model)
    noise = torch.randn(4, 4, 8, 8)
    given = {"noise": noise.numpy(), "class_labels": np.array([0, 1, 1, 0])}
    latents, images = session.run(["latents", "images"], given)
    pipeline = VQDriftPipeline.from_pretrained(tmp_path / "drift")
    for output_type, found in (("latent", latents), ("pt", images)):
        expected = pipeline([0, 1, 1, 0], latents=noise, output_type=output_type).images.numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3 * max(1, abs(expected).max()))

    record = json.loads((out / RECORD).read_text())
    for wrong, reason in (
        (record | {"format": "onnx"}, "is no page of hf-dpssl space"),
        ([], "must hold a JSON object"),
    ):
        (out / RECORD).write_text(json.dumps(wrong))
        assert main([*argv, "--overwrite"]) == 2
        assert reason in capsys.readouterr().err and (out / "index.html").exists()
    (out / RECORD).write_text(json.dumps(record))
    assert main(argv) == 2
    (out / "notes.txt").touch()
    assert main([*argv, "--overwrite"]) == 2
    errors = capsys.readouterr().err
    assert "is there already: choose another folder, or pass --overwrite" in errors
    assert "holds 1 files of others (notes.txt) and is not replaced" in errors


def test_weights_keep_as_few_bits_as_leave_all_but_a_share_of_the_outputs_what_they_are():
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    # 1 in 100 rows is the difference of numbers a thousand times as large, which 16 bits do not hold.
    parts = {"weights": np.full((2, 1), 1000.3, np.float32), "large": np.full((1,), 1000.3, np.float32)}
    weights = [onnx.numpy_helper.from_array(value, name) for name, value in parts.items()]
    weights[1].ClearField("raw_data")
    weights[1].float_data.extend([1000.3])  # is not rounded
    nodes = [
        onnx.helper.make_node("MatMul", ["rows", "weights"], ["products"]),
        onnx.helper.make_node("Mul", ["large", "share"], ["taken"]),
        onnx.helper.make_node("Sub", ["products", "taken"], ["images"]),
    ]
    kind = onnx.TensorProto.FLOAT
    given = [onnx.helper.make_tensor_value_info(name, kind, ["n", size]) for name, size in (("rows", 2), ("share", 1))]
    graph = onnx.helper.make_graph(
        nodes, "differences", given, [onnx.helper.make_tensor_value_info("images", kind, ["n", 1])], weights
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    rows = np.zeros((100, 2), np.float32)
    rows[3, 0] = 1.0
    values = {"rows": rows, "share": rows[:, :1]}
    found = [static_spaces._smaller(model.SerializeToString(), values, "images", turned)[1] for turned in (0.0, 0.02)]
    assert found == [20, 11]


REFUSALS = [
    (
        ["image_generator"],
        "dit",
        "is a latent DiT, and the page image_generator without a server runs a one-step generator",
    ),
    (["image_generator"], "encoder", "is an encoder, and the page image_generator without a server runs a one-step"),
    (
        ["encoder_explorer"],
        "drift",
        "is a one-step generator, and the page encoder_explorer without a server runs an enc",
    ),
    (["matching_lab"], None, "matching_lab has no page without a server: image_generator and encoder_explorer have"),
    (["image_generator", "--embeddings", "x"], "drift", "--embeddings is of the page encoder_explorer"),
    (["encoder_explorer", "--embeddings", "x"], "encoder", "embeddings in x: none"),
    (["image_generator", "--push", "org/page"], "drift", "--static takes no --push"),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return save_checkpoints(tmp_path_factory.mktemp("finished"), ("dit", "drift", "encoder"))


@for_each("argv, kind, reason", REFUSALS)
def test_a_page_that_cannot_be_is_refused_in_a_sentence(runtime, checkpoints, tmp_path, capsys, argv, kind, reason):
    pytest.importorskip("onnxscript")
    model = ["--model", str(checkpoints[kind])] if kind else []
    assert main(["space", *argv, "--static", str(tmp_path / "page"), *model]) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1
    assert not (tmp_path / "page").exists()


def test_a_folder_of_somebody_else_is_not_replaced(runtime, checkpoints, tmp_path, capsys):
    pytest.importorskip("onnxscript")
    (tmp_path / "diary").mkdir()
    (tmp_path / "diary/monday.txt").touch()
    argv = ["space", "image_generator", "--model", str(checkpoints["drift"]), "--static", str(tmp_path / "diary")]
    assert main([*argv, "--overwrite"]) == 2
    assert "is no page of hf-dpssl space image_generator --static and is not replaced" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "diary").iterdir()] == ["monday.txt"]
