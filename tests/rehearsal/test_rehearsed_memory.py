"""Memory of a step on a GPU that is not there: sizes computed by hand, and those of a step that really runs."""

import sys
from unittest import mock

import pytest
import timm
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from training_steps import CASES

from hf_dpssl.latent_training.mean_flow import mean_flow_target
from hf_dpssl.runs.rehearsal import _FLOAT32, _LOWER
from hf_dpssl.runs.rehearsed_memory import MemoryCounter, memory_rehearsal

BATCH, WIDTH, HIDDEN = 64, 256, 512


def stack(depth: int = 1) -> nn.Sequential:
    block = [nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH), nn.GELU()]
    return nn.Sequential(*block * depth)


def held_after_forward(precision=None) -> int:
    with torch.device("meta"):
        model = stack()
    with memory_rehearsal() as memory:
        memory.outside(memory.fake_module_(model).parameters())
        x = torch.randn(BATCH, WIDTH, device="cuda")
        with torch.autocast("cuda", precision, enabled=precision is not None):
            y = model(x)
        assert y.dtype == (precision or torch.float32)
        return memory.held


def _kept_by_hand():
    kept = BATCH * (HIDDEN + HIDDEN + WIDTH + WIDTH)  # inputs of GELU and linear layer, and the result
    assert held_after_forward() == 4 * (BATCH * WIDTH + kept)
    # Half the size; the input is kept twice, and the second weight as a copy, by which the gradient passes on.
    assert held_after_forward(torch.bfloat16) == 4 * BATCH * WIDTH + 2 * (BATCH * WIDTH + kept + HIDDEN * WIDTH)


def peak_and_gradients(model, make_input, *, real: bool, steps: int = 2) -> tuple[int, int, int]:
    """Of the last of some steps: the peak, gradients, and what is held after it."""

    def run(memory, x):
        for _ in range(steps):
            memory.clear()
            model(x).sum().backward()
            gradients = memory.gradients
            model.zero_grad()
        return memory.peak, gradients, memory.held

    if real:
        with MemoryCounter("cpu") as memory:
            memory.outside([*model.parameters(), *model.buffers()])
            memory.watch_gradients(model.parameters())
            return run(memory, make_input("cpu"))
    with memory_rehearsal() as memory:
        memory.fake_module_(model)
        memory.outside([*model.parameters(), *model.buffers()])
        return run(memory, make_input("cuda"))


def pictures(device):
    return torch.randn(4, 3, 64, 64, device=device)


def vectors(device):
    return torch.randn(BATCH, WIDTH, device=device)


def _as_a_step_that_runs():
    found = {real: peak_and_gradients(stack(), vectors, real=real) for real in (True, False)}
    assert found[True] == found[False]
    size = sum(parameter.nbytes for parameter in stack().parameters())
    assert found[False][1:] == (size, 4 * BATCH * WIDTH)  # nothing but the batch is left of a step
    for name in ("test_resnet.r160_in1k", "resnet18"):
        real, fake = (peak_and_gradients(timm.create_model(name), pictures, real=r) for r in (True, False))
        assert real[1:] == fake[1:]
        assert abs(real[0] / fake[0] - 1) < 0.05, (name, real, fake)  # libraries' own batch norms keep some more


def peak_of_forward_derivatives(counter, model, device: str) -> int:
    counter.outside([*model.parameters(), *model.buffers()])
    noised, velocity = torch.randn(BATCH, 4, 8, 8, device=device), torch.randn(BATCH, 4, 8, 8, device=device)
    times = torch.rand(BATCH, device=device)
    labels = torch.zeros(BATCH, dtype=torch.int64, device=device)
    counter.clear()
    mean_flow_target(model, noised, times, times / 2, velocity, labels)
    return counter.peak


def _forward_derivatives_as_those_that_run():
    [model], _, _ = CASES["dae_dit mean_flow"]()
    with MemoryCounter("cpu") as memory:
        expected = peak_of_forward_derivatives(memory, model, "cpu")
    with memory_rehearsal() as memory:
        assert peak_of_forward_derivatives(memory, memory.fake_module_(model), "cuda") == expected


def _casts():
    with memory_rehearsal() as memory:
        norm, linear = memory.fake_module_(nn.LayerNorm(WIDTH)), memory.fake_module_(nn.Linear(WIDTH, WIDTH))
        memory.outside([*norm.parameters(), *linear.parameters()])
        x = torch.randn(BATCH, WIDTH, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        with torch.autocast("cuda", torch.bfloat16):
            first = linear(x)
            held = memory.held  # x, its image, and copies of weight and bias, which the next call takes
            again = linear(x)
            assert memory.held - held == again.nbytes == first.nbytes == 2 * BATCH * WIDTH
            with torch.autocast("cuda", enabled=False):
                assert linear(x.float()).dtype == torch.float32
            normed = norm(first)
            probabilities = first.softmax(1)
        assert first.dtype == torch.bfloat16 and normed.dtype == probabilities.dtype == torch.float32
        assert (first @ again.T).dtype == torch.bfloat16 and x.softmax(1).dtype == torch.bfloat16


def kept_on_a_cpu(model: nn.Module, images: torch.Tensor) -> int:
    """Bytes that autograd keeps of a forward pass under a CPU's autocast, each storage once, weights not counted."""
    known = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(images)
    return sum(kept.values()) * (output is not None)  # the graph lives until here


def _as_autograd_keeps_on_a_cpu():
    """In bfloat16, of a network whose batch norms both autocasts leave alone."""
    model = timm.create_model("resnet18").train()
    expected = kept_on_a_cpu(model, pictures("cpu"))
    with memory_rehearsal() as memory:
        memory.outside([*memory.fake_module_(model).parameters(), *model.buffers()])
        images = pictures("cuda")
        with torch.autocast("cuda", torch.bfloat16):
            output = model(images)
        assert abs((memory.held - images.nbytes - output.nbytes) / expected - 1) < 0.03


def _in_proportion_to_the_batch():
    def peak(count):
        return peak_and_gradients(stack(4), lambda device: torch.randn(count, WIDTH, device=device), real=False)[0]

    small, middle, large = (peak(count) for count in (1024, 2048, 4096))
    assert large - middle == 2 * (middle - small) > 0


class Checkpointed(nn.Module):
    """Each of its parts is computed again in the backward pass, under autocast."""

    def __init__(self, again: bool):
        super().__init__()
        self.again = again
        self.parts = nn.ModuleList(stack() for _ in range(6))

    def forward(self, x):
        with torch.autocast("cuda", torch.bfloat16):
            for part in self.parts:
                x = checkpoint(part, x, use_reentrant=False) if self.again else part(x)
        return x


def _less_with_checkpoints():
    peaks = [peak_and_gradients(Checkpointed(again), vectors, real=False)[0] for again in (False, True)]
    kept_by_all = 6 * 2 * BATCH * 2 * (HIDDEN + WIDTH)
    assert peaks[1] < peaks[0] and peaks[0] > kept_by_all


def _values_that_decide():
    with memory_rehearsal() as memory:
        x = torch.zeros(8, 4, device="cuda")
        assert x.nonzero().shape == (32, 2) and x[x > 0].shape == (32,) and x[x[:, 0] > 0].shape == (8, 4)
        assert torch.bincount(torch.zeros(8, dtype=torch.int64, device="cuda"), minlength=3).tolist() == [0, 0, 8]
        parts = x.split((x[:, :1] == torch.arange(3, device="cuda")).sum(0).tolist())
        assert [len(part) for part in parts] == [0, 0, 8]
        assert [part.shape[1] for part in x.split([1, 3], dim=1)] == [1, 3]
        assert bool((x > 0).any()) and float(x.sum()) == 1
        filled = torch.zeros((), dtype=torch.int64, device="cuda")
        memory.states(filled, 7)
        assert int(filled) == 7
        del x, parts, filled
        assert memory.held == 0


def _shared_weights_once():
    with torch.device("meta"):
        model = nn.ModuleDict({"one": nn.Linear(8, 8, bias=False), "other": nn.Linear(8, 8, bias=False)})
    model["other"].weight = model["one"].weight
    with memory_rehearsal() as memory:
        memory.fake_module_(model)
        assert memory.held == 8 * 8 * 4 and model["one"].weight is model["other"].weight


def kept_by_attention(kind: torch.dtype) -> float:
    """Bytes of its result and what it keeps beside query, key and value, in results."""
    with memory_rehearsal() as memory:
        query = torch.randn(2, 4, 1024, 32, device="cuda", dtype=kind, requires_grad=True)
        before = memory.held
        out = nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
        return (memory.held - before) / out.nbytes


def _fused_attention_keeps_no_weights():
    # The weights would be 1024 / 32 results; a logarithm per row and head is 1 / 32 of them, 1 / 16 in bfloat16.
    assert 1 <= kept_by_attention(torch.float32) < 1.1 and 1 <= kept_by_attention(torch.bfloat16) < 1.1


def _lists_of_autocast():
    sys.modules.setdefault("expecttest", mock.Mock())  # of torch's own tests, for other ones
    sys.argv = sys.argv[:1]
    from torch.testing._internal.autocast_test_lists import AutocastTestLists

    lists = AutocastTestLists(torch.device("cpu"))

    def names(*parts):
        return {case[0] for part in parts for case in getattr(lists, part)}

    lower = {name for name in names("torch_fp16", "nn_fp16", "methods_fp16") if not name.endswith("_cell")}
    assert {name for name in lower if "convolution" not in name} - {"conv_tbc"} <= _LOWER
    assert names("torch_fp32", "nn_fp32", "methods_fp32") - {"nll_loss2d"} <= _FLOAT32


def test_what_is_kept_equals_the_count_by_hand(rehearse):
    rehearse(_kept_by_hand)


@pytest.mark.extended
def test_the_peak_is_that_of_a_step_that_runs(rehearse):
    rehearse(_as_a_step_that_runs)


@pytest.mark.extended
def test_the_peak_of_forward_derivatives_is_that_of_those_that_run(rehearse):
    rehearse(_forward_derivatives_as_those_that_run)


def test_autocast_casts_as_on_a_gpu(rehearse):
    rehearse(_casts)


@pytest.mark.extended
def test_what_is_kept_under_autocast_is_what_autograd_keeps_on_a_cpu(rehearse):
    rehearse(_as_autograd_keeps_on_a_cpu)


@pytest.mark.extended
def test_activations_grow_in_proportion_to_the_batch(rehearse):
    rehearse(_in_proportion_to_the_batch)


def test_checkpoints_lower_the_peak_under_autocast(rehearse):
    rehearse(_less_with_checkpoints)


def test_sizes_that_values_decide_about_are_the_largest(rehearse):
    rehearse(_values_that_decide)


def test_shared_weights_count_once(rehearse):
    rehearse(_shared_weights_once)


def test_attention_keeps_no_weights(rehearse):
    rehearse(_fused_attention_keeps_no_weights)


def test_the_lists_of_autocast_are_those_that_torch_tests(rehearse):
    rehearse(_lists_of_autocast)
