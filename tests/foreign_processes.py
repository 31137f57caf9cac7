"""Python code in processes as good as fresh: without hf_dpssl, or with the local server as its Hub."""

from __future__ import annotations

import json
import os
import re
import textwrap
from pathlib import Path

from forked_processes import run_forked
from hub_server import HubServer

REPOSITORY = Path(__file__).parents[1]


# The first lines of every foreign process: hf_dpssl is as good as not installed.
BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_dpssl":
            raise ModuleNotFoundError("hf_dpssl is blocked in this process")
sys.meta_path.insert(0, Block())
try:
    import hf_dpssl
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("hf_dpssl could be imported")
import json, torch
from PIL import Image
from safetensors.torch import load_file
"""


def run_foreign(code: str, folder) -> dict:
    """Run code without hf_dpssl in `folder`; it prints one line of JSON last."""
    done = run_forked(["-c", BLOCK + code], cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def run_client(code: str, server: HubServer, home: Path, **env: str) -> dict:
    """Run `code` in a process as good as fresh for which `server` is the Hub; the dict `report` that it fills.

    `report["requests"]` are the requests it made, to any host: the server is its HTTP proxy too. The code may use
    `attempt(f)`, which is what f() returns, or its error as text.
    """
    head = """
        import json, os, sys
        report = {}
        def attempt(function):
            try:
                return function()
            except Exception as error:
                return f"{type(error).__name__}: {error}"
    """
    tail = 'with open(os.environ["REPORT"], "w") as file: json.dump(report, file)'
    hub = {
        "HF_ENDPOINT": server.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0", "HTTP_PROXY": server.endpoint, "HTTPS_PROXY": server.endpoint,
        "NO_PROXY": "127.0.0.1,localhost", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY),
        "ORT_DISABLE_TELEMETRY": "1", "REPORT": str(home / "report.json"),  # diffusers imports onnxruntime
    }  # fmt: skip
    inherited = {k: v for k, v in os.environ.items() if not re.match("HF_|HUGGING|TRANSFORMERS_|.*_PROXY$", k, re.I)}
    command = ["-c", "\n".join([textwrap.dedent(head), textwrap.dedent(code), tail])]
    first = len(server.requests)
    done = run_forked(command, home, inherited | hub | env)
    assert done.returncode == 0, done.stderr
    requests = server.requests[first:]
    elsewhere = [path for _, path in requests if not path.startswith("/")]
    assert all("://datasets-server." in path for path in elsewhere), elsewhere  # a service that `datasets` asks first
    return json.loads((home / "report.json").read_text()) | {"requests": requests}
