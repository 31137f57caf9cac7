"""SWAD's window and soups, against the published code and on problems where an average must help.

SWAD_PATH is the path of a checkout of khanrc/swad at commit 252190e.
"""

import importlib.util
import os
import sys
import types
from collections import Counter

import numpy as np
import pytest
import torch
from cases import for_each
from torch import nn

from hf_dpssl.domains.algorithms import ERM
from hf_dpssl.domains.soups import RunningMean, greedy_soup, uniform_soup
from hf_dpssl.domains.swad import SWAD


def shares(losses, **settings) -> list[float]:
    """The share of each segment in the mean: the weights of segment i are the i-th unit vector."""
    swad = SWAD(**settings)
    for unit, loss in zip(torch.eye(len(losses), dtype=torch.float64), losses, strict=True):
        swad.step({"weight": unit + 1})  # two steps, whose mean it is
        swad.step({"weight": unit - 1})
        swad.evaluate(loss)
    return swad.weights()["weight"].tolist()


# Loss by segment, and how often each is in the mean, worked by hand: limit, pieces before and after.
CURVES = [
    # No segment is below its next two: the last one.
    ([9, 8, 7, 6, 5, 4, 3], [0, 0, 0, 0, 0, 0, 1]),
    # Begins at 4 (1, 1.2, 1.1; limit 1.43); before it all are above. 4 counts when 9 is seen, 5 when 10 is; at 11 the
    # last six (6 - 11) have 1.1, at 12 (7 - 12) only 9: the end, after 6.
    ([9, 8, 7, 6, 1, 1.2, 1.1, 9, 9, 9, 9, 9, 9, 9], [0] * 4 + [1, 1, 1] + [0] * 7),
    # Begins at 3 (limit 1.3 times 1.1). 0 - 3 lie before it, 1 - 3 below the limit: of that piece all but the first.
    # 3 counts again when 8 is seen, and at the end, which is the last segment, 4 - 8.
    ([9, 1.2, 1.1, 1, 1.1, 1.2, 1.1, 1.2, 1.1], [0, 0, 1, 2, 1, 1, 1, 1, 1]),
]


@for_each("losses, counts", CURVES)
def test_the_valley_begins_and_ends_where_it_does_by_hand(losses, counts):
    assert shares(losses) == pytest.approx([count / sum(counts) for count in counts])


def published(losses, patience, tolerance, ratio, monkeypatch) -> list[float]:
    """The shares by LossValley of SWAD_PATH."""
    path = os.environ["SWAD_PATH"]

    def load(name):
        spec = importlib.util.spec_from_file_location(
            f"published_{os.path.basename(name)}", f"{path}/domainbed/{name}.py"
        )
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    averages = load("lib/swa_utils")
    library = types.ModuleType("domainbed.lib")
    library.swa_utils = averages
    monkeypatch.setitem(sys.modules, "domainbed", types.ModuleType("domainbed"))
    monkeypatch.setitem(sys.modules, "domainbed.lib", library)
    monkeypatch.setattr(nn.Module, "cuda", lambda module: module)
    evaluator = types.SimpleNamespace(logger=types.SimpleNamespace(error=lambda text: None))
    valley = load("swad").LossValley(evaluator, patience, tolerance, ratio)
    model = nn.Linear(len(losses), 1, bias=False).double()
    for step, (unit, loss) in enumerate(zip(torch.eye(len(losses), dtype=torch.float64), losses, strict=True)):
        segment = averages.AveragedModel(model)
        model.weight.data = unit[None].clone()
        segment.update_parameters(model, step=step)
        valley.update_and_evaluate(segment, 0.0, loss, None)
    return valley.get_final_model().module.weight[0].tolist()


def curves(count):
    for seed in range(count):
        random = np.random.default_rng(seed)
        length = int(random.integers(1, 30))
        falling = 3 * np.exp(-np.arange(length) / random.uniform(1, 8)) + 1
        rising = np.maximum(0, np.arange(length) - random.integers(4, 30)) * random.uniform(0, 0.4)
        patience = int(random.integers(1, 5))
        settings = {"patience": patience, "tolerance": patience + int(random.integers(0, 5)), "ratio": 0.2}
        yield (falling + rising + random.uniform(0, 0.3, length)).tolist(), settings


def test_the_valley_is_that_of_the_published_code(monkeypatch, capsys):
    if not os.environ.get("SWAD_PATH"):
        pytest.skip("SWAD_PATH is not set: give the path of a checkout of khanrc/swad at commit 252190e")
    kinds = Counter()
    for losses, settings in curves(300):
        found, wanted = shares(losses, **settings), published(losses, *settings.values(), monkeypatch)
        assert found == pytest.approx(wanted, abs=1e-9), (losses, settings)
        kinds[sum(share > 0 for share in found) > 1] += 1
    assert min(kinds.values()) > 50  # with a valley, and without


def test_a_running_mean_is_the_mean_and_refuses_other_weights():
    states = [{"weight": torch.randn(3, 2), "steps": torch.tensor(number)} for number in range(5)]
    mean = uniform_soup(states)
    wanted = torch.stack([state["weight"] for state in states]).double().mean(0)
    assert torch.allclose(mean["weight"].double(), wanted, atol=1e-6) and mean["steps"] == 4
    other = RunningMean()
    other.add(states[0])
    for wrong in ({"weight": torch.zeros(2, 2), "steps": torch.tensor(0)}, {"weight": torch.zeros(3, 2)}):
        with pytest.raises(ValueError, match="other names or shapes"):
            other.add(wrong)
    for empty in (lambda: uniform_soup([]), lambda: greedy_soup([], float), lambda: SWAD().weights()):
        with pytest.raises(ValueError, match="no weights"):
            empty()
    with pytest.raises(ValueError, match="finite loss"):
        SWAD().evaluate(1.0)
    with pytest.raises(ValueError, match="patience <= tolerance"):
        SWAD(patience=7)


def test_a_greedy_soup_takes_what_helps():
    """Accuracy: how near the mean is to 0. From 0.4 on 1 (0.7), -1.5 (-0.55) and 5 are no help, -0.6 (-0.1) is."""

    def of(*values):
        states = [{"weight": torch.tensor([value])} for value in values]
        mean, taken = greedy_soup(states, lambda state: -abs(float(state["weight"][0])))
        return mean["weight"].item(), taken

    assert of(1.0, -1.5, 5.0, 0.4) == (pytest.approx(0.4), [3])
    assert of(1.0, -0.6, 5.0, 0.4) == (pytest.approx(-0.1), [3, 1])


def noisy_run(seed, steps=120):
    """A linear classifier at a high rate on labels of which a fifth is wrong; (algorithm, target, held-out, swad)."""
    random = np.random.default_rng(0)
    direction = random.normal(0, 1, 20)

    def drawn(shift, wrong, count=1000):
        inputs = random.normal(0, 1, (count, 20)) + shift
        labels = ((inputs - shift) @ direction > 0).astype(int)
        flipped = np.where(random.random(count) < wrong, 1 - labels, labels)
        return torch.from_numpy(inputs).float(), torch.from_numpy(flipped)

    sources, held_out, target = [drawn(0, 0.2), drawn(0.3, 0.2)], drawn(0.1, 0.2, 400), drawn(-0.3, 0.0)
    torch.manual_seed(0)
    algorithm = ERM(nn.Identity(), nn.Linear(20, 2), learning_rate=0.1)
    swad, generator = SWAD(), torch.Generator().manual_seed(seed)
    for step in range(steps):
        rows = [torch.randint(1000, (8,), generator=generator) for _ in sources]
        algorithm.update([(x[at], y[at]) for at, (x, y) in zip(rows, sources, strict=True)])
        swad.step(algorithm.state_dict())
        if step % 5 == 0:
            with torch.no_grad():
                loss = nn.functional.cross_entropy(algorithm.predict(held_out[0]), held_out[1])
            swad.evaluate(float(loss))
    return algorithm, target, held_out, swad


@torch.no_grad()
def accuracy(algorithm, state, inputs, labels):
    algorithm.load_state_dict(state)
    return 100 * float((algorithm.predict(inputs).argmax(1) == labels).double().mean())


def test_averages_are_nearer_to_the_truth_than_the_runs_they_are_made_of():
    """Steps at a high rate jump about the solution; their mean does not, within a run (SWAD) and over runs (soups)."""
    runs = [noisy_run(seed) for seed in range(4)]
    algorithm, target, held_out, _ = runs[0]
    last = [{name: value.clone() for name, value in run[0].state_dict().items()} for run in runs]
    single = np.mean([accuracy(algorithm, state, *target) for state in last])
    within = np.mean([accuracy(algorithm, run[3].weights(), *target) for run in runs])
    over = accuracy(algorithm, uniform_soup(last), *target)
    greedy, taken = greedy_soup(last, lambda state: accuracy(algorithm, state, *held_out))
    chosen = accuracy(algorithm, greedy, *target)
    print(f"one run {single:.1f}, SWAD {within:.1f}, uniform soup {over:.1f}, greedy soup {chosen:.1f} of {taken}")
    assert within > single + 6 and over > single + 3 and chosen > single + 1
