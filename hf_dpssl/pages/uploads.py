"""Pictures from strangers: bytes, type and pixels are checked before anything is decoded."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ..data.decoding import decode_image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
MAX_BYTES = 5 * 2**20
MAX_PIXELS = 16_000_000
MAX_ASPECT = 20  # a side may be so many times the other


def read_upload(path: str | os.PathLike, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The RGB picture in a file, of an animation its first frame.

    Args:
        path: of the file; its name and ending are not looked at.
        max_bytes: of the file.
        max_pixels: width times height, as the file's header says: a small file that would decode to a huge picture
            (a decompression bomb) is refused before it is decoded.

    Raises:
        ValueError: a file that is too large, empty, of another type, too many pixels, too narrow, or damaged.
    """
    size = Path(path).stat().st_size
    if size > max_bytes:
        raise ValueError(f"The file has {size / 2**20:.1f} MiB; at most {max_bytes / 2**20:g} MiB are accepted.")
    if size == 0:
        raise ValueError("The file is empty: choose a picture.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit follows, and is lower
            with Image.open(path, formats=FORMATS) as header:  # reads no pixels
                width, height = header.size
    except Image.DecompressionBombError:
        raise ValueError(
            f"The picture is far too large; at most {max_pixels / 1e6:g} megapixels are accepted."
        ) from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
        raise ValueError(f"This is no picture of a known type ({', '.join(FORMATS)}).") from None
    if width * height > max_pixels:
        raise ValueError(
            f"The picture has {width} x {height} pixels; at most {max_pixels / 1e6:g} megapixels are accepted: "
            "make it smaller first."
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"A picture of {width} x {height} pixels is too narrow: crop it to about a square.")
    try:
        return decode_image(str(path))
    except ValueError as error:
        raise ValueError(f"The picture is damaged: {error}.") from error
