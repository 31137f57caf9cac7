"""Validation of a generator while it trains: samples of the averaged weights, FID, class consistency, the best.

Every validation draws the same noise: image i has its own generator, a function of (seed, i), whatever the number of
processes. The best value so far is part of the run's checkpoints, so that a resumed run keeps the same pipeline.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor

from ..data import keyed_random
from ..data.batches import evaluation_batches
from ..data.image_table import ImageTable
from ..embedding.feature_extractors import check_classifier, load_extractor
from ..evaluation.generated_images import class_consistency
from ..evaluation.image_measures import image_quality
from ..generation.bulk_sampling import draw_images
from ..generation.pipeline_vq_dit import VQDiTPipeline
from ..generation.pipeline_vq_drift import VQDriftPipeline
from ..generation.pipeline_vq_token import VQTokenPipeline
from ..models.gather import gather_rows, gather_shares, is_first, own_share
from ..runs.atomic_files import atomic_folder
from ..runs.console import say
from ..runs.plots import save_grid
from ..runs.recipe import RunArguments, save_recipe
from ..runs.results import write_results
from ..runs.sharding import copy_whole_
from ..runs.training_loop import TrainingLoop
from .dit_arguments import DiTArguments
from .drift_arguments import DriftArguments
from .gan_arguments import GANArguments
from .gan_training import GANPipeline

LatentPipeline = VQDiTPipeline | VQDriftPipeline


@contextmanager
def averaged_weights(ema: EMAModel, module: torch.nn.Module) -> Iterator[None]:
    """Inside the block the module holds the averaged weights, whole, in eval mode."""
    training = module.training
    ema.store(module.parameters())
    copy_whole_(module.parameters(), ema.shadow_params)
    module.eval()
    try:
        yield
    finally:
        ema.restore(module.parameters())
        module.train(training)


class GenerationMonitor:
    """Samples, measures and keeps the best of a run's generator.

    Args:
        args: of the run.
        accelerator: its processes share the images of a validation.
        pipeline: of the network in training, or of a copy where that one is sharded.
        images: of which `evaluation_images` at random are compared with, training images or, of a GAN, held-out ones;
            None without extractor.

    Raises:
        ValueError: an extractor without logits, or with other classes, as the classifier.
    """

    def __init__(
        self,
        args: DiTArguments | DriftArguments | GANArguments,
        accelerator: Accelerator,
        pipeline: LatentPipeline | GANPipeline,
        images: ImageTable | None,
    ):
        self.args = args
        self.accelerator = accelerator
        self.pipeline = pipeline
        self.best: float | None = None
        self.best_step: int | None = None
        self.metrics: dict[str, float] = {}
        pipeline.set_progress_bar_config(disable=True)
        device = accelerator.device
        self.extractor = load_extractor(args.validation_extractor, device=device) if args.validation_extractor else None
        self.classifier = None
        if args.validation_classifier:
            self.classifier = load_extractor(args.validation_classifier, device=device)
            check_classifier(self.classifier, len(pipeline.class_names), pipeline.vae.config.image_size)
        self.real, self.reference = None, None
        if self.extractor is not None:
            self.real = self._real_features(images)
            self.reference = "evaluation" if isinstance(pipeline, GANPipeline) else "train"

    @property
    def metric(self) -> str | None:
        """Key by which the best is kept."""
        names = ["fid"] if self.extractor else []
        names += ["class_consistency"] if self.classifier else []
        return self.args.best_metric or (names[0] if names else None)

    def state_dict(self) -> dict:
        """The best value and its step."""
        return {"best": self.best, "best_step": self.best_step, "metrics": self.metrics}

    def load_state_dict(self, state: dict) -> None:
        """Go on from a checkpoint."""
        self.best = state["best"]
        self.best_step = state["best_step"]
        self.metrics = state["metrics"]

    def is_due(self, step: int) -> bool:
        """Whether the weights after that many steps are validated in the loop; `finish` validates the last."""
        every = self.args.validation_steps
        return bool(every) and step % every == 0 and step < self.args.max_train_steps

    def validate(self, step: int, ema: EMAModel) -> dict[str, float]:
        """Measure the averaged weights after `step` steps; all processes call it. {} where nothing measures."""
        with averaged_weights(ema, self.pipeline.transformer):
            generated, labels, logits = self._generate()
            self.metrics = self._measure(generated, labels, logits)
            images = sample_grid(
                self.pipeline, self.args.grid_images_per_class, self.args.grid, self.args, self.accelerator
            )
            if self.accelerator.is_main_process:
                self._write_grid(images, step)
                self._keep_best(step)
        self.accelerator.wait_for_everyone()
        return dict(self.metrics)

    def record(self, loop: TrainingLoop, ema: EMAModel) -> None:
        """Measure the averaged weights after this step, and write the figures into curves and trackers."""
        self._record(loop, ema, loop.step + 1)

    def finish(self, loop: TrainingLoop, ema: EMAModel) -> None:
        """Measure the last weights when their checkpoint is there, and write it again with the figures.

        A run that goes on from that one measures no more.
        """
        if any(entry["step"] == loop.step and self.metrics == _without_step(entry) for entry in loop.history):
            return
        self._record(loop, ema, loop.step)
        loop.save(wait=True)

    def _record(self, loop: TrainingLoop, ema: EMAModel, step: int) -> None:
        if metrics := self.validate(step, ema):
            loop.history.append({"step": step, **metrics})
            loop.accelerator.log({f"{loop.name}/{name}": value for name, value in metrics.items()}, step=step)
            listed = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            say(f"{loop.name}, step {step}: {listed}; best is that of step {self.best_step}")

    def summary(self, history: list[dict]) -> dict:
        """For results.json: the best validation, all of them, and [step, value] of what the best is kept by.

        `history`: of the loop. The curve is "validation_fid" or "validation_class_consistency".
        """
        validations = [entry for entry in history if entry.keys() >= self.metrics.keys()]
        key = self._key()
        return {
            "best": {"step": self.best_step, self.metric: self.best},
            "validations": validations,
            f"validation_{self.metric}": [[entry["step"], entry[key]] for entry in validations],
        }

    def judged(self) -> dict:
        """For results.json: how many images the figures are of, against how many, and of which split those are."""
        if self.real is None:
            return {"samples": {"generated": self.args.validation_images}}
        samples = {"generated": self.args.validation_images, "reference": len(self.real)}
        return {"samples": samples, "reference": self.reference}

    @torch.no_grad()
    def _generate(self) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Features, classes and logits of all processes' images, None where nothing needs them."""
        args = self.args
        index = self.accelerator.process_index
        count = self.accelerator.num_processes
        if self.extractor is None and self.classifier is None:
            return None, torch.empty(0, dtype=torch.int64), None
        mine = range(index, args.validation_images, count)
        class_count = len(self.pipeline.class_names)
        features = []
        logits = []
        for first in range(0, len(mine), args.batch_size):
            ids = list(mine[first : first + args.batch_size])
            images = self._sample(ids, [i % class_count for i in ids] if class_count else None)
            if self.extractor is not None:
                features.append(self.extractor.features(images))
            if self.classifier is not None:
                logits.append(self.classifier.logits(images))
        classes = torch.arange(args.validation_images if class_count else 0) % max(1, class_count)
        return (
            None if self.extractor is None else _gathered(features, args.validation_images),
            classes,
            None if self.classifier is None else _gathered(logits, args.validation_images),
        )

    def _sample(self, ids: list[int], labels: list[int] | None) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] of these numbers."""
        seeds = [keyed_random.derive_seed(self.args.seed, "validation", i) for i in ids]
        with self.accelerator.autocast():
            images = self.pipeline(
                labels,
                num_images=None if labels else len(ids),
                **self.args.sampling,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="pt",
            ).images
        return images.float() * 2 - 1

    def _real_features(self, images: ImageTable) -> Tensor:
        mine = own_share(images.random_rows(self.args.evaluation_images))
        features = []
        numbers = []
        for batch in evaluation_batches(images, self.args.batch_size, mine):
            features.append(self.extractor.features(batch["images"].float() / 127.5 - 1))
            numbers += batch["sample_ids"].tolist()  # unreadable ones may be missing
        return gather_rows(torch.cat(features) if features else None, numbers)

    def _measure(self, generated: Tensor | None, labels: Tensor, logits: Tensor | None) -> dict[str, float]:
        metrics = {}
        if generated is not None:
            metrics |= image_quality(self.real, generated, self.extractor.name, measures=("fid",))
        if logits is not None:
            metrics |= class_consistency(logits, labels)
        return metrics

    def _key(self) -> str | None:
        """Of `metric` among the figures, whose name may end with the extractor's."""
        return next((name for name in self.metrics if self.metric and name.startswith(self.metric)), None)

    def _keep_best(self, step: int) -> None:
        key = self._key()
        if key is None or not math.isfinite(value := self.metrics[key]):
            return
        better = self.best is None or (value < self.best if self.metric == "fid" else value > self.best)
        if not better:
            return
        self.best = value
        self.best_step = step
        with atomic_folder(Path(self.args.output_dir) / f"{self.args.name}-best") as folder:
            self.pipeline.save_pretrained(folder)
            save_recipe(self.args, folder / "recipe.yaml")
            about = {"dataset": self.args.dataset, "seed": self.args.seed, "step": step} | self.judged()
            write_results(folder / "results.json", self.metrics, **about)

    def _write_grid(self, images: Tensor, step: int) -> None:
        """The fixed-noise grid of this step, as a file and in the trackers that take pictures."""
        name = f"{self.args.name}-progress/step-{step:08d}.png"
        path = Path(self.args.output_dir) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}")
        save_grid(images, unfinished, columns=self.args.grid_images_per_class, min_side=64)
        unfinished.replace(path)
        pixels = np.asarray(Image.open(path).convert("RGB"))[None]
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({f"{self.args.name}/samples": pixels}, step=step, **options)


def _without_step(entry: dict) -> dict:
    return {name: value for name, value in entry.items() if name != "step"}


def _gathered(parts: list[Tensor], total: int) -> Tensor:
    """Rows of all processes, of which this one has made these parts."""
    return gather_shares(torch.cat(parts) if parts else None, total)


def sample_grid(
    pipeline: LatentPipeline | VQTokenPipeline | GANPipeline,
    per_class: int,
    options: dict,
    args: RunArguments,
    accelerator: Accelerator,
) -> Tensor:
    """Samples in [-1, 1]: a row of so many per class (of at most 10), or a square of them without classes.

    Those of hf-dpssl sample with that seed and so many classes; `options` are of the pipeline's call, the precision is
    that of the run. The processes share them: all call this, and get all.
    """
    classes = list(range(len(pipeline.class_names))[:10])
    rows = len(classes) or per_class
    numbers = [column * rows + row for row in range(rows) for column in range(per_class)]
    mine = own_share(numbers)
    if not is_first():
        pipeline.set_progress_bar_config(disable=True)
    parts = []
    for first in range(0, len(mine), args.batch_size):
        with accelerator.autocast():
            drawn = draw_images(
                pipeline, mine[first : first + args.batch_size], classes or None, seed=args.seed, options=options
            )
        parts.append(drawn)
    return _gathered(parts, len(numbers)) * 2 - 1
