"""From splits to batches of uint8 tensors, in an order that is a function of (seed, epoch) alone.

Images that fit into memory are decoded once, so that every bad one is found before training starts;
larger sets are decoded by loader workers as they come. Workers hold no random state: which samples
a batch holds follows from its epoch and index, so a resumed run simply starts the loader there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import IterableDataset as TorchIterableDataset

from ..models.gather import gather_objects
from . import keyed_random
from .decoding import picture_size
from .image_data import ImageData, load_images
from .image_table import BadImageError, ImageTable, decode_row, stack
from .subsets import sample_of_parts
from .views import TwoViews

logger = logging.getLogger(__name__)

_SHUFFLE_BUFFER = 4096  # rows of a stream that a process holds
_OF_A_STREAM = 10_000  # images of a split that are held to evaluate and measure


def load_images_for(args: Any) -> ImageData:
    """The data set that the arguments of a training script name; errors as `load_images`."""
    columns = {"image_column": args.image_column, "label_column": args.label_column}
    return load_images(args.dataset, **columns, streaming=args.streaming, revision=args.dataset_revision)


class _EpochOrder(Sampler):
    """Batches of (epoch, row) from a given point on, endlessly: this process's slice of each global batch."""

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        start: tuple[int, int],
        process: tuple[int, int],
        accumulate: int = 1,
    ):
        if size < batch_size * process[1]:
            raise ValueError(
                f"{size} samples are fewer than one batch of all processes ({batch_size} x {process[1]}): "
                "lower --batch_size."
            )
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.start = start
        self.process = process
        whole_steps = size // (batch_size * process[1] * accumulate) * accumulate  # those of an epoch, in batches
        self.num_batches = whole_steps or size // (batch_size * process[1])

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        index, count = self.process
        global_batch = self.batch_size * count
        epoch, batch = self.start
        while True:
            order = keyed_random.permutation(self.size, seed=self.seed, epoch=epoch).tolist()
            for first in range(batch * global_batch, self.num_batches * global_batch, global_batch):
                mine = order[first + index * self.batch_size : first + (index + 1) * self.batch_size]
                yield [(epoch, row) for row in mine]
            epoch += 1
            batch = 0


class _WholeStream(TorchIterableDataset):
    """Batches of a stream: every process and worker reads it, and decodes only what is its own.

    A sample's id is its place in the epoch's (shuffled) stream. Worker w of n makes every n-th
    batch, which the DataLoader puts back in order, so the number of workers changes nothing.
    """

    def __init__(self, source: ImageSource, start: tuple[int, int]):
        self.source = source
        self.start = start

    def __iter__(self) -> Iterator[dict]:
        worker_id, num_workers = _worker()
        epoch, first_batch = self.start
        number = 0  # of the batch since the start, over epochs
        while True:
            yielded = 0
            for batch, rows in enumerate(self._global_batches(epoch)):
                if batch >= first_batch:
                    yielded += 1
                    if number % num_workers == worker_id:
                        yield self._own(rows, batch, epoch)
                    number += 1
            if not yielded and first_batch == 0:
                raise ValueError(
                    f"the stream of {self.source.data.name!r} holds fewer images than one batch of all processes "
                    f"({self.source.batch_size * self.source.process[1]}): lower --batch_size."
                )
            epoch += 1
            first_batch = 0

    def _global_batches(self, epoch: int) -> Iterator[list[dict]]:
        seed = keyed_random.derive_seed(self.source.seed, "stream", epoch)
        size = self.source.batch_size * self.source.process[1]
        stream = self.source.data.train.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
        # In a loader worker iter(stream) would leave out the shards of other workers; stream.iter reads them all.
        yield from map(_rows, stream.iter(size, drop_last_batch=True))

    def _own(self, rows: list[dict], batch: int, epoch: int) -> dict:
        size = self.source.batch_size
        index = self.source.process[0]
        first = batch * len(rows) + index * size
        return _decoded(self.source, rows[index * size :][:size], torch.arange(first, first + size), epoch)


class _OwnShards(TorchIterableDataset):
    """Batches of a stream, of which each reader (a worker of a process) reads its own shards and nothing else.

    Rows are shuffled in blocks, and a batch is of one block. What a reader needs to go on after it is in the batch,
    under "reader": (worker, state); nothing is read again but the block. A sample's id is its place in what the reader
    has read in this epoch, times the readers, plus the reader's number.
    """

    def __init__(self, source: ImageSource, states: dict[int, dict]):
        self.source = source
        self.states = states

    def __iter__(self) -> Iterator[dict]:
        worker_id, num_workers = _worker()
        made = sum(state["made"] for state in self.states.values())
        mine = (worker_id + made) % num_workers  # the loader asks its first worker first, whoever's turn it is
        start = {"epoch": 0, "stream": None, "rows": 0, "batch": 0, "made": 0}
        state = self.states.get(mine, start)
        reader = (self.source.process[0] * num_workers + mine, self.source.process[1] * num_workers)
        while True:
            before = state["made"]
            for batch, after in self._epoch(state, reader, _SHUFFLE_BUFFER // num_workers):
                state = after
                yield batch | {"reader": (mine, state)}
            if state["made"] == before and state["stream"] is None and not state["batch"]:
                raise ValueError(
                    f"reader {reader[0]} of {reader[1]} of the stream of {self.source.data.name!r} finds fewer images "
                    f"in its shards than its batch ({self.source.batch_size}): lower --batch_size or --num_workers, or "
                    "give --stream_reading whole."
                )
            state = start | {"epoch": state["epoch"] + 1, "made": state["made"]}

    def _epoch(self, state: dict, reader: tuple[int, int], buffer: int) -> Iterator[tuple[dict, dict]]:
        """The batches from a state on to the end of its epoch, each with the state after it."""
        size, seed, epoch = self.source.batch_size, self.source.seed, state["epoch"]
        stream = self.source.data.train.shard(reader[1], reader[0], contiguous=False)
        stream.set_epoch(keyed_random.derive_seed(seed, "stream", epoch) % 2**31)  # the order of the shards
        if state["stream"] is not None:
            stream.load_state_dict(state["stream"])
        for block in map(_rows, stream.iter(max(1, buffer // size) * size)):
            key = keyed_random.derive_seed(seed, "block", reader[0], state["rows"])
            order = keyed_random.permutation(len(block), seed=key, epoch=epoch).tolist()
            for number in range(state["batch"], len(block) // size):
                places = torch.arange(number * size, (number + 1) * size)
                ids = (state["rows"] + places) * reader[1] + reader[0]
                batch = _decoded(self.source, [block[order[place]] for place in places], ids, epoch)
                state = state | {"batch": number + 1, "made": state["made"] + 1}
                yield batch, state
            state = state | {"stream": stream.state_dict(), "rows": state["rows"] + len(block), "batch": 0}


def _worker() -> tuple[int, int]:
    worker = torch.utils.data.get_worker_info()
    return (worker.id, worker.num_workers) if worker else (0, 1)


def _rows(columns: dict[str, list]) -> list[dict]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _decoded(source: ImageSource, rows: list[dict], ids: Tensor, epoch: int) -> dict:
    """The batch of these rows of a stream; keys as in `ImageSource.loader`."""
    skipped = {}
    decoded = []
    for number, values in zip(ids.tolist(), rows, strict=True):
        try:
            decoded.append(decode_row(source.data, values, f"image {number} of epoch {epoch}"))
        except BadImageError as error:
            if source.on_bad_image == "error":
                raise
            skipped[number] = str(error)
    if not decoded:
        raise BadImageError(f"a whole batch of {source.data.name!r} cannot be read: {next(iter(skipped.values()))}")
    decoded = (decoded * len(rows))[: len(rows)]  # repeats fill the places of bad images
    pictures, labels = zip(*decoded, strict=True)
    images = stack(pictures, source.image_size, source.views, ids, epoch)
    return dict(images=images, labels=torch.tensor(labels), sample_ids=ids, epoch=epoch, skipped=skipped)


class ImageSource:
    """The images of a run: endless training batches of this process, and the held-out table.

    Args:
        data: from `load_images`.
        image_size: side of the square images.
        batch_size: images per process and batch.
        seed: random seed of the run; decides the order.
        process: (index, count) of this process.
        num_workers: loader processes; they change nothing but the speed.
        on_bad_image: "error" or "skip".
        preload_bytes: decode a split once when its images fit into this.
        views: crop each image twice while loading (contrastive learning on large images).
        stream_reading: of a stream, "whole": each process and worker reads all of it, in an order that does not depend
            on them; "shards": its own shards only, where there are as many as readers.
        together: all processes of the launch make one; those of a machine decode the training images once.

    Raises:
        ValueError: fewer images than one batch of all processes. BadImageError: an unreadable picture.
    """

    def __init__(
        self,
        data: ImageData,
        *,
        image_size: int,
        batch_size: int,
        seed: int,
        process: tuple[int, int] = (0, 1),
        num_workers: int = 0,
        on_bad_image: str = "error",
        preload_bytes: int = 2**30,
        views: TwoViews | None = None,
        stream_reading: str = "whole",
        together: bool = False,
    ):
        self.data = data
        self.image_size = image_size
        self.batch_size = batch_size
        self.seed = seed
        self.process = process
        self.num_workers = num_workers
        self.on_bad_image = on_bad_image
        self.preload_bytes = preload_bytes
        self.views = views
        self.stream_reading = stream_reading
        self.skipped: dict[str, str] = {}
        self._held: dict[str, ImageTable] = {}  # to evaluate and measure
        streamed = isinstance(data.train, IterableDataset)
        self.table = None if streamed else self._table(data.train, "train", views, together=together)
        if self.table is not None and len(self.table) < batch_size * process[1]:
            raise ValueError(
                f"the training split of {data.name!r} holds {len(self.table)} images, fewer than one batch of all "
                f"processes ({batch_size} x {process[1]}): lower --batch_size."
            )

    @classmethod
    def from_arguments(cls, data: ImageData, args, accelerator, image_size: int, views: TwoViews | None = None):
        """From a script's `RunArguments` and Accelerator; `views` crop while loading when the images are larger."""
        options = dict(
            image_size=image_size,
            batch_size=args.batch_size,
            seed=args.seed,
            process=(accelerator.process_index, accelerator.num_processes),
            num_workers=args.num_workers,
            on_bad_image=args.on_bad_image,
            preload_bytes=int(args.preload_gb * 2**30),
            stream_reading=args.stream_reading,
            together=True,
        )
        if views is not None and _may_be_larger(data, image_size):
            views.crop = False
            options["views"] = views
        return cls(data, **options)

    def _table(
        self, split: Dataset, label: str, views: TwoViews | None = None, *, together: bool = False
    ) -> ImageTable:
        table = ImageTable(self.data, split, self.image_size, self.on_bad_image, views)
        table.skipped = self.skipped
        bad = table.preload(self.preload_bytes, show_progress=self.process[0] == 0, together=together)
        self.skipped |= {f"{label} row {row}": reason for row, reason in bad.items()}
        return table

    @property
    def num_images(self) -> int | None:
        """Training images; None for a stream, whose length is not known."""
        return None if self.table is None else len(self.table)

    @property
    def steps_per_epoch(self) -> int | None:
        """Whole global batches in an epoch; None for a stream."""
        return None if self.table is None else len(self.table) // (self.batch_size * self.process[1])

    def loader(self, start: tuple[int, int] = (0, 0), readers: dict[int, dict] | None = None) -> DataLoader:
        """Endless batches from epoch `start[0]`, batch `start[1]` on; an epoch's incomplete last one is dropped.

        Each is a dict: images uint8 (B, 3, S, S), or (B, 2, 3, S, S) when cropped while loading; labels
        (B,) int64, -1 where there are none; sample_ids (B,) int64; epoch; skipped {row: reason}. Those of a stream
        that is read by shards have `reader`, (worker, state): the last states, by worker, are the start of the next.
        """
        if self.table is not None:
            return ordered_batches(self.table, self.batch_size, self.seed, start, self.process, self.num_workers)
        # A run goes on as it began, whatever the number of readers is now.
        shards = self._by_shards() if start == (0, 0) else bool(readers)
        batches = _OwnShards(self, readers or {}) if shards else _WholeStream(self, start)
        return _loader(batches, self.num_workers, batch_size=None)

    def _by_shards(self) -> bool:
        if self.stream_reading == "whole":
            return False
        readers, shards = self.process[1] * max(1, self.num_workers), self.data.train.num_shards
        if shards < readers and self.process[0] == 0:
            logger.warning(
                "the stream of %r has %d shards for %d readers (%d processes x %d workers): each reads all of it",
                self.data.name, shards, readers, self.process[1], max(1, self.num_workers),
            )  # fmt: skip
        return shards >= readers

    def training_table(self, *, together: bool = False) -> ImageTable:
        """The training images uncropped, in order, to evaluate and measure; of a stream 10,000 at random.

        `together`: all processes of the launch call this now and read a share each; without, this one reads all, unless
        it holds the table of an earlier call.
        """
        if self.table is not None and self.views is None:
            return self.table
        return self._held_table(self.data.train, "train", together)

    def whole_training_table(self) -> ImageTable:
        """As `training_table`, but of a stream all of it: a table to be read once, from start to end."""
        split = self.data.train
        if not isinstance(split, IterableDataset):
            return self.training_table()
        table = ImageTable(self.data, split, self.image_size, self.on_bad_image)
        table.skipped = self.skipped
        return table

    def evaluation_table(self, *, together: bool = False) -> ImageTable | None:
        """The held-out images, or None; of a stream 10,000 at random. `together` as of `training_table`."""
        split = self.data.evaluation
        return None if split is None else self._held_table(split, "evaluation", together)

    def _held_table(self, split: Dataset | IterableDataset, label: str, together: bool) -> ImageTable:
        if label not in self._held:
            rows = self._sample(split, together) if isinstance(split, IterableDataset) else split
            self._held[label] = self._table(rows, label, together=together)
        return self._held[label]

    def _sample(self, stream: IterableDataset, together: bool) -> Dataset:
        """A random subset of a whole stream, whatever the processes: what is first in it may be of a few classes."""
        index, processes = self.process if together else (0, 1)
        count = stream.num_shards
        shards = ((number, stream.shard(count, number)) for number in range(index, count, processes))
        rows = sample_of_parts(shards, _OF_A_STREAM, **({"gather": gather_objects} if processes > 1 else {}))
        return Dataset.from_list(rows, features=stream.features)


def _may_be_larger(data: ImageData, image_size: int) -> bool:
    """Whether the shorter side of any training image is larger than this, as far as can be known: True of a stream."""
    if isinstance(data.train, IterableDataset):
        return True
    sizes = (picture_size(value) for value in data.train[data.image_column])
    return any(size is not None and min(size) > image_size for size in sizes)


def evaluation_batches(table: ImageTable, batch_size: int, rows: Sequence[int] | None = None) -> Iterator[dict]:
    """All readable images of a table (or of some rows) in order, once; bad ones are left out under "skip"."""
    rows = range(len(table)) if rows is None else rows
    for first in range(0, len(rows), batch_size):
        if batch := table.readable_batch(rows[first : first + batch_size]):
            yield batch


def ordered_batches(
    table: torch.utils.data.Dataset,
    batch_size: int,
    seed: int,
    start: tuple[int, int] = (0, 0),
    process: tuple[int, int] = (0, 1),
    num_workers: int = 0,
    accumulate: int = 1,
) -> DataLoader:
    """Endless batches of a map-style table with `__getitems__`, as `ImageSource.loader`; arguments as there.

    With `accumulate` an epoch ends after a multiple of so many batches, so that `accumulate` batches hold the images of
    one that is so many times as large, in every epoch.
    """
    order = _EpochOrder(len(table), batch_size, seed, start, process, accumulate)
    return _loader(table, num_workers, batch_sampler=order, collate_fn=_identity)


def _loader(dataset, num_workers: int, **sampling) -> DataLoader:
    cuda = torch.cuda.is_available()
    context = "spawn" if num_workers and cuda else None  # CUDA does not survive a fork
    return DataLoader(dataset, num_workers=num_workers, pin_memory=cuda, multiprocessing_context=context, **sampling)


def _identity(batch: dict) -> dict:
    return batch


def unit_pixels(images: Tensor, num_channels: int = 3) -> Tensor:
    """uint8 (B, 3, H, W) to float32 (B, num_channels, H, W) in [-1, 1]; one channel is the mean of the three."""
    pixel_values = images.float() / 127.5 - 1
    return pixel_values.mean(1, keepdim=True) if num_channels == 1 else pixel_values
