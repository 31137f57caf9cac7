"""Momentum and queue size of a run, and the two in-place updates of MoCo against the formula and a deque."""

import math
from collections import deque

import pytest
import torch

from hf_dpssl import ContrastiveConfig, MoCoForPreTraining
from hf_dpssl.contrastive.momentum import choose_queue_size, ema_update_, enqueue_, momentum_at


def tensors(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in [(3, 2), (4,), ()]]


def test_ema_update_equals_the_formula():
    for momentum in [0.0, 0.3, 0.9, 0.999, 1.0]:
        target, source = tensors(0), tensors(1)
        expected = [momentum * old + (1 - momentum) * new for old, new in zip(target, source, strict=True)]
        ema_update_(target, source, momentum)
        torch.testing.assert_close(target, expected, rtol=1e-14, atol=1e-15)
        torch.testing.assert_close(source, tensors(1), rtol=0, atol=0)


def test_momentum_of_one_changes_no_bit_and_of_zero_copies_every_bit():
    target, source = [t.float() for t in tensors(0)], [t.float() for t in tensors(1)]
    ema_update_(target, source, 1.0)
    torch.testing.assert_close(target, [t.float() for t in tensors(0)], rtol=0, atol=0)
    ema_update_(target, source, 0.0)
    torch.testing.assert_close(target, source, rtol=0, atol=0)


def test_ema_update_takes_iterators_and_leaves_no_graph_in_the_target():
    query, key = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    ema_update_(key.parameters(), query.parameters(), 0.5)
    assert all(p.grad_fn is None and p.is_leaf for p in key.parameters())
    ema_update_([], [], 0.5)


def test_ema_update_converges_to_the_source_like_a_geometric_series():
    target, source = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    for _ in range(50):
        ema_update_([target], [source], 0.9)
    assert float(target) == pytest.approx(1 - 0.9**50, rel=1e-12)


def test_momentum_outside_0_1_is_refused():
    for momentum in [-0.1, 1.1, float("nan")]:
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            ema_update_([torch.zeros(1)], [torch.ones(1)], momentum)


def empty_queue(size: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    count = torch.zeros((), dtype=torch.int64)
    return torch.zeros(size, 1, dtype=dtype), count, count.clone()


def test_queue_holds_what_a_deque_of_the_same_length_holds():
    for batches in [[1] * 9, [3] * 6, [4, 4, 4], [2, 5, 1, 7, 3], [9], [20, 1, 8], [0, 3, 0, 8], [14, 7]]:
        for size in [1, 4, 7]:
            queue, cursor, filled = empty_queue(size)
            reference: deque[float] = deque(maxlen=size)
            start = 1
            for count in batches:
                keys = torch.arange(start, start + count, dtype=torch.float32)[:, None]
                start += count
                enqueue_(queue, cursor, filled, keys)
                reference.extend(keys.flatten().tolist())
                assert int(filled) == len(reference)
                assert sorted(queue[: int(filled), 0].tolist()) == sorted(reference)
                assert not queue[int(filled) :].any(), "a row that holds no key was written"
                oldest_first = queue.roll(-int(cursor), 0) if int(filled) == size else queue[: int(filled)]
                assert oldest_first.flatten().tolist() == list(reference)


def test_enqueue_keeps_storage_and_dtype_of_the_queue_and_cuts_the_gradient():
    queue, cursor, filled = empty_queue(4, torch.bfloat16)
    address = queue.data_ptr()
    enqueue_(queue, cursor, filled, torch.ones(3, 1, requires_grad=True) * 2)
    assert queue.data_ptr() == address
    assert queue.dtype == torch.bfloat16
    assert not queue.requires_grad
    assert queue.flatten().tolist() == [2, 2, 2, 0]


def test_cosine_momentum_starts_at_the_given_value_and_ends_at_one():
    values = [momentum_at(step, 100, momentum=0.99, schedule="cosine") for step in range(101)]
    assert values[0] == pytest.approx(0.99, abs=1e-15) and values[100] == 1.0
    assert values[50] == pytest.approx(0.995, abs=1e-15) and values == sorted(values)
    for step, value in enumerate(values):  # BYOL's formula
        assert 1 - value == pytest.approx(0.01 * (math.cos(math.pi * step / 100) + 1) / 2, abs=1e-15)
    assert {momentum_at(step, 100, momentum=0.99) for step in range(101)} == {0.99}


def test_momentum_of_an_undefined_step_is_refused():
    for arguments, message in [
        ({"schedule": "linear"}, "'constant', 'cosine'.*'linear'"),
        ({"step": 11}, r"\[0, total_steps\].*got 11, 10"),
        ({"step": -1}, "got -1, 10"),
        ({"step": 0, "total_steps": 0}, "got 0, 0"),
        ({"momentum": 1.5}, r"\[0, 1\], got 1.5"),
    ]:
        with pytest.raises(ValueError, match=message):
            momentum_at(**{"step": 1, "total_steps": 10, "momentum": 0.9} | arguments)


def test_chosen_queue_is_the_largest_power_of_two_within_half_of_the_data():
    for num_images, batch_size, expected in [
        (10_000, 256, 4096),
        (1_281_167, 256, 65536),  # ImageNet, as in the paper
        (131_072, 256, 65536),
        (131_071, 256, 32768),
        (1_437, 256, 512),  # digits
        (300, 256, 256),  # at least one batch
        (300, 200, 200),
        (1, 1, 1),
        (2, 2, 2),
        (None, 256, 65536),
        (None, 70_000, 70_000),
    ]:
        assert choose_queue_size(num_images, batch_size) == expected


def tiny_moco(queue_size: int) -> MoCoForPreTraining:
    model_args = {"patch_size": 1, "depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}
    options = {"normalization": "anchor", "projection_dim": 4, "momentum": 0.9, "queue_size": queue_size}
    return MoCoForPreTraining(ContrastiveConfig("convnext_atto", model_args, **options)).train()


def test_model_takes_the_momentum_of_a_step_instead_of_that_of_its_config():
    model, images = tiny_moco(8), torch.randn(4, 3, 8, 8)
    torch.nn.init.zeros_(model.key_head[0].weight)
    query = model.head[0].weight.detach()
    model(images, images)
    torch.testing.assert_close(model.key_head[0].weight, 0.1 * query)
    model(images, images, momentum=0.25)
    torch.testing.assert_close(model.key_head[0].weight, 0.25 * 0.1 * query + 0.75 * query)


def test_model_refuses_a_queue_that_holds_less_than_one_batch():
    with pytest.raises(ValueError, match="queue_size 3 is smaller than the batch of 4 keys"):
        tiny_moco(3)(torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8))
    model = tiny_moco(4)
    model(torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8))
    assert int(model.queue_filled) == 4
    assert tiny_moco(3).eval()(torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)).loss.isfinite()
