"""SimCLR and MoCo in two real gloo processes under DDP against one process that holds the whole batch."""

import pytest
import torch
import torch.distributed as dist
from cases import for_each
from torch.nn.parallel import DistributedDataParallel

from hf_dpssl import ContrastiveConfig, MoCoForPreTraining, SimCLRForPreTraining
from hf_dpssl.models.gather import gather_without_gradient, is_distributed

PAIRS = 8  # per process
STEPS = 3
QUEUE_SIZE = 2 * 2 * PAIRS  # holds two of the three global batches
TOLERANCE = {torch.float64: {"rtol": 1e-9, "atol": 1e-9}, torch.float32: {"rtol": 1e-4, "atol": 1e-4}}
COSINE = {"kernel": "cosine", "normalization": "anchor", "feature_norm": "l2", "temperature": 0.5}
STUDENT_T = {"kernel": "student_t", "normalization": "anchor", "temperature": 2.0}
METHODS = {
    "simclr": (SimCLRForPreTraining, COSINE),
    "t_simclr_joint": (SimCLRForPreTraining, STUDENT_T | {"normalization": "joint"}),
    "t_simclr_anchor": (SimCLRForPreTraining, STUDENT_T),
    "moco": (MoCoForPreTraining, COSINE),
    "t_moco": (MoCoForPreTraining, STUDENT_T | {"feature_norm": "batch"}),
    "lejepa": (SimCLRForPreTraining, {"sigreg_weight": 0.2}),
    "calibrated": (SimCLRForPreTraining, STUDENT_T | {"temperature": "auto", "learnable_dof": True}),
    "calibrated_queue": (MoCoForPreTraining, COSINE | {"temperature": "auto"}),
}
CONVNEXT = ("convnext_atto", {"patch_size": 1, "depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "ls_init_value": 1.0})
RESNET = ("resnet18", {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 16], "act_layer": "gelu"})  # smooth, for float32
GLOBAL = {"batch_norm": "global", "projection_batch_norm": True}
# Backbone and options in two processes, and the options in one process that must give the same.
NORMS = {
    "layer_norm": (CONVNEXT, {"batch_norm": "global"}, {}),
    "global": (RESNET, GLOBAL, {"batch_norm": "local"}),
    "local": (RESNET, {}, {"batch_norm": "split", "batch_norm_splits": 2}),
    "split": (RESNET, {"batch_norm": "split", "batch_norm_splits": 2}, {"batch_norm_splits": 4}),
}
# Every method without batch norm and with that over all processes; either kind of negatives with the other two norms,
# and in float32.
CASES = [(method, norm, torch.float64) for method in METHODS for norm in ("layer_norm", "global")]
CASES += [(method, norm, torch.float64) for method in ("simclr", "t_moco") for norm in ("local", "split")]
CASES += [(method, "global", torch.float32) for method in ("t_simclr_joint", "moco")]


def images(seed: int, dtype: torch.dtype) -> torch.Tensor:
    """This process's share of a global batch, images in turns; all of it in a single process."""
    batch = torch.randn(2 * PAIRS, 3, 12, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (batch[dist.get_rank() :: 2] if is_distributed() else batch).to(dtype)


def sorted_rows(queue: torch.Tensor) -> torch.Tensor:
    """The rows in an order that does not depend on the one in which they came."""
    return queue[queue[:, 0].argsort()]


def run(method: str, norm: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Losses, last gradients and final state of three optimiser steps."""
    model_class, options = METHODS[method]
    (architecture, model_args), several, one = NORMS[norm]
    options = options | {"projection_dim": 4, "queue_size": QUEUE_SIZE, "momentum": 0.9} | several
    options |= {"stem": "small_image"} if norm != "layer_norm" else {}
    options |= {} if is_distributed() else one
    torch.manual_seed(0)
    bare = model_class(ContrastiveConfig(architecture=architecture, model_args=model_args, **options)).to(dtype).train()
    model = DistributedDataParallel(bare, broadcast_buffers=False) if is_distributed() else bare
    optimizer = torch.optim.SGD(bare.trainable_parameters(), lr=0.05)
    torch.manual_seed(dist.get_rank() if is_distributed() else 0)  # what a loss draws is that of process 0
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(images(2 * step, dtype), images(2 * step + 1, dtype)).loss
        loss.backward()
        optimizer.step()
        losses.append(gather_without_gradient(loss[None]).mean())
    result = {"losses": torch.stack(losses)}
    result |= {f"gradient of {n}": p.grad.clone() for n, p in bare.named_parameters() if p.requires_grad}
    for name, value in bare.state_dict().items():
        result[name] = sorted_rows(value) if name == "queue" else value.clone()
        if "running" in name:  # split statistics are the parts' mean
            result[name] = gather_without_gradient(value[None]).mean(0)
    return result


def run_all() -> dict[str, torch.Tensor]:
    return {
        f"{method} {norm} {dtype}: {name}": value
        for method, norm, dtype in CASES
        for name, value in run(method, norm, dtype).items()
    }


@pytest.fixture(scope="module")
def both_processes(run_in_two):
    return run_in_two(run_all)


@for_each("method", METHODS)
def test_losses_gradients_and_state_of_two_processes_are_those_of_one(method, both_processes):
    for norm, dtype in [case[1:] for case in CASES if case[0] == method]:
        expected = run(method, norm, dtype)
        gradients = [value for name, value in expected.items() if name.startswith("gradient of encoder")]
        assert max(value.abs().max() for value in gradients) > 1e-3
        prefix = f"{method} {norm} {dtype}: "
        for result in both_processes:
            found = {name.removeprefix(prefix): value for name, value in result.items() if name.startswith(prefix)}
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                assert not name.startswith("queue") or value.abs().max() > 0
                where = f"{prefix}{name}"
                torch.testing.assert_close(
                    found[name].to(value.dtype), value, **TOLERANCE[dtype], msg=lambda text, w=where: f"{w}: {text}"
                )


def test_local_batch_norm_over_two_processes_is_not_that_of_one(both_processes):
    alone = run("simclr", "global", torch.float64)["losses"]
    assert (alone - both_processes[0]["simclr local torch.float64: losses"]).abs().max() > 1e-3


def test_split_batch_norm_puts_a_key_and_its_query_into_different_company():
    options = COSINE | {"projection_dim": 4, "queue_size": 16, "batch_norm": "split", "batch_norm_splits": 2}
    config = ContrastiveConfig(architecture=RESNET[0], model_args=RESNET[1], stem="small_image", **options)
    torch.manual_seed(0)
    model = MoCoForPreTraining(config).double().train()
    stock = MoCoForPreTraining(ContrastiveConfig(**config.to_dict() | {"batch_norm": "local", "batch_norm_splits": 1}))
    stock.load_state_dict(model.state_dict())
    stock.double().train()
    view_1, view_2 = images(0, torch.float64)[:8], images(1, torch.float64)[:8]
    output = model(view_1, view_2)
    for part in range(2):
        torch.testing.assert_close(output.embeddings[part::2], stock(view_1[part::2]).embeddings)
        block = slice(4 * part, 4 * part + 4)  # keys in blocks, queries in turns
        keys = stock(view_1[block], view_2[block], momentum=1.0).paired_embeddings
        torch.testing.assert_close(output.paired_embeddings[block], keys)
