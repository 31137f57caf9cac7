"""What every tiny run would do again and other tests are about, done once in a process: the same results, sooner.

Decoded digits and counted operations are kept by what they depend on. Curves are drawn by our own code and only their
rendering, which is matplotlib's, is left out: a white picture of the figure's size. With the fixture `drawn` and
in what a command starts they are rendered.
"""

from __future__ import annotations

import functools
import sys

import torch
from matplotlib.figure import Figure
from PIL import Image


class Unrendered(Figure):
    """A figure that is saved as white paper of its size."""

    def savefig(self, path, *, dpi: int) -> None:
        width, height = (round(side * dpi) for side in self.get_size_inches())
        Image.new("L", (width, height), 255).save(path, format="PNG")


def keep_decoded_digits() -> None:
    """Let tables of the digits, and of rows of them, take their tensors from the first of the same rows and size."""
    from hf_dpssl.data.image_table import ImageTable

    if hasattr(ImageTable.preload, "__wrapped__"):
        return
    preload, readable_batch, kept = ImageTable.preload, ImageTable.readable_batch, {}

    def decoded(table):
        """Images and labels of a table of digits that is not cropped while it is read, else None."""
        if table.data.name != "digits" or table.views is not None:
            return None
        key = (table.split._fingerprint, table.data.image_column, table.data.label_column, table.image_size)
        if key not in kept:
            whole = ImageTable(table.data, table.split, table.image_size)
            preload(whole, sys.maxsize, show_progress=False)
            kept[key] = (whole.images, whole.labels)
        return kept[key]

    @functools.wraps(preload)
    def preload_or_take(table, max_bytes: int, show_progress: bool = True, *, together: bool = False) -> dict[int, str]:
        shared = together and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
        too_large = len(table.split) * 3 * table.image_size**2 > max_bytes
        if shared or too_large or (tensors := decoded(table)) is None:
            return preload(table, max_bytes, show_progress, together=together)
        table.images, table.labels = (tensor.clone() for tensor in tensors)
        return {}

    @functools.wraps(readable_batch)
    def batch_or_take(table, rows) -> dict | None:
        if table.images is not None or (tensors := decoded(table)) is None:
            return readable_batch(table, rows)
        whole = ImageTable(table.data, table.split, table.image_size)
        whole.images, whole.labels = tensors
        return readable_batch(whole, rows)

    ImageTable.preload, ImageTable.readable_batch = preload_or_take, batch_or_take


@functools.cache
def keep_counted_operations():
    """`step_flops` that counts a configuration's operations once."""
    from hf_dpssl.autoencoder.training import step_flops

    kept = {}

    def step_flops_or_take(model, image_size: int, *, train_encoder: bool) -> float:
        learning = tuple(parameter.requires_grad for parameter in model.parameters())
        key = (type(model), model.config.to_json_string(), learning, image_size, train_encoder)
        if key not in kept:
            kept[key] = step_flops(model, image_size, train_encoder=train_encoder)
        return kept[key]

    return step_flops_or_take
