"""What every tiny run would do again and other tests are about, done once in a process: the same results, sooner.

Decoded digits and counted operations are kept by what they depend on. Curves are drawn by our own code and only their
rendering, which is matplotlib's, is left out: a white picture of the figure's size; with the fixture `drawn` and in
processes of their own they are rendered.
"""

from __future__ import annotations

import functools

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
    preload, kept = ImageTable.preload, {}

    @functools.wraps(preload)
    def preload_or_take(table, max_bytes: int, show_progress: bool = True) -> dict[int, str]:
        fits = len(table.split) * 3 * table.image_size**2 <= max_bytes
        if table.data.name != "digits" or table.views is not None or not fits:
            return preload(table, max_bytes, show_progress)
        key = (table.split._fingerprint, table.data.image_column, table.data.label_column, table.image_size)
        if key not in kept:
            bad = preload(table, max_bytes, show_progress)
            assert not bad, bad
            kept[key] = (table.images, table.labels)
        table.images, table.labels = (tensor.clone() for tensor in kept[key])
        return {}

    ImageTable.preload = preload_or_take


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
