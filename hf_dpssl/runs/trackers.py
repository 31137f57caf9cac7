"""Where a run's numbers go while it trains (--log_with): one project for all runs; a resumed run goes on in its own."""

from __future__ import annotations

import json
import uuid
from dataclasses import asdict
from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from .atomic_files import write_json
from .recipe import RunArguments

PROJECT = "hf_dpssl"
_KNOWN = {"tensorboard", "wandb", "trackio", "aim", "comet_ml", "mlflow", "dvclive", "swanlab", "clearml"}


def check_trackers(names: list[str]) -> None:
    """ImportError for a tracker that is not installed, ValueError for an unknown one."""
    available = {str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()}
    known = available | _KNOWN
    for name in names:
        if name not in known:
            raise ValueError(f"--log_with {name!r} is no tracker; choose among {sorted(known)}.")
        if name not in available:
            raise ImportError(f"--log_with {name} was asked for, but {name} is not installed: pip install {name}.")


def start_trackers(accelerator: Accelerator, args: RunArguments) -> None:
    """Open the asked-for trackers.

    A resumed run goes on in the one it began (tensorboard, wandb, trackio), of which OUTPUT_DIR/logs has the name.
    """
    folder = Path(args.output_dir)
    name = run_name(args) if accelerator.is_main_process else None
    settings = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in asdict(args).items()}
    of_run = {
        "wandb": {"name": folder.name, "id": name, "resume": "allow"},
        "trackio": {"name": name, "resume": "allow", "embed": False},
        "mlflow": {"run_name": name},
    }
    accelerator.init_trackers(PROJECT, config=settings, init_kwargs={k: of_run.get(k, {}) for k in args.log_with})


def run_name(args: RunArguments) -> str:
    """The name of a run among all: that of its folder with some letters after it, the same until it is overwritten.

    So a start that is refused, since there is a run already, leaves that run's name as it is.
    """
    folder = Path(args.output_dir)
    file = folder / "logs" / f"name-of-{args.name.replace('/', '-')}.json"
    if file.exists() and not (args.overwrite and args.resume_from_checkpoint is None):
        return json.loads(file.read_text(encoding="utf-8"))["name"]
    name = f"{folder.name}-{uuid.uuid4().hex[:8]}"
    write_json(file, {"name": name})
    return name
