"""Pictures from strangers: what is refused before decoding, and that what is read is what Pillow reads."""

import struct
import zlib

import numpy as np
import pytest
from pictures import encoded, noise
from PIL import Image, ImageFile

from hf_dpssl.pages.uploads import FORMATS, read_upload


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes whose header promises width x height pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\0" * 100_000, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


BAD = {
    "text.png": (b"this is no picture", "no picture of a known type"),
    "empty.png": (b"", "empty"),
    "cut.png": (encoded(noise(0, 64, 64))[:900], "damaged"),
    "drawing.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no picture of a known type"),
    "document.pdf": (b"%PDF-1.4 ...", "no picture of a known type"),
    "other.tiff": (encoded(noise(0), "TIFF"), "no picture of a known type"),
    "bomb.png": (bomb(50_000, 50_000), "too large"),
    "large.png": (bomb(8_000, 8_000), "8000 x 8000 pixels; at most 16 megapixels"),
    "narrow.png": (encoded(noise(0, 1, 64)), "too narrow"),
    "heavy.png": (b"\x89PNG" + b"0" * (5 * 2**20), "at most 5 MiB"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_refused_with_what_is_wrong(name, tmp_path):
    content, said = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read_upload(tmp_path / name)


@pytest.mark.parametrize("name", ["bomb.png", "large.png", "heavy.png"])
def test_too_large_pictures_are_refused_before_a_pixel_is_decoded(name, tmp_path, monkeypatch):
    (tmp_path / name).write_bytes(BAD[name][0])
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ValueError):
        read_upload(tmp_path / name)


@pytest.mark.parametrize("kind", FORMATS)
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
