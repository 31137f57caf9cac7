"""The planted defects: one YAML file per room, each a list of entries

- defect: what is wrong, in words
  file: path in the repository
  before: text that occurs exactly once in it
  after: what stands there instead
  tests: node ids, at least one of which must fail
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

FOLDER = Path(__file__).parent
REPOSITORY = FOLDER.parents[1]


@dataclass(frozen=True)
class Mutant:
    """One defect; `room` is the name of the file that lists it."""

    room: str
    defect: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]

    def planted(self, text: str) -> str:
        """The file's text with the defect; ValueError when `before` does not occur exactly once."""
        if (found := text.count(self.before)) != 1:
            raise ValueError(f"{self.file} holds {self.before!r} {found} times, not once.")
        return text.replace(self.before, self.after)


def load() -> list[Mutant]:
    """All planted defects."""
    mutants = []
    for path in sorted(FOLDER.glob("*.yaml")):
        for entry in yaml.safe_load(path.read_text(encoding="utf-8")):
            mutants.append(Mutant(path.stem, **entry | {"tests": tuple(entry["tests"])}))
    return mutants
