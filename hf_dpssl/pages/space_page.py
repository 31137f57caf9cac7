"""What the Spaces' pages share: look, limits, errors as toasts, ZeroGPU. Needs gradio: pip install hf_dpssl[demo]."""

from __future__ import annotations

import functools
import inspect
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported
# Goes with the process: kept examples of an earlier start may be another model's, uploads are nobody's business.
_TEMPORARY = tempfile.TemporaryDirectory(prefix="space-", ignore_cleanup_errors=True)
os.environ.setdefault("GRADIO_EXAMPLES_CACHE", f"{_TEMPORARY.name}/examples")
os.environ.setdefault("GRADIO_TEMP_DIR", f"{_TEMPORARY.name}/files")
import gradio as gr  # noqa: E402

MAX_FILE_SIZE = 5 * 2**20  # bytes of an upload
CACHE = (3600, 6 * 3600)  # seconds between two clean-ups of uploads and results, and how long they are kept
QUEUE_SIZE = 200  # requests that wait; more are told so
_FONTS = ["system-ui", "sans-serif"]  # of the reader's system: nothing is fetched from elsewhere
_CSS = """
.gradio-container { max-width: 1240px !important; margin: 0 auto !important; }
.gradio-container main { width: 100%; }
.pictures { display: flex; flex-wrap: wrap; gap: 10px; }
.pictures figure { margin: 0; }
.pictures img { display: block; width: 100%; margin: 0 !important; image-rendering: pixelated; border-radius: 4px; }
.upload img { width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated; }
.progress { height: 6px; border-radius: 3px; background: var(--border-color-primary); overflow: hidden; }
.progress div { height: 100%; background: var(--color-accent); }
.pictures a { display: block; padding: 0 !important; line-height: 0; }
.pictures a:focus-visible img { outline: 3px solid var(--color-accent); }
.pictures figcaption { font-size: 13px; line-height: 1.3; margin: 3px 0 0 !important;
  color: var(--body-text-color-subdued); overflow-wrap: anywhere; }
footer .divider { display: none; }
.heading p { color: var(--body-text-color-subdued); max-width: 75ch; }
"""


def theme() -> gr.themes.Base:
    """The Spaces' look: system fonts, no request to another host."""
    return gr.themes.Soft(primary_hue="blue", font=_FONTS, font_mono=["ui-monospace", "monospace"]).set(
        body_text_color_subdued="#55606e",
        body_text_color_subdued_dark="#a9b4c2",
        block_title_background_fill="none",
        block_title_padding="0",
        block_title_text_color="*body_text_color",
        block_info_text_color="*body_text_color_subdued",
    )


def launch(page: gr.Blocks, css: str = "", **options) -> tuple:
    """Queue and start a page, on GRADIO_SERVER_PORT where it is set; `options` go to `gr.Blocks.launch`."""
    page.queue(max_size=QUEUE_SIZE, default_concurrency_limit=2)
    options = {"ssr_mode": False, "footer_links": ["api"], "state_session_capacity": 500} | options
    return page.launch(theme=theme(), css=_CSS + css, max_file_size=MAX_FILE_SIZE, **options)


def main(build: Callable[[], gr.Blocks], css: str = "") -> None:
    """Build and serve a page until it is stopped; a model that is missing ends in one line and exit status 2."""
    try:
        page = build()
    except (OSError, ValueError) as error:
        print(f"{Path(sys.argv[0]).parent.name}: {error}", file=sys.stderr)
        sys.exit(2)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # as containers end it: temporary folders go then, too
    try:
        launch(page, css)
    except KeyboardInterrupt:  # Ctrl-C while it starts; later gradio itself ends at it
        sys.exit(0)


def readable_errors(function: Callable) -> Callable:
    """The function, or generator function, whose ValueError is shown as a toast instead of ending in a traceback."""

    @functools.wraps(function)
    def call(*arguments):
        try:
            return function(*arguments)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error

    @functools.wraps(function)
    def generate(*arguments):
        try:
            yield from function(*arguments)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error

    return generate if inspect.isgeneratorfunction(function) else call


def switched(info: str | None, reason: str | None) -> dict:
    """`interactive` and `info` of a control: off with the reason, where there is one why it would change nothing."""
    return {"interactive": not reason, "info": reason or info}


def picture_upload(value: str, label: str, alternative: str) -> gr.Image:
    """A place for a picture that hands on the path of its file, unread: gradio's own would open it first.

    Args:
        value: path of the picture that is there at first.
        label: above it.
        alternative: for screen readers.
    """
    image = gr.Image(
        value, label=label, alt_text=alternative, type="filepath", image_mode=None, sources=["upload", "clipboard"],
        height=200, buttons=[], elem_classes="upload",
    )  # fmt: skip
    # Of this one component, not of a subclass, for which gradio would write a file beside this one.
    image.preprocess = lambda payload: None if payload is None else payload.path
    return image


def on_gpu(function: Callable, seconds: int = 60) -> Callable:
    """The function, or generator function, with ZeroGPU's decorator where its package `spaces` is, else as it is.

    There it runs in a process of its own, which hands back by pickle what it returns or yields, and of errors
    gradio's alone: `on_gpu(readable_errors(...))`.
    """
    try:
        from spaces import GPU
    except ImportError:
        return function
    return GPU(duration=seconds)(function)
