"""What a process holds in memory when a run goes on; exactness is shown in latent_training/test_dit_sharding.py."""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

from hf_dpssl.latent_training.latent_run import weight_averages
from hf_dpssl.runs.sharding import PartsOnDisk, common_part, load_, own_part

WIDTH, LAYERS = 128, 16
WEIGHTS = 4 * LAYERS * WIDTH * (WIDTH + 1)  # bytes


def most_memory(work: Callable[[], object]) -> int:
    """Bytes of the CPU that torch has allocated inside and not yet freed, at their most."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes() if event.device_type() == torch._C._autograd.DeviceType.CPU else 0
        most = max(most, held)
    return most


def make_kept(*, mesh=None, device: str = "cpu") -> dict:
    """A model of WEIGHTS bytes, its optimiser (twice that after a step) and its average (once)."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, device=device) for _ in range(LAYERS)))
    if mesh is not None:
        for layer in [*model, model]:
            fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), fused=device == "cpu")
    return {"model": model, "optimizer": optimizer, "ema": weight_averages(model.parameters(), 0.5)}


def tensors_of(state: dict) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(state) if torch.is_tensor(leaf)]


def train(kept: dict) -> None:
    kept["model"](torch.randn(8, WIDTH)).square().mean().backward()
    kept["optimizer"].step()
    kept["optimizer"].zero_grad()
    kept["ema"].step(kept["model"].parameters())


def parts_of(kept: dict) -> dict:
    return {name: own_part(value, [kept["model"]]) for name, value in kept.items()}


def resumed_in_two(folder: str) -> dict[str, torch.Tensor]:
    mesh = init_device_mesh("cpu", (2,))
    first, second = make_kept(mesh=mesh), make_kept(mesh=mesh)
    train(first)
    common = copy.deepcopy({name: common_part(value) for name, value in first.items()})
    disk = PartsOnDisk(torch.distributed.new_group(backend="gloo"))
    disk.write(parts_of(first), Path(folder))
    disk.wait()
    parts = {}
    most = {"parts": most_memory(lambda: parts.update(parts_of(second)))}
    most["read"] = most_memory(lambda: disk.read_(parts, Path(folder)))
    for name, value in second.items():
        most[name] = most_memory(
            lambda name=name, value=value: load_(value, [second["model"]], parts[name], common[name])
        )
    same = all(
        torch.equal(a.to_local(), b.to_local())
        for a, b in zip(second["ema"].shadow_params, first["ema"].shadow_params, strict=True)
    )
    return {"same": torch.tensor(same)} | {name: torch.tensor(value / WEIGHTS) for name, value in most.items()}


def test_process_of_a_sharded_run_goes_on_with_memory_for_its_own_part_alone(run_in_two, tmp_path):
    for found in run_in_two(resumed_in_two, str(tmp_path / "parts")):
        assert bool(found.pop("same"))
        # Two moments of half of the weights, and for a moment a gradient of them, which AdamW makes moments of.
        assert 1.45 < float(found.pop("parts")) < 1.55
        # Then values arrive where they belong, a few tensors at a time; a copy of the averages' half were 0.5.
        assert max(found.values()) < 0.2, found


def test_process_with_another_device_keeps_no_copy_of_the_state_on_the_cpu(tmp_path):
    first = make_kept()
    train(first)
    torch.save({name: common_part(value) for name, value in first.items()}, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", map_location="cpu", mmap=True, weights_only=True)
    second = make_kept(device="meta")

    def load() -> None:
        for name in ("optimizer", "ema"):  # a module copies
            load_(second[name], [], {}, state[name])

    assert most_memory(load) < 0.01 * WEIGHTS
    moments = [
        value for state in second["optimizer"].state.values() for value in (state["exp_avg"], state["exp_avg_sq"])
    ]
    assert {tensor.device.type for tensor in [*moments, *second["ema"].shadow_params]} == {"meta"}


def test_what_was_loaded_outlives_the_file_and_is_what_was_saved(tmp_path):
    first, second = make_kept(), make_kept()
    train(first)
    torch.save({name: common_part(value) for name, value in first.items()}, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", map_location="cpu", mmap=True, weights_only=True)
    most = most_memory(lambda: [load_(value, [], {}, state[name]) for name, value in second.items()])
    assert 1.95 * WEIGHTS < most < 2.05 * WEIGHTS  # the moments, which the optimiser had not yet
    in_file = {tensor.untyped_storage().data_ptr() for tensor in tensors_of(state)}
    for name, value in second.items():
        found = tensors_of(value.state_dict())
        for tensor, expected in zip(found, tensors_of(first[name].state_dict()), strict=True):
            assert torch.equal(tensor, expected), name
            assert tensor.untyped_storage().data_ptr() not in in_file, name
