"""Two real gloo processes against one process that holds the whole batch."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from hf_dpssl import VectorQuantizer, info_nce, t_simclr
from hf_dpssl.models.gather import (
    all_succeed,
    broadcast_,
    gather_rows,
    gather_shares,
    gather_with_gradient,
    gather_without_gradient,
    is_distributed,
)

WORLD_SIZE = 2
PAIRS = 4  # per process
STEPS = 3
EXACT = {"rtol": 1e-9, "atol": 1e-9}
LOSSES = {
    "info_nce": lambda a, b, w: info_nce(a, b, temperature=0.5, weights=w),
    "t_simclr_joint": lambda a, b, w: t_simclr(a, b, temperature=2.0, dof=3.0, weights=w),
    "t_simclr_anchor": lambda a, b, w: t_simclr(a, b, temperature=2.0, dof=3.0, normalization="anchor", weights=w),
}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def own_share(batch: torch.Tensor) -> torch.Tensor:
    """This process's part of a global batch; all of it in a single process."""
    return batch.chunk(WORLD_SIZE)[dist.get_rank()] if is_distributed() else batch


def parallel(model: torch.nn.Module) -> torch.nn.Module:
    return DistributedDataParallel(model) if is_distributed() else model


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


# Cases: each runs the same in one process and in two, and returns tensors by name.


class ProjectedLoss(torch.nn.Module):
    """A linear map and a loss over the gathered batch, as a model of this package does it."""

    def __init__(self, loss):
        super().__init__()
        self.projection = torch.nn.Linear(6, 3, dtype=torch.float64)
        self.loss = loss

    def forward(self, view_1, view_2, weights):
        a, b = (gather_with_gradient(self.projection(view)) for view in (view_1, view_2))
        return self.loss(a, b, gather_without_gradient(weights))


def loss_case(name: str) -> dict:
    torch.manual_seed(0)
    model = parallel(ProjectedLoss(LOSSES[name]))
    total = WORLD_SIZE * PAIRS
    weights = torch.arange(1, total + 1, dtype=torch.float64)
    loss = model(own_share(random(total, 6, seed=1)), own_share(random(total, 6, seed=2)), own_share(weights))
    loss.backward()
    return {"loss": loss.detach()} | gradients(model)


def quantizer_case(revival_threshold: float) -> dict:
    torch.manual_seed(0)
    vq = VectorQuantizer(12, 3, decay=0.7, revival_threshold=revival_threshold)
    # Random choices must not depend on every process having the same generator state.
    torch.manual_seed(100 + (dist.get_rank() if is_distributed() else 0))
    codes = []
    for step in range(STEPS):
        latents = random(WORLD_SIZE * PAIRS, 3, 4, 4, seed=step, dtype=torch.float32)
        codes.append(gather_without_gradient(vq(own_share(latents)).codes))
        if step == STEPS - 2:
            vq.sums[3] = 1000.0  # far from all latents: dead in the last step
            vq.counts[3] = 1.0
            vq.codebook[3] = 1000.0
    return {"codes": torch.stack(codes)} | {name: value.clone() for name, value in vq.state_dict().items()}


def all_cases() -> dict:
    """Results by "case: name"; one start of two processes for all of them."""
    cases = {name: loss_case(name) for name in LOSSES}
    cases["quantizer"] = quantizer_case(0.0)
    cases["revival"] = quantizer_case(0.2)
    if is_distributed():
        cases["gather"] = gather_case()
    return {f"{case}: {name}": value for case, results in cases.items() for name, value in results.items()}


@pytest.fixture(scope="module")
def two_processes(run_in_two):
    """By case: the results of both processes."""
    both = run_in_two(all_cases)
    cases = sorted({key.split(": ")[0] for key in both[0]})
    return {
        case: [
            {key.split(": ")[1]: value for key, value in part.items() if key.startswith(f"{case}: ")} for part in both
        ]
        for case in cases
    }


def gather_case() -> dict:
    rank = dist.get_rank()
    own = torch.full((2, 3), float(rank + 1), requires_grad=True)
    gathered = gather_with_gradient(own)
    (gathered * torch.arange(12.0).view(4, 3)).sum().backward()
    detached = gather_without_gradient(own * 1)
    return {
        "gathered": gathered.detach(),
        "gradient": own.grad,
        "detached": detached,
        "detached has gradient": torch.tensor(detached.requires_grad),
        "integers": gather_without_gradient(torch.tensor([rank])),
        "columns": gather_with_gradient(torch.full((3, 2), float(rank)).T),  # not contiguous
        "broadcast": broadcast_(torch.tensor([float(rank)])),
        "five dealt": gather_shares(torch.arange(10).view(5, 2)[rank::2], 5),
        "one dealt": gather_shares(torch.ones(1, 2) if rank == 0 else None, 1),
        "some lack": gather_rows(torch.tensor([[9, 3], [7, 1]][rank][:1]), [[5, 2], [4, 1]][rank][:1]),
        "second has some": gather_rows(torch.arange(2) if rank == 1 else None, [3, 2] if rank == 1 else []),
        "who fails": failure_of_a_part(),
    }


def failure_of_a_part() -> torch.Tensor:
    """1 where this process failed in its part, 2 where it heard of another's failure; then both go on together."""
    try:
        all_succeed(lambda: 1 // dist.get_rank())
    except ZeroDivisionError:
        found = 1
    except RuntimeError as error:
        assert "process 0 failed: ZeroDivisionError" in str(error)
        found = 2
    return torch.tensor([found, all_succeed(dist.get_rank)])


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], **tolerance) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def test_rows_that_are_dealt_in_turn_come_back_in_their_order_also_where_a_process_has_none(two_processes):
    for result in two_processes["gather"]:
        assert torch.equal(result["five dealt"], torch.arange(10).view(5, 2))
        assert torch.equal(result["one dealt"], torch.ones(1, 2))
        assert result["some lack"].tolist() == [7, 9] and result["second has some"].tolist() == [1, 0]
    assert torch.equal(gather_shares(torch.arange(3), 3), torch.arange(3))


def test_a_part_that_fails_in_one_process_fails_in_all(two_processes):
    assert [result["who fails"].tolist() for result in two_processes["gather"]] == [[1, 0], [2, 1]]
    assert all_succeed(lambda: 5) == 5


def test_rows_that_nobody_has_are_refused():
    with pytest.raises(ValueError, match="no process has one"):
        gather_rows(None, [])


def test_gather_concatenates_in_rank_order_and_returns_the_summed_gradient(two_processes):
    for rank, result in enumerate(two_processes["gather"]):
        expected = torch.tensor([1.0, 1, 2, 2])[:, None].expand(4, 3)
        assert torch.equal(result["gathered"], expected)
        assert torch.equal(result["detached"], expected) and not result["detached has gradient"]
        assert torch.equal(result["gradient"], 2 * torch.arange(12.0).view(4, 3)[2 * rank : 2 * rank + 2])
        assert result["integers"].tolist() == [0, 1]
        assert result["columns"].tolist() == [[0, 0, 0], [0, 0, 0], [1, 1, 1], [1, 1, 1]]
        assert result["broadcast"].tolist() == [0]


def test_loss_and_gradient_over_two_processes_equal_one_process_with_the_whole_batch(two_processes):
    for name in LOSSES:
        expected = loss_case(name)
        assert expected["projection.weight"].abs().max() > 1e-3
        for result in two_processes[name]:
            assert_same(result, expected, **EXACT)


def test_quantizer_statistics_over_two_processes_equal_one_process_with_the_whole_batch(two_processes):
    expected = quantizer_case(0.0)
    first, second = two_processes["quantizer"]
    assert_same(first, second, rtol=0, atol=0)
    assert_same(first, expected, rtol=1e-5, atol=1e-5)


def test_revived_codes_are_the_same_on_both_processes_and_vectors_of_the_first(two_processes):
    first, second = two_processes["revival"]
    assert_same(first, second, rtol=0, atol=0)
    last = random(WORLD_SIZE * PAIRS, 3, 4, 4, seed=STEPS - 1, dtype=torch.float32)
    candidates = last.chunk(WORLD_SIZE)[0].permute(0, 2, 3, 1).reshape(-1, 3)
    assert (candidates - first["codebook"][3]).norm(dim=1).min() < 1e-5


def test_in_one_process_gathering_is_the_identity_and_cuts_the_gradient_where_it_says_so():
    tensor = torch.ones(2, 3, requires_grad=True)
    assert not is_distributed()
    assert gather_with_gradient(tensor) is tensor
    assert not gather_without_gradient(tensor).requires_grad
    assert torch.equal(gather_without_gradient(tensor), tensor)
    assert broadcast_(tensor.detach()).data_ptr() == tensor.data_ptr()
