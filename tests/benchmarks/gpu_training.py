"""The training scripts as a user starts them, compiled, for 50 steps: steps per second, and what the host waits for.

Profiled is the second fifth of each loop, timed are its last two fifths but for one step, which no profiler slows down.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from accelerate.state import AcceleratorState
from gpu_speed import scaled, synchronize
from torch.profiler import ProfilerActivity, profile

from hf_dpssl.runs.training_loop import TrainingLoop

STEPS = 50
# By the profiler's names: the first is any value read on the host, the others are what a GPU made it wait for.
SYNCHRONISATIONS = (
    "aten::_local_scalar_dense",
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
)
TINY_ENCODER = ["--model_args", '{"channels": [8, 8, 16, 16]}', "--projection_dim", "8", "--batch_size", "16"]
TINY_WIDTHS = [word for part in ("encoder", "decoder", "auxiliary") for word in (f"--{part}_channels", "8", "8")]


class Watch:
    """What happened in every loop that ran: {name: {"steps_per_second", "synchronisations_per_step"}}."""

    def __init__(self, device: torch.device):
        self.device = device
        self.loops: dict[str, dict] = {}

    def batches(self, iterate, loop: TrainingLoop) -> Iterator[dict]:
        """The batches of a loop, profiled and timed on the way."""
        total = loop.total_steps
        start, stop, timed = total // 5, 2 * total // 5, 3 * total // 5
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device.type == "cuda" else [])]
        profiler = profile(activities=activities)
        found = self.loops[loop.name] = {"steps": total}
        for step, batch in enumerate(iterate(loop)):
            if step == start:
                synchronize(self.device)
                profiler.start()
            if step == stop:
                profiler.stop()
                found["synchronisations_per_step"] = counts(profiler, stop - start)
            if step == timed:
                synchronize(self.device)
                begun = time.perf_counter()
            if step == total - 1:  # after which a loop may validate
                synchronize(self.device)
                found["steps_per_second"] = (total - 1 - timed) / (time.perf_counter() - begun)
            yield batch


def counts(profiler: profile, steps: int) -> dict[str, float]:
    """How often a step waited, by the name of what it waited in."""
    found = {event.key: event.count / steps for event in profiler.key_averages() if event.key in SYNCHRONISATIONS}
    return dict.fromkeys(SYNCHRONISATIONS, 0.0) | found


def flags(script: str, folder: Path, steps: int, small: bool, rounded: bool) -> list[str]:
    """The command line of a script, on the embedded digits."""
    found = ["--output_dir", str(folder), "--overwrite", "--compile", "--evaluation_images", "64"]
    found += ["--mixed_precision", "bf16" if rounded else "no", "--logging_steps", "1000"]
    if script == "contrastive":
        full = ["--architecture", "resnet18", "--stem", "small_image", "--model_args", "{}", "--batch_size", "512"]
        return [*found, "--max_train_steps", str(steps), *(TINY_ENCODER if small else full)]
    if script == "dae_vq":
        stages = ["--arm", "dae", "--stage_1_steps", str(steps), "--stage_2_steps", str(steps)]
        stages += ["--validation_steps", "1000"]
        return [*found, *stages, *(["--batch_size", "8", *TINY_WIDTHS] if small else [])]
    drawn = ["--sampling_steps", "2", "--grid_images_per_class", "1"]
    size = ["--num_layers", "1", "--width", "16", "--num_heads", "2", "--batch_size", "16"]
    found += ["--autoencoder", str(folder / "autoencoder"), "--max_train_steps", str(steps)]
    return [*found, *drawn, *(size if small else ["--preset", "dit-s-2"])]


@contextlib.contextmanager
def compiled_by(backend: str) -> Iterator[None]:
    """Inside, modules are compiled by this backend unless they name one."""
    own = torch.nn.Module.compile

    def compile_(module, *args, **options):
        return own(module, *args, **{"backend": backend} | options)

    with mock.patch.object(torch.nn.Module, "compile", compile_):
        yield


def run(script: str, argv: list[str], watch: Watch) -> None:
    """A script of training/ in this process, its output kept back."""
    module = importlib.import_module(script)
    iterate = TrainingLoop.__iter__
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        with (
            mock.patch.object(TrainingLoop, "__iter__", lambda loop: watch.batches(iterate, loop)),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            module.main(argv)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def measure(device: torch.device, scale: float) -> Iterator[dict]:
    """{script: {loop: figures, "seconds": of the whole script}} one by one; a script that fails leaves its error."""
    steps = scaled(STEPS, scale, 5)
    with tempfile.TemporaryDirectory() as folder, compiled_by("inductor" if scale == 1 else "eager"):
        for script in ("contrastive", "dae_vq", "dae_dit"):
            watch, start = Watch(device), time.perf_counter()
            try:
                run(script, flags(script, Path(folder), steps, scale < 1, device.type == "cuda"), watch)
            except TimeoutError:  # of the whole part
                yield {script: watch.loops}
                raise
            except (Exception, SystemExit) as error:
                watch.loops["error"] = f"{type(error).__name__}: {error}"[:500]
                yield {"passed": False}
            yield {script: watch.loops | {"seconds": round(time.perf_counter() - start, 1)}}
