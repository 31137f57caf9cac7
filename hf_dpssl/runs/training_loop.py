"""The part of training that all scripts share: processes, trackers, progress, checkpoints, exact resume.

    accelerator = start_accelerator(args)
    loop = TrainingLoop(args, accelerator, "encoder", total_steps, make_loader, skipped={})
    model, optimizer = accelerator.prepare(model, optimizer)
    loop.keep(model=model, optimizer=optimizer, scheduler=scheduler)
    for batch in loop:
        with accelerator.accumulate(model):
            ...
        loop.log(loss=loss)

A resumed run gives the same weights bit for bit, because nothing random has a history: order,
augmentation, noise and dropout are functions of (seed, epoch, sample) or (seed, step).
"""

from __future__ import annotations

import atexit
import copy
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, gather_object, parse_flag_from_env
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from ..data import keyed_random
from ..models.matrix_products import allow_tf32
from .atomic_files import write_json
from .console import is_quiet, say
from .continuation import Processes, check_same_run, record_of_data
from .recipe import RunArguments
from .sharding import PartsOnDisk, common_part, load_, own_part
from .shared_storage import check_shared
from .trackers import check_trackers, start_trackers
from .training_checkpoints import CheckpointFolder

if TYPE_CHECKING:
    from ..data.image_data import ImageData

logger = logging.getLogger(__name__)
_PATIENCE = timedelta(minutes=30)  # of processes with one that writes, or does not come
_PATIENCE_PER_IMAGE = timedelta(seconds=0.1)  # with one that measures alone what all have embedded or drawn
_PATIENCE_WITH_DOWNLOADS = timedelta(hours=4)  # of a data set, by nodes of which each loads its own


def patience(args: RunArguments) -> timedelta:
    """How long processes wait for one another before the run ends with an error, by what the run does.

    Half an hour; a tenth of a second for each image that is measured at the end, of all images for 100,000; and four
    hours where each node downloads a data set first. What hangs is noticed so late, which is why it is no constant.
    """
    images = 100_000 if args.evaluation_images is None else args.evaluation_images
    images += sum(getattr(args, name, 0) for name in ("num_generated", "validation_images"))
    here = [part == "digits" or Path(part).exists() for part in args.dataset.split("+")]
    downloads = not args.streaming and not all(here)
    return _PATIENCE + images * _PATIENCE_PER_IMAGE + downloads * _PATIENCE_WITH_DOWNLOADS


def start_accelerator(args: RunArguments, *, can_be_sharded: bool = False) -> Accelerator:
    """Accelerator with the asked-for processes, precision, accumulation and trackers.

    Args:
        args: of the script.
        can_be_sharded: the script trains one model whose parameters may be spread over the processes (FSDP2).

    Raises:
        RuntimeError: fewer or more processes than asked for.
        ImportError: a tracker that is not installed.
        ValueError: an unknown tracker; accelerate is to spread a model in a way that the script cannot be trained in.
    """
    logging.basicConfig(level=logging.WARNING if is_quiet() else logging.INFO, format="%(message)s")
    for noisy in ("httpx", "timm", "accelerate", "datasets", "huggingface_hub"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
    check_trackers(args.log_with)
    sharded = _check_sharding(can_be_sharded)
    asked_for = args.num_processes or int(os.environ.get("WORLD_SIZE", 1))
    accelerator = Accelerator(
        # Without this, processes of a machine without GPU do not find each other, and each trains alone; one that
        # spreads its model over itself, to go on with another number later, needs a group too.
        cpu=(asked_for > 1 or sharded) and not torch.accelerator.is_available(),
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=args.log_with or None,
        project_dir=str(Path(args.output_dir) / "logs"),
        # Buffers are equal by construction (queue, codebook) or each process's own (batch norm).
        # While one process draws pictures and measures, the others wait, longer than NCCL's 10 minutes.
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=patience(args)),
        ],
        step_scheduler_with_optimizer=False,
    )
    _check_processes(asked_for, accelerator.num_processes)
    allow_tf32(accelerator.device)
    if sharded and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # Of processes without GPUs accelerate would copy the whole model, without a word; torch spreads theirs too.
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    if args.log_with:
        start_trackers(accelerator, args)
    if torch.distributed.is_initialized():
        atexit.register(_leave_process_group)
    return accelerator


def finish(accelerator: Accelerator, args: RunArguments, skipped: dict[str, str]) -> None:
    """Wait for all processes, list the skipped images of all of them in OUTPUT_DIR/skipped_images.json, close trackers.

    The process group stays, for a script that goes on.
    """
    accelerator.wait_for_everyone()
    everywhere = {row: reason for part in gather_object([skipped]) for row, reason in part.items()}
    if everywhere and accelerator.is_main_process:
        path = Path(args.output_dir) / "skipped_images.json"
        write_json(path, {"count": len(everywhere), "images": everywhere})
        say(f"{len(everywhere)} unreadable images were skipped, see {path}")
    for tracker in accelerator.trackers:
        tracker.finish()


def _leave_process_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _check_sharding(can_be_sharded: bool) -> bool:
    """Whether accelerate is to spread the model over the processes; ValueError where that is not possible."""
    for library in ("DEEPSPEED", "MEGATRON_LM"):
        if parse_flag_from_env(f"ACCELERATE_USE_{library}"):
            raise ValueError(
                f"accelerate's configuration asks for {library}, which no script trains with: {_UNSHARDED}"
            )
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return False
    if not can_be_sharded:
        raise ValueError(f"accelerate's configuration asks for FSDP, and this script trains whole copies: {_UNSHARDED}")
    if os.environ.get("FSDP_VERSION") != "2":
        raise ValueError("accelerate's configuration asks for FSDP 1: set fsdp_version: 2, as in fsdp_8_bf16.yaml.")
    return True


_UNSHARDED = (
    "use one without it, such as training/accelerate/gpu_8_bf16.yaml. Generators that are sharded (dae_dit, dae_drift) "
    "take the folder of a finished --autoencoder."
)


def _check_processes(asked_for: int, found: int) -> None:
    if asked_for != found:
        raise RuntimeError(f"{asked_for} processes were asked for, but this run has {found}. {_LAUNCH_HINT}")
    check_launch()


def check_launch() -> None:
    """RuntimeError where accelerate was to start several processes and, without a word, has started one."""
    launched_for_several = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ
    if launched_for_several and "WORLD_SIZE" not in os.environ:
        raise RuntimeError(f"accelerate was asked for several processes and started one. {_LAUNCH_HINT}")


_LAUNCH_HINT = (
    "Start several CPU processes with accelerate launch --config_file training/accelerate/cpu_2_processes.yaml SCRIPT "
    "(on a machine with a GPU prefix ACCELERATE_USE_CPU=true); --cpu --num_processes N starts one."
)


def _checkpoints(args: RunArguments, name: str) -> CheckpointFolder:
    return CheckpointFolder(Path(args.output_dir) / "checkpoints" / name, args.checkpoints_total_limit)


def check_start(
    args: RunArguments,
    accelerator: Accelerator,
    name: str,
    data: ImageData | None,
    sources: dict[str, str],
    bound_to_processes: str | None = None,
) -> None:
    """Whether a loop of that name may start or go on; called before anything is written, by every `TrainingLoop` too.

    Raises:
        FileExistsError: checkpoints of an earlier run, and neither --resume_from_checkpoint nor --overwrite.
        FileNotFoundError: a machine does not see OUTPUT_DIR of the first process.
        ValueError: the checkpoint is of another run, as `check_same_run`.
    """
    checkpoints = _checkpoints(args, name)
    if args.resume_from_checkpoint is None:
        if accelerator.is_main_process and checkpoints.steps() and not args.overwrite:
            raise FileExistsError(
                f"{checkpoints.path} holds checkpoints of an earlier run: go on with --resume_from_checkpoint latest, "
                "start afresh with --overwrite, or choose another --output_dir."
            )
        check_shared(Path(args.output_dir))
        return
    which = same_checkpoint(args.resume_from_checkpoint, checkpoints)
    if which is not None:
        meta = checkpoints.read_meta(which)
        processes = Processes(accelerator.num_processes, is_sharded(accelerator), bound_to_processes)
        check_same_run(meta, args, processes, data, sources, str(checkpoints.path))
    check_shared(Path(args.output_dir))


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether a prepared model's parameters are spread over the processes (FSDP2)."""
    return accelerator.distributed_type == DistributedType.FSDP


def same_checkpoint(which: str, checkpoints: CheckpointFolder) -> str | None:
    """ "latest" as the first process sees it, for all processes; None where it sees none.

    Raises:
        FileNotFoundError: a process, on another machine perhaps, does not see that checkpoint.
    """
    if which == "latest":
        steps = checkpoints.steps()
        which = str(checkpoints.folder_of(steps[-1])) if steps else None
    if not torch.distributed.is_initialized():
        return which
    first = [which]
    torch.distributed.broadcast_object_list(first)
    seen = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(seen, first[0] is None or (Path(first[0]) / "state.pt").exists())
    if not all(seen):
        blind = [rank for rank, sees in enumerate(seen) if not sees]
        raise FileNotFoundError(
            f"processes {blind} of {len(seen)} do not see {first[0]}, where the first one goes on: all machines need "
            "the same --output_dir on shared storage."
        )
    return first[0]


def _listed(sample_ids: torch.Tensor | None) -> str:
    return "" if sample_ids is None else f", images {sample_ids.tolist()}"


def _is_away(value: float | torch.Tensor) -> bool:
    return torch.is_tensor(value) and value.device.type != "cpu"


def _read(values: list[float | torch.Tensor]) -> list[float]:
    """Numbers and tensors () as numbers; a GPU is waited for once."""
    away = [i for i, value in enumerate(values) if _is_away(value)]
    arrived = torch.stack([values[i].detach().float() for i in away]).tolist() if away else []
    found = dict(zip(away, arrived, strict=True))
    return [found[i] if i in found else float(value) for i, value in enumerate(values)]


class TrainingLoop:
    """Yields batches from where the run stands, and after each does progress bar, log and checkpoint.

    Args:
        args: the script's arguments.
        accelerator: from `start_accelerator`.
        name: of the checkpoints' folder and of the progress bar, e.g. "encoder".
        total_steps: optimiser steps of the whole loop.
        make_loader: makes an endless iterable of batches from `start=(epoch, batch)`.
        skipped: {row: reason} of unreadable images, extended while training.
        data: the images, which a checkpoint remembers; None for a loop over none.
        sources: fingerprints of finished models that the run builds on, {"autoencoder": ...}, remembered too.
        bound_to_processes: why the run cannot go on with another number of processes and the same batch of all of
            them; None: it can.

    Raises:
        FileExistsError, ValueError: as `check_start`.
    """

    def __init__(
        self,
        args: RunArguments,
        accelerator: Accelerator,
        name: str,
        total_steps: int,
        make_loader: Callable[..., Iterable[dict]],
        skipped: dict[str, str],
        data: ImageData | None = None,
        sources: dict[str, str] | None = None,
        bound_to_processes: str | None = None,
    ):
        self.args = args
        self.accelerator = accelerator
        self.name = name
        self.total_steps = total_steps
        self.make_loader = make_loader
        self.step = 0
        self.epoch = 0
        self.batch = 0
        self.history: list[dict] = []
        # Wall-clock up to the last checkpoint, all processes at once; None: continued from one that did not note it.
        self.seconds: float | None = 0.0
        self._clock = time.perf_counter()
        self.skipped = skipped
        self._pending: dict[str, float | torch.Tensor] = {}
        self._unchecked: list[tuple[int, bool | torch.Tensor, torch.Tensor | None]] = []
        self._readers: dict[int, dict] = {}  # by worker: where it stands in its shards of a stream
        self._last_ids: torch.Tensor | None = None
        self._kept: dict[str, object] = {}
        self._disk = (
            PartsOnDisk(torch.distributed.new_group(backend="gloo", timeout=patience(args)))
            if is_sharded(accelerator)
            else None
        )
        self._unfinished: tuple[int, dict, dict] | None = None  # a checkpoint whose parts are being written
        self.sources = sources or {}
        check_start(args, accelerator, name, data, self.sources, bound_to_processes)
        self._data = record_of_data(data) if accelerator.is_main_process else None
        self.checkpoints = _checkpoints(args, name)
        if accelerator.is_main_process and args.resume_from_checkpoint is None:
            self.checkpoints.clear()

    def keep(self, **objects) -> None:
        """Name the objects whose `state_dict` makes up a checkpoint (model, optimizer, scheduler, ema, ...)."""
        self._kept = {
            name: self.accelerator.unwrap_model(value) if isinstance(value, torch.nn.Module) else value
            for name, value in objects.items()
        }
        if self.accelerator.scaler is not None:
            self._kept["scaler"] = self.accelerator.scaler
        if self.args.resume_from_checkpoint is not None:
            self._resume(self.args.resume_from_checkpoint)

    def _own_parts(self) -> dict[str, dict]:
        return {name: own_part(value, self._modules()) for name, value in self._kept.items()}

    def _modules(self) -> list[torch.nn.Module]:
        return [value for value in self._kept.values() if isinstance(value, torch.nn.Module)]

    def _resume(self, which: str) -> None:
        found = same_checkpoint(which, self.checkpoints)
        if found is None:
            say(f"{self.name}: no checkpoint in {self.checkpoints.path}, starting afresh")
            return
        state, meta = self.checkpoints.load(found)
        parts = self._own_parts()
        if self._disk:
            self._disk.read_(parts, Path(found) / "parts")
        for name, value in self._kept.items():
            if name in state or name != "monitor":  # one that is new to the run starts with nothing
                load_(value, self._modules(), parts[name], state[name])
        self.step = meta["step"]
        if self.step > self.total_steps:
            raise ValueError(
                f"the checkpoint in {self.checkpoints.path} is of step {self.step}, beyond the {self.total_steps} that "
                "were asked for: ask for more, or give the folder of an earlier checkpoint."
            )
        self.epoch = meta["epoch"]
        self.batch = meta["batch"]
        self.history = meta["history"]
        self.seconds = meta.get("seconds")
        self.skipped.update(meta["skipped"])
        if meta.get("readers"):
            states = meta["readers"][self.accelerator.process_index]
            self._readers = {int(worker): state for worker, state in states.items()}
        where = f"step {self.step} (epoch {self.epoch}, batch {self.batch})"
        replays = self.args.streaming and not self._readers
        replay = ", replaying the stream from the start of the epoch" if replays else ""
        say(f"{self.name}: resumed at {where}{replay}")

    def __iter__(self) -> Iterator[dict]:
        args = self.args
        accelerator = self.accelerator
        shown = accelerator.is_main_process and not is_quiet()
        silent = {} if shown else {"disable": True}  # else TQDM_DISABLE decides
        bar = tqdm(total=self.total_steps, initial=self.step, desc=self.name, unit="step", mininterval=0.5, **silent)
        micro_step = self.step * args.gradient_accumulation_steps
        self._clock = time.perf_counter()
        start = {"start": (self.epoch, self.batch)} | ({"readers": self._readers} if self._readers else {})
        batches = iter(self.make_loader(**start)) if self.step < self.total_steps else iter(())
        while self.step < self.total_steps:
            batch = next(batches)
            self._advance(batch)
            keyed_random.seed_step(args.seed, micro_step, accelerator.process_index)
            yield self._to_device(batch)
            micro_step += 1
            self._note_finite(batch.get("sample_ids"))
            if micro_step % args.gradient_accumulation_steps:
                continue
            self.step += 1
            bar.update()
            if self.step % args.logging_steps == 0 or self.step == self.total_steps:
                self._write_log(bar)
                # All processes are here together: a checkpoint that all have written need not wait for the next.
                if self._unfinished and all(gather_object([self._disk.is_written()])):
                    self._finish_checkpoint()
            if self.step % args.checkpointing_steps == 0 or self.step == self.total_steps:
                self.save()
        self._finish_checkpoint()
        bar.close()

    def _advance(self, batch: dict) -> None:
        if batch["epoch"] != self.epoch:
            self.epoch = batch["epoch"]
            self.batch = 0
        self.batch += 1
        if "reader" in batch:
            worker, state = batch["reader"]
            self._readers[worker] = state
        for row, reason in batch.get("skipped", {}).items():
            if str(row) not in self.skipped:
                self.skipped[str(row)] = reason
                logger.warning("skipped: %s", reason)

    def _to_device(self, batch: dict) -> dict:
        device = self.accelerator.device
        return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}

    def _note_finite(self, sample_ids: torch.Tensor | None) -> None:
        """Remember whether this step's values are finite; read at once on a CPU, else before logs and checkpoints."""
        values = [value for value in self._pending.values() if value is not None]
        away = [value.detach().float() for value in values if _is_away(value)]
        if values:
            # Numbers of the host are not sent to a GPU, which would be a wait in every step.
            finite = all(math.isfinite(value) for value in values if not _is_away(value))
            finite = torch.stack(away).isfinite().all() if finite and away else finite
            self._unchecked.append((self.step + 1, finite, sample_ids))
            read = any((self.step + 1) % n == 0 for n in (self.args.logging_steps, self.args.checkpointing_steps))
            if finite is False or not away or read or self.step + 1 == self.total_steps:
                self._check_finite()

    def _check_finite(self) -> None:
        """FloatingPointError at the first step whose logged values were not finite; checkpoints before it are kept."""
        flags = _read([finite for _, finite, _ in self._unchecked])
        for (step, _, sample_ids), finite in zip(self._unchecked, flags, strict=True):
            if not finite:
                values = self._logged_values()
                raise FloatingPointError(
                    f"{self.name}: a loss is not finite at step {step}{_listed(sample_ids)} (last values {values}). "
                    f"{self._advice()}"
                )
        if self._unchecked:
            self._last_ids = self._unchecked[-1][2]
        self._unchecked.clear()

    def _check_weights(self) -> None:
        """FloatingPointError when a step of finite loss has left weights that are not: its gradients were not."""
        for name, value in self._kept.items():
            if not isinstance(value, torch.nn.Module):
                continue
            tensors = {key: tensor for key, tensor in value.state_dict().items() if tensor.is_floating_point()}
            local = {key: t.to_local() if isinstance(t, DTensor) else t for key, t in tensors.items()}
            flags = _read([tensor.isfinite().all() for tensor in local.values()])
            bad = [key for key, finite in zip(local, flags, strict=True) if not finite]
            if self._disk:
                bad = sorted({key for part in gather_object([bad]) for key in part})
            if bad:
                raise FloatingPointError(
                    f"{self.name}: after step {self.step}{_listed(self._last_ids)}, {len(bad)} of {len(tensors)} "
                    f"tensors of {name} are not finite ({', '.join(bad[:3])}). {self._advice()}"
                )

    def _advice(self) -> str:
        kept = self.checkpoints.steps()
        last = f"of step {max(kept)}" if kept else "none yet"
        return (
            f"The last checkpoint is {last}, in {self.checkpoints.path}. Lower the learning rate or the weights of the "
            "losses, or look at these images."
        )

    def log(self, **values: float | torch.Tensor) -> None:
        """Values of this step for bar, trackers and curves; read every `logging_steps` only."""
        self._pending = values

    def _logged_values(self) -> dict[str, float]:
        given = {name: value for name, value in self._pending.items() if value is not None}
        return dict(zip(given, _read(list(given.values())), strict=True))

    def _write_log(self, bar: tqdm) -> None:
        values = self._logged_values()
        self.history.append({"step": self.step, **values})
        bar.set_postfix({k: f"{v:.4g}" for k, v in values.items()}, refresh=False)
        self.accelerator.log({f"{self.name}/{k}": v for k, v in values.items()}, step=self.step)

    def save(self, *, wait: bool = False) -> None:
        """Write a checkpoint now (all processes call it); FloatingPointError instead of one with weights of NaN.

        Parts of a sharded model are copied now and written while training goes on: the checkpoint appears at the first
        log entry after that, at the latest with the next one's beginning or at the end of the loop; `wait`: now.
        """
        self._finish_checkpoint()
        main = self.accelerator.is_main_process
        if main or self._disk:
            self._check_weights()
        now = time.perf_counter()
        self.seconds = None if self.seconds is None else self.seconds + now - self._clock
        self._clock = now
        meta = {
            "step": self.step,
            "epoch": self.epoch,
            "batch": self.batch,
            "num_processes": self.accelerator.num_processes,
            "sharded": is_sharded(self.accelerator),
            "arguments": asdict(self.args),
            "history": self.history,
            "seconds": self.seconds,
            "skipped": self.skipped,
            "data": self._data,
            "sources": self.sources,
            "readers": gather_object([self._readers]) if self._readers else None,
        }
        if main or self._disk:
            state = {name: common_part(value) for name, value in self._kept.items()}
        if self._disk:
            self._unfinished = (self.step, copy.deepcopy(state), copy.deepcopy(meta))
            self._disk.write(self._own_parts(), self.checkpoints.place_of_parts(self.step))
        elif main:
            self.checkpoints.save(self.step, state, meta)
        self.accelerator.wait_for_everyone()
        if wait:
            self._finish_checkpoint()

    def _finish_checkpoint(self) -> None:
        """Complete the checkpoint whose parts are being written, if one is."""
        if self._unfinished is None:
            return
        self._disk.wait()
        if self.accelerator.is_main_process:
            step, state, meta = self._unfinished
            self.checkpoints.save(step, state, meta, self.checkpoints.place_of_parts(step))
        self._unfinished = None
        self.accelerator.wait_for_everyone()
