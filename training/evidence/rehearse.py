"""Would a run start on a GPU, with how much memory, and how often would the host wait for it: rehearsed without one.

    python training/evidence/rehearse.py dae_dit --recipe dit-b2-imagenet --json    # as hf-dpssl rehearse

Memory: the script's own models, optimisers and averages at full size on tensors without values; the second of two steps
on a batch of one process is counted. Waits: two steps of the same run made small, with values, in its precision; the
second is counted.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections import Counter
from dataclasses import dataclass
from itertools import islice

from hf_dpssl.cli.errors import reported
from hf_dpssl.cli.rehearse import Asked, parsed
from hf_dpssl.runs.recipe import find_recipe

if __name__ == "__main__":
    parsed(sys.argv[1:])  # help and wrong flags end here, before the libraries are imported

import torch  # noqa: E402
import yaml  # noqa: E402
from accelerate.utils import convert_outputs_to_fp32  # noqa: E402
from rehearsed_steps import STEPS, Step, reduced  # noqa: E402
from run_times import SHARES_OF_PEAK, OperationCounter, span, times_of  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from hf_dpssl.runs.rehearsal import rehearsal  # noqa: E402
from hf_dpssl.runs.rehearsed_memory import memory_rehearsal  # noqa: E402

_KINDS = {"bf16": torch.bfloat16, "fp16": torch.float16}
_NAMES = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "optimiser",
    "averages": "averaged weights",
    "others": "frozen, buffers",
    "activations": "activations, peak",
    "total": "sum per GPU",
}


@dataclass
class Process:
    """One of `count` processes, in a precision of accelerate; sharded: parameters are spread over them."""

    count: int
    precision: str
    sharded: bool


def main(argv: list[str] | None = None) -> int:
    """Print what is asked for; returns 0."""
    asked = parsed(sys.argv[1:] if argv is None else argv)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights that are not there, and of small codebooks
        found = rehearse(asked)
    print(json.dumps(found, indent=2) if asked.as_json else text_of(found))
    return 0


def rehearse(asked: Asked) -> dict:
    """Bytes by stage, whether they fit, what the recipe states, times and waits by stage.

    Raises:
        ValueError: a script that cannot be sharded.
    """
    process = process_of(asked)
    if process.sharded and asked.script not in ("dae_dit", "dae_drift"):
        raise ValueError(f"accelerate's configuration asks for FSDP, and {asked.script} trains whole copies.")
    names = stage_names(asked)
    stages = {name: memory_of(asked, number, process) for number, name in enumerate(names)}
    largest = max(stages.values(), key=lambda stage: stage["bytes"]["total"])
    return {
        "script": asked.script,
        "recipe": asked.recipe,
        "batch_size": asked.args.batch_size,
        "processes": process.count,
        "sharded": process.sharded,
        "mixed_precision": process.precision,
        "memory": round(asked.memory * 2**30),
        "fits": largest["bytes"]["total"] <= asked.memory * 2**30,
        "total": largest["bytes"]["total"],
        "stated_by_recipe": stated_bytes(asked.recipe),
        "stages": stages,
        "times": times_of(asked, process.count, stages),
        "waits": {name: waits_of(asked, number) for number, name in enumerate(names)},
    }


def process_of(asked: Asked) -> Process:
    """As flags and accelerate's configuration say; one process where they say nothing."""
    config = yaml.safe_load(asked.launcher.read_text(encoding="utf-8")) if asked.launcher else {}
    count = asked.args.num_processes or config.get("num_processes", 1)
    precision = asked.args.mixed_precision or config.get("mixed_precision", "no")
    return Process(count, precision, config.get("distributed_type") == "FSDP")


def stage_names(asked: Asked) -> list[str]:
    """Of the script's stages, in order."""
    return [name for name, _ in STEPS[asked.script](asked.args, "meta")]


def memory_of(asked: Asked, number: int, process: Process) -> dict:
    """`step_memory` of a stage."""
    _, step = next(islice(STEPS[asked.script](asked.args, "meta"), number, None))
    return step_memory(step, process)


def step_memory(step: Step, process: Process) -> dict:
    """{"parameters": that learn, "operations", "launches": of a step, "bytes": {part: bytes} of its second step}."""
    with memory_rehearsal() as memory:
        move(step, memory.fake_module_, lambda tensor: tensor.to("cuda"))
        for name, value in step.read.items():
            memory.states(getattr(step.learning[0], name), value)
        for module in step.learning:
            cast_(module, process.precision)
        learned = [p for module in step.learning for p in module.parameters() if p.requires_grad]
        parts = {"parameters": memory.outside(learned), "gradients": 0, "optimizer": 0, "averages": 0}
        parts["others"] = memory.outside(tensors_of(step))
        started = step.start()
        if started.averages is not None:
            parts["averages"] = memory.outside(started.averages.shadow_params)
        batch = {key: on_gpu(value) for key, value in step.batch().items()}
        with OperationCounter() as counter:
            started.run(batch)
        states = [state for optimizer in started.optimizers for state in optimizer.state.values()]
        parts["optimizer"] = memory.outside(v for state in states for v in state.values() if on_a_gpu(v))
        memory.clear()
        started.run(batch)
    gradients = min(memory.gradients, parts["parameters"])  # some updates have several backward passes
    parts |= {"gradients": gradients, "activations": memory.peak}
    if process.sharded:
        for name in ("parameters", "gradients", "optimizer", "averages"):
            parts[name] = -(-parts[name] // process.count)
    count = sum(parameter.numel() for parameter in dict.fromkeys(learned))
    counted = {"parameters": count, "operations": counter.total, "launches": counter.launches}
    return counted | {"bytes": parts | {"total": sum(parts.values())}}


def move(step: Step, module_, tensor) -> None:
    """Move all that a step has onto the GPU, modules in place."""
    for module in (*step.learning, *step.frozen):
        module_(module)
    for space in step.features:
        for name, value in vars(space).items():
            if isinstance(value, nn.Module) and value not in step.frozen:
                module_(value)
            elif isinstance(value, Tensor):
                setattr(space, name, tensor(value))


def tensors_of(step: Step) -> list[Tensor]:
    """Parameters and buffers of all modules."""
    held = [value for space in step.features for value in vars(space).values() if isinstance(value, nn.Module)]
    modules = [*step.learning, *step.frozen, *held]
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


def on_gpu(value):
    """A tensor on the GPU; another value as it is."""
    return value.to("cuda") if isinstance(value, Tensor) else value


def on_a_gpu(value) -> bool:
    """Whether a value is a tensor that takes memory there."""
    return isinstance(value, Tensor) and value.device.type == "cuda"


def cast_(module: nn.Module, precision: str) -> None:
    """Autocast in a module's forward pass, and its outputs in float32, as `accelerator.prepare` does it."""
    if precision in _KINDS:
        module.forward = convert_outputs_to_fp32(torch.autocast("cuda", _KINDS[precision])(module.forward))


def waits_of(asked: Asked, number: int) -> list[str]:
    """What the host waits for in the second step of a stage of the run made small, in the run's precision."""
    _, step = next(islice(STEPS[asked.script](reduced(asked.script, asked.args), "cpu"), number, None))
    for name, value in step.read.items():  # a full queue is known to be so without asking the GPU
        getattr(step.learning[0], name).fill_(value)
    with rehearsal() as rehearsed:
        move(step, rehearsed.fake_module_, rehearsed.fake_of)
        for module in step.learning:
            cast_(module, process_of(asked).precision)
        started = step.start()
        given = {key: rehearsed.fake_of(v) if isinstance(v, Tensor) else v for key, v in step.batch().items()}
        for _ in range(2):
            rehearsed.clear()
            started.run(given)
    return list(rehearsed.syncs)


def stated_bytes(recipe: str | None) -> int | None:
    """What a recipe's comment states per GPU, or None."""
    if recipe is None:
        return None
    found = re.search(r"([\d.]+) GB per GPU", find_recipe(recipe).read_text(encoding="utf-8"))
    return found and round(float(found.group(1)) * 1e9)


def text_of(found: dict) -> str:
    """The figures as lines."""
    how = ", sharded" if found["sharded"] else ""
    lines = [
        f"{found['script']}: {found['batch_size']} images per process, {found['processes']} process(es){how}, "
        f"mixed precision {found['mixed_precision']}"
    ]
    for name, stage in found["stages"].items():
        lines.append(f"{name or 'a step'}: {stage['parameters']:,} parameters learn")
        lines += [f"  {_NAMES[part]:<22}{size / 1e9:>10.3f} GB" for part, size in stage["bytes"].items() if size]
    verdict = "fits into" if found["fits"] else "does NOT fit into"
    lines.append(f"{found['total'] / 1e9:.1f} GB per GPU: {verdict} {found['memory'] / 2**30:g} GiB, by --memory")
    if found["stated_by_recipe"]:
        lines.append(f"The recipe states {found['stated_by_recipe'] / 1e9:.1f} GB per GPU.")
    lines.append("Not in it: the driver's context, workspaces of libraries, gaps between blocks (a few GB).")
    if found["processes"] > 1:
        lines.append("Nor what processes exchange, but for gradients, which are views of what is sent.")
    if found["sharded"]:
        lines.append("Sharded: a quotient; gathered blocks come on top, activations are those of the whole model.")
    lines += lines_of_times(found["times"])
    for name, waits in found["waits"].items():
        where = f"{name}: " if name else ""
        lines.append(f"{where}{len(waits)} waits for the GPU in a step (of the run made small), beside log entries")
        lines += [f"  {line}{f' ({count} times)' if count > 1 else ''}" for line, count in Counter(waits).items()]
    return "\n".join(lines)


def lines_of_times(times: dict) -> list[str]:
    """What a run takes before, in and after its steps."""
    low, high = (f"{share:g}" for share in SHARES_OF_PEAK)

    def spans(seconds: dict) -> str:
        return f"{span(seconds['A100'][low])} ({span(seconds['A100'][high])})"

    lines = [f"By formula, on A100 at {low} ({high}) of their peak (small models take longer: launches):"]
    lines += [f"  {name or 'a step':<22}{spans(seconds)}" for name, seconds in times["step"].items()]
    if "run" in times:
        lines.append(f"  {'all steps':<22}{spans(times['run'])}")
    if "start" in times:
        start = times["start"]
        what = f"{start['images']:,} images are encoded into {start['bytes'] / 1e9:.2g} GB on disk"
        lines.append(f"  {'before them':<22}{spans(start['seconds'])}: {what}")
    if "end" in times:
        lines.append(
            f"  {'after them':<22}{spans(times['end']['seconds'])}: {times['end']['images']} pictures are drawn"
        )
    return lines


if __name__ == "__main__":
    sys.exit(reported("hf-dpssl rehearse", main))
