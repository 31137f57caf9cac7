"""What a served Space does for many and for strangers: kept examples, a full queue, files that are refused."""

import threading
import time

import httpx
import pytest
from load_space import load_app
from pictures import BAD_UPLOADS, encoded, noise
from tiny_pipelines import make_vae

gradio = pytest.importorskip("gradio", minversion="6.0")
client = pytest.importorskip("gradio_client")


@pytest.fixture(scope="module")
def latents():
    return load_app("latent_lab")


@pytest.fixture
def calls():
    """One entry per computation."""
    return []


@pytest.fixture
def url(latents, calls, monkeypatch, tmp_path):
    """Where latent_lab is served on two tiny autoencoders."""
    from hf_dpssl.pages.space_page import launch

    make_vae(0).save_pretrained(tmp_path / "autoencoder")
    make_vae(1).save_pretrained(tmp_path / "comparison" / "dae")
    monkeypatch.setenv("DPSSL_DEMO", str(tmp_path))
    compare = latents.compare
    monkeypatch.setattr(latents, "compare", lambda *arguments: calls.append(1) or compare(*arguments))
    page = latents.build()
    yield launch(page, latents.CSS, prevent_thread_lock=True, quiet=True)[1]
    page.close()


def test_an_example_is_computed_once_and_then_comes_from_the_cache(url, calls):
    user = client.Client(url, verbose=False)
    shown = [str(user.predict(1, api_name="/load_example")) for _ in range(2)]
    assert len(calls) == 1 and all("reconstruction" in text for text in shown)


@pytest.mark.extended
def test_bad_uploads_are_refused_by_the_server_whatever_the_browser_lets_through(url, calls, tmp_path):
    user = client.Client(url, verbose=False)
    for name, (content, said) in BAD_UPLOADS.items():
        (tmp_path / name).write_bytes(content)
        if name == "heavy.png":  # not even kept
            with open(tmp_path / name, "rb") as file:
                answer = httpx.post(f"{url}gradio_api/upload", files={"files": (name, file)})
            assert answer.status_code == 413 and "5" in answer.text
            continue
        with pytest.raises(client.exceptions.AppError, match=said):
            user.predict(client.handle_file(str(tmp_path / name)), api_name="/compare")


def test_a_file_of_the_server_that_nobody_uploaded_is_not_opened(url, calls, tmp_path):
    (tmp_path / "private.png").write_bytes(encoded(noise(0, 30, 20)))
    session = {"data": [{"path": str(tmp_path / "private.png"), "meta": {"_type": "gradio.FileData"}}]}
    answer = httpx.post(f"{url}gradio_api/call/compare", json=session)
    told = httpx.get(f"{url}gradio_api/call/compare/{answer.json()['event_id']}").text
    assert "event: error" in told and "<img" not in told and not calls


@pytest.mark.extended
def test_a_full_queue_tells_those_who_come_too_late(monkeypatch):
    from hf_dpssl.pages import space_page

    monkeypatch.setattr(space_page, "QUEUE_SIZE", 1)
    started, go_on = threading.Event(), threading.Event()

    def slow() -> str:
        started.set()
        assert go_on.wait(60)
        return "done"

    with gradio.Blocks() as page:
        gradio.Button("slow").click(slow, None, gradio.Textbox(), api_name="slow", concurrency_limit=1)
    _, url, _ = space_page.launch(page, prevent_thread_lock=True, quiet=True)
    try:
        user = client.Client(url, verbose=False)
        running = user.submit(api_name="/slow")
        assert started.wait(60)
        waiting = user.submit(api_name="/slow")
        while waiting.status().code.name != "IN_QUEUE":
            time.sleep(0.01)
        with pytest.raises(Exception, match="full"):
            client.Client(url, verbose=False).predict(api_name="/slow")
        go_on.set()
        assert running.result(60) == waiting.result(60) == "done"
    finally:
        go_on.set()
        page.close()
