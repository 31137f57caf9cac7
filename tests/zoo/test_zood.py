"""Choosing, combining and selecting encoders, on planted zoos; and what is known of an encoder."""

import json
import re

import numpy as np
import pytest
import torch
from scipy.stats import weightedtau

from hf_dpssl.cli.zood import _lines
from hf_dpssl.evaluation.probes import linear_probe
from hf_dpssl.zoo import ZooEntry, leave_one_domain_out, read_zoo, zood_of_features
from hf_dpssl.zoo.encoder_facts import contamination, encoder_facts

DOMAINS, CLASSES, EACH = ["photo", "sketch", "paint"], 4, 50


def planted_zoo(seed=0):
    """Two encoders that each tell half of the classes, one that tells all but noisily, and three that say nothing."""
    draw = torch.Generator().manual_seed(seed)
    count = len(DOMAINS) * EACH
    domains, labels = torch.arange(count) // EACH, torch.randint(CLASSES, (count,), generator=draw)

    def normal(width):
        return torch.randn(count, width, generator=draw)

    first, second = (torch.eye(CLASSES)[labels] * torch.tensor(mask) for mask in ([1.0, 1, 0, 0], [0.0, 0, 1, 1]))
    zoo = {
        "first half": torch.cat([5 * first + normal(4), normal(20)], 1),
        "second half": torch.cat([5 * second + normal(4), normal(30)], 1),
        "noisy": torch.cat([torch.eye(CLASSES)[labels], normal(10)], 1) + normal(14),
        "nothing": normal(8),
        "nothing wide": normal(40),
    }
    return zoo, labels, domains


@pytest.mark.extended
def test_ensemble_and_selection_put_together_what_single_encoders_know():
    zoo, labels, domains = planted_zoo()
    found = zood_of_features(zoo, labels, domains, DOMAINS, draws=1, trained=[n for n in zoo if "nothing" not in n])
    means = {method: value["mean"] for method, value in found["methods"].items()}
    assert means["ensemble"] > means["single"] + 10 and means["selection"] > means["random"] + 10, means
    assert means["best"] >= means["single"] and means["selection"] > means["ensemble"] - 1, means
    for target in found["targets"].values():
        assert {"first half", "second half"} < set(target["ensemble"]["encoders"])
        kept = target["selection"]["features"]
        assert sum(kept.values()) == target["random"]["features"] < 25 and kept["first half"] >= 2, kept
    taus = {group: found["agreement"][group]["score"]["tau"]["mean"] for group in ("all", "trained")}
    assert taus["all"] > 0.2 and found["agreement"]["all"]["width"]["tau"]["mean"] < taus["all"], taus
    assert found["agreement"]["all"]["score"]["regret"] < found["agreement"]["all"]["width"]["regret"]


def test_the_target_is_not_seen_and_the_figures_are_those_of_score_probe_and_scipy():
    zoo, labels, domains = planted_zoo(1)
    zoo = {name: zoo[name] for name in ("first half", "noisy", "nothing")}
    found = zood_of_features(zoo, labels, domains, DOMAINS, draws=0)
    taus = []
    for number, name in enumerate(DOMAINS):
        new = domains == number
        table = found["targets"][name]["encoders"]
        others = torch.unique(domains[~new], return_inverse=True)[1]
        for encoder, values in zoo.items():
            score = np.mean([parts["score"] for parts in leave_one_domain_out(values[~new], labels[~new], others)])
            accuracy = linear_probe(values[~new], labels[~new], values[new], labels[new])["linear_top1"]
            assert table[encoder]["score"] == pytest.approx(score) and table[encoder]["accuracy"] == accuracy
        best = max(table, key=lambda encoder: table[encoder]["score"])
        assert found["targets"][name]["single"] == {"encoder": best, "accuracy": table[best]["accuracy"]}
        taus.append(weightedtau(*zip(*[(t["score"], t["accuracy"]) for t in table.values()], strict=True)).statistic)
    assert found["agreement"]["all"]["score"]["tau"]["mean"] == pytest.approx(np.mean(taus))
    changed = dict(zoo)
    new = domains == 0
    changed["noisy"] = torch.where(new[:, None], 100 * torch.randn(len(new), 14), zoo["noisy"])
    again = zood_of_features(changed, labels, domains, DOMAINS, draws=0)["targets"][DOMAINS[0]]
    before = found["targets"][DOMAINS[0]]
    assert again["selection"]["features"] == before["selection"]["features"]
    assert again["encoders"]["noisy"]["score"] == before["encoders"]["noisy"]["score"]


def test_what_is_not_stated_is_named_in_the_figures_and_in_the_lines():
    """Features tell the classes in the first domain only: nothing is selected where it is the target. Three classes."""
    draw = torch.Generator().manual_seed(0)
    domains, labels = torch.arange(90) // 30, torch.arange(90) % 3
    zoo = {name: torch.randn(90, 6, generator=draw) for name in ("telling", "one", "other")}
    zoo["telling"][domains == 0, :3] += 5 * torch.eye(3)[labels[domains == 0]]
    found = zood_of_features(zoo, labels, domains, DOMAINS, draws=2)
    assert found["not_stated"] == {"selection": ["photo"], "random": ["photo"]} and found["draws"] == 0
    assert list(found["methods"]) == ["single", "ensemble", "best"]
    known = {"contaminated": "no", "contaminated_because": ""}
    found["encoders"] = [{"name": name} | known for name in zoo]
    lines = "\n".join(_lines(found, draws=2))
    for method in ("selection", "random"):
        assert re.search(rf"^{method} +not stated: no feature was selected for the target photo$", lines, re.M)
    said = "agreement is of all classes alone"
    assert said in lines and said not in "\n".join(_lines(found, draws=0))


@pytest.mark.extended
def test_set_ups_take_classes_that_every_domain_has():
    random = np.random.default_rng(0)
    domains = torch.arange(4).repeat_interleave(40)
    labels = torch.arange(160) % 4
    labels[domains == 3] %= 2  # the last one has two of the four
    values = {name: torch.from_numpy(random.normal(size=(160, 4))).float() for name in ("one", "other", "third")}
    for seed in range(3):
        given = zood_of_features(values, labels, domains, list("abcd"), top=1, draws=4, seed=seed)
        assert given["agreement"]["all"]["score"]["tau"]["mean"] == pytest.approx(0, abs=1.01)


def test_contamination_is_told_from_names_and_classes():
    pacs = ["dog", "elephant", "giraffe", "guitar", "horse", "house", "person"]
    cases = [
        (["pacs-64px"], "pacs-64px", pacs, "yes"),
        (["org/cifar10@abc"], "cifar10", None, "yes"),
        (["cifar10-jpeg"], "/data/cifar10-jpeg-small.parquet", None, "yes"),
        (["cifar100"], "cifar10", None, "no"),
        (["digits+mnist"], "mnist-m-small", None, "yes"),
        (["imagenet-1k"], "pacs-64px", pacs, "yes"),
        (["imagenet-1k"], "digits", ["seven", "eight"], "no"),
        (["imagenet-1k"], "digits", None, "not known"),
        (["laion/laion2b"], "pacs-64px", pacs, "not known"),
        (["imagenet-1k", "laion-2b"], "mine", ["iris", "tulip", "rose", "lily"], "not known"),
        (["imagenet-21k"], "mine", ["giraffe", "house", "person", "tulip"], "not known"),
        (["pacs"], "data/pacs/", pacs, "yes"),
        ([], "pacs-64px", pacs, "not known"),
    ]
    for trained_on, dataset, classes, wanted in cases:
        assert contamination(trained_on, dataset, classes)[0] == wanted, (trained_on, dataset)
    assert encoder_facts(ZooEntry("untrained:resnet18", "r", trained=False), "pacs", pacs)["contaminated"] == "no"


def test_contamination_and_licence_come_from_the_encoders_own_files(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\ndatasets:\n- org/photos\n---\n# Card\n")
    (tmp_path / "config.json").write_text("{}")
    entry = ZooEntry(str(tmp_path), "own")
    found = encoder_facts(entry, "photos", None)
    assert (found["licence"], found["trained_on"], found["contaminated"]) == ("mit", ["org/photos"], "yes")
    assert encoder_facts(entry._replace(data="drawings"), "photos", None)["contaminated"] == "no"
    lineage = [{"part": "start", "name": "old", "dataset": "photos"}]
    (tmp_path / "results.json").write_text(json.dumps({"dataset": "sketches", "lineage": lineage}))
    assert encoder_facts(entry, "photos", None)["trained_on"] == ["sketches", "photos"]


def test_a_zoo_is_read_from_a_file_and_mistakes_in_it_are_named(tmp_path):
    path = tmp_path / "zoo.yaml"
    path.write_text("encoders:\n- a/b\n- encoder: untrained:resnet18\n  name: random\n- {encoder: c, data: mnist}\n")
    wanted = [ZooEntry("a/b", "a/b"), ZooEntry("untrained:resnet18", "random", None, False)]
    assert read_zoo(path) == [*wanted, ZooEntry("c", "c", "mnist")]
    assert len(read_zoo(["default", "mine"])) == 7
    cases = {
        "encoders: []": "the zoo is empty",
        "encoders:\n- a\n- a": "the same encoder is given twice: ['a']",
        "encoders:\n- {encoder: a, name: x}\n- {encoder: b, name: x}": "two encoders have the same name: ['x']",
        "encoders:\n- {name: x}": "an encoder of a zoo is its name",
        "encoders:\n- {encoder: a, size: 3}": "an encoder of a zoo is its name",
        "encoders:\n- {encoder: a, trained: maybe}": "'trained' of 'a' must be a bool",
        "models: [a]": "a list of encoders under the one key",
        "a: [": "is no YAML",
    }
    for text, message in cases.items():
        path.write_text(text)
        with pytest.raises(ValueError) as refused:
            read_zoo(path)
        assert message in str(refused.value), text
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_zoo(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match=r"zoo.yaml beside 1 more: write these into its list"):
        read_zoo([str(path), "untrained:resnet18"])
