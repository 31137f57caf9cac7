"""The functions behind the Spaces that have models, on tiny ones: what they show, and what they refuse."""

import html
import re
import shlex
import shutil
import zipfile

import numpy as np
import pytest
import torch
import yaml
from cases import for_each
from load_space import load_app
from pictures import BAD_UPLOADS, encoded, noise
from PIL import Image
from tiny_encoders import save_ours
from tiny_pipelines import make_dit, make_drift, make_tokens, make_vae

from hf_dpssl import VQAutoencoder
from hf_dpssl.pages.page_pictures import data_url

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
    make_vae(1).save_pretrained(folder / "comparison" / "dae")
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
    for app, names in ((generator, {"draw"}), (latents, {"compare", "morph", "draw"}), (explorer, {"explore"})):
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
    request = generator.asked_for(models(generator), "dit", generator.EVERY, 5, 0, 2, 4, 1, 0)
    assert request.labels == ("cat", "dog", "horse", "cat", "dog")
    assert generator.asked_for(models(generator), "dit", generator.NONE, 2, 0, 2, 4, 1, 0).labels == ()


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


@pytest.mark.extended
def test_sliders_that_change_nothing_are_off_with_the_reason(generator, models):
    """In every state: the pictures of two values of a slider differ where it is on, and only there."""
    loaded, others = models(generator), {"guidance": 6.0, "steps": 2, "temperature": 0.5, "top_k": 2}
    places = dict(zip(others, range(3, 7), strict=True))

    def pictures(name, values):
        *_, last = generator.draw(loaded, name, *values)
        return re.findall('src="([^"]+)"', last[0])

    for name in BOTH:
        for label in ("cat", generator.NONE):
            for temperature in (0.0, 1.0) if name == "token transformer" else (1.0,):
                start = [label, 2, 3, 2.0, 4, temperature, 0]
                classes, *sliders = generator.fit_controls(loaded, name, label, temperature)
                assert classes.value == label and classes.interactive
                drawn = pictures(name, start)
                for (slider, value), shown in zip(others.items(), sliders, strict=True):
                    values = [value if i == places[slider] else old for i, old in enumerate(start)]
                    assert shown.interactive == (pictures(name, values) != drawn), (name, label, temperature, slider)
                    assert shown.interactive or shown.info not in (None, generator.SLIDERS[slider])


def test_a_model_without_classes_says_so_and_takes_no_guidance(generator, tmp_path, monkeypatch):
    pipeline = make_dit(names=[])
    pipeline.save_pretrained(tmp_path / "dit")
    monkeypatch.setenv("DPSSL_DEMO", str(tmp_path))
    page = generator.build()
    blocks = {block.label: block for block in page.blocks.values() if getattr(block, "label", None)}
    assert not blocks["class"].interactive and "without classes" in blocks["class"].info
    assert not blocks["guidance"].interactive and blocks["steps"].interactive
    assert not blocks["temperature"].visible and not blocks["top k"].visible


def test_latent_lab_compares_both_autoencoders_and_morphs(latents, models, picture):
    shown = latents.compare(models(latents), picture)
    assert shown.count("<section>") == 2 and shown.count("<img") == 8
    assert len(re.findall(r"reconstruction, -?[\d.]+ dB", shown)) == 2
    way = latents.between(models(latents), picture, picture, True)
    assert way.count("<section>") == 3 and way.count("<img") == 3 * latents.STEPS


def test_latent_lab_with_one_autoencoder_says_which_is_missing(latents, demo, monkeypatch, tmp_path):
    (tmp_path / "autoencoder").symlink_to(demo / "autoencoder")
    monkeypatch.setenv("DPSSL_DEMO", str(tmp_path))
    assert "dae is missing" in latents.Models().note
    assert "There is no such autoencoder here" in latents.missing_generators(latents.Models())


@pytest.fixture(scope="module")
def both_latents(tmp_path_factory):
    """Folders as the demo has them: a DiT in the latents of one autoencoder, and a token model in those of another."""
    folder = tmp_path_factory.mktemp("latents")
    for pipeline, place, latents in (
        (make_dit(), "drift", "autoencoder"),
        (make_tokens(["dog", "cat"]), "comparison/dae-drift", "comparison/dae"),
    ):
        pipeline.save_pretrained(folder / place)
        pipeline.vae.save_pretrained(folder / latents)
    return folder


def test_latent_lab_shows_what_each_generator_draws_of_the_same_classes_and_seeds(latents, both_latents, monkeypatch):
    monkeypatch.setenv("DPSSL_DEMO", str(both_latents))
    loaded = latents.Models()
    assert loaded.class_names == ["cat", "dog"]  # those that both know
    shown = latents.generate(loaded, latents.EVERY, 3, 7, 2.0, 4)
    drawn = re.findall('<img src="([^"]+)" alt="([^"]+)"', shown)
    assert [spoken for _, spoken in drawn] == ["cat, seed 7", "dog, seed 8", "cat, seed 9"] * 2
    dit, tokens = make_dit(), make_tokens(["dog", "cat"])
    generators = lambda: [torch.Generator().manual_seed(seed) for seed in (7, 8, 9)]  # noqa: E731
    classes = ["cat", "dog", "cat"]
    expected = dit(classes, guidance_scale=2.0, num_inference_steps=4, generator=generators()).images
    expected += tokens(classes, guidance_scale=2.0, generator=generators()).images
    for (address, _), picture in zip(drawn, expected, strict=True):
        assert address == data_url(picture)
    with pytest.raises(ValueError, match="no class 'horse'"):
        latents.generate(loaded, "horse", 3, 7, 2.0, 4)


def test_latent_lab_names_the_command_that_trains_a_missing_generator_and_then_shows_it(
    latents, both_latents, monkeypatch, tmp_path, run_script
):
    for place in ("autoencoder", "drift"):
        shutil.copytree(both_latents / place, tmp_path / "demo" / place)
    statistics = {"latent_mean": [0.0] * 4, "latent_std": [1.0] * 4}
    make_vae(1, **statistics).save_pretrained(tmp_path / "demo" / "comparison" / "dae")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DPSSL_DEMO", "demo")
    small = {"num_layers": 1, "width": 16, "num_heads": 2, "max_train_steps": 1, "dataset": "digits"}
    (tmp_path / "demo" / "drift" / "recipe.yaml").write_text(yaml.safe_dump(small | {"output_dir": "elsewhere"}))
    page = latents.build()
    text = html.unescape(latents.missing_generators(latents.Models()))
    texts = [html.unescape(block.value) for block in page.blocks.values() if isinstance(block, gradio.HTML)]
    assert text.count("<pre>") == 1 and any(text in shown for shown in texts)
    command = shlex.split(re.search("<pre>(.*)</pre>", text)[1])
    assert command[:3] == ["hf-dpssl", "train", "dae_dit"]
    run_script("dae_dit", command[3:])
    loaded = latents.Models()
    assert set(loaded.generators) == {"dae", "joint"} and latents.missing_generators(loaded) == ""
    monkeypatch.setenv("DPSSL_DEMO", str(tmp_path / "demo"))  # of a server, whose folders mean nothing to a visitor
    shutil.rmtree(tmp_path / "demo" / "comparison" / "dae-drift")
    assert str(tmp_path) not in latents.missing_generators(latents.Models())


def test_latent_lab_refuses_a_generator_of_other_latents(latents, both_latents, monkeypatch, tmp_path):
    monkeypatch.setenv("DPSSL_DEMO", str(both_latents))
    monkeypatch.setenv("DPSSL_DAE_GENERATOR", str(both_latents / "drift"))
    with pytest.raises(ValueError, match="not trained on the latents of .*DPSSL_DAE and DPSSL_DAE_GENERATOR"):
        latents.Models()
    monkeypatch.setenv("DPSSL_DAE", str(both_latents / "autoencoder"))
    assert set(latents.Models().generators) == {"joint", "dae"}
    rescaled = VQAutoencoder.from_pretrained(both_latents / "autoencoder")
    rescaled.config.latent_std = [3.0] * rescaled.config.latent_channels
    rescaled.save_pretrained(tmp_path)
    monkeypatch.setenv("DPSSL_DAE", str(tmp_path))
    with pytest.raises(ValueError, match="normalised by its latent_mean and latent_std"):
        latents.Models()
    monkeypatch.setenv("DPSSL_DAE", str(both_latents / "autoencoder"))
    monkeypatch.delenv("DPSSL_DAE_GENERATOR")
    assert set(latents.Models().generators) == {"joint"}  # the demo's is left out, since nobody has named it


@pytest.mark.extended
def test_controls_of_the_latent_lab_that_change_nothing_are_off_with_the_reason(
    latents, both_latents, monkeypatch, tmp_path
):
    def controls() -> dict:
        blocks = latents.build().blocks.values()
        return {block.label or block.value: block for block in blocks if hasattr(block, "interactive")}

    monkeypatch.setenv("DPSSL_DEMO", str(both_latents))
    shown = controls()
    assert all(shown[name].interactive for name in ("class", "pictures", "guidance", "steps", "Draw"))
    assert shown["snap to codes on the way"].interactive and shown["snap to codes on the way"].info is None
    loaded = latents.Models()
    guidance, steps = latents.fit_controls(loaded, latents.NONE)
    assert not guidance.interactive and "none is asked for" in guidance.info and steps.interactive
    del loaded.generators["joint"]  # the token model stays
    assert [slider.interactive for slider in latents.fit_controls(loaded, "cat")] == [True, False]
    for seed, place in enumerate(("autoencoder", "comparison/dae")):
        make_vae(seed, quantizer=("kl", "none")[seed]).save_pretrained(tmp_path / place)
    monkeypatch.setenv("DPSSL_DEMO", str(tmp_path))
    shown = controls()
    for name in ("class", "pictures", "seed of the first", "guidance", "steps", "snap to codes on the way"):
        assert not shown[name].interactive and shown[name].info, name
    assert not shown["Draw"].interactive and shown["snap to codes on the way"].value is False
    monkeypatch.setenv("DPSSL_DAE", str(both_latents / "comparison" / "dae"))
    snapping = controls()["snap to codes on the way"]
    assert snapping.interactive and snapping.info == "joint has no codebook"


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
