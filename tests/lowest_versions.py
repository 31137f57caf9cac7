"""Print pip constraints that pin every dependency to the lower bound stated in pyproject.toml."""

import re
import sys
import tomllib
from pathlib import Path


def lowest_versions(pyproject: str) -> list[str]:
    """`name==bound` for each `name>=bound` of the project's dependencies."""
    dependencies = tomllib.loads(pyproject)["project"]["dependencies"]
    return ["{}=={}".format(*re.fullmatch(r"([\w.-]+)>=([\w.]+)", entry).groups()) for entry in dependencies]


if __name__ == "__main__":
    print("\n".join(lowest_versions(Path(sys.argv[1]).read_text(encoding="utf-8"))))
