"""The module of a Space, as a test calls it."""

from __future__ import annotations

import importlib.util

from hf_dpssl.runs.shipped_folders import shipped_folder


def load_app(name: str):
    """The module of a Space."""
    spec = importlib.util.spec_from_file_location(f"space_{name}", shipped_folder("spaces") / name / "app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
