"""Values of every image mode, refusal of what is no picture, and the resampling against torchvision."""

import io
import random

import numpy as np
import pytest
import torch
from pictures import encoded, noise
from PIL import Image, features
from torchvision.transforms.v2 import functional as F

from hf_dpssl.data.decoding import crop_to_tensor, decode_image, picture_size, to_rgb, to_square_tensor

GREY = np.array([[0, 100, 255]], np.uint8)
DEEP = np.array([[0, 32768, 65535]], np.uint16)
DEEP_AS_BYTES = [[[0, 0, 0], [128, 128, 128], [255, 255, 255]]]


def decoded(data):
    picture = decode_image(data)
    assert picture.mode == "RGB"
    return np.asarray(picture).tolist()


def mode_of(data):
    return Image.open(io.BytesIO(data)).mode


def test_rgb_png_keeps_its_values():
    pixels = noise(0, 5, 7)
    assert np.array_equal(decode_image(encoded(pixels)), pixels)


def test_grey_is_copied_to_three_channels():
    assert decoded(encoded(GREY)) == [[[0, 0, 0], [100, 100, 100], [255, 255, 255]]]


def test_one_bit_becomes_black_and_white():
    data = encoded(Image.fromarray(np.array([[True, False]])))
    assert mode_of(data) == "1"
    assert decoded(data) == [[[255, 255, 255], [0, 0, 0]]]


def palette_picture():
    picture = Image.new("P", (3, 1))
    picture.putpalette([10, 20, 30, 200, 100, 50, 0, 0, 255])
    picture.putdata([0, 1, 2])
    return picture


def test_palette_gives_its_colours():
    data = encoded(palette_picture())
    assert mode_of(data) == "P"
    assert decoded(data) == [[[10, 20, 30], [200, 100, 50], [0, 0, 255]]]


def test_transparent_palette_entry_becomes_white():
    for format in ["PNG", "GIF"]:
        data = encoded(palette_picture(), format, transparency=1)
        assert decoded(data) == [[[10, 20, 30], [255, 255, 255], [0, 0, 255]]]


def test_half_transparent_palette_entries_are_mixed_with_white():
    data = encoded(palette_picture(), transparency=bytes([255, 0, 51]))
    assert decoded(data) == [[[10, 20, 30], [255, 255, 255], [204, 204, 255]]]


def test_rgba_is_composited_over_white():
    data = encoded(np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [100, 0, 200, 51]]], np.uint8))
    assert mode_of(data) == "RGBA"
    assert decoded(data) == [[[255, 0, 0], [255, 255, 255], [224, 204, 244]]]  # 0.2 x colour + 0.8 x 255


def test_grey_with_alpha_is_composited_over_white():
    data = encoded(Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(np.array([[255, 51, 0]], np.uint8))]))
    assert mode_of(data) == "LA"
    assert decoded(data) == [[[0, 0, 0], [224, 224, 224], [255, 255, 255]]]


def test_transparent_colour_becomes_white():
    for mode, key in [("L", 100), ("RGB", (100, 100, 100))]:
        data = encoded(Image.fromarray(GREY).convert(mode), transparency=key)
        assert mode_of(data) == mode
        assert decoded(data) == [[[0, 0, 0], [255, 255, 255], [255, 255, 255]]]


def test_cmyk_jpeg_without_cyan_is_red():
    data = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100)
    assert mode_of(data) == "CMYK"
    assert decoded(data)[8][8] == [255, 0, 0]


def test_16_bit_grey_is_scaled_by_65535():
    data = encoded(DEEP)
    assert mode_of(data).startswith("I")
    assert decoded(data) == DEEP_AS_BYTES


def test_16_bit_tiff_is_scaled_by_65535_in_either_byte_order():
    for dtype in ["<u2", ">u2", "<i4"]:
        data = encoded(DEEP.astype(dtype), "TIFF")
        assert mode_of(data).startswith("I")
        assert decoded(data) == DEEP_AS_BYTES


def test_float_tiff_is_taken_as_0_to_1():
    data = encoded(np.array([[0, 0.5, 1]], np.float32), "TIFF")
    assert mode_of(data) == "F"
    assert decoded(data) == DEEP_AS_BYTES


def test_float_image_outside_0_to_1_is_refused():
    for pixels, found in [([[0, 255]], "0 to 255"), ([[-0.5, 1]], "-0.5 to 1"), ([[0, np.nan]], "nan")]:
        with pytest.raises(ValueError, match=f"mode F .*{found}.*rescale"):
            decode_image(encoded(np.array(pixels, np.float32), "TIFF"))


def test_32_bit_image_above_65535_is_refused():
    with pytest.raises(ValueError, match=r"mode I .*65535.*70000.*rescale"):
        decode_image(encoded(np.array([[0, 70000]], np.int32), "TIFF"))


def test_exif_orientation_is_applied():
    """The eight orientations of the EXIF standard: where the 0th row and the 0th column are to be seen."""
    for orientation in range(1, 9):
        pixels = noise(1, 2, 3)
        shown = {
            1: pixels,
            2: pixels[:, ::-1],
            3: pixels[::-1, ::-1],
            4: pixels[::-1],
            5: pixels.swapaxes(0, 1),
            6: np.rot90(pixels, -1),
            7: pixels[::-1, ::-1].swapaxes(0, 1),
            8: np.rot90(pixels),
        }
        exif = Image.Exif()
        exif[0x0112] = orientation
        assert np.array_equal(decode_image(encoded(pixels, exif=exif)), shown[orientation])


def test_every_form_of_an_image_column_gives_the_same_picture(tmp_path):
    pixels = noise(2, 4, 6)
    data, path = encoded(pixels), tmp_path / "picture.png"
    path.write_bytes(data)
    forms = [data, str(path), {"bytes": data, "path": None}, {"bytes": None, "path": str(path)}, pixels]
    for form in [*forms, Image.fromarray(pixels)]:
        assert np.array_equal(decode_image(form), pixels)


def test_what_is_no_picture_is_a_value_error():
    for value, message in [
        (b"", "0 bytes"),
        ({"bytes": b"", "path": "a.png"}, "0 bytes"),
        (b"<html>not found", r"no picture format .*15 bytes from b'<html>no' on"),
        (b"\x89PNG\r\n\x1a\n", "no picture format"),
        ("/no/such/picture.png", "No such file.*picture.png"),
        (None, "expected picture bytes or a path, found NoneType"),
        ({"bytes": None, "path": None}, "found NoneType"),
        (7, "found int"),
        (np.zeros((3, 3, 7), np.uint8), "data type"),
    ]:
        with pytest.raises(ValueError, match=message):
            decode_image(value)


def test_truncated_file_is_a_value_error():
    for format in ["PNG", "JPEG", "GIF", "BMP", "TIFF"]:
        data = encoded(noise(3, 64, 64), format)
        for share in (0.1, 0.5, 0.9):
            with pytest.raises(ValueError, match="truncated|no picture format|not processed|Truncated|bytes|decod"):
                decode_image(data[: int(len(data) * share)])


def test_png_with_a_wrong_checksum_is_a_value_error():
    data = bytearray(encoded(noise(3, 32, 32)))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(ValueError, match=r"\w+"):
        decode_image(bytes(data))


def test_unsupported_kind_of_a_known_format_is_a_value_error():
    data = bytearray(encoded(noise(3), "DDS"))
    data[80:84] = bytes(4)  # its pixel format flags
    with pytest.raises(ValueError, match="pixel format"):
        decode_image(bytes(data))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_random_damage_never_raises_anything_but_value_errors():
    pixels, rng, refused = noise(4, 20, 30), random.Random(0), 0
    files = [encoded(pixels, format) for format in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")]
    for _ in range(400):
        data = bytearray(rng.choice(files))
        for _ in range(rng.choice([1, 4, 16])):
            data[rng.randrange(min(len(data), rng.choice([100, len(data)])))] = rng.randrange(256)
        try:
            assert decode_image(bytes(data)).mode == "RGB"
        except ValueError as error:
            assert str(error)
            refused += 1
    assert 50 < refused < 400


def test_damaged_avif_is_a_value_error_and_may_have_a_size_or_none():
    if not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    whole, refused = encoded(noise(4, 64, 64), "AVIF"), 0
    for place in range(whole.index(b"mdat") + 30):  # the head, and how the pixels begin
        data = bytearray(whole)
        data[place] = 0
        assert picture_size(bytes(data)) is None or len(picture_size(bytes(data))) == 2
        try:
            assert decode_image(bytes(data)).mode == "RGB"
        except ValueError as error:
            assert str(error)
            refused += 1
    assert refused > 50


def test_square_tensor_of_the_right_size_is_the_picture_itself():
    pixels = noise(5, 16, 16)
    result = to_square_tensor(Image.fromarray(pixels), 16)
    assert result.dtype == torch.uint8 and result.shape == (3, 16, 16) and result.is_contiguous()
    assert np.array_equal(result.permute(1, 2, 0).numpy(), pixels)


def test_square_tensor_equals_torchvision_resize_and_centre_crop():
    for height, width in [(40, 40), (48, 96), (100, 64), (8, 12), (33, 57)]:
        picture = Image.fromarray(noise(6, height, width))
        scale = 16 / min(height, width)
        resized = F.resize(picture, [round(height * scale), round(width * scale)], F.InterpolationMode.BICUBIC)
        top, left = (resized.height - 16) // 2, (resized.width - 16) // 2
        expected = F.pil_to_tensor(F.crop(resized, top, left, 16, 16))
        assert torch.equal(to_square_tensor(picture, 16), expected)


def test_square_tensor_keeps_the_centre_of_a_wide_picture():
    pixels = np.zeros((32, 96, 3), np.uint8)
    pixels[:, 32:64] = (10, 200, 30)
    result = to_square_tensor(Image.fromarray(pixels), 32)
    assert (result.flatten(1).float().mean(1) - torch.tensor([10.0, 200.0, 30.0])).abs().max() == 0


def test_extreme_aspect_ratios_give_a_square():
    for height, width in [(1, 1), (1, 500), (500, 1), (3, 1000), (999, 1000)]:
        result = to_square_tensor(Image.new("RGB", (width, height), (7, 77, 177)), 24)
        assert result.shape == (3, 24, 24)
        assert result.flatten(1).unique(dim=1).tolist() == [[7], [77], [177]]


def test_crop_equals_torchvision_resized_crop():
    """Exactly, where no kernel reaches over the edge of the crop: at scale 1 and for the whole picture."""
    for box, size in [((10, 4, 42, 36), 32), ((0, 0, 60, 40), 16), ((0, 0, 60, 40), 64)]:
        picture = Image.fromarray(noise(7, 40, 60))
        left, top, right, bottom = box
        cropped = F.resized_crop(
            picture, top, left, bottom - top, right - left, [size] * 2, F.InterpolationMode.BICUBIC
        )
        assert torch.equal(
            crop_to_tensor(picture, (top, left, bottom - top, right - left), size), F.pil_to_tensor(cropped)
        )


def test_scaled_crop_equals_torchvision_inside_and_the_whole_picture_at_its_edge():
    for box, size in [((16, 8, 48, 40), 16), ((8, 16, 24, 32), 32)]:
        picture = Image.fromarray(noise(8, 64, 64))
        left, top, right, bottom = box
        result = crop_to_tensor(picture, (top, left, bottom - top, right - left), size)
        cropped = F.resized_crop(
            picture, top, left, bottom - top, right - left, [size] * 2, F.InterpolationMode.BICUBIC
        )
        inside, scale = (slice(None), slice(5, -5), slice(5, -5)), size / (right - left)
        assert torch.equal(result[inside], F.pil_to_tensor(cropped)[inside])
        whole = F.pil_to_tensor(F.resize(picture, [int(64 * scale)] * 2, F.InterpolationMode.BICUBIC))
        first_row, first_column = int(top * scale), int(left * scale)
        assert torch.equal(result, whole[:, first_row : first_row + size, first_column : first_column + size])


def test_pillow_image_with_alpha_is_accepted_by_to_rgb():
    assert to_rgb(Image.new("RGBA", (1, 1), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
