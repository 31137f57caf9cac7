"""Parts of pages without a server, as Python reads them, and a stand-in for the package that runs them."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path

import numpy as np

from hf_dpssl.pages import browser_runtime


def parts_of(script: Path) -> dict[str, bytes]:
    """What a script of packed parts holds, by name."""
    found = re.findall(r"\(globalThis.packed \?\?= {}\)\.(\w+) = (.*);\n", script.read_text(encoding="utf-8"))
    return {name: unpacked(json.loads(content)) for name, content in found}


def unpacked(part: dict) -> bytes:
    """The inverse of `packed`."""
    content = bytearray(gzip.decompress(base64.b64decode(part["data"])))
    for start, count in part["ranges"]:
        planes = np.frombuffer(bytes(content[start : start + 4 * count]), np.uint8).reshape(4, count)
        content[start : start + 4 * count] = planes.T.tobytes()
    return bytes(content)


def facts_of_page(page: str) -> dict:
    """What app.js reads."""
    return json.loads(re.search(r'<script type="application/json" id="facts">(.*?)</script>', page, re.DOTALL)[1])


def runtime_package(folder: Path, version: str = browser_runtime.VERSION) -> Path:
    """A folder like the npm package's, with files that run nothing."""
    (folder / "dist").mkdir(parents=True)
    (folder / "package.json").write_text(json.dumps({"version": version}))
    for name in (browser_runtime.SCRIPT, browser_runtime.MODULE, browser_runtime.BINARY):
        (folder / "dist" / name).write_bytes(f"/* {name} */".encode())
    return folder
