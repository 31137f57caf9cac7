"""Pages without a server in a real Chromium, from a disk and from a host of files; DPSSL_SCREENSHOTS keeps pictures."""

import functools
import http.server
import io
import json
import os
import re
import sys
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from pictures import noise
from tiny_checkpoints import drift_pipeline, finish, save_checkpoints

from hf_dpssl import VQAutoencoder, VQConfig, VQDriftPipeline
from hf_dpssl.cli.commands import main
from hf_dpssl.convert.static_spaces import PICTURES
from hf_dpssl.embedding.embedder import Preprocessor
from hf_dpssl.embedding.embedding_job import EmbedJob, embed_images
from hf_dpssl.embedding.embeddings_table import search_images
from hf_dpssl.generation.latent_mlp import LatentMLP
from hf_dpssl.generation.per_image_noise import spherical_path
from hf_dpssl.pages import browser_runtime

pytestmark = pytest.mark.browser
pytest_plugins = ["running_spaces"]
NAMES = ["image_generator", "encoder_explorer"]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """By name: (folder of the page, checkpoint); and under "table" embeddings of 60 pictures."""
    pytest.importorskip("onnxscript", reason="pip install 'hf_dpssl[onnx]'")
    try:
        browser_runtime.runtime_files()
    except OSError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("static")
    made = drift_pipeline()
    torch.nn.init.normal_(made.vae.quantizer.codebook, std=2.0)
    VQDriftPipeline(made.transformer, made.vae, {0: "<b>zero</b>", 1: "one"}).save_pretrained(folder / "drift")
    finish(folder / "drift", "drift")
    encoder = save_checkpoints(folder, ("encoder",))["encoder"]
    for number in range(60):
        path = folder / "pictures" / ("<i>dark" if number % 2 else "light") / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(number, 20, 24)).save(path)
    table = embed_images(EmbedJob(str(encoder), str(folder / "pictures"), str(folder / "table")))
    argv = ["space", "image_generator", "--static", folder / "image_generator", "--model", folder / "drift"]
    assert main([str(part) for part in argv]) == 0
    argv = ["space", "encoder_explorer", "--static", folder / "encoder_explorer", "--embeddings", folder / "table"]
    assert main([str(part) for part in argv]) == 0
    return {
        "image_generator": (folder / "image_generator", folder / "drift"),
        "encoder_explorer": (folder / "encoder_explorer", encoder),
        "table": table,
    }


class _Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def served(pages):
    """Address of the folder of both pages on a plain host of files."""
    handler = functools.partial(_Silent, directory=str(pages["image_generator"][0].parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def open_page(browser, pages):
    """open_page(name, address=None, width=..., scheme=...) -> tab, ready; its problems fail the test at the end."""
    problems, contexts = [], []

    def open_tab(name: str, address: str | None = None, width: int = 1280, scheme: str = "light", touch: bool = False):
        address = f"{address}/{name}/" if address else f"{pages[name][0].as_uri()}/"
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, has_touch=touch, accept_downloads=True
        )
        context.set_default_timeout(120_000)
        contexts.append(context)
        page = context.new_page()

        def requested(request):
            if not request.url.startswith((address, "data:", "blob:")):
                problems.append(f"request to elsewhere: {request.url}")

        page.on("request", requested)
        page.on("requestfailed", lambda request: problems.append(f"{request.url}: {request.failure}"))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: message.type == "error" and problems.append(message.text))
        page.goto(f"{address}index.html")
        page.wait_for_selector("body[data-ready=yes]")
        return page

    yield open_tab
    for context in contexts:
        context.close()
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width, scheme", [(1280, "light"), (1280, "dark"), (390, "light")])
def test_page_without_a_server_fits_and_names_its_controls(open_page, name, width, scheme):
    page = open_page(name, width=width, scheme=scheme)
    if folder := os.environ.get("DPSSL_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/static_{name}_{scheme}_{width}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    controls = page.locator("button, input, [tabindex]")
    for i in range(controls.count()):
        control = controls.nth(i)
        named = control.evaluate(
            "e => e.ariaLabel || e.innerText || [...(e.labels || [])].map(l => l.innerText).join()"
        )
        assert named.strip(), control.evaluate("e => e.outerHTML")
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", colour)[:3])) > 3 * 128) == (scheme == "light"), colour
    assert "trained on digits" in page.inner_text("ul") and not page.locator("b, i").count()  # names are text


def test_pictures_are_those_of_the_pipeline_from_a_disk_and_from_a_host(open_page, pages, served):
    pipeline = VQDriftPipeline.from_pretrained(pages["image_generator"][1])
    latents = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    requests = [0, 1, 2, 1, 0, 2]
    expected = []
    for row, label in zip(latents, requests, strict=True):
        what = {"num_images": 1} if label == 2 else {"class_labels": [label]}
        expected.append(pipeline(**what, latents=row[None], output_type="pt").images[0])
    for address in (None, served):
        page = open_page("image_generator", address)
        draw = "async ([noise, label]) => [...await page.generate(new Float32Array(noise), label)]"
        for row, label, picture in zip(latents, requests, expected, strict=True):
            found = torch.tensor(page.evaluate(draw, [row.flatten().tolist(), label])).view(3, 16, 16)
            torch.testing.assert_close(found, picture, rtol=0, atol=1e-3)
        print(page.inner_text("#status"))
    assert torch.stack(expected).std() > 0.02 and (expected[0] - expected[4]).abs().max() > 1e-3


def test_a_page_with_a_generator_of_the_demos_size_has_8_mb_and_draws_a_picture_in_100_ms(open_page, pages, tmp_path):
    torch.manual_seed(0)
    widths = {"encoder_block_out_channels": [16, 32], "decoder_block_out_channels": [24, 48], "num_codes": 128}
    statistics = {"latent_mean": [0.0] * 4, "latent_std": [1.0] * 4}
    vae = VQAutoencoder(VQConfig(image_size=16, norm_num_groups=8, **widths, **statistics)).eval()
    transformer = LatentMLP(in_channels=4, sample_size=8, num_layers=3, width=256, num_embeds_ada_norm=10)
    VQDriftPipeline(transformer, vae, {i: str(i) for i in range(10)}).save_pretrained(tmp_path / "drift")
    finish(tmp_path / "drift", "drift")
    argv = ["space", "image_generator", "--static", tmp_path / "page", "--model", tmp_path / "drift"]
    assert main([str(part) for part in argv]) == 0
    pages["demo"] = (tmp_path / "page", tmp_path / "drift")
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "page").iterdir()}
    page = open_page("demo")
    draw = "async () => { for (let i = 0; i < 20; i++) await page.generate(new Float32Array(256).fill(i / 20), 3); }"
    page.evaluate(draw)
    page.get_by_role("button", name="New noise").click()
    page.wait_for_function("() => !document.querySelector('#caption').textContent.includes('noise 0')")
    milliseconds = float(page.inner_text("#status").split()[0])
    print(f"{sum(sizes.values()):,} bytes, {milliseconds} ms per picture")
    assert sum(sizes.values()) <= 8e6, sizes
    assert milliseconds <= 100


def test_a_finger_on_the_pad_morphs_as_a_mouse_does(open_page):
    page = open_page("image_generator", width=390, touch=True)
    page.locator("#pad").scroll_into_view_if_needed()
    box = page.locator("#pad").bounding_box()
    fingers = page.context.new_cdp_session(page)

    def touch(kind: str, *places: tuple[float, float]) -> None:
        points = [{"x": box["x"] + x * box["width"], "y": box["y"] + y * box["height"]} for x, y in places]
        fingers.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    scrolled = page.evaluate("scrollY")
    touch("touchStart", (0.5, 0.5))
    page.get_by_text("place 50 | 50").wait_for()
    touch("touchMove", (0.6, 0.4))
    touch("touchMove", (0.68, 0.32))
    page.get_by_text("place 75 | 25").wait_for()
    touch("touchEnd")
    assert page.evaluate("scrollY") == scrolled


def test_the_way_between_noises_is_the_pipelines(open_page):
    page = open_page("image_generator")
    ends = torch.randn(2, 4, 8, 8)
    path = spherical_path(ends[0], ends[1], 5)
    between = "([a, b, share]) => [...page.between(new Float32Array(a), new Float32Array(b), share)]"
    for i, expected in enumerate(path):
        found = page.evaluate(between, [ends[0].flatten().tolist(), ends[1].flatten().tolist(), i / 4])
        torch.testing.assert_close(torch.tensor(found).view_as(expected), expected, rtol=0, atol=1e-5)


def test_every_control_of_the_generator_does_what_it_says_by_keyboard_too(open_page):
    page = open_page("image_generator")
    pixels = "() => [...document.querySelector('#picture').getContext('2d').getImageData(0, 0, 16, 16).data]"
    corner = "() => [...document.querySelector('#pad canvas').getContext('2d').getImageData(0, 0, 16, 16).data]"
    caption = page.locator("#caption")

    def changed(act, words: str) -> list[int]:
        before = page.evaluate(pixels)
        act()
        page.wait_for_function("(text) => document.querySelector('#caption').textContent.includes(text)", arg=words)
        page.wait_for_function(f"(before) => String(({pixels})()) !== String(before)", arg=before)
        return page.evaluate(pixels)

    page.get_by_role("radio", name="<b>zero</b>").focus()
    changed(lambda: page.keyboard.press("ArrowRight"), "one,")
    start = changed(lambda: page.get_by_role("radio", name="no class").check(), "no class,")
    assert start == page.evaluate(corner)
    page.locator("#pad").focus()
    changed(lambda: page.keyboard.press("ArrowRight"), "place 5 | 0")
    changed(lambda: page.keyboard.press("End"), "place 100 | 100")
    assert page.locator("#pad").get_attribute("aria-valuetext") == "100 % to the right, 100 % down"
    box = page.locator("#pad").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    changed(
        lambda: page.mouse.move(box["x"] + 0.68 * box["width"], box["y"] + 0.32 * box["height"], steps=5), "75 | 25"
    )
    page.mouse.up()
    chosen = "() => [...document.querySelectorAll('#grid canvas')[3].getContext('2d').getImageData(0, 0, 16, 16).data]"
    wanted = page.evaluate(chosen)
    assert changed(lambda: page.locator("#grid button").nth(3).press("Enter"), "(chosen)") == wanted
    changed(lambda: page.get_by_role("button", name="New noise").click(), "no class, noise")
    assert "(chosen)" not in caption.inner_text()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download PNG").click()
    with Image.open(download.value.path()) as saved:
        assert saved.size == (16, 16) and saved.format == "PNG"
        assert list(saved.convert("RGBA").tobytes()) == page.evaluate(pixels)
    assert download.value.suggested_filename.startswith("no-class-noise-")


def encoded(picture: Image.Image) -> list[int]:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return list(buffer.getvalue())


def test_the_page_prepares_pictures_as_the_image_processor_byte_for_byte(open_page, pages, tmp_path):
    page = open_page("encoder_explorer")
    prepare = """async ([file, change]) => { Object.assign(page.facts.input, change);
        const blob = new Blob([new Uint8Array(file)]); return [...page.prepare(await page.pixelsOf(blob))]; }"""
    config = json.loads((pages["encoder_explorer"][1] / "config.json").read_text())
    for crop, interpolation, small in ((1.0, "bicubic", False), (0.8, "bilinear", False), (1.0, "bicubic", True)):
        config["pretrained_cfg"] |= {"crop_pct": crop, "interpolation": interpolation}
        folder = tmp_path / f"{crop}-{interpolation}-{small}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        processor = Preprocessor(str(folder))
        processor.small_image = small
        if small:
            processor.settings = config["pretrained_cfg"]
        change = {"resize": int(16 / crop), "filter": interpolation, "rounds": small}
        for number, size in enumerate([(16, 16), (24, 20), (133, 57), (7, 9), (16, 40)]):
            picture = Image.fromarray(noise(number, *size))
            found = torch.tensor(page.evaluate(prepare, [encoded(picture), change])).view(3, 16, 16)
            torch.testing.assert_close(found, processor([picture])[0], rtol=0, atol=1e-5)


def test_neighbours_are_those_of_the_table_from_a_disk_and_from_a_host(open_page, pages, served, tmp_path):
    table, path = pages["table"], tmp_path / "picture.png"
    assert len(table) < PICTURES
    Image.fromarray(noise(99, 33, 21)).save(path)
    expected = search_images(table, [path], k=12)[0]
    for address in (None, served):
        page = open_page("encoder_explorer", address)
        first = page.get_attribute("#shown", "src")  # a caption may stay the same
        page.locator("#file").set_input_files(path)
        page.wait_for_function("(first) => document.querySelector('#shown').src !== first", arg=first)
        shown = [text.split(" · ") for text in page.locator("figcaption").all_inner_texts()]
        similarities = [row["similarity"] for row in expected]
        assert [float(cosine) for _, cosine in shown] == pytest.approx(similarities, abs=2e-3)
        assert [name for name, _ in shown][:1] == [expected[0]["label"]]
        print(page.inner_text("#status"))
    dropped = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
    first = page.get_attribute("#shown", "src")
    hand = page.context.new_cdp_session(page)
    for kind in ("dragEnter", "dragOver", "drop"):
        hand.send("Input.dispatchDragEvent", {"type": kind, "x": 200, "y": 300, "data": dropped})
    page.wait_for_function("(first) => document.querySelector('#shown').src !== first", arg=first)
    assert [text.split(" · ") for text in page.locator("figcaption").all_inner_texts()] == shown
    page.locator("#examples button").nth(2).press("Enter")
    page.wait_for_function("() => document.querySelector('figcaption').textContent.includes('1.000')")
    page.locator("#file").set_input_files(files=[{"name": "x.png", "mimeType": "image/png", "buffer": b"no picture"}])
    page.get_by_text("This is no picture that the browser can read").wait_for()
