"""A Space without a server: one folder with a page, a model and what runs it, from a disk or any host of files.

A browser lets a page that lies on a disk read scripts beside it, and nothing else. So the page's own module and style
are in index.html, and the runtime's binary and the model are text in scripts (packed_bytes.py).
"""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

from ..runs.shipped_folders import shipped_folder
from . import browser_runtime
from .packed_bytes import packed

_LICENCE = "LICENSE-onnxruntime-web.txt"


def write_static_page(
    folder: Path, name: str, runtime: dict[str, bytes], facts: dict, parts: dict[str, str], about: list[str]
) -> None:
    """Write the page of a Space into an empty folder.

    Args:
        folder: of the result.
        name: of the Space, whose folder `static` holds page.html, app.js and README.md.
        runtime: of `runtime_files`.
        facts: what app.js reads, as JSON.
        parts: results of `packed` by name: `model`, and what else app.js asks for.
        about: lines of plain text that say what the model is.
    """
    shared = shipped_folder("spaces") / "static"
    own = shipped_folder("spaces") / name / "static"
    lines = "".join(f"<li>{html.escape(line)}</li>" for line in about)
    marks = {
        "__STYLE__": _text(shared / "style.css"),
        "__RUNTIME__": _text(shared / "runtime.js"),
        "__APP__": _text(own / "app.js"),
        "__VERSION__": browser_runtime.VERSION,
        "__ABOUT__": f"<ul>{lines}</ul>",
        # "<" could end the script element, and may come from a class name.
        "__FACTS__": json.dumps(facts, separators=(",", ":")).replace("<", "\\u003c"),
    }
    # At once: a class name may hold another's mark.
    template = _text(own / "page.html").replace("__TAIL__\n", _text(shared / "tail.html"))
    page = re.sub("|".join(marks), lambda found: marks[found[0]], template)
    readme = _text(own / "README.md").replace("__VERSION__", browser_runtime.VERSION)
    started = {"binary": packed(runtime[browser_runtime.BINARY]), "module": packed(runtime[browser_runtime.MODULE])}
    texts = {
        "index.html": page,
        "README.md": readme,
        _LICENCE: _text(shared / _LICENCE),
        "runtime-packed.js": _script(started),
        "model-packed.js": _script(parts),
    }
    for file, text in texts.items():
        (folder / file).write_text(text, encoding="utf-8")
    (folder / browser_runtime.SCRIPT).write_bytes(runtime[browser_runtime.SCRIPT])


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _script(parts: dict[str, str]) -> str:
    return "".join(f"(globalThis.packed ??= {{}}).{name} = {content};\n" for name, content in parts.items())
