"""Would the runs of a study start: two steps of each at full size, on tensors without values (rehearse.py).

So a study of a scale that nobody has the machine for, or the images, is tried on any machine, in seconds a run.
"""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

from claim_cells import filled, steps_of_arm
from rehearse import memory_of, process_of, stage_names
from rehearsed_steps import STEPS

from hf_dpssl.cli.rehearse import Asked
from hf_dpssl.cli.train import SCRIPTS
from hf_dpssl.runs.recipe import parse

# What names an encoder that the study trains before: its weights are not there.
_ENCODERS = ("--perceptual", "--align_encoder", "--features", "--extractor", "--validation_extractor")
_BEYOND = {"contrastive": ["--autoencoder"], "dae_drift": ["--init_from"]}  # of what is not there: not rehearsed


@dataclass(frozen=True)
class Run:
    """One training run of a study, the same in one arm or several; `without`: flags of networks that are left out."""

    script: str
    flags: tuple[str, ...]
    without: tuple[str, ...]
    arms: list[str] = field(default_factory=list, compare=False)


def runs_of(study: dict) -> tuple[list[Run], list[str]]:
    """The different training runs of a study, of each grid the first point, and what of it is not rehearsed."""
    own = {"fit": study["data"]["name"], "measured": study["data"]["name"], "shared": "shared", "cell": "cell"}
    own |= {"trained": "cell", "seed": 0}
    fill = study["numbers"] | study["data"] | own
    shared = {name: _argv(step, fill) for name, step in study.get("shared", {}).items()}
    steps = [(step["run"], shared[name], "shared", None) for name, step in study.get("shared", {}).items()]
    for arm, about in study["arms"].items():
        _, with_arm = filled(study, arm, 0, own)
        own_steps = [step for step in steps_of_arm(study, arm) if step.get("final") or "trained_as" not in about]
        of_arm = [(step["run"].format_map(with_arm), _argv(step, with_arm)) for step in own_steps]
        trained = next((argv for run, argv in of_arm if run == "dae_vq"), None)
        steps += [(run, argv, arm, trained) for run, argv in of_arm]
    found: dict[Run, Run] = {}
    left = {}
    for script, argv, arm, trained in steps:
        beyond = [flag for flag in _BEYOND.get(script, ()) if flag in argv]
        if script not in STEPS or beyond:
            left[" ".join([script, *beyond])] = None
            continue
        run = _run(script, argv, shared, trained)
        found.setdefault(run, run).arms.append(arm)
    return list(found), list(left)


def rehearsed(study: dict) -> Iterator[tuple[Run, dict[str, dict]]]:
    """Each training run with {stage: {"parameters", "bytes", ...} of `rehearse.step_memory`}.

    Raises:
        ValueError, RuntimeError: a run that would not start, from where it fails.
    """
    for run in runs_of(study)[0]:
        args = parse(SCRIPTS[run.script], list(run.flags), "")
        asked = Asked(run.script, args, None, 80, True, None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of small codebooks
            process = process_of(asked)
            stages = {name: memory_of(asked, number, process) for number, name in enumerate(stage_names(asked))}
        yield run, stages


def _argv(step: dict, fill: dict) -> list[str]:
    return shlex.split(step["flags"].format_map(fill))


def _run(script: str, argv: list[str], shared: dict[str, list[str]], trained: list[str] | None) -> Run:
    """A run whose autoencoder is described by the flags that train it, without networks whose weights it would load."""
    argv = list(argv)
    without = []
    for flag in _ENCODERS:
        if flag in argv:
            without += _taken(argv, flag)
    if "--autoencoder" in argv:
        _, name = _taken(argv, "--autoencoder")
        flags = list(trained if name.startswith("cell/") else shared[name.removeprefix("shared/")])
        for flag in _ENCODERS:
            if flag in flags:
                _taken(flags, flag)
        argv += ["--autoencoder_args", shlex.join(flags)]
    return Run(script, tuple(argv), tuple(without[::2]))


def _taken(argv: list[str], flag: str) -> list[str]:
    """A flag and its value, which are no longer in `argv`."""
    place = argv.index(flag)
    found = argv[place : place + 2]
    del argv[place : place + 2]
    return found
