"""One test over several cases of one claim."""

from __future__ import annotations

import contextlib
import functools
import inspect
import random
from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch


def seed_generators() -> None:
    """The global generators start as they do at the beginning of every test."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def for_each(names: str, cases: Iterable) -> Callable:
    """Decorator of a test that is one test for all cases, where pytest.mark.parametrize makes one of each.

    `names` and `cases` are given as there. Every case starts from the same seeds, with an empty folder as `tmp_path`,
    a `monkeypatch` that is undone after it, and nothing in `capsys` and `caplog`. The first failure ends the test and
    names its case; a case that skips skips no other.
    """
    keys = [name.strip() for name in names.split(",")]
    cases = list(cases)
    assert cases, f"there is no case of {names}"

    def decorate(test: Callable) -> Callable:
        @functools.wraps(test)
        def over_all_cases(**fixtures):
            skipped = []
            for count, case in enumerate(cases, 1):
                values = dict(zip(keys, case if len(keys) > 1 else [case], strict=True))
                own = dict(fixtures)
                seed_generators()
                with contextlib.ExitStack() as stack:
                    if "tmp_path" in fixtures:
                        own["tmp_path"] = fixtures["tmp_path"] / f"case-{count}"
                        own["tmp_path"].mkdir()
                    if "monkeypatch" in fixtures:
                        own["monkeypatch"] = stack.enter_context(pytest.MonkeyPatch.context())
                    if "capsys" in fixtures:
                        fixtures["capsys"].readouterr()
                    if "caplog" in fixtures:
                        fixtures["caplog"].clear()
                    try:
                        test(**own, **values)
                    except pytest.skip.Exception as reason:
                        skipped.append(reason)
                    except BaseException as error:
                        error.add_note(f"in the case {', '.join(f'{k}={v!r}' for k, v in values.items())}")
                        raise
            if len(skipped) == len(cases):
                raise skipped[0]

        parameters = inspect.signature(test).parameters
        fixtures = [parameter for name, parameter in parameters.items() if name not in keys]
        over_all_cases.__signature__ = inspect.Signature(fixtures)
        return over_all_cases

    return decorate
