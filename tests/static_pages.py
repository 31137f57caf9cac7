"""Parts of pages without a server, as Python reads them, and a stand-in for the package that runs them."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import numpy as np

from hf_dpssl.pages import browser_runtime


def parts_of(script: Path) -> dict[str, bytes]:
    """What a script of packed parts holds, by name."""
    lines = script.read_bytes().decode("ascii").split("(globalThis.packed ??= {}).")[1:]
    return {name: unpacked(content.removesuffix(";\n")) for name, _, content in (one.partition(" = ") for one in lines)}


def unpacked(text: str) -> bytes:
    """The inverse of `packed`."""
    head, _, data = text.partition(',"data":"')
    part = json.loads(head + "}")
    meant = {"x00": "\0", "0": "\0", "n": "\n", "r": "\r"}
    data = re.sub(r"\\(x00|.)", lambda found: meant.get(found[1], found[1]), data.removesuffix('"}'), flags=re.DOTALL)
    bits = "".join(f"{ord(character):07b}" for character in data)
    small = bytes(int(bits[i : i + 8], 2) for i in range(0, 8 * part["size"], 8))
    content = bytearray(gzip.decompress(small))
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
