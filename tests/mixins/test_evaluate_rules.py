"""evaluate's own checks of the modules in its repository, run on ours.

EVALUATE_SOURCE is the path of a checkout of evaluate with its tests.
"""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from foreign_tests import source_tests

source_tests("EVALUATE_SOURCE", "tests/test_metric_common.py")
pytest.importorskip("absl")

from hf_dpssl import evaluation  # noqa: E402

FOLDER = tempfile.TemporaryDirectory()
HERE = os.getcwd()
for name in evaluation.MODULES:  # where their modules lie
    folder = Path(FOLDER.name, "metrics", name)
    folder.mkdir(parents=True)
    shutil.copy(Path(evaluation.__file__).parent / "modules" / f"{name}.py", folder)
os.chdir(FOLDER.name)  # in which theirs looks for modules while it is imported
try:
    from tests.test_metric_common import LocalModuleTest  # noqa: E402
finally:
    os.chdir(HERE)

pytestmark = pytest.mark.mixins


class ModulesTest(LocalModuleTest):
    @pytest.fixture(autouse=True)
    def among_the_modules(self, monkeypatch):
        monkeypatch.chdir(FOLDER.name)


del LocalModuleTest
