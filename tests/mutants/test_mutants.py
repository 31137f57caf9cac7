"""The planted defects still fit the code: what they replace is there once, and their tests exist."""

import ast
import re
from collections import Counter

from planted import REPOSITORY, load


def test_every_defect_can_be_planted_once_and_leaves_a_file_that_can_be_read():
    wrong = []
    for mutant in load():
        try:
            text = mutant.planted((REPOSITORY / mutant.file).read_text(encoding="utf-8"))
            assert mutant.before != mutant.after, "nothing is changed"
            if mutant.file.endswith(".py"):
                ast.parse(text)
        except (ValueError, AssertionError, SyntaxError, OSError) as error:
            wrong.append(f"{mutant.room}: {mutant.defect}: {error}")
    assert not wrong, "\n".join(wrong)


def test_every_test_that_a_defect_names_exists():
    missing = []
    for mutant in load():
        assert mutant.tests, f"{mutant.room}: {mutant.defect} names no test"
        for test in mutant.tests:
            path, _, name = test.partition("::")
            text = (REPOSITORY / path).read_text(encoding="utf-8") if (REPOSITORY / path).exists() else ""
            if not re.search(rf"^ *def {re.escape(name.split('::')[-1].split('[')[0])}\(", text, re.MULTILINE):
                missing.append(test)
    assert not missing


def test_descriptions_tell_defects_apart_and_there_are_sixty():
    counts = Counter(f"{mutant.room}: {mutant.defect}" for mutant in load())
    assert max(counts.values()) == 1 and counts.total() >= 60
