"""SIGKILL at a chosen moment: a parent that watches files appear may see the last of them when the run is over."""

import fnmatch
import os
import signal


def die_at_rename(count: int, pattern: str) -> None:
    """Let SIGKILL end this process at its `count`-th rename to a path of that pattern: written, not yet named."""
    seen, rename = [], os.replace

    def replace(source, target, **options):
        if fnmatch.fnmatch(os.fspath(target), pattern):
            seen.append(target)
            if len(seen) == count:
                os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target, **options)

    os.replace = replace
