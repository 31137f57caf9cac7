"""Digits in several domains, splits and draws against DomainBed (DOMAINBED_PATH) and what it does in other words."""

import importlib
import os
import sys
import types

import numpy as np
import pytest
import torch
from cases import for_each
from PIL import Image

from hf_dpssl.domains.choices import ALGORITHMS
from hf_dpssl.domains.digit_domains import coloured, digit_domains, rotated
from hf_dpssl.domains.domain_checks import notes_of_missing
from hf_dpssl.domains.domain_tensors import DomainTensors, seed_hash, split
from hf_dpssl.domains.hyperparameters import hyperparameters


def digits(count=90):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(1, 256, (count, 28, 28), generator=generator, dtype=torch.uint8)
    return images, torch.arange(count) % 10


def test_colours_and_flips_are_those_of_the_same_draws_one_by_one():
    """In the order of DomainBed: shuffle; then of each environment the flips of labels, and of colours."""
    images, labels = digits()
    made = coloured(images, labels, seed=4)
    torch.manual_seed(4)
    order = torch.randperm(90).tolist()
    for i, flips in enumerate([0.1, 0.2, 0.9]):
        mine = order[i::3]
        noise, tint = torch.rand(len(mine)).tolist(), torch.rand(len(mine)).tolist()
        for place, source in enumerate(mine):
            label = int(labels[source] < 5) ^ int(noise[place] < 0.25)
            colour = label ^ int(tint[place] < flips)
            assert made.labels[i][place] == label
            assert torch.equal(made.inputs[i][place, colour], images[source])
            assert not made.inputs[i][place, 1 - colour].any()


def test_rotated_digits_are_turned_by_pillow():
    images, labels = digits(60)
    made = rotated(images, labels, seed=2)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(2))
    for i, angle in enumerate([0, 15, 30, 45, 60, 75]):
        assert torch.equal(made.labels[i], labels[order[i::6]])
        turned = Image.fromarray(images[order[i]].numpy()).rotate(angle, Image.Resampling.BICUBIC)
        assert np.array_equal(made.inputs[i][0, 0].numpy(), np.asarray(turned))
    assert torch.equal(made.inputs[0][:, 0], images[order[0::6]])
    small = digit_domains("rotated_digits", 0)
    assert small.names == ["0", "30", "60"] and small.inputs[1].shape == (599, 1, 8, 8)
    with pytest.raises(ValueError, match="no set of digits"):
        digit_domains("digits", 0)


@pytest.fixture(scope="module")
def domain_bed():
    path = os.environ.get("DOMAINBED_PATH")
    if not path:
        pytest.skip("DOMAINBED_PATH is not set: give the path of a checkout of DomainBed at commit 7df6f06")
    sys.path.insert(0, path)
    names = ("datasets", "hparams_registry", "lib.misc", "model_selection", "lib.query")
    yield types.SimpleNamespace(
        **{name.rpartition(".")[2]: importlib.import_module(f"domainbed.{name}") for name in names}
    )
    sys.path.remove(path)


def test_sets_are_those_of_domain_bed_itself(domain_bed, monkeypatch):
    images, labels = digits(300)

    def stored(root, train, download):
        part = slice(0, 200) if train else slice(200, 300)
        return types.SimpleNamespace(data=images[part], targets=labels[part])

    monkeypatch.setattr(domain_bed.datasets, "MNIST", stored)
    # Its argument `resample` has another name in today's torchvision.
    turn = lambda picture, angle, fill, resample: picture.rotate(angle, resample, fillcolor=fill[0])  # noqa: E731
    monkeypatch.setattr(domain_bed.datasets, "rotate", turn)
    for name, ours in (("ColoredMNIST", coloured), ("RotatedMNIST", rotated)):
        torch.manual_seed(3)
        theirs = getattr(domain_bed.datasets, name)("nowhere", [0], {})
        made = ours(images, labels, seed=3)
        assert len(theirs) == len(made.names)
        for (x, y), inputs, targets in zip((d.tensors for d in theirs), made.inputs, made.labels, strict=True):
            assert torch.equal(y, targets) and torch.equal(x, inputs.float() / 255)


def test_splits_and_draws_are_those_of_domain_bed_itself(domain_bed):
    for seed, domain, count in [(0, 0, 100), (2, 3, 57)]:
        assert seed_hash(seed, domain) == domain_bed.misc.seed_hash(seed, domain)
        out, kept = domain_bed.misc.split_dataset(range(count), int(count * 0.2), seed_hash(seed, domain))
        assert (
            split(count, domain, seed)[0].tolist() == kept.keys and split(count, domain, seed)[1].tolist() == out.keys
        )
    names = {"irm_lambda": "penalty", "irm_penalty_anneal_iters": "anneal", "vrex_lambda": "penalty"}
    names |= {
        "vrex_penalty_anneal_iters": "anneal",
        "groupdro_eta": "eta",
        "mixup_alpha": "alpha",
        "mmd_gamma": "gamma",
    }
    names |= {"sag_w_adv": "adversary", "rsc_f_drop_factor": "features", "rsc_b_drop_factor": "pictures"}
    called = {"group_dro": "GroupDRO", "mixup": "Mixup", "sagnet": "SagNet", "vrex": "VREx", "swad": "ERM"}
    registry = domain_bed.hparams_registry
    for algorithm in ALGORITHMS:
        theirs = called.get(algorithm, algorithm.upper())
        for protocol, dataset in (("network", "ColoredMNIST"), ("fine_tune", "PACS")):
            for draw in range(4):
                seed = domain_bed.misc.seed_hash(draw, 1)
                wanted = registry.random_hparams(theirs, dataset, seed) if draw else None
                wanted = wanted or registry.default_hparams(theirs, dataset)
                found = hyperparameters(algorithm, protocol, draw, 1)
                assert found.learning_rate == wanted["lr"] and found.weight_decay == wanted["weight_decay"]
                assert found.batch_size == wanted["batch_size"]
                assert found.settings == {names[key]: value for key, value in wanted.items() if key in names}


def test_selection_is_that_of_domain_bed_itself(domain_bed):
    """On random accuracies of four domains, with ties."""
    from hf_dpssl.domains.selection import chosen

    random = np.random.default_rng(0)
    rules = {
        "training_domains": domain_bed.model_selection.IIDAccuracySelectionMethod,
        "oracle": domain_bed.model_selection.OracleSelectionMethod,
        "leave_one_domain_out": domain_bed.model_selection.LeaveOneOutSelectionMethod,
    }
    for _ in range(20):
        records, runs = [], []
        for draw in range(3):
            for out in [[0], [0, 1], [0, 2], [0, 3]]:
                mine = []
                for step in range(4):
                    value = {
                        f"env{d}_{part}_acc": float(random.integers(5)) for d in range(4) for part in ("in", "out")
                    }
                    about = {"args": {"test_envs": out, "hparams_seed": draw}, "step": step}
                    records.append(value | about)
                    held_out = {str(d): value[f"env{d}_out_acc"] for d in range(4) if d not in out}
                    targets = {
                        str(d): {"accuracy": value[f"env{d}_in_acc"], "fifth": value[f"env{d}_out_acc"]} for d in out
                    }
                    mine.append({"step": step, "held_out": held_out, "targets": targets})
                runs.append({"targets": [str(d) for d in out], "draw": draw, "records": mine})
        for rule, method in rules.items():
            wanted = method.sweep_acc(domain_bed.query.Q(records))
            assert chosen(rule, "0", runs)["accuracy"] == wanted, rule


FIVE = torch.tensor([0, 1, 2, 0, 1])
CASES = [
    ({"inputs": [torch.zeros(5, 2), torch.zeros(3, 2)]}, "has 3 samples and 5 labels"),
    ({"inputs": [torch.zeros(5, 2), torch.full((5, 2), torch.nan)]}, "5 of 5 samples of domain 'b' hold numbers"),
    ({"labels": [FIVE % 2, FIVE]}, "class 'three' is found in domain 'b' only"),
    ({"names": ["a"], "inputs": [torch.zeros(5, 2)], "labels": [FIVE]}, "all samples are of one"),
    ({"inputs": [torch.zeros(5, 2), torch.zeros(0, 2)], "labels": [FIVE, FIVE[:0]]}, "'b' has 0 samples for 3 classes"),
    ({"inputs": [torch.zeros(5, 2), torch.zeros(4, 2)], "labels": [FIVE, FIVE[:4]]},
     "'b' has 4 samples for 3 classes: give at least 5, of which a fifth is held out"),
    ({"class_names": list("abcdef")}, "'a' has 5 samples for 6 classes: give at least 6"),
]  # fmt: skip


@for_each("changes, message", CASES)
def test_domains_that_cannot_be_learned_from_are_refused(changes, message):
    whole = {
        "names": ["a", "b"],
        "inputs": [torch.zeros(5, 2), torch.zeros(5, 2)],
        "labels": [FIVE] * 2,
        "class_names": ["one", "two", "three"],
    }
    assert DomainTensors(**whole).missing_classes == {}
    with pytest.raises(ValueError, match=message):
        DomainTensors(**whole | changes)


def test_classes_that_a_domain_lacks_are_named():
    labels = [FIVE, FIVE % 2, FIVE.flip(0)]
    made = DomainTensors(["a", "b", "c"], [torch.zeros(len(x), 2) for x in labels], labels, ["one", "two", "three"])
    assert made.missing_classes == {"b": ["three"]}
    many = notes_of_missing({"b": ["three"], "c": list("0123456789abc")})
    assert many == ["b has no three.", "c has no 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 3 more classes."]
