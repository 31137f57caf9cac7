"""onnxruntime-web is the pinned release, or is refused; weights keep the bits that they are said to keep."""

import stat
import subprocess
import tarfile

import numpy as np
import pytest
from cases import for_each
from static_pages import runtime_package, unpacked

from hf_dpssl.pages import browser_runtime
from hf_dpssl.pages.packed_bytes import packed, rounded, smaller_onnx


def fake_npm(folder, monkeypatch, script: str) -> None:
    """An npm on PATH that runs a line of shell, and an empty cache."""
    folder.mkdir(exist_ok=True)
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.delenv(browser_runtime.VARIABLE, raising=False)


def test_a_package_with_another_hash_is_refused_and_not_kept(tmp_path, monkeypatch):
    fake_npm(tmp_path / "bin", monkeypatch, f'echo other > "$4/onnxruntime-web-{browser_runtime.VERSION}.tgz"')
    damaged = tmp_path / "bin/cache/hf_dpssl" / f"onnxruntime-web-{browser_runtime.VERSION}.tgz"
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"half a download")
    with pytest.raises(ValueError, match="is not that release .* and is not used: name a folder of the package"):
        browser_runtime.runtime_files()
    assert damaged.read_bytes() == b"half a download"


def test_a_package_is_used_where_no_cache_can_be_written(tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "made.tgz", "w:gz") as package:
        for file in (runtime_package(tmp_path / "package") / "dist").iterdir():
            package.add(file, f"package/dist/{file.name}")
    content = (tmp_path / "made.tgz").read_bytes()
    monkeypatch.setattr(browser_runtime, "INTEGRITY", browser_runtime.integrity(content))
    name = f"onnxruntime-web-{browser_runtime.VERSION}.tgz"
    fake_npm(tmp_path / "bin", monkeypatch, f'cp {tmp_path}/made.tgz "$4/{name}"')
    (tmp_path / "bin/cache").write_text("a file where the folder should be")
    assert browser_runtime.runtime_files()[browser_runtime.SCRIPT] == b"/* ort.wasm.min.js */"


def test_a_hash_is_written_as_npm_does(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    command = ["openssl", "dgst", "-sha512", "-binary", str(tmp_path / "file")]
    digest = subprocess.run(command, capture_output=True, check=True).stdout
    expected = subprocess.run(["base64", "-w0"], input=digest, capture_output=True, check=True).stdout.decode()
    assert browser_runtime.integrity(b"abc") == f"sha512-{expected}"


def test_without_npm_and_network_the_way_out_is_named(tmp_path, monkeypatch):
    fake_npm(tmp_path / "bin", monkeypatch, "echo 'npm error 403 by your proxy' >&2; exit 1")
    with pytest.raises(OSError, match=r"by npm pack \(npm error 403 by your proxy\).* in DPSSL_ONNXRUNTIME_WEB"):
        browser_runtime.runtime_files()
    (tmp_path / "bin/npm").unlink()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")
    with pytest.raises(OSError, match=r"could not be fetched by a download .* in DPSSL_ONNXRUNTIME_WEB"):
        browser_runtime.runtime_files()


def test_a_given_folder_is_read_if_it_is_that_version(tmp_path, monkeypatch):
    monkeypatch.setenv(browser_runtime.VARIABLE, str(runtime_package(tmp_path / "right")))
    found = browser_runtime.runtime_files()
    assert found[browser_runtime.SCRIPT] == b"/* ort.wasm.min.js */" and len(found) == 3
    monkeypatch.setenv(browser_runtime.VARIABLE, str(runtime_package(tmp_path / "wrong", "1.30.0")))
    with pytest.raises(ValueError, match=f"holds onnxruntime-web 1.30.0: {browser_runtime.VERSION} is needed"):
        browser_runtime.runtime_files()
    (tmp_path / "wrong/dist" / browser_runtime.BINARY).unlink()
    with pytest.raises(ValueError, match=r"is no folder of the npm package .*\.wasm is missing"):
        browser_runtime.runtime_files()


@for_each("bits", [11, 16, 20, 24])
def test_rounding_is_to_the_nearest_number_of_so_many_bits(bits):
    values = np.random.default_rng(0).standard_normal(5000).astype(np.float32)
    found = rounded(values, bits)
    exponents = np.frexp(values.astype(np.float64))[1]
    expected = np.round(np.ldexp(values.astype(np.float64), bits - exponents))
    np.testing.assert_array_equal(found, np.ldexp(expected, exponents - bits).astype(np.float32))
    if bits == 11:
        np.testing.assert_array_equal(found, values.astype(np.float16).astype(np.float32))


def test_packed_bytes_come_back_and_planes_make_rounded_weights_small():
    values = rounded(np.random.default_rng(0).standard_normal(4000).astype(np.float32), 16)
    content = b"head" + values.tobytes() + b"tail!"
    by_planes = packed(content, [(4, 4000)])
    assert unpacked(by_planes) == unpacked(packed(content)) == content
    assert by_planes.isascii() and len(by_planes) < 0.9 * len(packed(content))
    noise = np.random.default_rng(1).bytes(200_000)  # of every character and pair of them; gzip makes it no smaller
    assert unpacked(packed(noise)) == noise and len(packed(noise)) < 1.2 * len(noise)


def test_weights_that_stand_in_others_come_back_too():
    onnx = pytest.importorskip("onnx")
    sizes = {"many": 600, "few": 300, "as_many": 600}
    weights = [onnx.numpy_helper.from_array(np.ones(size, np.float32), name) for name, size in sizes.items()]
    node = onnx.helper.make_node("Add", ["many", "as_many"], ["sum"])
    output = onnx.helper.make_tensor_value_info("sum", onnx.TensorProto.FLOAT, [600])
    content = onnx.helper.make_model(onnx.helper.make_graph([node], "sums", [], [output], weights)).SerializeToString()
    whole, ranges = smaller_onnx(content, 24)
    assert unpacked(packed(whole, ranges)) == whole and sorted(count for _, count in ranges) == [300, 600, 600]
