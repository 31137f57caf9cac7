"""Every control of every Space in a real Chromium, with good and bad files, in light and dark, small and large.

`make test-browser`; DPSSL_SCREENSHOTS=FOLDER keeps pictures of all pages.
"""

import os
import re
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pictures import BAD_UPLOADS

sys.path.insert(0, str(Path(__file__).parent.parent))
from pictures import encoded, noise
from PIL import Image
from running_spaces import demo_outputs

pytestmark = pytest.mark.browser
pytest_plugins = ["running_spaces"]
NAMES = ["matching_lab", "image_generator", "latent_lab", "encoder_explorer"]
STEP = "() => +(document.querySelector('.numbers b')?.innerText ?? 0)"
# Boxes of what can be clicked or typed into, and what has no name that a screen reader could read.
CONTROLS = """() => [...document.querySelectorAll('main button, main input, main textarea, main select')]
  .filter(e => e.checkVisibility() && e.type !== 'file' && e.offsetWidth > 1)
  .map(e => { const b = e.getBoundingClientRect();
    const name = e.ariaLabel || e.innerText || e.title || [...(e.labels || [])].map(l => l.innerText).join(' ')
      || (e.getAttribute('aria-labelledby') || '') || e.closest('fieldset, .block')?.innerText || '';
    return {name: name.trim(), box: [b.left, b.top, b.right, b.bottom], kind: e.tagName + ' ' + e.type}; })"""

# What the focus is on, by its place among all controls; and what it has to reach: of a group of radios, the chosen one.
ALL = "[...document.querySelectorAll('main button, main input, main textarea, main select, main a[href]')]"
FOCUSED = f"() => {ALL}.indexOf(document.activeElement)"
STOPS = f"""() => {{ const all = {ALL};
  return all.filter(e => e.checkVisibility() && e.offsetWidth > 1 && !e.disabled && e.tabIndex >= 0
    && e.type !== 'file' && (e.type !== 'radio' || e.checked)).map(e => all.indexOf(e)); }}"""


@pytest.fixture(scope="module")
def spaces(start_space):
    """spaces(name) -> RunningSpace, started once."""
    started = {}
    return lambda name: started.get(name) or started.setdefault(name, start_space(name))


def act(tab, name: str) -> None:
    """The main action of a Space, until its result is there."""
    page = tab.page
    if name == "matching_lab":
        page.wait_for_function(f"({STEP})() >= 40")
        page.get_by_role("button", name="Pause").click()
    elif name == "image_generator":
        page.get_by_role("button", name="Draw").click()
        page.get_by_text(re.compile(r"pictures in [\d.]+ s")).wait_for()
    elif name == "latent_lab":
        page.get_by_role("button", name="Compare", exact=True).click()
        page.get_by_text("reconstruction,").first.wait_for()
        page.get_by_role("button", name="Morph", exact=True).click()
        page.get_by_text("through pixels").wait_for()
        if page.get_by_role("button", name="Draw").is_enabled():
            page.get_by_role("button", name="Draw").click()
            page.get_by_text("drawn by").first.wait_for()
    else:
        page.get_by_role("button", name="Find neighbours").click()
        page.get_by_text("with cosine").first.wait_for()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width, scheme", [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")])
def test_page_works_fits_and_names_its_controls(spaces, visit, name, width, scheme):
    tab = visit(spaces(name), width=width, scheme=scheme)
    act(tab, name)
    page = tab.page
    page.wait_for_timeout(500)
    if folder := os.environ.get("DPSSL_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{name}_{scheme}_{width}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    controls = page.evaluate(CONTROLS)
    assert len(controls) >= 4 and all(control["name"] for control in controls), controls
    for i, one in enumerate(controls):
        for other in controls[i + 1 :]:
            edges = zip((max, max, min, min), one["box"], other["box"], strict=True)
            left, top, right, bottom = (outer(a, b) for outer, a, b in edges)
            assert right - left <= 1 or bottom - top <= 1, f"{one} overlaps {other}"
    dark = page.evaluate(
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).every(c => c < 60)"
    )
    assert dark == (scheme == "dark")


def test_student_t_makes_more_room_than_the_gaussian_within_seconds_of_the_visit(spaces, visit):
    page = visit(spaces("matching_lab")).page
    page.wait_for_function(f"({STEP})() >= 80")
    gaussian, student = (float(text.inner_text()) for text in page.locator(".map .gap b").all())
    assert student > 1.5 * gaussian


def test_every_control_of_the_matching_lab_does_what_it_says(spaces, visit):
    page = visit(spaces("matching_lab")).page
    page.wait_for_function(f"({STEP})() >= 8")
    page.get_by_role("button", name="Pause").click()
    page.get_by_role("button", name="Go on").wait_for()
    page.wait_for_timeout(1500)  # an update under way may still arrive
    stopped = page.evaluate(STEP)
    page.wait_for_timeout(1500)
    assert page.evaluate(STEP) == stopped
    page.get_by_role("button", name="Go on").click()
    page.wait_for_function(f"({STEP})() > {stopped}")
    page.get_by_text("more", exact=True).click()
    for label in (
        "same class",
        "pairs (two views)",
        "near neighbours",
        "cosine",
        "Gaussian",
        "Student-t",
        "anchor",
        "joint",
    ):
        page.get_by_role("radio", name=label, exact=True).check()
        before = page.evaluate(STEP)
        page.wait_for_function(f"({STEP})() != {before}")
    assert page.locator(".map h3").nth(1).inner_text().startswith("Student-t")
    dof = page.get_by_role("slider", name=re.compile("degrees of freedom"))
    dof.focus()
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    page.wait_for_function("document.querySelectorAll('.map h3')[1].innerText.includes('dof 3')")
    for name, choice in (("divergence", "alpha"), ("data", "rings"), ("A known loss", "SNE"), ("data", "clusters")):
        page.get_by_role("listbox", name=name).or_(page.get_by_label(name, exact=True)).first.click()
        page.get_by_role("option", name=choice, exact=True).click()
        page.wait_for_function(f"({STEP})() >= 4")
    page.wait_for_function("document.querySelectorAll('.map h3')[1].innerText === 'Gaussian'")
    for name in ("perplexity", "temperature"):
        page.get_by_role("slider", name=re.compile(name)).focus()
        page.keyboard.press("ArrowRight")
    page.get_by_label("random seed").fill("3")
    page.get_by_label("random seed").press("Enter")
    page.get_by_role("button", name="Start again").click()
    page.wait_for_function(f"({STEP})() >= 8")


def pictures_of(code: str, folder: Path, model: Path) -> list[Image.Image]:
    """What the lines shown on a page draw with the model, run in a fresh process in a folder of its own."""
    folder.mkdir()
    code = code.replace(f"path/to/{model.name}", str(model))  # a page shows no folder of its machine
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, timeout=300)
    return [Image.open(path) for path in sorted(folder.iterdir())]


def test_image_generator_shows_the_steps_stops_saves_and_prints_the_code(spaces, visit, tmp_path):
    tab = visit(spaces("image_generator"))
    page = tab.page
    page.get_by_label("class").click()
    page.get_by_role("option", name="7", exact=True).click()
    page.get_by_role("spinbutton", name=re.compile("pictures")).fill("3")
    page.get_by_role("spinbutton", name=re.compile("steps")).fill("60")
    page.get_by_label("seed of the first").fill("11")
    assert page.get_by_role("button", name="Stop").is_disabled()
    page.get_by_role("button", name="Draw").click()
    page.get_by_text(re.compile(r"step \d+ of 60")).wait_for()  # seen while it is made
    page.get_by_text(re.compile("3 pictures in")).wait_for()
    code = page.locator(".cm-content").inner_text()
    assert "['7'] * 3" in code and "range(11, 14)" in code and "num_inference_steps=60" in code
    with page.expect_download() as saved:
        page.get_by_role("img", name="7, seed 11").click()
    assert saved.value.suggested_filename == "picture-0.png"
    with page.expect_download() as saved:
        page.get_by_role("button", name="Download all as zip").click()
    saved.value.save_as(tmp_path / "all.zip")
    zipfile.ZipFile(tmp_path / "all.zip").extractall(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["7-11.png", "7-12.png", "7-13.png"]
    assert pictures_of(code, tmp_path / "again", demo_outputs() / "dit") == [
        Image.open(path) for path in sorted(tmp_path.glob("*.png"))
    ]
    page.get_by_role("spinbutton", name=re.compile("steps")).fill("100")
    page.get_by_role("button", name="Draw").click()
    page.get_by_text(re.compile(r"step \d+ of 100")).wait_for()
    page.get_by_role("button", name="Stop").click()
    page.wait_for_function("[...document.querySelectorAll('button')].find(b => b.innerText === 'Stop').disabled")
    page.get_by_role("button", name="four of 1").click()
    page.get_by_text("1, seed 1").wait_for()
    page.get_by_role("radio", name="token transformer").check()
    page.get_by_text("draws one code after the other").wait_for()
    assert page.get_by_role("slider", name=re.compile("steps")).is_disabled()
    assert page.get_by_role("slider", name=re.compile("temperature")).is_enabled()
    page.get_by_role("button", name="Draw").click()
    # A tiny model may be done before its steps are seen, and the line of the last pictures stays until then.
    page.locator(".cm-content").get_by_text("VQTokenPipeline").first.wait_for()
    page.get_by_text(re.compile("pictures in")).wait_for()
    code = page.locator(".cm-content").inner_text()
    with page.expect_download() as saved:
        page.get_by_role("button", name="Download all as zip").click()
    saved.value.save_as(tmp_path / "tokens.zip")
    zipfile.ZipFile(tmp_path / "tokens.zip").extractall(tmp_path / "tokens")
    drawn = sorted((tmp_path / "tokens").iterdir(), key=lambda path: int(path.stem.split("-")[-1]))
    made = spaces("image_generator").log.parent / "token"  # by start_space, where the demo has none
    model = made if made.is_dir() else Path(os.environ.get("DPSSL_TOKENS") or demo_outputs() / "ar")
    assert pictures_of(code, tmp_path / "tokens_again", model) == [Image.open(path) for path in drawn]
    page.get_by_label("seed of the first").fill("")
    page.get_by_role("button", name="Draw").click()
    assert "seed" in tab.toast()


def put(page, path: Path, number: int = 0) -> None:
    """Remove what is in a place for pictures and put a file there."""
    place = page.locator(".upload").nth(number)
    if place.get_by_label("Remove Image").or_(place.get_by_label("Clear")).count():
        place.get_by_label("Remove Image").or_(place.get_by_label("Clear")).first.click()
        place.locator("img").wait_for(state="detached")
    place.locator("input[type=file]").set_input_files(path)


@pytest.mark.parametrize("name, button", [("latent_lab", "Compare"), ("encoder_explorer", "Find neighbours")])
def test_bad_files_are_refused_with_a_toast_and_good_ones_are_read(spaces, visit, tmp_path, name, button):
    tab = visit(spaces(name))
    page = tab.page
    for file, (content, said) in BAD_UPLOADS.items():
        path = tmp_path / (file if file.endswith(".png") else f"{file}.png")  # else the browser itself refuses it
        path.write_bytes(content)
        put(page, path)
        if file != "heavy.png":  # refused while it is sent, by gradio
            page.locator(".upload img").first.wait_for(state="attached")
            page.get_by_role("button", name=button, exact=True).click()
        text = tab.toast()
        assert said in text or (file == "heavy.png" and "maximum allowed size of 5" in text), f"{file}: {text}"
    page.wait_for_timeout(2000)
    tab.problems.clear()  # the browser, too, says that it cannot send or show these files
    for kind in ("PNG", "JPEG", "WEBP"):
        path = tmp_path / f"good.{kind.lower()}"
        path.write_bytes(encoded(noise(0, 40, 30), kind))
        put(page, path)
        page.locator(".upload img").first.wait_for()
        act(tab, name)


def test_latent_lab_examples_and_the_switch_of_snapping(spaces, visit):
    page = visit(spaces("latent_lab")).page
    page.locator(".gallery-item, .gallery button, [data-testid='dataset'] button").nth(3).click()
    page.get_by_text("reconstruction,").first.wait_for()
    page.get_by_role("button", name="Morph", exact=True).click()
    page.get_by_text("through pixels").wait_for()
    before = page.locator(".way img").nth(3).get_attribute("src")
    page.get_by_label("snap to codes on the way").uncheck()
    page.get_by_role("button", name="Morph", exact=True).click()
    page.wait_for_function("src => document.querySelectorAll('.way img')[3].src !== src", arg=before)


def test_latent_lab_draws_in_both_latents_from_the_same_seeds_or_says_what_to_train(spaces, visit):
    page = visit(spaces("latent_lab")).page
    samples = page.locator(".samples")
    if samples.locator("pre").count():
        assert "hf-dpssl train dae_" in samples.inner_text()
    if page.get_by_role("button", name="Draw").is_disabled():
        assert samples.locator("pre").count() == 2
        return
    page.get_by_role("spinbutton", name=re.compile("pictures")).fill("3")
    page.get_by_label("seed of the first").fill("4")
    page.get_by_role("button", name="Draw").click()
    page.get_by_text("drawn by").first.wait_for()
    spoken = [image.get_attribute("alt") for image in samples.locator("img").all()]
    drawn = samples.locator("h3", has_text="drawn by").count()
    assert spoken == ["0, seed 4", "1, seed 5", "2, seed 6"] * drawn
    guidance = page.get_by_role("slider", name=re.compile("guidance"))
    if guidance.is_disabled():  # of one-step generators, as the demo's are
        page.get_by_text(re.compile("one step|one pass")).first.wait_for()
        return
    page.get_by_role("combobox", name="class").click()
    page.get_by_role("option", name="no class").click()
    page.get_by_text("none is asked for").wait_for()
    assert guidance.is_disabled()
    page.get_by_role("combobox", name="class").click()
    page.get_by_role("option", name="7", exact=True).click()
    page.get_by_text("none is asked for").wait_for(state="detached")
    assert guidance.is_enabled()


def test_sliders_of_the_matching_lab_that_change_nothing_are_off_and_say_why(spaces, visit):
    page = visit(spaces("matching_lab")).page
    assert "Class gap: how many times as far" in page.locator(".heading").first.inner_text()
    dof, perplexity = (
        page.get_by_role("slider", name=re.compile(name)) for name in ("degrees of freedom", "perplexity")
    )
    page.get_by_role("radio", name="cosine", exact=True).check()
    page.get_by_text("only for the Student-t kernel").wait_for()
    assert dof.is_disabled() and perplexity.is_enabled()
    page.get_by_role("radio", name="same class", exact=True).check()
    page.get_by_text("only for near neighbours").wait_for()
    page.get_by_role("radio", name="Student-t", exact=True).check()
    page.get_by_text("few: heavy tail").wait_for()
    assert dof.is_enabled() and perplexity.is_disabled()


@pytest.mark.parametrize("name", ["matching_lab", "encoder_explorer"])
def test_a_finger_on_the_map_scrolls_the_page_of_a_phone(spaces, visit, name):
    page = visit(spaces(name), width=390, height=700, has_touch=True).page
    place = page.locator("iframe.map" if name == "encoder_explorer" else ".map svg").first
    place.scroll_into_view_if_needed()
    page.wait_for_timeout(1000)
    box, before = place.bounding_box(), page.evaluate("scrollY")
    room = page.evaluate("document.documentElement.scrollHeight - innerHeight - scrollY")
    session = page.context.new_cdp_session(page)
    x, y = box["x"] + box["width"] / 2, min(box["y"] + box["height"] / 2, 600)
    session.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [{"x": x, "y": y}]})
    for moved in range(0, 310, 10):
        finger = {"x": x, "y": y - moved}
        session.send("Input.dispatchTouchEvent", {"type": "touchMove", "touchPoints": [finger]})
        page.wait_for_timeout(10)
    session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    page.wait_for_timeout(500)
    assert page.evaluate("scrollY") - before >= min(200, room - 1) > 0


def test_each_page_says_what_its_models_are_and_what_they_were_trained_on(spaces, visit):
    for name, models in (
        ("image_generator", ["dit"]),
        ("latent_lab", ["dae", "joint"]),
        ("encoder_explorer", ["encoder"]),
    ):
        page = visit(spaces(name)).page
        for model in models:
            said = re.compile(rf"{model}: .+, trained on digits, for [\d.]+ min")
            page.locator("main").filter(has_text=said).wait_for()  # the page is still being built


def test_map_of_the_encoder_explorer_shows_a_thumbnail_under_the_pointer(spaces, visit):
    tab = visit(spaces("encoder_explorer"))
    page = tab.page
    act(tab, "encoder_explorer")
    assert page.locator("iframe.map").count() == 2
    inner = page.frame_locator("iframe.map").first
    box = inner.locator("#plot > canvas").bounding_box()
    for share in range(5, 95, 3):  # some point lies on the way
        page.mouse.move(box["x"] + box["width"] * share / 100, box["y"] + box["height"] / 2)
        if inner.locator("#tip").is_visible():
            break
    assert inner.locator("#tip").is_visible() and inner.locator("#tip b").inner_text()
    inner.get_by_role("button", name="3", exact=True).click()
    assert inner.get_by_role("button", name="3", exact=True).get_attribute("aria-pressed") == "false"


@pytest.mark.parametrize("name", NAMES)
def test_every_control_is_reached_with_the_tab_key_and_a_button_pressed_with_enter(spaces, visit, name):
    page = visit(spaces(name)).page
    stops, missing = set(), []
    for _ in range(400):  # the first ones may come before the page is ready
        page.keyboard.press("Tab")
        stops.add(page.evaluate(FOCUSED))
        missing = [place for place in page.evaluate(STOPS) if place not in stops]
        if not missing and len(stops) > 4:
            break
    assert not missing, f"not reached: {missing}"
    button = page.get_by_role("button", name=re.compile("^(Start again|Draw|Compare|Find neighbours)$")).first
    button.focus()
    page.keyboard.press("Enter")
    results = {"image_generator": "pictures in", "latent_lab": "reconstruction,", "encoder_explorer": "with cosine"}
    page.get_by_text(re.compile(results.get(name, r"step"))).first.wait_for()


def test_twenty_users_at_once_get_their_own_results(spaces):
    from gradio_client import Client

    url = spaces("matching_lab").url
    settings = ["neighbours", 20, "student_t", "joint", 1, 1, "kl", 0.5]

    def user(seed: int) -> str:
        client = Client(url, verbose=False)
        client.predict("digits", seed % 2, *settings, api_name="/restart")
        for _ in range(3):
            result = client.predict(*settings, api_name="/update")
        return str(result[1])

    with ThreadPoolExecutor(20) as pool:
        maps = list(pool.map(user, range(20)))
    assert len(set(maps)) == 2 and maps[0] == maps[2] and maps[1] == maps[3] != maps[0]


def test_twenty_users_of_the_generator_get_the_pictures_of_their_own_seeds(spaces):
    from gradio_client import Client

    url = spaces("image_generator").url

    def user(seed: int) -> list[str]:
        grid = Client(url, verbose=False).predict("dit", "7", 1, seed, 2, 4, 1, 0, api_name="/draw")[0]
        return re.findall(r'<img src="([^"]+)" alt="([^"]+)"', grid)

    with ThreadPoolExecutor(20) as pool:
        drawn = list(pool.map(user, [number % 10 for number in range(20)]))
    assert [shown[0][1] for shown in drawn] == [f"7, seed {number % 10}" for number in range(20)]
    assert drawn[:10] == drawn[10:] and len({shown[0][0] for shown in drawn}) == 10
