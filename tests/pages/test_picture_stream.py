"""Pictures while they are made: the same as the pipeline's own, in as many steps; snippets run in fresh processes."""

import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import make_dit, make_drift, make_tokens

from hf_dpssl.pages.picture_stream import PictureRequest, emitted, snippet, stream_pictures

REQUEST = PictureRequest(("cat", "dog", "cat"), 3, seed=5, guidance=2.0, steps=4)


@pytest.fixture(scope="module", params=[make_dit, make_drift, make_tokens], ids=["dit", "drift", "tokens"])
def pipeline(request):
    return request.param()


def generators():
    return [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)]


def arrays(pictures) -> np.ndarray:
    return np.stack([np.asarray(picture) for picture in pictures])


def test_last_pictures_are_those_of_the_pipeline_and_each_step_shows_some(pipeline):
    parts = list(stream_pictures(pipeline, REQUEST))
    total = parts[0][1]
    assert [done for done, *_ in parts] == list(range(1, total + 2))
    steps = {"VQDiTPipeline": 4, "VQDriftPipeline": 1}
    assert total == steps.get(type(pipeline).__name__) or total == pipeline.num_tokens
    expected = pipeline(["cat", "dog", "cat"], generator=generators(), **REQUEST.options(type(pipeline))).images
    assert np.array_equal(arrays(parts[-1][2]), arrays(expected))
    assert all(len(pictures) == 3 and pictures[0].size == (16, 16) for *_, pictures in parts)
    assert np.array_equal(arrays(parts[-2][2]), arrays(expected))  # the last step is the picture


def test_pictures_between_two_frames_are_left_out_and_not_decoded(pipeline):
    parts = list(stream_pictures(pipeline, REQUEST, frame_seconds=60))
    assert [done for done, *_ in parts] == [1, parts[0][1] + 1]
    assert np.array_equal(arrays(parts[-1][2]), arrays(list(stream_pictures(pipeline, REQUEST))[-1][2]))


def test_codes_to_come_are_grey_and_those_drawn_are_final():
    tokens = make_tokens()
    parts = list(stream_pictures(tokens, PictureRequest(("horse",), 1, guidance=1.0)))
    side = 16 // tokens.vae.config.latent_size
    after_five = arrays(parts[4][2])[0]
    assert (after_five[side : 2 * side, side:] == 128).all()  # code 5 is the first of the second row
    assert (after_five[2 * side :] == 128).all() and not (after_five[:side] == 128).all()


def test_image_is_the_same_alone_and_among_others(pipeline):
    among = list(stream_pictures(pipeline, REQUEST))[-1][2]
    alone = list(stream_pictures(pipeline, PictureRequest(("dog",), 1, seed=6, guidance=2.0, steps=4)))[-1][2]
    assert np.abs(arrays(among)[1].astype(int) - arrays(alone)[0]).max() <= 1  # rounding of another batch size


@pytest.mark.parametrize("fresh", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_snippets_draw_the_same_pixels_also_in_a_fresh_process(fresh, pipeline, tmp_path, monkeypatch):
    pipeline.save_pretrained(tmp_path / "model")
    requests = {"classes": REQUEST, "no-class": PictureRequest((), 2, seed=1, steps=3)}
    program = "import os\n"
    for name, request in requests.items():
        (tmp_path / name).mkdir()
        code = snippet(type(pipeline), str(tmp_path / "model"), request)
        assert str(tmp_path) not in code  # a server's folders are nobody's business
        code = code.replace("path/to/model", str(tmp_path / "model"))
        program += f"os.chdir({str(tmp_path / name)!r})\nexec({code!r}, {{}})\n"
    monkeypatch.chdir(tmp_path)  # and back
    if fresh:
        subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
    else:
        exec(program, {})
    for name, request in requests.items():
        for i, picture in enumerate(list(stream_pictures(pipeline, request))[-1][2]):
            drawn = Image.open(tmp_path / name / f"{request.seed + i}.png")
            assert np.array_equal(np.asarray(drawn), np.asarray(picture))


def test_snippet_of_a_hub_id_names_its_revision(pipeline):
    code = snippet(type(pipeline), "org/model@v2", PictureRequest(("cat", "cat"), 2))
    assert "from_pretrained('org/model', revision='v2')" in code and "['cat'] * 2" in code
    compile(code, "snippet", "exec")


def test_closing_the_stream_ends_the_run_and_the_pipeline_goes_on(pipeline):
    before = threading.active_count()
    parts = stream_pictures(pipeline, REQUEST)
    next(parts)
    parts.close()
    assert threading.active_count() == before
    assert len(list(stream_pictures(pipeline, PictureRequest(("cat",), 1, steps=2)))) >= 2


def test_an_error_of_the_run_is_raised_where_it_is_read():
    def run(emit):
        emit(1)
        raise ValueError("no memory")

    parts = emitted(run)
    assert next(parts) == 1
    with pytest.raises(ValueError, match="no memory"):
        next(parts)


def test_unknown_class_is_refused_with_the_known_ones(pipeline):
    with pytest.raises(ValueError, match="unknown class 'cow'"):
        list(stream_pictures(pipeline, PictureRequest(("cow",), 1)))


def test_requests_out_of_range_are_refused():
    nan = float("nan")
    for values, said in [
        ({"number": 17}, "1 to 16"),
        ({"number": 0}, "1 to 16"),
        ({"labels": ("cat",), "number": 2}, "1 to 16"),
        ({"steps": 0}, "1 to 100"),
        ({"steps": 1000}, "1 to 100"),
        ({"guidance": 0.5}, "Guidance"),
        ({"guidance": nan}, "Guidance"),
        ({"seed": -1}, "whole number"),
        ({"seed": 2**32}, "whole number"),
    ]:
        with pytest.raises(ValueError, match=said):
            PictureRequest(**values)


def test_two_runs_at_once_on_one_pipeline_do_not_disturb_each_other(pipeline):
    other = PictureRequest(("horse",), 1, seed=9, guidance=1.5, steps=7)
    expected = [arrays(list(stream_pictures(pipeline, request))[-1][2]) for request in (REQUEST, other)]
    last, runs = {}, {0: stream_pictures(pipeline, REQUEST), 1: stream_pictures(pipeline, other)}
    while runs:
        for number in list(runs):
            part = next(runs[number], None)
            if part is None:
                del runs[number]
            else:
                last[number] = arrays(part[2])
    assert all(np.array_equal(last[number], expected[number]) for number in (0, 1))
