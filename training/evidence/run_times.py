"""How long a rehearsed run would take, before, in and after its steps, and what its cache takes on disk: by formula.

Time: operations over an assumed share of a GPU's peak, if images come fast enough. Operations: by the formulas of
torch's FlopCounterMode (convolutions and matrix products; a multiplication and an addition are two), with what
checkpointing computes again.

Before the steps of a generator in a latent all GPUs encode the images, in float32, of which TF32 is assumed; after them
all draw the grids, in the precision of the run. A small model takes longer than all this: its operations are waited for
less than their launches.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import torch
from rehearsed_steps import autoencoder_of, classes_of, dae_vq, entry_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from hf_dpssl.cli.rehearse import Asked
from hf_dpssl.data.batches import load_images_for
from hf_dpssl.data.image_data import TABLE

PEAK_TERAFLOPS = {"A100": 312, "H100": 989}  # dense bf16 by the data sheets (SXM); TF32 has half of it
SHARES_OF_PEAK = (0.2, 0.4)  # assumed; convolutions of 32 to 224 px images stay far below matrix products
# By the cards of the data sets, without the tenth of FFHQ that is held out.
TRAINING_IMAGES = {"cifar10": 50_000, "imagenet-1k": 1_281_167, "celeba-hq": 28_000, "ffhq": 63_000}
_GENERATORS = ("dae_ar", "dae_dit", "dae_drift")
_DRAW = ("dae_dit", "dae_drift")  # a token model waits for launches, a token at a time


class OperationCounter(TorchDispatchMode):
    """Operations in `total`, by the formulas of FlopCounterMode, whose hooks on modules bear no inner gradients.

    `launches` are the calls of what is no view, about as many as kernels are started.
    """

    def __init__(self):
        super().__init__()
        self.total = 0
        self.launches = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.launches += not func.is_view
        if (count := flop_registry.get(func.overloadpacket)) is not None:
            self.total += count(*args, **kwargs, out_val=result)
        return result


def times_of(asked: Asked, gpus: int, stages: dict[str, dict]) -> dict:
    """Seconds by GPU and share of its peak: {"step": {stage: ...}, "run": ..., "start": ..., "end": ...}.

    "run" are all steps, where their number is known. "start" and "end" are of generators in a latent: "start" has the
    images that are encoded and the bytes of the cache, too, and "end", which token models have not, the images that
    are drawn. `stages` have the operations of a step.
    """
    images = images_of_run(asked)
    steps = steps_of(asked, gpus, images)
    found = {"step": {name: seconds_of(stage["operations"]) for name, stage in stages.items()}}
    if steps:
        found["run"] = seconds_of(sum(steps[name] * stages[name]["operations"] for name in stages))
    if asked.script in _GENERATORS:
        found |= {"start": cache_of(asked, gpus)} if images else {}
    if asked.script in _DRAW:
        passes = 4 if asked.args.gradient_checkpointing else 3  # a backward pass takes two
        found["end"] = grids_of(asked, stages[""]["operations"] / asked.args.batch_size / passes, gpus)
    return found


def span(seconds: float) -> str:
    """A time in the unit that suits it."""
    for name, length in (("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= length:
            return f"{_two(seconds / length)} {name}"
    return f"{_two(seconds * 1000)} ms"


def _two(value: float) -> str:
    """At least two digits of a number."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def seconds_of(operations: float, gpus: int = 1, *, tf32: bool = False) -> dict[str, dict[str, float]]:
    """{GPU: {share of its peak: seconds}} of so many operations, spread over some of them."""
    return {
        gpu: {f"{share:g}": operations / (gpus * peak * 1e12 / (1 + tf32) * share) for share in SHARES_OF_PEAK}
        for gpu, peak in PEAK_TERAFLOPS.items()
    }


def images_of_run(asked: Asked) -> int | None:
    """Training images, or None where they are not known without a download."""
    parts = [part.strip() for part in asked.args.dataset.split("+")]
    if all(part in TRAINING_IMAGES for part in parts):
        return sum(TRAINING_IMAGES[part] for part in parts)
    if asked.args.streaming or any(part in TABLE and TABLE[part].hub_id for part in parts):
        return None
    return len(load_images_for(asked.args).train)


def steps_of(asked: Asked, gpus: int, images: int | None) -> dict[str, int] | None:
    """Steps of each stage, or None."""
    args = asked.args
    if asked.script == "dae_vq":
        with nullcontext() if args.init_from else torch.device("meta"):
            side = args.image_size or entry_of(args).image_size
            return {stage.name: stage.steps for stage in dae_vq.make_model(args, SimpleNamespace(image_size=side))[1]}
    if asked.script == "dae_gan":
        first = {"stage-1": args.stage_1_steps} if args.latent == "dae" else {}
        return first | {"generator": args.max_train_steps}
    if args.max_train_steps:
        return {"": args.max_train_steps}
    return images and {"": args.num_train_epochs * (images // (args.batch_size * gpus))}


def cache_of(asked: Asked, gpus: int) -> dict:
    """Images, bytes on disk and seconds of the cache of latents or codes of all images, mirrored ones too."""
    autoencoder, args = autoencoder_of(asked.args, "meta"), asked.args
    config = autoencoder.config
    copies = images_of_run(asked) * (1 + getattr(args, "flip_cache", False))
    with torch.no_grad(), OperationCounter() as counter:
        autoencoder.encode_latents(torch.empty(1, config.num_channels, *[config.image_size] * 2, device="meta"))
    code = 2 if config.num_codes <= 2**15 else 4
    held = code if asked.script == "dae_ar" else 4 * config.latent_channels
    return {
        "images": copies,
        "bytes": copies * held * config.latent_size**2,
        "seconds": seconds_of(copies * counter.total, gpus, tf32=True),
    }


def grids_of(asked: Asked, operations: float, gpus: int) -> dict:
    """Images and seconds of the grids that the GPUs draw at the end; `operations` of a forward pass of an image."""
    args = asked.args
    classes = min(10, classes_of(args))
    images = classes * args.grid_images_per_class or args.grid_images_per_class**2
    passes = getattr(args, "sampling_steps", 1)
    if asked.script != "dae_drift":  # a guided grid, with and without class in each step, and one without guidance
        passes *= 3 if classes else 1
    return {"images": images, "seconds": seconds_of(images * passes * operations, gpus)}
