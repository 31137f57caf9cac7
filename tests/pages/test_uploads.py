"""Pictures from strangers: what is refused before decoding, and that what is read is what Pillow reads."""

import numpy as np
import pytest
from cases import for_each
from pictures import BAD_UPLOADS, encoded, noise
from PIL import Image, ImageFile

from hf_dpssl.pages.uploads import FORMATS, read_upload


@for_each("name", BAD_UPLOADS)
def test_bad_file_is_refused_with_what_is_wrong(name, tmp_path):
    content, said = BAD_UPLOADS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read_upload(tmp_path / name)


@for_each("name", ["bomb.png", "large.png", "heavy.png"])
def test_too_large_pictures_are_refused_before_a_pixel_is_decoded(name, tmp_path, monkeypatch):
    (tmp_path / name).write_bytes(BAD_UPLOADS[name][0])
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ValueError):
        read_upload(tmp_path / name)


@for_each("kind", FORMATS)
def test_every_format_named_is_read_as_pillow_reads_it(kind, tmp_path):
    path = tmp_path / "picture"  # the ending does not matter
    path.write_bytes(encoded(noise(1, 24, 16), kind))
    picture = read_upload(path)
    expected = Image.open(path).convert("RGB")
    assert picture.mode == "RGB" and np.array_equal(np.asarray(picture), np.asarray(expected))


def test_of_an_animation_the_first_frame_is_read(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    assert read_upload(tmp_path / "two.gif").getpixel((0, 0)) == (255, 0, 0)
