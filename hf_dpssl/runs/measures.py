"""Measures of a finished run: one that cannot be taken is left out and named, and the run is kept."""

from __future__ import annotations

from collections.abc import Callable

from .console import say


class Measures:
    """Metrics that are taken one after another.

    Attributes:
        metrics: {name: value} of those that could be taken.
        left_out: {measure: why} of those that could not.
    """

    def __init__(self):
        self.metrics: dict[str, float] = {}
        self.left_out: dict[str, str] = {}

    def take(self, name: str, measure: Callable[..., dict[str, float]], *arguments) -> None:
        """Add the metrics that `measure(*arguments)` returns, or note that there are none and why."""
        try:
            self.metrics |= measure(*arguments)
        except (ValueError, OSError, ImportError, RuntimeError) as error:
            self.left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            say(f"{name} is not measured: {error}")

    def results(self) -> dict:
        """What goes into results.json beside the metrics."""
        return {"not_measured": self.left_out} if self.left_out else {}
