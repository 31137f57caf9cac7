"""Labels that transformers.Trainer passes to every model: ours learn without them."""

from __future__ import annotations


def ignore_labels(others: dict) -> None:
    """Take note of no `labels`; they are no argument of `forward`, or Trainer would report no loss without them.

    Raises:
        TypeError: another argument, misspelt perhaps.
    """
    unknown = sorted(others.keys() - {"labels"})
    if unknown:
        raise TypeError(f"forward() got an unexpected keyword argument {unknown[0]!r}")
