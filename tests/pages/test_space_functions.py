"""The functions behind the Spaces that have models, on tiny ones: what they show, and what they refuse."""

import re
import zipfile

import numpy as np
import pytest
from cases import for_each
from load_space import load_app
from pictures import BAD_UPLOADS, encoded, noise
from PIL import Image
from tiny_encoders import save_ours
from tiny_pipelines import make_dit, make_drift, make_tokens, make_vae

gradio = pytest.importorskip("gradio", minversion="6.0")
BOTH = ["dit", "one step", "token transformer"]
CONTROLS = ["cat", 2, 3, 2.0, 4, 1.0, 0]  # class, number, seed, guidance, steps, temperature, top k


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A folder like the demo's outputs, of tiny models."""
    folder = tmp_path_factory.mktemp("demo")
    make_dit().save_pretrained(folder / "dit")
    make_drift().save_pretrained(folder / "drift")
    make_tokens().save_pretrained(folder / "ar")
    make_vae(0).save_pretrained(folder / "autoencoder")
    make_vae(1).save_pretrained(folder / "comparison" / "joint-total")
    save_ours(folder / "encoder")
    save_ours(folder / "comparison" / "encoder-2d", projection_dim=2)
    return folder


@pytest.fixture(scope="module")
def models(demo):
    """models(app) -> its models, loaded once."""
    loaded = {}

    def load(app):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DPSSL_DEMO", str(demo))
            return loaded.get(app.__name__) or loaded.setdefault(app.__name__, app.Models())

    return load


@pytest.fixture(scope="module")
def generator():
    return load_app("image_generator")


@pytest.fixture(scope="module")
def latents():
    return load_app("latent_lab")


@pytest.fixture(scope="module")
def explorer():
    return load_app("encoder_explorer")


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(encoded(noise(0, 30, 20)))
    return str(path)


def test_each_page_is_built_and_its_events_have_names_and_limits(generator, latents, explorer, models):
    for app, names in ((generator, {"draw"}), (latents, {"compare", "morph"}), (explorer, {"explore"})):
        page = app.build(models(app))
        events = {function.api_name: function for function in page.fns.values() if function.api_name in names}
        assert set(events) == names
        assert all(function.concurrency_limit in (1, 2) for function in events.values())


@pytest.mark.parametrize("name", BOTH)
def test_drawing_ends_with_pictures_a_zip_and_code(generator, models, name):
    parts = []
    for grid, state, file, code in generator.draw(models(generator), name, *CONTROLS):
        parts.append((grid, state, code))
        if isinstance(file, gradio.DownloadButton):
            names = zipfile.ZipFile(file.value["path"]).namelist()
    assert names == ["cat-3.png", "cat-4.png"]
    grid, state, code = parts[-1]
    assert grid.count("<img") == 2 and 'download="picture-1.png"' in grid and "2 pictures in" in state
    assert 'alt="cat, seed 3"' in grid and "['cat'] * 2" in code and "range(3, 5)" in code


def test_each_class_in_turn_and_no_class_can_be_asked_for(generator, models):
    request = generator.read_request(models(generator), "dit", generator.EVERY, 5, 0, 2, 4, 1, 0)
    assert request.labels == ("cat", "dog", "horse", "cat", "dog")
    assert generator.read_request(models(generator), "dit", generator.NONE, 2, 0, 2, 4, 1, 0).labels == ()


@for_each(
    "change, said",
    [
        ({0: "cow"}, "no class 'cow'"),
        ({1: 17}, "1 to 16"),
        ({1: None}, "seed"),
        ({2: None}, "seed"),
        ({2: -1}, "whole"),
        ({3: 99.0}, "Guidance"),
        ({4: 1000}, "1 to 100"),
    ],
)
def test_controls_out_of_range_are_refused(generator, models, change, said):
    values = [change.get(i, value) for i, value in enumerate(CONTROLS)]
    with pytest.raises(ValueError, match=said):
        list(generator.draw(models(generator), "dit", *values))


def test_a_change_of_model_shows_the_sliders_that_it_reads(generator, models):
    shown = {
        "dit": (True, True, False, False),
        "one step": (False,) * 4,
        "token transformer": (True, False, True, True),
    }
    for name, expected in shown.items():
        label, *sliders = generator.fit_controls(models(generator), name, "dog")
        assert label.value == "dog" and tuple(slider.visible for slider in sliders) == expected


def test_latent_lab_compares_both_autoencoders_and_morphs(latents, models, picture):
    shown = latents.compare(models(latents), picture)
    assert shown.count("<section>") == 2 and shown.count("<img") == 8
    assert len(re.findall(r"reconstruction, -?[\d.]+ dB", shown)) == 2
    way = latents.between(models(latents), picture, picture, True)
    assert way.count("<section>") == 3 and way.count("<img") == 3 * latents.STEPS


def test_latent_lab_with_one_autoencoder_says_which_is_missing(latents, demo, monkeypatch, tmp_path):
    (tmp_path / "autoencoder").symlink_to(demo / "autoencoder")
    monkeypatch.setenv("DPSSL_DEMO", str(tmp_path))
    assert "joint is missing" in latents.Models().note


def test_explorer_shows_neighbours_and_a_map_of_each_encoder(explorer, models, picture):
    parts = explorer.explore(models(explorer), picture, 6)
    assert len(parts) == 4 and [part.count("<img") for part in parts[:2]] == [6, 6]
    assert all("<iframe" in part and "your picture" in part for part in parts[2:])


@for_each("count", [0, 21, float("nan")])
def test_explorer_refuses_a_number_of_neighbours_out_of_range(explorer, models, picture, count):
    with pytest.raises(ValueError, match="1 to 20"):
        explorer.explore(models(explorer), picture, count)


def test_without_a_picture_the_message_says_what_to_do(explorer, latents, models, picture):
    for call in (
        lambda: explorer.explore(models(explorer), None, 5),
        lambda: latents.compare(models(latents), None),
        lambda: latents.between(models(latents), picture, None, True),
    ):
        with pytest.raises(ValueError, match="hoose"):
            call()


@for_each("name", BAD_UPLOADS)
def test_bad_files_are_refused_by_both_spaces_that_take_pictures(explorer, latents, models, tmp_path, name):
    content, said = BAD_UPLOADS[name]
    (tmp_path / name).write_bytes(content)
    for call in (
        lambda: explorer.explore(models(explorer), str(tmp_path / name), 5),
        lambda: latents.compare(models(latents), str(tmp_path / name)),
    ):
        with pytest.raises(ValueError, match=said):
            call()


def test_an_uploaded_file_is_handed_on_unread(latents, models, tmp_path):
    page = latents.build(models(latents))
    image = next(block for block in page.blocks.values() if isinstance(block, gradio.Image))
    (tmp_path / "bad.png").write_bytes(b"no picture")
    payload = image.data_model(path=str(tmp_path / "bad.png"))
    assert image.preprocess(payload) == str(tmp_path / "bad.png") and image.preprocess(None) is None
    assert Image.open(image.value["path"]).size == (8, 8) and np.asarray(Image.open(image.value["path"])).max() > 200
