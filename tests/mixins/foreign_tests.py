"""Makes the tests of another library importable: its source is given by a path and nothing of it is kept here."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import types
from pathlib import Path

import pytest


def source_tests(variable: str, needed: str) -> None:
    """Put the source that an environment variable names first on the path, so that `tests` is its package of tests.

    The module that calls it is skipped where the variable is not set; FileNotFoundError where its path lacks `needed`.
    """
    source = os.environ.get(variable)
    if not source:
        pytest.skip(f"{variable} is not set: give the path of a source tree", allow_module_level=True)
    if not Path(source, needed).is_file():
        raise FileNotFoundError(f"{variable}={source} has no {needed}: give the root of a source tree.")
    for name in [name for name in sys.modules if name == "tests" or name.startswith("tests.")]:
        del sys.modules[name]
    sys.path.insert(0, source)
    package = types.ModuleType("tests")
    package.__path__ = [str(Path(source, "tests"))]
    sys.modules["tests"] = package


def stand_in(name: str, **content) -> None:
    """Modules that a source distribution leaves out, and that its mixins import by name, hold this content only."""
    parts = name.split(".")
    for end in range(2, len(parts) + 1):
        part = ".".join(parts[:end])
        if part in sys.modules or importlib.util.find_spec(part) is not None:
            continue
        module = types.ModuleType(part)
        module.__path__ = []
        sys.modules[part] = module
        setattr(sys.modules[".".join(parts[: end - 1])], parts[end - 1], module)
    module = importlib.import_module(name)
    for key, value in content.items():
        if not hasattr(module, key):
            setattr(module, key, value)


def expect_failures(case: type, limits: dict[str, str]) -> None:
    """Mark checks of a case that fail by design, by name, with the reason; one that passes then fails the run."""
    for name, reason in limits.items():
        check = getattr(case, name)

        def expected(self, check=check):
            return check(self)

        expected.__name__ = name
        setattr(case, name, pytest.mark.xfail(reason=reason, strict=True)(expected))
