"""What a page tells its reader to do: the indented shell commands and the Python blocks, in their order."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple


class Step(NamedTuple):
    """A command (its words), or a Python block (its text)."""

    words: list[str] | None
    python: str | None


def steps_of(page: Path) -> list[Step]:
    """Commands and Python blocks of a Markdown page; a command may go on after a backslash, `#` starts a remark."""
    steps, block, command = [], None, ""
    for line in page.read_text(encoding="utf-8").splitlines():
        if block is not None:
            if line.startswith("```"):
                steps.append(Step(None, "\n".join(block)))
                block = None
            else:
                block.append(line)
        elif line.startswith("```python"):
            block = []
        elif re.match(r" {4}\S", line) or command:
            command += line.strip().removesuffix("\\")
            if not line.endswith("\\"):
                steps += [Step(shlex.split(part, comments=True), None) for part in command.split("&&")]
                command = ""
    return steps
