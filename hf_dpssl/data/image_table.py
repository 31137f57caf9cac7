"""One split of a data set as uint8 tensors: decoded once when it fits into memory, otherwise row by row."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice

import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from .decoding import crop_to_tensor, decode_image, picture_size, to_square_tensor
from .decoding_threads import in_threads
from .image_data import ImageData
from .shared_images import decoded_once
from .views import TwoViews

# Pixels below which threads wait for each other longer than they decode (cifar10-jpeg: twice the seconds of CPU).
_SMALL = 96**2


class BadImageError(ValueError):
    """A row whose picture cannot be read; the message names the data set, the row and the file."""


class ImageTable(torch.utils.data.Dataset):
    """Map-style images of one split; items are (epoch, row) pairs, batches are dicts (`__getitems__`).

    Args:
        data: where the split comes from.
        split: data.train or data.evaluation.
        image_size: side of the square uint8 images that come out.
        on_bad_image: "error", or "skip": a bad row's place is taken by the next readable row.
        views: random-resized-crop each image twice from its full resolution while loading, for
            contrastive learning on images larger than `image_size`.
        first_row: number of the split's first row in the whole data set, for messages.
        place: what stands before the number there, such as the shard.
    """

    def __init__(
        self,
        data: ImageData,
        split: Dataset,
        image_size: int,
        on_bad_image: str = "error",
        views: TwoViews | None = None,
        first_row: int = 0,
        place: str = "",
    ):
        if on_bad_image not in ("error", "skip"):
            raise ValueError(f"on_bad_image must be 'error' or 'skip', got {on_bad_image!r}.")
        self.data = data
        self.split = split
        self.image_size = image_size
        self.on_bad_image = on_bad_image
        self.views = views
        self.first_row = first_row
        self.place = place
        self.skipped: dict[str, str] = {}  # unreadable rows met by `preload` and `evaluation_batches`
        self.images: Tensor | None = None
        self.labels: Tensor | None = None
        self._unreadable: frozenset[int] = frozenset()  # rows of `images` that hold the next readable one

    def __len__(self) -> int:
        return len(self.split)

    def random_rows(self, limit: int | None) -> Sequence[int]:
        """Rows in ascending order: a random subset of that size, of each class its share; all without a limit.

        Those of them that `preload` could not read are left out.
        """
        rows = self.data.random_rows(self.split, limit)
        return [row for row in rows if row not in self._unreadable] if self._unreadable else rows

    def preload(self, max_bytes: int, show_progress: bool = True, *, together: bool = False) -> dict[int, str]:
        """Decode everything once if it fits into `max_bytes`; returns {row: reason} of rows replaced by "skip".

        `together`: all processes of the launch call this; those of a machine decode a share each, into one memory.
        """
        count = len(self.split)
        if self.views is not None or count * 3 * self.image_size**2 > max_bytes:
            return {}
        silent = {} if show_progress else {"disable": True}  # else TQDM_DISABLE decides

        def decode(rows: range, images: Tensor, labels: Tensor) -> dict[int, str]:
            bad: dict[int, str] = {}
            shown = tqdm(rows, "reading images", unit="img", leave=False, **silent)
            for row, found in zip(shown, self._squares(rows), strict=True):
                if isinstance(found, BadImageError):
                    bad[row] = str(found)
                    if self.on_bad_image == "error":
                        break
                else:
                    images[row], labels[row] = found
            return bad

        images, labels, bad = decoded_once(decode, count, self.image_size, together=together)
        if bad and self.on_bad_image == "error":
            raise BadImageError(bad[min(bad)])
        if len(bad) == count:
            raise BadImageError(f"none of the {len(bad)} images of {self.data.name!r} can be read: {bad.get(0)}")
        readable = [row for row in range(count) if row not in bad]
        for row in bad:  # as `_readable`, so that batches do not depend on whether the images fit into memory
            taken = readable[bisect(readable, row) % len(readable)]
            images[row], labels[row] = images[taken], labels[taken]
        self._unreadable = frozenset(bad)
        self.images = images
        self.labels = labels
        return bad

    def _row(self, row: int):
        """(RGB picture, label or -1) of a row; BadImageError when it cannot be decoded."""
        values = self.split[row]
        return decode_row(self.data, values, f"{self.place}row {self.first_row + row}")

    def _squares(self, rows: Iterable[int]) -> Iterator[tuple[Tensor, int] | BadImageError]:
        """Square image and label of each row, or why it cannot be read."""
        given = ((self.split[row], f"{self.place}row {self.first_row + row}") for row in rows)
        return decode_rows(self.data, given, size=self.image_size)

    def _readable(self, row: int, skipped: dict[int, str]):
        for step in range(len(self.split)):
            try:
                return self._row((row + step) % len(self.split))
            except BadImageError as error:
                if self.on_bad_image == "error":
                    raise
                skipped[(row + step) % len(self.split)] = str(error)
        raise BadImageError(f"no image of {self.data.name!r} can be read: {next(iter(skipped.values()))}")

    def __getitems__(self, items: list[tuple[int, int]]) -> dict:
        """The batch of these (epoch, row) pairs; keys as in `ImageSource.loader`."""
        epoch = items[0][0]
        rows = torch.tensor([row for _, row in items])
        if self.images is not None:
            return dict(images=self.images[rows], labels=self.labels[rows], sample_ids=rows, epoch=epoch, skipped={})
        skipped: dict[int, str] = {}
        pictures, labels = zip(*(self._readable(row, skipped) for _, row in items), strict=True)
        images = stack(pictures, self.image_size, self.views, rows, epoch)
        return dict(images=images, labels=torch.tensor(labels), sample_ids=rows, epoch=epoch, skipped=skipped)

    def readable_batch(self, rows: Sequence[int]) -> dict | None:
        """Those of the rows that can be read, none twice; keys as in `__getitems__`, None when none can be read."""
        if self.images is not None:
            items = [(0, row) for row in rows if row not in self._unreadable]
            return self.__getitems__(items) if items else None
        kept = []
        images = []
        labels = []
        for row, found in zip(rows, self._squares(rows), strict=True):
            if not isinstance(found, BadImageError):
                kept.append(row)
                images.append(found[0])
                labels.append(found[1])
            elif self.on_bad_image == "error":
                raise found
            else:
                self.skipped[f"{self.place}row {self.first_row + row}"] = str(found)
        if not kept:
            return None
        ids = torch.tensor(kept)
        return dict(images=torch.stack(images), labels=torch.tensor(labels), sample_ids=ids, epoch=0, skipped={})


def decode_row(data: ImageData, values: dict, place: str) -> tuple[Image.Image, int]:
    """(RGB picture, label or -1) of one row; BadImageError, naming `place`, when it cannot be decoded."""
    value = values[data.image_column]
    label = values[data.label_column] if data.label_column is not None else -1
    try:
        return decode_image(value), -1 if label is None else int(label)
    except ValueError as error:
        file = value.get("path") if isinstance(value, dict) else None
        raise BadImageError(
            f"{place} of data set {data.name!r}{f' ({file})' if file else ''} is not a readable picture: {error}. "
            "Repair or remove it, or pass --on_bad_image skip."
        ) from error


def decode_rows(
    data: ImageData, rows: Iterable[tuple[dict, str]], *, size: int | None = None
) -> Iterator[tuple[Image.Image | Tensor, int] | BadImageError]:
    """`decode_row` of each (values, place), in their order; a BadImageError stands where it was raised.

    Threads decode ahead, one for each core, unless the first picture is small. `size`: squares uint8 (3, size, size) in
    the place of pictures.
    """

    def decoded(given: tuple[dict, str]) -> tuple[Image.Image | Tensor, int] | BadImageError:
        try:
            picture, label = decode_row(data, *given)
        except BadImageError as error:
            return error
        return picture if size is None else to_square_tensor(picture, size), label

    rows = iter(rows)
    first = list(islice(rows, 1))
    sides = picture_size(first[0][0][data.image_column]) if first else None
    small = sides is not None and sides[0] * sides[1] < _SMALL
    return in_threads(decoded, chain(first, rows), 1 if small else None)


def stack(pictures, size: int, views: TwoViews | None, sample_ids: Tensor, epoch: int) -> Tensor:
    """Pictures as uint8 (B, 3, S, S); with `views` as (B, 2, 3, S, S), each cropped twice at its full resolution."""
    if views is None:
        return torch.stack([to_square_tensor(picture, size) for picture in pictures])
    widths, heights = torch.tensor([picture.size for picture in pictures]).unbind(1)
    boxes = [views.parameters(sample_ids, epoch, view, heights, widths).boxes.tolist() for view in (1, 2)]
    return torch.stack(
        [torch.stack([crop_to_tensor(picture, box[i], size) for box in boxes]) for i, picture in enumerate(pictures)]
    )
