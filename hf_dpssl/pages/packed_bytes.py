"""Bytes as text that a script element holds, as few as may be: rounded weights, byte planes, gzip, base64.

A page that is opened from a disk may read scripts and nothing else beside it. Weights hardly get smaller by gzip as
they are; rounded to fewer significant bits and stored by bytes, the first of all numbers before the second of all, they
do. `unpacked` of spaces/static/runtime.js is the inverse.
"""

from __future__ import annotations

import base64
import gzip
import json

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
    """JSON of {"ranges", "data"}, which a script takes as it is."""
    parts = bytearray(content)
    for start, count in ranges:
        end = start + 4 * count
        parts[start:end] = np.frombuffer(content[start:end], np.uint8).reshape(count, 4).T.tobytes()
    data = base64.b64encode(gzip.compress(bytes(parts), 9, mtime=0)).decode()
    return json.dumps({"ranges": list(ranges), "data": data}, separators=(",", ":"))


def smaller_onnx(content: bytes, bits: int, least: int = 256) -> tuple[bytes, Ranges]:
    """An ONNX file with its weights rounded to `bits`, and where those of at least `least` numbers stand in it."""
    import onnx

    model = onnx.load_from_string(content)
    weights = [one for one in model.graph.initializer if one.data_type == onnx.TensorProto.FLOAT and one.raw_data]
    for weight in weights:
        weight.raw_data = rounded(np.frombuffer(weight.raw_data, np.float32), bits).tobytes()
    content = model.SerializeToString()
    ranges: Ranges = []
    for weight in weights:
        if len(weight.raw_data) >= 4 * least:
            ranges.append((content.index(weight.raw_data), len(weight.raw_data) // 4))
    return content, sorted(set(ranges))
