"""kNN accuracy against scikit-learn, lightly and a loop: votes, ties, several k, bad input."""

import math

import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from hf_dpssl.evaluation import knn

NUM_CLASSES = 5


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labelled_features(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.randint(NUM_CLASSES, (rows,), generator=torch.Generator().manual_seed(seed))
    return random(rows, columns, seed=seed) + 0.5 * labels[:, None], labels


def accuracy(classifier, queries, labels) -> float:
    return 100 * float((classifier.predict(queries) == labels.numpy()).mean())


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("k", [1, 2, 5, 20, 300])
def test_knn_equals_scikit_learn(metric, k):
    bank, bank_labels = labelled_features(300, 16, seed=0)
    features, labels = labelled_features(1500, 16, seed=1)  # more than one chunk
    classifier = KNeighborsClassifier(k, metric=metric, algorithm="brute").fit(bank.numpy(), bank_labels.numpy())
    expected = accuracy(classifier, features.numpy(), labels)
    assert knn(bank, bank_labels, features, labels, k=k, metric=metric)["knn_top1"] == pytest.approx(expected)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("k", [1, 5, 50])
def test_inverse_distance_votes_equal_scikit_learn(metric, k):
    bank, bank_labels = labelled_features(300, 16, seed=0)
    features, labels = labelled_features(500, 16, seed=1)
    classifier = KNeighborsClassifier(k, metric=metric, weights="distance", algorithm="brute")
    expected = accuracy(classifier.fit(bank.numpy(), bank_labels.numpy()), features.numpy(), labels)
    found = knn(bank, bank_labels, features, labels, k=k, metric=metric, weighting="inverse")
    assert found["knn_top1"] == pytest.approx(expected)


def test_neighbours_at_distance_0_decide_inverse_votes_alone():
    bank = torch.tensor([[0.0], [0.0], [1e-3], [1e-3], [1e-3]])
    result = knn(bank, torch.tensor([1, 1, 0, 0, 0]), torch.zeros(1, 1), torch.tensor([1]), k=5, metric="euclidean",
                 weighting="inverse")  # fmt: skip
    assert result == {"knn_top1": 100}


@pytest.mark.parametrize("weighting", ["uniform", "exponential", "inverse"])
def test_several_k_at_once_equal_each_alone(weighting):
    bank, bank_labels = labelled_features(300, 16, seed=0)
    features, labels = labelled_features(400, 16, seed=1)
    together = knn(bank, bank_labels, features, labels, k=(20, 1, 100), weighting=weighting)
    assert list(together) == ["knn_top1_k20", "knn_top1_k1", "knn_top1_k100"]
    for k in (1, 20, 100):
        alone = knn(bank, bank_labels, features, labels, k=k, weighting=weighting)["knn_top1"]
        assert together[f"knn_top1_k{k}"] == alone


def test_exponential_votes_of_distances_are_those_of_cosines_on_the_sphere():
    bank, bank_labels = labelled_features(300, 8, seed=0)
    features, labels = labelled_features(400, 8, seed=1)
    bank, features = torch.nn.functional.normalize(bank), torch.nn.functional.normalize(features)
    options = {"k": 50, "weighting": "exponential", "temperature": 0.2}
    by_metric = [knn(bank, bank_labels, features, labels, metric=m, **options) for m in ("cosine", "euclidean")]
    assert by_metric[0] == by_metric[1]


@pytest.mark.parametrize("candidates", ["float32", "bfloat16"])
def test_knn_equals_lightly(candidates):
    lightly = pytest.importorskip("lightly.utils.benchmarking")
    bank, bank_labels = labelled_features(2048, 64, seed=0)
    features, labels = labelled_features(500, 64, seed=1)
    bank, features = torch.nn.functional.normalize(bank), torch.nn.functional.normalize(features)
    theirs = lightly.knn_predict(features, bank.T, bank_labels, NUM_CLASSES, knn_k=200, knn_t=0.1)[:, 0]
    options = {"k": 200, "weighting": "exponential", "temperature": 0.1, "candidates": candidates}
    for seen in (labels, theirs):  # the same accuracy, and the same class for each query
        expected = 100 * float((theirs == seen).double().mean())
        assert knn(bank, bank_labels, features, seen, **options)["knn_top1"] == pytest.approx(expected)


def test_a_large_class_id_costs_no_memory():
    bank, bank_labels = labelled_features(30, 4, seed=0)
    result = knn(bank, bank_labels + 10**15, bank, bank_labels + 10**15, k=1)
    assert result == {"knn_top1": 100}


def test_euclidean_knn_equals_scikit_learn_far_from_the_origin():
    bank, bank_labels = labelled_features(300, 16, seed=0)
    features, labels = labelled_features(500, 16, seed=1)
    bank, features = bank + 1000, features + 1000
    classifier = KNeighborsClassifier(5, algorithm="kd_tree").fit(bank.double().numpy(), bank_labels.numpy())
    expected = accuracy(classifier, features.double().numpy(), labels)
    assert knn(bank, bank_labels, features, labels, k=5, metric="euclidean")["knn_top1"] == pytest.approx(expected)


def weighted_votes_by_loop(bank, bank_labels, features, k, temperature) -> list[int]:
    winners = []
    for query in features.double():
        cosines = [float(query @ row / query.norm() / row.norm()) for row in bank.double()]
        nearest = sorted(range(len(bank)), key=lambda i: -cosines[i])[:k]
        votes = [0.0] * NUM_CLASSES
        for i in nearest:
            votes[int(bank_labels[i])] += math.exp(cosines[i] / temperature)
        winners.append(votes.index(max(votes)))
    return winners


@pytest.mark.parametrize("temperature", [0.002, 0.07, 1.0])
def test_exponentially_weighted_knn_equals_the_loop(temperature):
    bank, bank_labels = labelled_features(80, 6, seed=0)
    features, labels = labelled_features(60, 6, seed=1)
    winners = weighted_votes_by_loop(bank, bank_labels, features, 20, temperature)
    expected = 100 * sum(a == b for a, b in zip(winners, labels.tolist(), strict=True)) / 60
    options = {"k": 20, "weighting": "exponential", "temperature": temperature}
    assert knn(bank, bank_labels, features, labels, **options)["knn_top1"] == pytest.approx(expected)


def test_a_tie_of_uniform_votes_goes_to_the_smallest_class():
    bank, bank_labels = torch.tensor([[0.0], [1.0]]), torch.tensor([3, 1])
    for label, expected in [(1, 100), (3, 0)]:
        result = knn(bank, bank_labels, torch.tensor([[0.1]]), torch.tensor([label]), k=2, metric="euclidean")
        assert result["knn_top1"] == expected


def test_knn_takes_half_precision_and_classes_that_the_bank_lacks():
    bank, bank_labels = labelled_features(30, 4, seed=0)
    result = knn(bank.bfloat16(), bank_labels, bank.bfloat16(), torch.full((30,), 9), k=1)
    assert result["knn_top1"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, r"\[1, 30\]"),
        ({"k": 31}, r"\[1, 30\]"),
        ({"metric": "manhattan"}, "'cosine', 'euclidean'"),
        ({"weighting": "linear"}, "'uniform', 'exponential', 'inverse'"),
        ({"weighting": "exponential", "temperature": 0.0}, "temperature must be positive"),
        ({"bank": torch.zeros(30, 5)}, "bank and features"),
        ({"bank": torch.zeros(30)}, "bank and features"),
        ({"features": torch.zeros(3, 4, 1)}, "bank and features"),
        ({"bank_labels": torch.zeros(29, dtype=torch.int64)}, "one label per row"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, "one label per row"),
        ({"features": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}, "no features"),
        ({"bank_labels": torch.full((30,), -1)}, "without a class"),
        ({"labels": torch.tensor([0, -1, 0])}, "got -1.*without a class"),
        ({"labels": torch.tensor([0.0, 1.0, 0.0])}, "integer class ids, got torch.float32"),
        ({"k": ()}, r"\[1, 30\]"),
        ({"k": (1, 31)}, r"\[1, 30\]"),
        ({"candidates": "int8"}, "'auto', 'float32', 'bfloat16'"),
    ],
)
def test_knn_refuses_what_is_not_defined(changes, message):
    bank, bank_labels = labelled_features(30, 4, seed=0)
    arguments = {"bank": bank, "bank_labels": bank_labels, "features": bank[:3], "labels": bank_labels[:3], "k": 3}
    with pytest.raises(ValueError, match=message):
        knn(**(arguments | changes))
