"""What the loop of all scripts notes, and what it refuses: losses and weights that are not finite, other settings."""

import functools
import json
import os
from dataclasses import dataclass

import pytest
import torch

from hf_dpssl.runs import training_loop
from hf_dpssl.runs.recipe import RunArguments, option
from hf_dpssl.runs.rehearsal import rehearsal
from hf_dpssl.runs.training_loop import TrainingLoop, patience, start_accelerator


@dataclass
class Arguments(RunArguments):
    """Of these runs."""

    learning_rate: float = option(0.1, "of plain gradient descent")


@dataclass
class LaterArguments(Arguments):
    """With a flag that an earlier version had not."""

    power: float = option(2.0, "of the loss")


def numbers(start):
    """Endless batches of two samples; sample 5 is not a number, sample 9 so large that the weights overflow."""
    epoch, batch = start
    while True:
        ids = torch.arange(2 * batch, 2 * batch + 2)
        values = ids.float().masked_fill(ids == 5, float("nan")).masked_fill(ids == 9, 3e38)
        yield {"images": values, "sample_ids": ids, "epoch": epoch}
        batch += 1


def train(args, steps: int, bad: int) -> torch.nn.Linear:
    """Descend on logged losses that are finite but for sample `bad`; the other bad sample is left out."""
    accelerator = start_accelerator(args)
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.learning_rate)
    loop = TrainingLoop(args, accelerator, "line", steps, numbers, {})
    loop.keep(model=model, optimizer=optimizer)
    for batch in loop:
        chosen = (batch["sample_ids"] == bad) | ((batch["sample_ids"] != 5) & (batch["sample_ids"] != 9))
        loss = model(batch["images"][chosen][:, None] / 10).abs().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loop.log(loss=loss.detach() if bad == 5 else loss.detach().clamp(max=1))
    return model


def arguments(folder, kind=Arguments, **options):
    return kind(output_dir=str(folder), checkpointing_steps=1, checkpoints_total_limit=9, **options)


def test_run_stops_at_the_step_of_a_loss_that_is_not_finite_and_names_its_images(tmp_path):
    with pytest.raises(
        FloatingPointError, match=r"not finite at step 3, images \[4, 5\].*last\s+checkpoint is of step 2"
    ):
        train(arguments(tmp_path), 6, bad=5)
    assert sorted(path.name for path in (tmp_path / "checkpoints/line").iterdir()) == ["step-00000001", "step-00000002"]


def test_no_checkpoint_is_written_of_weights_that_are_not_finite(tmp_path):
    with pytest.raises(
        FloatingPointError, match=r"after step 5, images \[8, 9\], \d of 2 tensors of model are not finite"
    ):
        train(arguments(tmp_path, learning_rate=1e10), 6, bad=9)
    kept = sorted((tmp_path / "checkpoints" / "line").iterdir())
    assert [path.name for path in kept][-1] == "step-00000004"
    state = torch.load(kept[-1] / "state.pt", weights_only=True)["model"]
    assert all(tensor.isfinite().all() for tensor in state.values())


def _waits_of_eight_steps(folder):
    """Of which two are logged; two values lie on a GPU, one does not."""
    args = arguments(folder, logging_steps=4)
    args.checkpointing_steps = 100
    loop = TrainingLoop(args, start_accelerator(args), "line", 100, lambda start: numbers((0, 10)), {})
    values = torch.tensor([1.5, 2.5])
    with rehearsal() as rehearsed:
        loss, part = rehearsed.fake_of(values)
        for _, batch in zip(range(9), loop, strict=False):
            loop.log(loss=loss, part=part, learning_rate=0.1)
            assert batch["sample_ids"].device.type == "cpu"
        waits = [line for line in rehearsed.syncs if "training_loop.py" in line]
    assert loop.history == [{"step": step, "loss": 1.5, "part": 2.5, "learning_rate": 0.1} for step in (4, 8)]
    assert len(waits) == 4, waits  # flags of four steps at once, then all values


def test_loop_waits_for_a_gpu_twice_when_it_logs_and_in_no_other_step(rehearse, tmp_path):
    rehearse(functools.partial(_waits_of_eight_steps, str(tmp_path)))


def _not_finite_on_a_gpu(folder):
    args = arguments(folder, logging_steps=4)
    args.checkpointing_steps = 100
    values = torch.tensor([1.0, float("inf")])
    for bad in ("loss", "learning_rate"):
        loop = TrainingLoop(args, start_accelerator(args), bad, 100, lambda start: numbers((0, 10)), {})
        with rehearsal() as rehearsed, pytest.raises(FloatingPointError, match="not finite at step 3"):
            fine, infinite = rehearsed.fake_of(values)
            for step, _ in enumerate(loop, 1):
                given = {"loss": fine, "learning_rate": 0.1}
                loop.log(**given | ({bad: infinite if bad == "loss" else float("nan")} if step == 3 else {}))
                assert step <= 4


def test_value_that_is_not_finite_on_a_gpu_is_named_with_its_step_when_flags_are_read(rehearse, tmp_path):
    rehearse(functools.partial(_not_finite_on_a_gpu, str(tmp_path)))


def test_seconds_of_a_resumed_run_go_on_from_the_checkpoint_and_are_unknown_after_one_without_them(tmp_path):
    train(arguments(tmp_path), 2, bad=-1)
    checkpoint = tmp_path / "checkpoints/line/step-00000002/meta.json"
    meta = json.loads(checkpoint.read_text())
    assert 0 < meta["seconds"] < 60
    checkpoint.write_text(json.dumps(meta | {"seconds": 1000.0}))
    train(arguments(tmp_path, resume_from_checkpoint="latest"), 4, bad=-1)
    later = json.loads((tmp_path / "checkpoints/line/step-00000004/meta.json").read_text())["seconds"]
    assert 1000 < later < 1060
    checkpoint = tmp_path / "checkpoints/line/step-00000004/meta.json"
    checkpoint.write_text(json.dumps({k: v for k, v in meta.items() if k != "seconds"} | {"step": 4}))
    train(arguments(tmp_path, resume_from_checkpoint="latest"), 6, bad=-1)
    assert json.loads((tmp_path / "checkpoints/line/step-00000006/meta.json").read_text())["seconds"] is None


def test_argument_that_came_after_a_checkpoint_counts_as_its_default(tmp_path):
    train(arguments(tmp_path), 2, bad=-1)
    resumed = train(arguments(tmp_path, LaterArguments, resume_from_checkpoint="latest"), 4, bad=-1)
    whole = train(arguments(tmp_path / "whole"), 4, bad=-1)
    assert torch.equal(resumed.weight, whole.weight)
    with pytest.raises(ValueError, match=r"power: 2\.0 -> 3\.0"):
        train(arguments(tmp_path, LaterArguments, power=3.0, resume_from_checkpoint="latest"), 6, bad=-1)


def _gradients_of_two_weights(folder: str) -> dict[str, torch.Tensor]:
    rank = str(torch.distributed.get_rank())
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ.update(place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"})  # as a launcher; both have met
    accelerator = start_accelerator(arguments(folder))
    model = accelerator.prepare(torch.nn.Linear(3, 2))
    for _ in range(2):  # the first step orders the buckets anew
        model.zero_grad()
        accelerator.backward(model(torch.ones(1, 3)).sum() * (1 + accelerator.process_index))
    storages = {parameter.grad.untyped_storage().data_ptr() for parameter in model.parameters()}
    return {"storages": torch.tensor(len(storages)), "gradient": model.module.bias.grad.clone()}


def test_gradients_of_processes_are_views_of_what_they_exchange(run_in_two, tmp_path):
    for found in run_in_two(_gradients_of_two_weights, str(tmp_path)):
        assert found["storages"] == 1
        assert found["gradient"].tolist() == [1.5, 1.5]


def test_processes_of_a_sharded_model_wait_for_each_other_as_long_as_all_others(monkeypatch, tmp_path):
    asked = []
    accelerator = start_accelerator(arguments(tmp_path))
    monkeypatch.setattr(training_loop, "is_sharded", lambda accelerator: True)
    monkeypatch.setattr(torch.distributed, "new_group", lambda **options: asked.append(options))
    TrainingLoop(arguments(tmp_path), accelerator, "line", 1, numbers, {})
    assert asked == [{"backend": "gloo", "timeout": accelerator.init_handler.timeout}]
    assert accelerator.init_handler.timeout.total_seconds() >= 3600


def test_processes_wait_as_long_as_the_run_measures_and_downloads(tmp_path):
    hours = {
        0.5 + 360 / 36_000: {"evaluation_images": 360},
        0.5 + 50_000 / 36_000: {"evaluation_images": 50_000, "dataset": str(tmp_path)},
        4.5 + 360 / 36_000: {"evaluation_images": 360, "dataset": f"{tmp_path}+imagenet-1k"},
        0.5 + 720 / 36_000: {"evaluation_images": 720, "dataset": "imagenet-1k", "streaming": True},
        0.5 + 100_000 / 36_000: {},  # all, of a set that nobody has counted
    }
    for expected, options in hours.items():
        assert patience(Arguments(**options)).total_seconds() == pytest.approx(3600 * expected), options
    args = Arguments(evaluation_images=360)
    args.num_generated = 1000
    assert patience(args).total_seconds() == pytest.approx(1800 + 136)
