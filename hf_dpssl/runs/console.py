"""What runs tell on the terminal: lines of progress, which `--quiet` switches off with progress bars; errors' words."""

from __future__ import annotations

import os

# Read by this package, tqdm, huggingface_hub, datasets, transformers and diffusers when they are imported.
_QUIET = {
    "DPSSL_QUIET": "1",
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
}


def be_quiet() -> None:
    """From now on no lines of progress, here and in processes that are started; libraries not yet imported comply."""
    os.environ.update(_QUIET)


def is_quiet() -> bool:
    """Whether `--quiet` was given, or DPSSL_QUIET is set."""
    return os.environ.get("DPSSL_QUIET", "0") not in ("", "0")


def say(text: str) -> None:
    """A line on stdout, of a machine's first process only; nothing under `--quiet`."""
    if not is_quiet() and os.environ.get("LOCAL_RANK", "0") == "0":
        print(printable(text), flush=True)


def printable(text: str) -> str:
    """Text for a terminal: what a file said cannot move the cursor, colour or hide lines; line ends and blanks stay."""
    kept = "\n\t\u00a0"
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


def one_line(error: BaseException) -> str:
    """The whole of what an error says, in one line: clients put a request's number first and the reason last."""
    return " ".join(str(error).split()) or "no message"
