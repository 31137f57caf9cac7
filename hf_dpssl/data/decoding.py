"""From the bytes of a picture to an RGB uint8 tensor, by stated rules for every image mode.

| mode | rule |
|---|---|
| RGB, L, 1, YCbCr, LAB, HSV | Pillow's own conversion (grey is copied to three channels) |
| P (palette) | its colours; transparent entries as alpha |
| RGBA, LA, PA, RGB, L or P with a transparent colour | composited over white |
| CMYK | Pillow's conversion |
| I;16, I;16L, I;16B, I (16-bit grey) | value / 65535; Pillow's convert("RGB") would clip it to 255 |
| F (float grey) | taken as [0, 1] |

The EXIF orientation is applied first, as viewers do.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from datasets.utils.file_utils import xopen
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

RESAMPLING = Image.Resampling.BICUBIC


def to_rgb(image: Image.Image) -> Image.Image:
    """An RGB picture of any Pillow image, by the table at the top of this file.

    Raises:
        ValueError: for a 32-bit or float image whose values are outside the stated range.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        return _grey_from_array(np.asarray(image, dtype=np.int64), 65535, image.mode)
    if image.mode == "F":
        return _grey_from_array(np.asarray(image, dtype=np.float64), 1.0, image.mode)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _grey_from_array(values: np.ndarray, maximum: float, mode: str) -> Image.Image:
    if not (values.min() >= 0 and values.max() <= maximum):  # also when one is not a number
        raise ValueError(
            f"a mode {mode} image is read as grey in [0, {maximum:g}], but its values go from "
            f"{values.min():g} to {values.max():g}: rescale it."
        )
    return Image.fromarray(np.rint(values * (255 / maximum)).astype(np.uint8)).convert("RGB")


def decode_image(value: object) -> Image.Image:
    """An RGB picture from what a `datasets` image column holds: {"bytes", "path"}, a path, bytes, Pillow or array.

    Raises:
        ValueError: when the data is not a readable picture; the message says what is wrong with it.
    """
    try:
        if isinstance(value, Image.Image):
            return to_rgb(value)
        if isinstance(value, np.ndarray):
            return to_rgb(Image.fromarray(value))
        if isinstance(value, dict) and value.get("bytes") is not None:
            value = value["bytes"]
        elif isinstance(value, dict):
            value = value.get("path")
        if isinstance(value, str) and value.startswith("hf://"):  # a row of a streamed folder of the Hub
            with xopen(value, "rb") as file:
                value = file.read()
        if isinstance(value, bytes):
            if not value:
                raise ValueError("it holds 0 bytes")
            value = io.BytesIO(value)
        elif not isinstance(value, str):
            raise ValueError(f"expected picture bytes or a path, found {type(value).__name__}")
        with Image.open(value) as image:
            image.load()
            return to_rgb(image)
    except UnidentifiedImageError as error:
        what = value if isinstance(value, str) else f"{value.getbuffer().nbytes} bytes from {value.getvalue()[:8]} on"
        raise ValueError(f"no picture format that Pillow can read ({what})") from error
    except (OSError, SyntaxError, TypeError, RuntimeError, Image.DecompressionBombError) as error:  # AVIF: RuntimeError
        raise ValueError(str(error)) from error


def picture_size(value: object) -> tuple[int, int] | None:
    """(width, height), or (height, width), of what an image column holds, from the file's head; None if unreadable."""
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    try:
        with Image.open(io.BytesIO(value) if isinstance(value, bytes) else value) as image:
            return image.size
    except (OSError, ValueError, SyntaxError, TypeError, AttributeError, RuntimeError, Image.DecompressionBombError):
        return None


def to_square_tensor(image: Image.Image, size: int) -> Tensor:
    """(3, size, size) uint8: shorter side resized to `size` (bicubic), centre cropped."""
    width, height = image.size
    if (width, height) != (size, size):
        scale = size / min(width, height)
        new_size = (max(size, round(width * scale)), max(size, round(height * scale)))
        image = image.resize(new_size, RESAMPLING)
        left = (new_size[0] - size) // 2
        top = (new_size[1] - size) // 2
        image = image.crop((left, top, left + size, top + size))
    return _channels_first(image)


def crop_to_tensor(image: Image.Image, box: tuple[int, int, int, int], size: int) -> Tensor:
    """(3, size, size) uint8 of a crop; `box` = (top, left, height, width) in pixels."""
    top, left, height, width = box
    image = image.resize((size, size), RESAMPLING, box=(left, top, left + width, top + height))
    return _channels_first(image)


def _channels_first(image: Image.Image) -> Tensor:
    # By NumPy: torch would start threads of its own in each thread that decodes.
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())
