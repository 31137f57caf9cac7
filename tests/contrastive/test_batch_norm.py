"""Batch norm over all processes and over parts of a batch, against torch's own on the same images."""

import copy
import pickle

import pytest
import timm
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from tiny_encoders import config as tiny_config
from tiny_encoders import images
from torch import nn

from hf_dpssl import MoCoForPreTraining
from hf_dpssl.contrastive.batch_norm import batch_norms, set_batch_norm_
from hf_dpssl.models.gather import batch_norm_over_processes, deal_out, gather_dealt, in_turns, is_distributed

LAYERS = {
    "1d": (lambda: nn.BatchNorm1d(3), (8, 3)),
    "1d_sequence": (lambda: nn.BatchNorm1d(3), (8, 3, 5)),
    "1d_without_affine": (lambda: nn.BatchNorm1d(3, affine=False), (8, 3)),
    "2d": (lambda: nn.BatchNorm2d(3, momentum=0.3), (8, 3, 4, 2)),
    "2d_cumulative": (lambda: nn.BatchNorm2d(3, momentum=None), (8, 3, 4, 2)),
    "2d_without_statistics": (lambda: nn.BatchNorm2d(3, track_running_stats=False), (8, 3, 4, 2)),
    "act": (lambda: BatchNormAct2d(3, act_layer=nn.SiLU, inplace=True), (8, 3, 4, 2)),
}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_layer(name: str) -> nn.Module:
    """The layer in float64, with weights and running statistics that are not those of a new one."""
    layer = LAYERS[name][0]().double().train()
    for seed, tensor in enumerate([*layer.parameters(), *layer.buffers()]):
        if tensor.is_floating_point():
            tensor.data.copy_(random(*tensor.shape, seed=seed).abs() + 0.5)
    return layer


def two_steps(layer: nn.Module, batches: list[torch.Tensor], coefficients: list[torch.Tensor]) -> dict:
    """Outputs, gradients of inputs and weights and buffers after two training steps."""
    result = {}
    for step, (batch, coefficient) in enumerate(zip(batches, coefficients, strict=True)):
        batch = batch.clone().requires_grad_()
        output = layer(batch * 1)  # not a leaf: activations may work in place
        (output * coefficient).sum().backward()
        result |= {f"output {step}": output.detach(), f"gradient {step}": batch.grad}
    result |= {f"gradient of {name}": p.grad for name, p in layer.named_parameters()}
    return result | {name: buffer.clone() for name, buffer in layer.named_buffers()}


def batches(name: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    shape = LAYERS[name][1]
    return [random(*shape, seed=s) * (s + 1) + s for s in (5, 6)], [random(*shape, seed=s) for s in (7, 8)]


def assert_same(found: dict, expected: dict, **tolerance) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


# Over processes.

UNEQUAL = slice(0, 5), slice(5, 8)  # images of either process


def layers_over_processes_case() -> dict:
    result = {}
    for name in LAYERS:
        layer = make_layer(name)
        set_batch_norm_(layer, "global")
        share = UNEQUAL[dist.get_rank()] if is_distributed() else slice(None)
        own = [[tensor[share] for tensor in tensors] for tensors in batches(name)]
        result |= {f"{name}: {key}": value for key, value in two_steps(layer, *own).items()}
    return result


@pytest.fixture(scope="module")
def layers_over_processes(run_in_two):
    return run_in_two(layers_over_processes_case)


def test_global_batch_norm_over_unequal_processes_equals_torchs_on_the_whole_batch(layers_over_processes):
    for name in LAYERS:
        expected = two_steps(make_layer(name), *batches(name))
        parts = [{k.removeprefix(f"{name}: "): v for k, v in part.items() if k.startswith(f"{name}: ")}
                 for part in layers_over_processes]  # fmt: skip
        found = {}
        for key, value in parts[0].items():
            if key.startswith("gradient of"):
                found[key] = value + parts[1][key]  # each process has its share, which DDP would average
            elif key.startswith(("output", "gradient")):
                found[key] = torch.cat([value, parts[1][key]])
            else:
                found[key] = value
                assert torch.equal(value, parts[1][key]), f"{key} differs between processes"
        assert_same(found, expected, rtol=1e-12, atol=1e-12)
        assert expected["gradient 0"].abs().max() > 1e-3


def hard_numbers_case() -> dict:
    """float32 with a mean 1e4 times its spread, the two processes' means apart; and bfloat16."""
    rank = dist.get_rank()
    images = random(64, 4, 3, 3, seed=rank) + 1e4 + 3 * rank
    narrow, *_ = batch_norm_over_processes(images.float(), None, None, 1e-5)
    layer = nn.BatchNorm2d(4)
    set_batch_norm_(layer, "global")
    half = images.sub(1e4).bfloat16().requires_grad_()
    output = layer(half)
    (output.float() * random(*half.shape, seed=9)).sum().backward()
    assert output.dtype == half.grad.dtype == torch.bfloat16 and layer.weight.grad.dtype == torch.float32
    return {"float32": narrow, "bfloat16": output.detach(), "gradient": half.grad, "variance": layer.running_var}


def test_global_batch_norm_keeps_its_precision_far_from_zero_and_in_bfloat16(run_in_two):
    both = run_in_two(hard_numbers_case)
    images = torch.cat([random(64, 4, 3, 3, seed=rank) + 1e4 + 3 * rank for rank in range(2)])
    expected = nn.BatchNorm2d(4, affine=False).double()(images)
    torchs = nn.BatchNorm2d(4, affine=False)(images.float())
    found = torch.cat([part["float32"] for part in both])
    error, torchs_error = ((x - expected).abs().max() for x in (found, torchs))
    assert error < 1e-3 and error < 2 * torchs_error
    # bfloat16 against torch's own on the same rounded images
    half = images.sub(1e4).bfloat16().requires_grad_()
    layer = nn.BatchNorm2d(4)
    output = layer(half)
    (output.float() * torch.cat([random(64, 4, 3, 3, seed=9)] * 2)).sum().backward()
    for name, value in (("bfloat16", output.detach()), ("gradient", half.grad)):
        torch.testing.assert_close(torch.cat([part[name] for part in both]), value, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(both[0]["variance"], layer.running_var, rtol=1e-4, atol=0)


def dealing_case() -> dict:
    rank = dist.get_rank()
    own = torch.arange(5)[:, None] + 10 * rank
    dealt = deal_out(own)
    return {"dealt": dealt, "back": gather_dealt(dealt)}


def test_dealt_out_rows_mix_both_processes_and_come_back_in_order(run_in_two):
    first, second = run_in_two(dealing_case)
    assert first["dealt"].flatten().tolist() == [0, 10, 1, 11, 2]
    assert second["dealt"].flatten().tolist() == [12, 3, 13, 4, 14]
    for result in (first, second):
        assert result["back"].flatten().tolist() == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]


def traffic_case() -> dict:
    """Numbers that this process gets in a training step of MoCo with a temperature of 0.2 and then "auto"."""
    counts = []
    collect, exchange = dist.all_gather, dist.all_to_all_single

    def all_gather(parts, tensor):
        counts.append(sum(part.numel() for part in parts))
        collect(parts, tensor)

    def all_to_all_single(received, *arguments):
        counts.append(received.numel())
        exchange(received, *arguments)

    dist.all_gather, dist.all_to_all_single = all_gather, all_to_all_single
    found = {}
    for temperature in (0.2, "auto"):
        options = dict(temperature=temperature, kernel="cosine", normalization="anchor", queue_size=16)
        model = MoCoForPreTraining(tiny_config("resnet", **options)).train()
        model(images(0), images(1))
        found[str(temperature)] = torch.tensor(counts)
        counts.clear()
    dist.all_gather, dist.all_to_all_single = collect, exchange
    return found


def test_moco_exchanges_no_image_twice_and_gathers_queries_only_to_calibrate(run_in_two):
    """Four images of 3 x 16 x 16 and four embeddings of 6 to a process."""
    for result in run_in_two(traffic_case):
        assert result["0.2"].tolist() == [4 * 3 * 16 * 16, 8 * 6]
        assert result["auto"].tolist() == [4 * 3 * 16 * 16, 8 * 6, 8 * 6]


def test_in_turns_takes_one_of_each_part_and_inverts_itself():
    rows = torch.arange(12).view(12, 1)
    assert in_turns(rows, 3).flatten().tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    assert torch.equal(in_turns(in_turns(rows, 3), 4), rows) and torch.equal(in_turns(rows, 1), rows)


# In one process.


def test_global_batch_norm_in_one_process_is_torchs_bit_by_bit():
    for name in LAYERS:
        layer = make_layer(name)
        set_batch_norm_(layer, "global")
        assert_same(two_steps(layer, *batches(name)), two_steps(make_layer(name), *batches(name)), rtol=0, atol=0)


def test_split_batch_norm_equals_one_torch_layer_per_part():
    for name in LAYERS:
        for splits in [2, 4]:
            layer = make_layer(name)
            set_batch_norm_(layer, "split", splits)
            found = two_steps(layer, *batches(name))
            parts = [
                two_steps(make_layer(name), *([x[part::splits] for x in tensors] for tensors in batches(name)))
                for part in range(splits)
            ]
            tracked = [key for key in parts[0] if key.startswith("running")]
            for key, value in found.items():
                for part, expected in enumerate(parts):
                    if key.startswith(("output", "gradient 0", "gradient 1")):
                        torch.testing.assert_close(value[part::splits], expected[key], rtol=1e-12, atol=1e-12)
                if key.startswith("gradient of"):
                    torch.testing.assert_close(value, sum(part[key] for part in parts), rtol=1e-12, atol=1e-12)
                if key in tracked:
                    torch.testing.assert_close(value, torch.stack([part[key] for part in parts]).mean(0))
            assert int(found.get("num_batches_tracked", 2)) == 2 and bool(tracked) == layer.track_running_stats


def test_set_batch_norm_changes_neither_weights_names_nor_evaluation_of_a_timm_model():
    for architecture in ["test_resnet", "test_efficientnet"]:  # nn.BatchNorm2d; timm's BatchNormAct2d
        torch.manual_seed(0)
        model = timm.create_model(architecture, num_classes=0).double().eval()
        stock = copy.deepcopy(model)
        images = random(4, 3, 40, 40)
        for kind, splits in (("split", 2), ("global", 1)):
            set_batch_norm_(model, kind, splits)
            assert len(batch_norms(model)) == len(batch_norms(stock)) > 10
            assert all(type(layer).__name__.startswith("Regrouped") for layer in batch_norms(model))
            torch.testing.assert_close(dict(model.state_dict()), dict(stock.state_dict()), rtol=0, atol=0)
            assert torch.equal(model(images), stock(images))
        copied = pickle.loads(pickle.dumps(model))
        assert "over all processes" in repr(copied) and torch.equal(copied(images), stock(images))
        set_batch_norm_(model, "split", 2)
        model.train()
        stock.train()
        parts = torch.empty_like(model(images))
        for part in range(2):
            parts[part::2] = stock(images[part::2])
        torch.testing.assert_close(model(images), parts, rtol=1e-6, atol=1e-6)
        assert not torch.allclose(parts, stock(images), atol=1e-2)
        set_batch_norm_(model, "local")
        assert [type(layer) for layer in model.modules()] == [type(layer) for layer in stock.modules()]


def test_bad_batch_norms_are_refused_with_what_is_allowed():
    with pytest.raises(ValueError, match=r"'local', 'global', 'split'.*got 'sync'"):
        set_batch_norm_(nn.BatchNorm1d(2), "sync")
    with pytest.raises(ValueError, match="at least 2, got 1"):
        set_batch_norm_(nn.BatchNorm1d(2), "split")
    with pytest.raises(ValueError, match="batch_norm_splits=4 is read with batch_norm='split' only"):
        set_batch_norm_(nn.BatchNorm1d(2), "global", 4)
    with pytest.raises(TypeError, match="the model has BatchNorm3d"):
        set_batch_norm_(nn.BatchNorm3d(2), "global")
    layer = nn.BatchNorm1d(2)
    set_batch_norm_(layer, "split", 3)
    with pytest.raises(ValueError, match="8 images cannot be split into 3 equal parts"):
        layer(torch.randn(8, 2))
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        layer(torch.randn(9, 2, 1, 1))
