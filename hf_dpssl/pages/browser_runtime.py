"""onnxruntime-web, which runs ONNX files in a browser: one release of it, fetched once and checked.

The package is none of ours and is not committed: it comes from the npm registry, by npm or without, into the user's
cache, or is in a folder that DPSSL_ONNXRUNTIME_WEB names. This release is the newest whose binary with SIMD has no more
than 3 MB when packed; later ones are larger and compute the same.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import io
import os
import shutil
import subprocess
import tarfile
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

from ..runs.atomic_files import atomic_file
from ..runs.lineage import read_json

VERSION = "1.22.0"
# Of the registry, as package-lock.json would have it.
INTEGRITY = "sha512-Ud/+EBo6mhuaQWt/OjaOk0iNWjXqJoeeMFr6xQEERZdIZH2OWpGzuujz7lfuOBjUa6TEE/sc4nb7Da5dNL34fg=="
VARIABLE = "DPSSL_ONNXRUNTIME_WEB"
SCRIPT = "ort.wasm.min.js"
MODULE = "ort-wasm-simd-threaded.mjs"
BINARY = "ort-wasm-simd-threaded.wasm"
_FILES = (SCRIPT, MODULE, BINARY)
_ARCHIVE = f"onnxruntime-web-{VERSION}.tgz"
_REGISTRY = "https://registry.npmjs.org"
_SECONDS = 300  # a download may take


def runtime_files() -> dict[str, bytes]:
    """Contents of SCRIPT, MODULE and BINARY by name.

    Raises:
        ValueError: the folder of DPSSL_ONNXRUNTIME_WEB holds another version, or what was fetched is not the release.
        OSError: it could not be fetched.
    """
    if given := os.environ.get(VARIABLE):
        return _read_folder(Path(given))
    with tarfile.open(fileobj=io.BytesIO(_archive())) as package:
        return {name: package.extractfile(f"package/dist/{name}").read() for name in _FILES}


def _read_folder(folder: Path) -> dict[str, bytes]:
    places = {name: folder / "dist" / name for name in _FILES}
    lacking = [str(path) for path in (folder / "package.json", *places.values()) if not path.is_file()]
    if lacking:
        raise ValueError(
            f"{VARIABLE}={folder} is no folder of the npm package onnxruntime-web: {lacking[0]} is missing."
        )
    found = read_json(folder / "package.json").get("version")
    if found != VERSION:
        raise ValueError(f"{VARIABLE}={folder} holds onnxruntime-web {found}: {VERSION} is needed.")
    return {name: path.read_bytes() for name, path in places.items()}


def _archive() -> bytes:
    """The package as the registry has it, from the cache, where a damaged one is replaced, or fetched."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_dpssl"
    path = cache / _ARCHIVE
    if path.is_file() and integrity(content := path.read_bytes()) == INTEGRITY:
        return content
    content = _fetch()
    if (found := integrity(content)) != INTEGRITY:
        raise ValueError(
            f"what the npm registry gave as {_ARCHIVE} is not that release ({found[:20]}..., not {INTEGRITY[:20]}...), "
            f"and is not used: name a folder of the package in {VARIABLE}."
        )
    with contextlib.suppress(OSError):  # without a cache the next call fetches it again
        with atomic_file(path, "wb") as file:
            file.write(content)
    return content


def integrity(content: bytes) -> str:
    """The hash of a package as npm writes it."""
    return f"sha512-{base64.b64encode(hashlib.sha512(content).digest()).decode()}"


def _fetch() -> bytes:
    """The package by npm, which knows its registry and proxy, or from the registry where there is no npm."""
    try:
        if npm := shutil.which("npm"):
            with tempfile.TemporaryDirectory() as folder:
                command = [npm, "pack", f"onnxruntime-web@{VERSION}", "--pack-destination", folder]
                command += ["--ignore-scripts"]
                subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=_SECONDS)
                return (Path(folder) / _ARCHIVE).read_bytes()
        registry = (os.environ.get("npm_config_registry") or _REGISTRY).rstrip("/")
        with urllib.request.urlopen(f"{registry}/onnxruntime-web/-/{_ARCHIVE}", timeout=_SECONDS) as answer:
            return answer.read()
    except (OSError, http.client.HTTPException, subprocess.SubprocessError) as error:
        lines = (getattr(error, "stderr", None) or b"").decode(errors="replace").splitlines()
        reason = next((line for line in lines if line.lower().startswith("npm err")), error)
        how = "npm pack" if shutil.which("npm") else "a download"
        raise OSError(
            f"onnxruntime-web {VERSION}, which runs models in the browser, could not be fetched by {how} ({reason}). "
            f"With a network the next call keeps it; without, unpack the npm package and name its folder in {VARIABLE}."
        ) from error
