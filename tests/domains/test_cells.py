"""Runs, the choice among their checkpoints, and the table: what is measured, on what, and with which budget."""

import pytest
import torch
from cases import for_each

from hf_dpssl.domains.cells import Cell, Trainer
from hf_dpssl.domains.choices import ALGORITHMS
from hf_dpssl.domains.domain_tensors import DomainTensors
from hf_dpssl.domains.selection import as_markdown, chosen, table


def features(moved: float = 0.0) -> DomainTensors:
    """Three domains of 60 samples and three classes; `moved`: the third lies elsewhere."""
    generator = torch.Generator().manual_seed(0)
    labels = [torch.arange(60) % 3] * 3
    inputs = [3 * torch.eye(6)[classes] + torch.randn(60, 6, generator=generator) for classes in labels]
    return DomainTensors(["a", "b", "c"], [*inputs[:2], inputs[2] + moved], labels, ["x", "y", "z"])


def trainer(tensors=None, **settings) -> Trainer:
    return Trainer(tensors or features(), **{"protocol": "frozen", "steps": 151, "every": 50} | settings)


def same(first: dict, second: dict) -> bool:
    return {**first, "seconds": 0} == {**second, "seconds": 0}


@pytest.mark.extended
@for_each("algorithm", ALGORITHMS)
def test_a_run_learns_and_is_a_function_of_its_arguments(algorithm):
    found, _ = trainer().run(Cell(algorithm, (2,), 0, 1))
    assert found["targets"] == ["c"] and found["adapts"] == (algorithm == "arm")
    assert [record["step"] for record in found["records"]][:4] == [0, 50, 100, 150]
    last = found["records"][-1]
    assert last["step"] == 150 and set(last["held_out"]) == {"a", "b"} and last["targets"]["c"]["accuracy"] > 60
    runs = [trainer(steps=4, every=2).run(Cell(algorithm, (2,), draw, 1)) for draw in (1, 1, 2)]
    states = [torch.cat([value.flatten() for value in state.values()]) for _, state in runs]
    assert same(runs[0][0], runs[1][0]) and torch.equal(states[0], states[1])
    assert not same(runs[0][0], runs[2][0]) and not torch.equal(states[0], states[2])


@for_each("algorithm", ["erm", "sagnet", "arm"])
def test_pictures_are_learned_from_by_the_small_network(algorithm):
    random = torch.Generator().manual_seed(0)
    pictures = [torch.randint(0, 256, (9, 3, 4, 4), generator=random, dtype=torch.uint8) for _ in range(3)]
    tensors = DomainTensors(["a", "b", "c"], pictures, [torch.arange(9) % 3] * 3, ["x", "y", "z"])
    found, _ = trainer(tensors, protocol="network", steps=1, every=1).run(Cell(algorithm, (0,), 0, 0))
    assert set(found["records"][-1]["targets"]) == {"a"} and not found["diverged"]


@pytest.mark.extended
@for_each("algorithm", ["erm", "irm", "arm"])
def test_networks_run_in_bfloat16_and_losses_in_float32(algorithm, monkeypatch):
    random = torch.Generator().manual_seed(0)
    pictures = [torch.randint(0, 256, (24, 2, 8, 8), generator=random, dtype=torch.uint8) for _ in range(3)]
    tensors = DomainTensors(["a", "b", "c"], pictures, [torch.arange(24) % 2] * 3, ["x", "y"])
    seen = set()
    convolution, classifier = torch.nn.Conv2d.forward, torch.nn.Linear.forward
    watch = {torch.nn.Conv2d: convolution, torch.nn.Linear: classifier}
    for kind, forward in watch.items():

        def watched(self, inputs, kind=kind, forward=forward):
            output = forward(self, inputs)
            seen.add((kind, output.dtype))
            return output

        monkeypatch.setattr(kind, "forward", watched)
    records, states = {}, {}
    for precision, dtype in (("no", torch.float32), ("bf16", torch.bfloat16)):
        seen.clear()
        settings = {"protocol": "network", "steps": 3, "every": 1, "mixed_precision": precision}
        found, states[precision] = trainer(tensors, **settings).run(Cell(algorithm, (2,), 0, 0))
        assert seen == {(torch.nn.Conv2d, dtype), (torch.nn.Linear, torch.float32)}
        assert all(value.dtype != torch.bfloat16 for value in states[precision].values())
        records[precision] = [record["loss"] for record in found["records"]]
    assert records["no"] != records["bf16"]
    assert records["bf16"][0] == pytest.approx(records["no"][0], rel=0.01)


def test_a_run_of_swad_ends_with_the_mean_of_erms_weights():
    """Segments end after steps 1 and 4; no valley begins in two of them, so that the second one's mean counts."""
    of_erm = [trainer(steps=steps).run(Cell("erm", (2,), 0, 0))[1] for steps in (2, 3, 4)]
    found, state = trainer(steps=4, every=10).run(Cell("swad", (2,), 0, 0))
    for name, value in state.items():
        assert torch.allclose(value, torch.stack([step[name] for step in of_erm]).mean(0), atol=1e-7)
        assert not torch.equal(value, of_erm[-1][name])
    assert [("targets" in record) for record in found["records"]] == [False, False, True]


def test_nothing_of_the_target_enters_the_run():
    """Features of the target moved far away: all that is measured on the other domains stays, its own accuracy not."""
    here, _ = trainer().run(Cell("erm", (2,), 0, 0))
    there, _ = trainer(features(moved=50.0)).run(Cell("erm", (2,), 0, 0))
    assert [record["held_out"] for record in here["records"]] == [record["held_out"] for record in there["records"]]
    assert here["records"][-1]["loss"] == there["records"][-1]["loss"]
    assert there["records"][-1]["targets"]["c"]["accuracy"] < 60 < here["records"][-1]["targets"]["c"]["accuracy"]


def test_the_target_is_measured_where_it_can_be_chosen():
    every, _ = trainer(steps=31, every=3, every_target=True).run(Cell("erm", (2,), 0, 0))
    found, _ = trainer(steps=31, every=3).run(Cell("erm", (2,), 0, 0))
    measured = [record for record in found["records"] if "targets" in record]
    assert len(measured) < len(found["records"]) == len(every["records"]) == 11
    for rule in ("training_domains", "oracle"):
        assert chosen(rule, "c", [found]) == chosen(rule, "c", [every])


def test_a_run_that_diverges_ends_and_says_so():
    broken = features()
    broken.inputs[0][0, 0] = torch.inf  # after the check of the data
    for algorithm in ("erm", "swad"):
        found, _ = trainer(broken).run(Cell(algorithm, (2,), 0, 0))
        assert (
            found["diverged"]
            and found["records"][0]["step"] == 0
            and len(found["records"]) < 3
            and "c" in found["records"][-1]["targets"]
        )


def test_soups_are_made_of_the_runs_of_erm():
    runs = [trainer().run(Cell("erm", (1,), draw, 0)) for draw in range(3)]
    states = [state for _, state in runs]
    uniform, mean = trainer().average(Cell("uniform_soup", (1,), 0, 0), states)
    for name, value in mean.items():
        assert torch.allclose(value, torch.stack([state[name] for state in states]).mean(0), atol=1e-6)
    greedy, _ = trainer().average(Cell("greedy_soup", (1,), 0, 0), states)
    best = max(sum(run["records"][-1]["held_out"].values()) for run, _ in runs)
    assert sum(greedy["records"][0]["held_out"].values()) >= best and 1 <= len(greedy["runs"]) <= 3
    assert uniform["runs"] == [0, 1, 2] and uniform["of"] == 3


def run(algorithm, target, draw, seed, *, held_out, accuracy, fifth=0.0, **more):
    """A record of one checkpoint for each value."""
    records = [
        {"step": step, "held_out": {"rest": validation}, "targets": {target: {"accuracy": value, "fifth": fifth}}}
        for step, (validation, value) in enumerate(zip(held_out, accuracy, strict=True))
    ]
    about = {"algorithm": algorithm, "targets": [target], "draw": draw, "seed": seed, "adapts": algorithm == "arm"}
    return about | {"records": records, "diverged": False} | more


def test_rules_choose_by_what_they_may_see():
    runs = [
        run("erm", "a", 0, 0, held_out=[80, 90, 85], accuracy=[1, 2, 3], fifth=50),
        run("erm", "a", 1, 0, held_out=[70, 70, 89], accuracy=[4, 5, 6], fifth=60),
    ]
    assert chosen("training_domains", "a", runs) == {"accuracy": 2, "validation": 90, "step": 1, "draw": 0}
    assert chosen("oracle", "a", runs) == {"accuracy": 6, "validation": 60, "step": 2, "draw": 1}
    assert chosen("leave_one_domain_out", "a", runs) is None  # no runs with two domains held out
    with pytest.raises(ValueError, match="no rule"):
        chosen("target", "a", runs)


def test_any_first_part_of_a_plan_gives_a_table_of_equal_budgets():
    """Two algorithms, two targets, two seeds: a draw or a seed that one of them lacks counts for neither."""

    def of(algorithm, target, draw, seed, value):
        return run(algorithm, target, draw, seed, held_out=[value], accuracy=[value])

    plan = [
        of(name, target, draw, seed, 50 + 10 * draw + seed + (name == "arm") + 20 * (target == "b"))
        for seed in (0, 1)
        for draw in (0, 1)
        for name in ("erm", "arm")
        for target in ("a", "b")
    ]
    seen = {}
    for count in range(len(plan) + 1):
        rows = table(plan[:count], ["training_domains"], ["a", "b"])
        seen[count] = {row["algorithm"]: (row["seeds"], row["draws"], row["mean"]) for row in rows}
    assert seen[0] == seen[1] == {}
    assert seen[2] == seen[3] == {"erm": (1, 1, 60)}
    assert seen[4] == seen[7] == {"erm": (1, 1, 60), "arm": (1, 1, 61)}
    assert seen[8] == {"erm": (1, 2, 70), "arm": (1, 2, 71)}
    assert seen[16] == {"erm": (2, 2, 70.5), "arm": (2, 2, 71.5)}
    rows = table(plan, ["training_domains"], ["a", "b"])
    assert rows[0]["domains"] == {"a": 60.5, "b": 80.5} and rows[0]["worst"] == 60.5
    text = as_markdown(rows, ["a", "b"], ["A note."])
    assert "| erm | 60.5 | 80.5 | 70.5 | below 5 seeds | 60.5 | 2 x 2 |" in text
    five = [of("erm", target, 0, seed, 50 + seed) for seed in range(5) for target in ("a", "b")]
    interval = table(five, ["training_domains"], ["a", "b"])[0]["interval"]  # of 50 to 54: 2.776 sqrt(2.5 / 5)
    assert interval["mean"] == 52 and interval["high"] == pytest.approx(52 + 1.963, abs=1e-3)
    assert table(five[:-2], ["training_domains"], ["a", "b"])[0]["interval"] is None
    assert (
        "| arm * |" in text and "adapts to batches of at most 64 pictures of the target" in text and "A note." in text
    )
    assert "sees a fifth of the target" in as_markdown(table(plan, ["oracle"], ["a", "b"]), ["a", "b"])
