"""Pictures of a pipeline while they are made, and the Python lines that make them again."""

from __future__ import annotations

import copy
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from ..autoencoder import latent_codec
from ..generation.pipeline_vq_dit import VQDiTPipeline
from ..generation.pipeline_vq_drift import VQDriftPipeline
from ..generation.pipeline_vq_token import VQTokenPipeline
from .demo_outputs import shown_source, source_arguments
from .page_pictures import to_pictures

MAX_IMAGES = 16
MAX_STEPS = 100
MAX_GUIDANCE = 10.0
EVERY, NONE = "each class in turn", "no class"  # what can be asked for beside the names of classes
_GREY = 0.0  # of what has not been drawn yet, in [-1, 1]


@dataclass(frozen=True)
class PictureRequest:
    """What to draw: one seed per image, so that image i is the same alone and among others.

    labels: a class name per image; empty: `number` images without class.
    steps is read for a DiT, temperature and top_k (0: all codes) for a token transformer, guidance for both; a one-step
    generator reads none of them.

    Raises:
        ValueError: a value out of range.
    """

    labels: tuple[str, ...] = ()
    number: int = 1
    seed: int = 0
    guidance: float = 1.5
    steps: int = 25
    temperature: float = 1.0
    top_k: int = 0

    def __post_init__(self):
        if not 1 <= self.number <= MAX_IMAGES or len(self.labels) not in (0, self.number):
            raise ValueError(f"The number of pictures must lie in 1 to {MAX_IMAGES}, got {self.number}.")
        if not 1 <= self.steps <= MAX_STEPS:
            raise ValueError(f"Steps must lie in 1 to {MAX_STEPS}, got {self.steps}.")
        if not 1 <= self.guidance <= MAX_GUIDANCE:
            raise ValueError(f"Guidance must lie in 1 (none) to {MAX_GUIDANCE:g}, got {self.guidance}.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"The seed must be a whole number from 0 to {2**32 - 1}, got {self.seed}.")

    @property
    def captions(self) -> list[str]:
        """Class and seed of each picture."""
        return [f"{label}, seed {self.seed + i}" for i, label in enumerate(self.labels or (NONE,) * self.number)]

    def options(self, kind: type) -> dict[str, Any]:
        """Keyword arguments of the pipeline's call, all but the generators."""
        options: dict[str, Any] = {} if self.labels else {"num_images": self.number}
        if kind is VQDriftPipeline:
            return options
        if self.labels:
            options["guidance_scale"] = self.guidance
        if kind is VQDiTPipeline:
            return options | {"num_inference_steps": self.steps}
        return options | {"temperature": self.temperature} | ({"top_k": self.top_k} if self.top_k else {})


def class_choices(names: list[str]) -> list[str]:
    """What can be asked of a model with classes of these names, or with none."""
    return [*names, EVERY, NONE] if names else [NONE]


def read_request(names: list[str], label: str, number: float | None, seed: float | None, **options) -> PictureRequest:
    """The controls of a page as a request; `options`: its other fields.

    Args:
        names: of the model's classes.
        label: one of `class_choices(names)`.
        number: of pictures.
        seed: of the first one.

    Raises:
        ValueError: a value that cannot be.
    """
    if seed is None or number is None:
        raise ValueError("Give a number of pictures and a seed.")
    count = min(int(number), MAX_IMAGES + 1)  # of more the request itself says that they are too many
    labels: tuple[str, ...] = ()
    if label == EVERY and names:
        labels = tuple(names[i % len(names)] for i in range(count))
    elif label in names:
        labels = (label,) * count
    elif label != NONE:
        raise ValueError(f"There is no class {label!r} here: choose one of the list.")
    return PictureRequest(labels, int(number), int(seed), **options)


def unread(kind: type, with_class: bool, temperature: float = 1.0) -> dict[str, str]:
    """Why a field of PictureRequest changes nothing in what a pipeline of this class draws, of those that do not.

    Args:
        kind: class of the pipeline.
        with_class: whether a class is asked for.
        temperature: that is asked for.
    """
    if kind is VQDriftPipeline:
        reasons = {"guidance": "a one-step generator was trained with its guidance", "steps": "it draws in one pass"}
    elif kind is VQDiTPipeline:
        reasons = {}
    else:
        reasons = {"steps": "a token transformer draws one code after the other"}
    if not with_class:
        reasons["guidance"] = "guidance leads to a class, and none is asked for"
    if kind is not VQTokenPipeline:
        reasons |= {name: "only a token transformer draws codes" for name in ("temperature", "top_k")}
    elif temperature == 0:
        reasons["top_k"] = "at temperature 0 the likeliest code is taken"
    return reasons


def snippet(kind: type, source: str, request: PictureRequest) -> str:
    """Python that draws the request's pictures again with `kind`, the class of the pipeline, from `source`."""
    place = source_arguments(shown_source(source))
    arguments = [repr(place.pop("pretrained_model_name_or_path")), *(f"{k}={v!r}" for k, v in place.items())]
    labels = list(request.labels)
    if not labels:
        shown = "None"
    elif len(set(labels)) == 1 and len(labels) > 1:
        shown = f"[{labels[0]!r}] * {len(labels)}"
    else:
        shown = repr(labels)
    options = "".join(f"    {name}={value!r},\n" for name, value in request.options(kind).items())
    return (
        f"import torch\nfrom hf_dpssl import {kind.__name__}\n\n"
        f"pipeline = {kind.__name__}.from_pretrained({', '.join(arguments)})\n"
        f"seeds = range({request.seed}, {request.seed + request.number})\n"
        f"images = pipeline(\n    {shown},\n{options}"
        "    generator=[torch.Generator().manual_seed(seed) for seed in seeds],\n"
        ").images\n"
        'for seed, image in zip(seeds, images):\n    image.save(f"{seed}.png")\n'
    )


def stream_pictures(
    pipeline: VQDiTPipeline | VQDriftPipeline | VQTokenPipeline, request: PictureRequest, *, frame_seconds: float = 0.0
) -> Iterator[tuple[int, int, list[Image.Image]]]:
    """(steps done, steps in all, pictures so far) after each step; last, with done = all + 1, the finished pictures.

    Steps that end less than `frame_seconds` after the last one shown are left out, and not decoded.
    Several may run on one pipeline at a time. Closing the iterator stops the run.
    """
    pipeline = copy.copy(pipeline)  # the weights are shared, not what a run changes, as its interruption
    generators = [torch.Generator().manual_seed(request.seed + i) for i in range(request.number)]
    options = request.options(type(pipeline)) | {"generator": generators}
    labels = list(request.labels) or None
    if isinstance(pipeline, VQDriftPipeline):
        total = 1
    else:
        total = request.steps if isinstance(pipeline, VQDiTPipeline) else pipeline.num_tokens

    shown = [-math.inf]

    def is_due() -> bool:
        due = time.monotonic() - shown[0] >= frame_seconds
        shown[0] = time.monotonic() if due else shown[0]
        return due

    def run(emit: Callable) -> None:
        if isinstance(pipeline, VQDiTPipeline):

            def show(pipe, step, timestep, tensors):
                if is_due():
                    emit((step + 1, total, to_pictures(latent_codec.decode(pipe.vae, tensors["latents"]))))
                return {}

            images = pipeline(labels, callback_on_step_end=show, **options).images
        elif isinstance(pipeline, VQDriftPipeline):
            images = pipeline(labels, **options).images
            emit((1, total, images))
        else:
            images = pipeline(
                labels, streamer=_PartsOfPictures(pipeline, request.number, is_due, emit), **options
            ).images
        emit((total + 1, total, images))

    pipeline.set_progress_bar_config(disable=True)
    yield from emitted(run)


class _PartsOfPictures(BaseStreamer):
    """Decodes the codes drawn so far; cells to come are grey."""

    def __init__(self, pipeline: VQTokenPipeline, number: int, is_due: Callable, emit: Callable):
        self.pipeline = pipeline
        self.number = number
        self.is_due = is_due
        self.emit = emit
        self.codes: list[Tensor] = []

    def put(self, value: Tensor) -> None:
        if value.ndim != 1:  # the tokens that the images start with
            return
        self.codes.append(value[: self.number])
        vae = self.pipeline.vae
        total = self.pipeline.num_tokens
        done = len(self.codes)
        if done > total or not self.is_due():
            return
        codes = torch.stack(self.codes, dim=1)  # (N, drawn)
        codes = torch.cat([codes, codes[:, -1:].expand(-1, total - done)], dim=1)
        side = vae.config.latent_size
        pixel_values = vae.decode_codes(codes.unflatten(1, (side, side)).to(vae.device)).pixel_values
        drawn = (torch.arange(total, device=vae.device) < done).view(1, 1, side, side).float()
        drawn = torch.nn.functional.interpolate(drawn, size=pixel_values.shape[2:], mode="nearest")
        self.emit((done, total, to_pictures(torch.where(drawn > 0, pixel_values, _GREY))))

    def end(self) -> None:
        """Nothing: the finished pictures come from the pipeline."""


class _Closed(Exception):
    """Nobody waits for more."""


def emitted(run: Callable[[Callable[[Any], None]], None]) -> Iterator:
    """What `run(emit)` passes to `emit`, as soon as it does; its exception, if any, is raised here.

    `run` works in a thread of its own, at most one item ahead; closing the iterator ends it at its next `emit`.
    """
    items: queue.Queue = queue.Queue(maxsize=1)
    closed = threading.Event()
    finished = object()
    failure = []

    def emit(item) -> None:
        while not closed.is_set():
            try:
                return items.put(item, timeout=0.1)
            except queue.Full:
                continue
        raise _Closed

    @torch.no_grad()
    def work() -> None:
        try:
            run(emit)
        except _Closed:
            return
        except BaseException as error:  # raised again by the reader
            failure.append(error)
        try:
            emit(finished)
        except _Closed:
            return

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while (item := items.get()) is not finished:
            yield item
        if failure:
            raise failure[0]
    finally:
        closed.set()
        thread.join()
