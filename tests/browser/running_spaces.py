"""Spaces in a real Chromium: CHROMIUM_PATH or one on PATH, and the demo's outputs (DPSSL_DEMO or outputs/demo)."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent.parent
CHROMIUM = os.environ.get("CHROMIUM_PATH") or shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


def demo_outputs() -> Path:
    """The demo's outputs."""
    return Path(os.environ.get("DPSSL_DEMO") or REPOSITORY / "outputs" / "demo").absolute()


_PROGRESS = "/upload_progress"  # gradio asks for it of uploads, too, that have ended


class RunningSpace:
    """A Space in a process of its own: `url`, seconds of its `cold_start`, and its `log`."""

    def __init__(self, name: str, folder: Path, variables: dict[str, str]):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.name, self.url, self.log = name, f"http://127.0.0.1:{port}", folder / f"{name}.log"
        start = time.perf_counter()
        command = [sys.executable, "-m", "hf_dpssl.cli", "space", name, "--port", str(port)]
        variables = os.environ | {"DPSSL_DEMO": str(demo_outputs())} | variables
        with open(self.log, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                command, cwd=folder, env=variables, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        while not self._answers():
            assert self.process.poll() is None, self.log.read_text(encoding="utf-8")
            time.sleep(0.1)
        self.cold_start = time.perf_counter() - start

    def _answers(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.url}/config", timeout=10).status == 200
        except (urllib.error.URLError, OSError):
            return False

    def stop(self) -> None:
        """End the process and the one that it started."""
        os.killpg(self.process.pid, 15)
        self.process.wait(30)


@contextmanager
def chromium():
    """A headless Chromium of Playwright."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def browser():
    pytest.importorskip("gradio", minversion="6.0", reason="pip install 'hf_dpssl[browser]'")
    pytest.importorskip("playwright", reason="pip install 'hf_dpssl[browser]'")
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install -y chromium; pip install 'hf_dpssl[browser]' (or set CHROMIUM_PATH)")
    with chromium() as started:
        yield started


class Visit:
    """A tab on a Space; `finish` fails on console errors, script errors, failed requests and requests to elsewhere."""

    def __init__(self, browser, url: str, *, width=1280, height=900, scheme: str = "light", has_touch: bool = False):
        self.context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, has_touch=has_touch, accept_downloads=True
        )
        self.context.set_default_timeout(120_000)  # also on a busy machine
        self.page, self.problems, self.url = self.context.new_page(), [], url
        self.page.on("console", self._said)
        self.page.on("pageerror", lambda error: self._note(str(error)))
        self.page.on("requestfailed", self._failed)
        self.page.on("response", self._answered)
        self.page.on("request", self._requested)
        self.page.goto(f"{url}/?__theme={scheme}")
        self.page.wait_for_selector("button")

    def _note(self, problem: str) -> None:
        self.problems.append(problem)

    def _said(self, message) -> None:
        if message.type == "error" and message.text != "Response" and _PROGRESS not in message.location["url"]:
            self._note(message.text)  # "Response" is one that `_answered` has noted

    def _answered(self, response) -> None:
        if response.status >= 400 and _PROGRESS not in response.url:
            self._note(f"{response.url}: {response.status}")

    def _failed(self, request) -> None:
        if "/queue/data" not in request.url and _PROGRESS not in request.url:  # streams of events that have ended
            self._note(f"{request.url}: {request.failure}")

    def _requested(self, request) -> None:
        if not request.url.startswith((self.url, "data:", "blob:", "about:")):
            self._note(f"request to elsewhere: {request.url}")

    def toast(self) -> str:
        """The text of the next toast, which is then closed."""
        toast = self.page.get_by_test_id("toast-body").first
        toast.wait_for()
        text = toast.inner_text()
        self.page.get_by_test_id("toast-close").first.click()
        toast.wait_for(state="detached")  # the next one is another
        return text

    def finish(self) -> None:
        """Close the tab; AssertionError naming what went wrong in it."""
        self.context.close()
        assert not self.problems, "\n".join(self.problems)


@pytest.fixture(scope="module")
def start_space(browser, tmp_path_factory):
    """start_space(name, **variables) -> RunningSpace; it is stopped at the end of the file."""
    running = []

    def start(name: str, **variables: str) -> RunningSpace:
        if name != "matching_lab" and not demo_outputs().is_dir():
            pytest.skip("no outputs of the demo: hf-dpssl demo --output_dir outputs/demo (or set DPSSL_DEMO)")
        folder = tmp_path_factory.mktemp(name)
        if name == "image_generator" and not (os.environ.get("DPSSL_TOKENS") or (demo_outputs() / "ar").is_dir()):
            from tiny_checkpoints import save_checkpoints  # its controls work on an untrained one too

            variables["DPSSL_TOKENS"] = str(save_checkpoints(folder, ("token",))["token"])
        running.append(RunningSpace(name, folder, variables))
        return running[-1]

    yield start
    for space in running:
        space.stop()


@pytest.fixture
def visit(browser):
    """visit(space, width=..., scheme=...) -> Visit; checked and closed at the end of the test."""
    opened = []

    def open_tab(space: RunningSpace, **options) -> Visit:
        opened.append(Visit(browser, space.url, **options))
        return opened[-1]

    yield open_tab
    for tab in opened:
        tab.finish()
