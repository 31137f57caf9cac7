"""Thousands of images from a pipeline, as the Frechet distance wants them: by any number of processes.

Image i has a generator of its own, seeded by (seed, i), and a class that follows from i. So neither batches nor
processes change it, a killed run goes on with the images that lack, and process r of n takes every n-th batch
without a word to the others; whoever finds all images written writes the manifest.
sample_folder.py says what the folder holds.
"""

from __future__ import annotations

import difflib
import inspect
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import diffusers
import torch
from diffusers import SchedulerMixin
from huggingface_hub import hf_hub_download
from torch import Tensor
from tqdm.auto import tqdm

from ..data.keyed_random import derive_seed
from ..embedding.embedder import best_device
from ..models.matrix_products import allow_tf32, gpu_computes_in_bfloat16
from ..models.weight_hashes import combined_sha256, tensor_sha256
from ..runs.lineage import read_json, well_formed
from ..runs.local_processes import divide_work, stop_without_parent
from ..runs.results import environment
from .choices import DTYPES, FORMATS, LAYOUTS, OPTIONS
from .pipeline_classes import ClassConditionalPipeline
from .pipeline_vq_dit import VQDiTPipeline
from .pipeline_vq_drift import VQDriftPipeline
from .pipeline_vq_token import VQTokenPipeline
from .sample_folder import DECIDES, check_folder, claim, finish, picture_path, save_picture

_PIPELINES = {
    "VQDiTPipeline": VQDiTPipeline,
    "VQDriftPipeline": VQDriftPipeline,
    "VQTokenPipeline": VQTokenPipeline,
    "DiTPipeline": VQDiTPipeline,
}


def _default_dtype() -> str:
    return "bfloat16" if gpu_computes_in_bfloat16() else "float32"


@dataclass(frozen=True)
class SampleJob:
    """What to draw, by what, and where to.

    Args:
        pipeline: folder or Hub id (`id@revision`) of a VQDiTPipeline, VQDriftPipeline, VQTokenPipeline or
            diffusers DiTPipeline.
        folder: of the result.
        num_images: images in all.
        format: "png", or "npz": one file of all images, in RGB.
        layout: of pictures: "numbered", or "by_class", a folder to each class.
        images_per_folder: of numbered pictures; 0: all in one folder.
        class_labels: ids or names, taken in turn; one for each image where there are so many. Default: all classes
            of the model in turn, so that their numbers differ by at most one.
        unconditional: draw without class from a model that has classes.
        options: of the pipeline's call, those of `OPTIONS` that it knows; others keep their default.
        scheduler: name of a diffusers scheduler instead of the pipeline's own, with its config.
        scheduler_config: what to change in the scheduler's config.
        seed: random seed, from which image i's own follows.
        batch_size: images drawn at once; may change when a run goes on.
        dtype: of weights and noise, one of `DTYPES`. Default: bfloat16 on a GPU that computes in it, else float32.

    Raises:
        ValueError: a number out of range, or an unknown or contradictory choice.
    """

    pipeline: str
    folder: str
    num_images: int = 50_000
    format: str = "png"
    layout: str = "numbered"
    images_per_folder: int = 1000
    class_labels: list[int | str] | None = None
    unconditional: bool = False
    options: dict = field(default_factory=dict)
    scheduler: str | None = None
    scheduler_config: dict = field(default_factory=dict)
    seed: int = 0
    batch_size: int = 64
    dtype: str = field(default_factory=_default_dtype)

    def __post_init__(self):
        for name, least in (("num_images", 1), ("batch_size", 1), ("images_per_folder", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        for name, known in (("format", FORMATS), ("layout", LAYOUTS), ("dtype", DTYPES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}.")
        if self.unconditional and self.class_labels:
            raise ValueError(f"class_labels {self.class_labels[:3]} and unconditional contradict: give one of them.")
        if self.layout == "by_class" and (self.unconditional or self.format == "npz"):
            raise ValueError("layout by_class is for pictures with classes: use numbered with npz or unconditional.")
        if len(self.class_labels or ()) > self.num_images:
            raise ValueError(f"{len(self.class_labels)} class_labels are more than {self.num_images} images.")


def sample_images(job: SampleJob, *, num_processes: int = 1, overwrite: bool = False) -> dict | None:
    """Draw what is not drawn yet, and return the manifest.

    Under torchrun or accelerate launch every process calls this and takes its share; the manifest is
    returned to those that find all images written, None to the others.

    Args:
        job: see `SampleJob`.
        num_processes: to use on this machine, each with its share of the threads; 1 under a launcher.
        overwrite: remove images that are in the folder already.

    Raises:
        ValueError: no such pipeline, class, option or scheduler, a folder that holds something else, or images
            drawn by another pipeline or otherwise; says which.
        RuntimeError: a process started here ended with an error.
    """
    divide_work(_sample_share, job, num_processes=num_processes, overwrite=overwrite)
    finish(Path(job.folder))
    path = Path(job.folder, "manifest.json")
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def open_pipeline(source: str, dtype: torch.dtype = torch.float32) -> ClassConditionalPipeline:
    """The pipeline of a folder or Hub id (`id@revision`), of the class that it names, without progress bars.

    Raises:
        ValueError: a folder without pipeline, or one of another class.
    """
    name = source
    revision = None
    if not Path(name).exists() and "@" in name:
        name, _, revision = name.partition("@")
    if Path(name).exists():
        index = Path(name) / "model_index.json"
        if not index.exists():
            raise ValueError(
                f"{name} holds no pipeline (model_index.json): give the folder that a trainer has written."
            )
    else:
        index = Path(hf_hub_download(name, "model_index.json", revision=revision))
    found = (read_json(index) or {}).get("_class_name")
    if not isinstance(found, str) or found not in _PIPELINES:
        raise ValueError(f"{source} is a {found}; images are drawn from {' or '.join(_PIPELINES)}.")
    with warnings.catch_warnings(), well_formed(source):
        warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)  # by the newest diffusers only
        pipeline = _PIPELINES[found].from_pretrained(name, revision=revision, torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_pipeline(job: SampleJob, device: torch.device) -> ClassConditionalPipeline:
    """The pipeline of a job, with its scheduler, on a device, without progress bars; errors as `sample_images`."""
    pipeline = open_pipeline(job.pipeline, getattr(torch, job.dtype))
    if job.scheduler is not None or job.scheduler_config:
        replace_scheduler(pipeline, job.scheduler, job.scheduler_config)
    return pipeline.to(device)


def replace_scheduler(pipeline: ClassConditionalPipeline, name: str | None, changes: dict) -> None:
    """Give a pipeline another diffusers scheduler (None: of the same class) with its config, changed by `changes`.

    Raises:
        ValueError: a pipeline without scheduler, or an unknown scheduler or entry; the message names what there is.
    """
    if "scheduler" not in pipeline.components:
        raise ValueError(f"a {type(pipeline).__name__} has no scheduler: leave it out, got {name!r}.")
    name = name or type(pipeline.scheduler).__name__
    chosen = getattr(diffusers, name, None) or getattr(diffusers, f"{name}Scheduler", None)
    if not (inspect.isclass(chosen) and issubclass(chosen, SchedulerMixin)):
        known = [entry for entry in dir(diffusers) if entry.endswith("Scheduler")]
        close = difflib.get_close_matches(f"{name.removesuffix('Scheduler')}Scheduler", known, 3) or known[:10]
        raise ValueError(f"{name!r} is no scheduler of diffusers; known are for example {close}.")
    taken = set(inspect.signature(chosen).parameters)
    if unknown := sorted(set(changes) - taken):
        raise ValueError(f"{chosen.__name__} does not take {unknown}; it takes {sorted(taken)}.")
    pipeline.scheduler = chosen.from_config(pipeline.scheduler.config, **changes)


def draw_images(
    pipeline: ClassConditionalPipeline, numbers: list[int], class_ids: list[int] | None, *, seed: int, options: dict
) -> Tensor:
    """The images of some numbers, whatever others there are in the batch.

    Args:
        pipeline: a VQDiTPipeline, VQDriftPipeline or VQTokenPipeline.
        numbers: of the images, at least 0.
        class_ids: taken in turn: image i is of class class_ids[i % len(class_ids)]; None: without class.
        seed: image i's generator is seeded by (seed, i).
        options: further arguments of the pipeline's call.

    Returns:
        (N, C, H, W) in [0, 1], on the CPU.
    """
    generators = [torch.Generator().manual_seed(derive_seed(seed, "sample", number)) for number in numbers]
    labels = None if class_ids is None else [class_ids[number % len(class_ids)] for number in numbers]
    count = {"num_images": len(numbers)} if labels is None else {}
    return pipeline(labels, generator=generators, output_type="pt", **count, **options).images.float().cpu()


def _sample_share(job: SampleJob, rank: int, world: int, start_others: Callable[[], None]) -> None:
    """Draw every `world`-th batch from number `rank` on, as far as its images lack."""
    device = best_device(int(os.environ.get("LOCAL_RANK", rank)))
    allow_tf32(device)
    pipeline = load_pipeline(job, device)
    plan = _plan(job, pipeline)
    folder = Path(job.folder)
    claimed = False
    check_folder(folder, plan)
    if (folder / "manifest.json").exists():
        return
    mine = [i for i in range(job.num_images) if i // job.batch_size % world == rank]
    missing = [i for i in mine if not picture_path(folder, plan, i).exists()]
    silent = {} if rank == 0 else {"disable": True}  # else TQDM_DISABLE decides
    text = "drawing" if world == 1 else f"drawing, 1 of {world} processes"
    with tqdm(total=len(mine), initial=len(mine) - len(missing), desc=text, unit="img", **silent) as bar:
        for first in range(0, len(missing), job.batch_size):
            numbers = missing[first : first + job.batch_size]
            images = draw_images(pipeline, numbers, plan["class_ids"], seed=job.seed, options=plan["options"])
            if not claimed:  # only now: a refused option must not leave a plan that no other command can continue
                claim(folder, plan)
                claimed = start_others() or True
            for number, image in zip(numbers, images, strict=True):
                save_picture(picture_path(folder, plan, number), image)
            bar.update(len(numbers))
            stop_without_parent()
    if not claimed:
        start_others()  # their images may lack


def _plan(job: SampleJob, pipeline: ClassConditionalPipeline) -> dict:
    parameters = inspect.signature(type(pipeline).__call__).parameters
    takes = [name for name in OPTIONS if name in parameters]
    if unknown := [name for name in job.options if name not in takes]:
        raise ValueError(f"a {type(pipeline).__name__} does not take {unknown}; it takes {takes}.")
    scheduler = pipeline.components.get("scheduler")
    libraries = environment()["libraries"]
    trained = {name: pipeline.config.get(name) for name in ("prediction_type", "noise_schedule")}
    weights = {name: _sha256(part) for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    plan = asdict(job) | {
        "pipeline_class": type(pipeline).__name__,
        "weights": combined_sha256(weights | {"trained": json.dumps(trained, sort_keys=True)}),
        "scheduler": scheduler and {"class": type(scheduler).__name__} | _settings(scheduler.config),
        "options": {name: job.options.get(name, parameters[name].default) for name in takes},
        "class_ids": _class_ids(job, pipeline),
        "class_names": pipeline.class_names,
        "versions": {name: libraries[name] for name in ("hf_dpssl", "torch", "diffusers", "transformers")},
    }
    for name in ("folder", "class_labels", "unconditional", "scheduler_config"):
        plan.pop(name)
    plan = json.loads(json.dumps(plan))  # as it is read back: no tuples
    plan["fingerprint"] = combined_sha256({name: json.dumps(plan[name], sort_keys=True) for name in DECIDES})
    return plan


def _sha256(model: torch.nn.Module) -> str:
    config = model.config if isinstance(model.config, dict) else model.config.to_dict()
    settings = json.dumps(_settings(config), sort_keys=True, default=str)
    return combined_sha256(tensor_sha256(model.state_dict()) | {"config": settings})


def _settings(config: dict) -> dict:
    """What of a config decides numbers."""
    elsewhere = ("transformers_version", "architectures", "auto_map", "dtype", "torch_dtype")
    return {name: value for name, value in config.items() if name[0] != "_" and name not in elsewhere}


def _class_ids(job: SampleJob, pipeline: ClassConditionalPipeline) -> list[int] | None:
    names = pipeline.class_names
    if not names and (job.class_labels or job.layout == "by_class"):
        raise ValueError(f"{job.pipeline} has no classes: leave out class_labels and layout by_class.")
    if job.unconditional or not names:
        return None
    if not job.class_labels:
        return list(range(len(names)))
    return pipeline.class_ids(_as_ids_or_names(job.class_labels, pipeline))


def _as_ids_or_names(labels: list[int | str], pipeline: ClassConditionalPipeline) -> list[int | str]:
    """Labels of one call, texts that are numbers turned into ids unless all of them are names of classes.

    Raises:
        ValueError: some are names only and others ids only, as "0" and "12" of classes called "1" to "12".
    """
    numbers = [label for label in labels if isinstance(label, str) and label.lstrip("-").isdecimal()]
    names = set(pipeline.class_names)
    known = [label for label in numbers if label in names]
    if known and len(known) < len(numbers):
        ids = {label for label in numbers if 0 <= int(label) < len(names)}
        if not ids.issuperset(known):
            other = next(label for label in numbers if label not in names)
            only = next(label for label in known if label not in ids)
            raise ValueError(
                f"class_labels mix names and ids: {only!r} is a name and no id, {other!r} is no name. Give names only "
                "or ids only."
            )
    as_names = len(known) == len(numbers)
    return [int(label) if label in numbers and not as_names else label for label in labels]
