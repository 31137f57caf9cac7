"""Errors of the command line and of the training scripts: one line and an exit code; a traceback on demand."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..runs.console import one_line, printable
from ..runs.shipped_folders import shipped_folder

FAILURE, BAD_INPUT, INTERRUPTED = 1, 2, 130
_EXPECTED_OF_OURS = (RuntimeError, ArithmeticError)  # of other libraries they are bugs, or memory that ran out


def debugging() -> bool:
    """Whether DPSSL_DEBUG asks for tracebacks; `hf-dpssl --debug` sets it."""
    return os.environ.get("DPSSL_DEBUG", "0") not in ("", "0")


def reported(program: str, command: Callable[[], object]) -> int:
    """Run a command; its exit status (0 where it returns no number).

    A wrong folder, id, value or file, a Hub that cannot be reached or a missing library is one line on stderr that
    starts with `program`; other errors, and all of them where `debugging()`, keep their traceback.

    Returns:
        0; FAILURE of something that may work another time (the network, a busy Hub, what a run computed); BAD_INPUT;
        INTERRUPTED.
    """
    try:
        result = command()
        return result if isinstance(result, int) else 0
    except KeyboardInterrupt:
        print(f"{program}: interrupted.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # as of `| head`: what was written is what was wanted
        return reader_has_gone()
    except Exception as error:
        ours = _raised_by_us(error)
        if debugging() or not (isinstance(error, _expected()) or ours and isinstance(error, _EXPECTED_OF_OURS)):
            raise
        message = printable(one_line(error)) if str(error).strip() else type(error).__name__
        hint = "" if ours else f" ({type(error).__name__}; DPSSL_DEBUG=1 shows the traceback)"
        print(f"{program}: {message}{hint}", file=sys.stderr)
        return exit_status(error)


def reader_has_gone() -> int:
    """Nobody reads stdout any more: end without a word, as other commands do."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what Python still holds is written at its end
    return 0


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Within the block SIGTERM, by which batch systems and containers end a process, ends it by SystemExit.

    So that it leaves no temporary folder. The status is the one that shells give: 128 and the signal's number.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def exit_status(error: Exception) -> int:
    """FAILURE where the network, a busy Hub or a computation is behind an expected error, else BAD_INPUT."""
    if isinstance(error, _EXPECTED_OF_OURS):
        return FAILURE
    return FAILURE if any(map(_may_work_later, _chain(error))) else BAD_INPUT


def _expected() -> tuple[type[Exception], ...]:
    """What bad input and networks raise, of libraries too: those that are imported, as others have raised nothing."""
    kinds: tuple[type[Exception], ...] = (ValueError, OSError, ImportError)
    if "huggingface_hub" in sys.modules:
        from huggingface_hub.errors import EntryNotFoundError, HTTPError

        kinds += (EntryNotFoundError, HTTPError)
    if "safetensors" in sys.modules:
        from safetensors import SafetensorError

        kinds += (SafetensorError,)
    return kinds


def _may_work_later(error: BaseException) -> bool:
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if "urllib.error" in sys.modules:
        from urllib.error import URLError

        if isinstance(error, URLError):
            return True
    if "huggingface_hub" not in sys.modules:
        return False
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    response = getattr(error, "response", None) if isinstance(error, HTTPError) else None
    if response is not None:  # of the client's error, and of the library's below it
        return response.status_code in (408, 429) or response.status_code >= 500
    return isinstance(error, HTTPError | OfflineModeIsEnabled)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and what it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _raised_by_us(error: Exception) -> bool:
    """Whether the message is one of this package, or of a script of training/."""
    frames = list(traceback.walk_tb(error.__traceback__))
    if not frames:
        return False
    code = frames[-1][0]
    if code.f_globals.get("__name__", "").split(".")[0] in ("hf_dpssl", "__main__"):
        return True
    return shipped_folder("training") in Path(code.f_code.co_filename).parents  # what the scripts share
