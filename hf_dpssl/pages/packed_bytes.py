"""Bytes as text that a script element holds, as few as may be: byte planes, gzip, and seven bits a character.

A page that is opened from a disk may read scripts and nothing else beside it. Weights hardly get smaller by gzip as
they are; stored by bytes, the first of all numbers before the second of all, they do, and more so when rounded to
fewer significant bits. Seven bits a character, with the few characters escaped that a string cannot hold, take 19 %
more than the bytes, base64 33 %. `unpacked` of spaces/static/runtime.js is the inverse.
"""

from __future__ import annotations

import gzip
import json
import re

import numpy as np

Ranges = list[tuple[int, int]]  # (first byte, count of float32 numbers) of parts that are stored by planes


def rounded(values: np.ndarray, bits: int) -> np.ndarray:
    """float32 numbers rounded, a half to even, to `bits` significant bits: float32 has 24, float16 11."""
    dropped = 24 - bits
    if dropped == 0:
        return values
    words = np.ascontiguousarray(values, np.float32).view(np.uint32)
    half = (1 << (dropped - 1)) - 1 + (words >> dropped & 1)
    return ((words + half) >> dropped << dropped).view(np.float32)


def packed(content: bytes, ranges: Ranges = ()) -> str:
    """A JavaScript object {"ranges", "size" (of the gzipped bytes), "data"}, in ASCII."""
    parts = bytearray(content)
    for start, count in ranges:
        end = start + 4 * count
        parts[start:end] = np.frombuffer(content[start:end], np.uint8).reshape(count, 4).T.tobytes()
    small = gzip.compress(bytes(parts), 9, mtime=0)
    head = json.dumps({"ranges": list(ranges), "size": len(small)}, separators=(",", ":"))
    return f'{head[:-1]},"data":"{_seven_bits(small)}"}}'


def _seven_bits(content: bytes) -> str:
    """Characters of seven bits each, first bits first, as between the quotes of a string of JavaScript."""
    bits = np.unpackbits(np.frombuffer(content, np.uint8))
    bits = np.pad(bits, (0, -len(bits) % 7)).reshape(-1, 7)
    text = np.packbits(np.pad(bits, ((0, 0), (1, 0))), axis=1).tobytes()
    for raw, escaped in ((b"\\", b"\\\\"), (b'"', b'\\"'), (b"\n", b"\\n"), (b"\r", b"\\r")):
        text = text.replace(raw, escaped)
    text = re.sub(rb"\x00(?=[0-9])", rb"\\x00", text)  # where \0 and the digit would be another character
    return text.replace(b"\0", b"\\0").decode("ascii")


def smaller_onnx(content: bytes, bits: int, least: int = 256) -> tuple[bytes, Ranges]:
    """An ONNX file with its weights rounded to `bits`, and where those of at least `least` numbers stand in it."""
    import onnx

    model = onnx.load_from_string(content)
    weights = [one for one in model.graph.initializer if one.data_type == onnx.TensorProto.FLOAT and one.raw_data]
    for weight in weights:
        weight.raw_data = rounded(np.frombuffer(weight.raw_data, np.float32), bits).tobytes()
    content = model.SerializeToString()
    ranges: Ranges = []
    end = 0  # they stand in their order; the same numbers may stand within an earlier one, too
    for weight in weights:
        if len(weight.raw_data) >= 4 * least:
            start = content.index(weight.raw_data, end)
            end = start + len(weight.raw_data)
            ranges.append((start, len(weight.raw_data) // 4))
    return content, ranges
