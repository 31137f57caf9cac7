"""The nearest rows against float64, and votes of neighbours against scikit-learn, lightly and a loop."""

import math

import pytest
import torch
from cases import for_each
from sklearn.neighbors import KNeighborsClassifier
from torch.nn.functional import normalize

from hf_dpssl.evaluation import knn, nearest_neighbours, neighbours

METRICS = ("cosine", "euclidean")
NUM_CLASSES = 5


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def around(centres: torch.Tensor, spread: float, seed: int) -> torch.Tensor:
    """64 vectors close to each centre."""
    return (centres[:, None] + spread * random(len(centres), 64, centres.shape[1], seed=seed)).flatten(0, 1)


def exact_similarities(bank, queries, metric) -> torch.Tensor:
    bank, queries = bank.double(), queries.double()
    if metric == "cosine":
        return normalize(queries, dim=1) @ normalize(bank, dim=1).T
    return -torch.cdist(queries, bank, compute_mode="donot_use_mm_for_euclid_dist")


def nearly_orthogonal() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows whose cosines with all queries are about .001, and differ by a hundredth of that."""
    direction = normalize(random(1, 48), dim=1)
    across = normalize(random(1024, 48) - random(1024, 48) @ direction.T @ direction, dim=1)
    return across + (1e-3 + 1e-5 * random(1024, 1, seed=1)) * direction, random(64, 1, seed=2).exp() * direction


CLOUDS = {
    "gaussian": (random(1024, 48), random(64, 48, seed=1)),
    "few columns": (random(1024, 2), random(64, 2, seed=1)),
    "after a relu": (random(1024, 48).relu() + 1, random(64, 48, seed=1).relu() + 1),
    "far from the origin": (random(1024, 48) + 1000, random(64, 48, seed=1) + 1000),
    "around one direction": (around(random(1, 48), 1e-3, 1).repeat(16, 1), around(random(1, 48), 1e-3, 2)),
    "tight clusters": (around(random(16, 48), 1e-3, 1), around(random(16, 48), 1e-3, 2)[::16]),
    "nearly orthogonal": nearly_orthogonal(),
    "one outlier": (torch.cat([random(1023, 48), 1e4 * random(1, 48)]), random(64, 48, seed=1)),
    "rows of the bank": (random(1024, 48), random(1024, 48)[:64]),
    "tiny": (1e-15 * random(1024, 48), 1e-15 * random(64, 48, seed=1)),
}


def check_nearest(cloud: str, k: int, metric: str) -> None:
    bank, queries = CLOUDS[cloud]
    similarities, indices = nearest_neighbours(bank, queries, k=k, metric=metric)
    exact = exact_similarities(bank, queries, metric)
    scale = 1.0 if metric == "cosine" else float(exact.abs().median())
    # What is returned is the similarity of the row that is named, and no other row is nearer than float32 can tell.
    named, best = exact.gather(1, indices), exact.topk(k).values
    kept = named.sort(dim=1, descending=True).values
    for found, wanted in ((similarities.double(), named), (kept, best)):
        torch.testing.assert_close(found / scale, wanted / scale, rtol=2e-6, atol=1e-6, msg=cloud)
    assert bool((similarities.diff(dim=1) <= 0).all()) and all(len(row.unique()) == k for row in indices)


@for_each("metric", METRICS)
@for_each("k", [1, 20, 1024])
def test_neighbours_are_those_of_float64(metric, k):
    for cloud in CLOUDS:
        check_nearest(cloud, k, metric)


@pytest.fixture
def rounded(monkeypatch):
    """Cosines go through bfloat16, of however few rows; the rows that each tile compares again in float32."""
    monkeypatch.setattr(neighbours, "_NARROW", 1)
    monkeypatch.setattr(neighbours, "_FEW_PRODUCTS", 0)
    monkeypatch.setattr(neighbours, "has_fast_bfloat16", lambda device: True)
    compared, exactly = [], neighbours._sampled_product

    def counted(rows, columns, row, column):
        compared.append(len(row))
        return exactly(rows, columns, row, column)

    monkeypatch.setattr(neighbours, "_sampled_product", counted)
    return compared


@for_each("k", [1, 20, 200, 1024])
@for_each("tile", [2**24, 2 * 48 * 100])
def test_neighbours_that_bfloat16_leaves_are_those_of_float64(k, tile, rounded, monkeypatch):
    monkeypatch.setattr(neighbours, "_MOST_PAIRS", 2**15)  # half of all where k is all rows
    monkeypatch.setattr(neighbours, "_TILE_ELEMENTS", tile)
    monkeypatch.setattr(neighbours, "_ROUNDED_QUERIES", 1024 if tile > 2**20 else 7)
    for cloud, (bank, queries) in CLOUDS.items():
        rounded.clear()
        check_nearest(cloud, k, "cosine")
        if cloud == "gaussian" and tile > 2**20 and k == 20:
            assert k <= sum(rounded) / len(queries) < 3 * k < len(bank) / 8  # which is what is gained
        assert all(pairs <= neighbours._MOST_PAIRS for pairs in rounded)
        if cloud == "around one direction" and k == 1:
            assert not rounded  # bfloat16 tells none apart


@for_each("count", [1000, 1003, 1007])  # columns that folds leave over, and none
def test_the_largest_of_folded_rows_are_those_of_topk(count):
    values = random(32, count)
    values[0] = 0.0
    values[1, ::8] = 2.0  # more of one value than are asked for, all in one fold
    values[2, -3:] = 9.0
    found, places = neighbours._largest_of_each(values, 20)
    assert torch.equal(found, values.topk(20).values) and torch.equal(values.gather(1, places), found)
    assert all(len(row.unique()) == 20 for row in places)


def test_close_neighbours_far_from_the_middle_keep_their_distances_to_the_last_digits():
    # Where a product in float32 has an error of a tenth of the squared distances.
    bank, queries = CLOUDS["tight clusters"]
    similarities, _ = nearest_neighbours(bank, queries, k=20, metric="euclidean")
    exact = exact_similarities(bank, queries, "euclidean").topk(20).values
    torch.testing.assert_close(similarities.double(), exact, rtol=1e-5, atol=0)
    itself, _ = nearest_neighbours(bank, bank, k=1, metric="euclidean")
    assert bool((itself == 0).all())


@pytest.mark.parametrize("metric", METRICS)
def test_tiles_and_chunks_change_nothing_beyond_rounding(monkeypatch, metric):
    bank, queries = CLOUDS["gaussian"]
    whole = nearest_neighbours(bank, queries, k=30, metric=metric)
    for rows, chunk, gathered in ((100, 7, 100), (17, 64, 2**22)):
        monkeypatch.setattr(neighbours, "_TILE_ROWS", rows)
        monkeypatch.setattr(neighbours, "_CHUNK_QUERIES", chunk)
        monkeypatch.setattr(neighbours, "_GATHERED", gathered)
        similarities, indices = nearest_neighbours(bank, queries, k=30, metric=metric)
        assert torch.equal(indices, whole[1])
        torch.testing.assert_close(similarities, whole[0], rtol=1e-5, atol=1e-6)


def test_rows_at_the_same_distance_come_in_the_order_of_the_bank():
    grid = torch.cartesian_prod(torch.arange(12.0), torch.arange(12.0))
    similarities, indices = nearest_neighbours(grid, grid[:1], k=144, metric="euclidean")
    distances = torch.cdist(grid[:1].double(), grid.double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert torch.equal(indices, torch.argsort(distances.float(), dim=1, stable=True))
    bank = random(10, 8).repeat(60, 1)  # row i equals row i + 10
    similarities, indices = nearest_neighbours(bank, bank[:10], k=60, metric="euclidean")
    assert torch.equal(indices, torch.arange(10)[:, None] + 10 * torch.arange(60)) and not similarities.any()


def test_a_row_of_zeros_has_cosine_0():
    bank = torch.cat([torch.zeros(1, 4), random(1, 4), -random(1, 4)])
    similarities, indices = nearest_neighbours(bank, random(1, 4), k=3)
    assert indices.tolist() == [[1, 0, 2]] and float(similarities[0, 1]) == 0


def test_half_precision_is_widened():
    bank, queries = (cloud.half() for cloud in CLOUDS["gaussian"])
    for metric in METRICS:
        half, whole = (nearest_neighbours(*c, k=4, metric=metric) for c in ((bank, queries), (bank.float(), queries)))
        assert torch.equal(half[1], whole[1]) and half[0].dtype == torch.float32


def test_bad_features_are_refused_by_name_and_row(monkeypatch):
    monkeypatch.setattr(neighbours, "_TILE_ROWS", 100)
    monkeypatch.setattr(neighbours, "_CHUNK_QUERIES", 10)
    for value in (math.nan, math.inf, 1e30):
        for metric in METRICS:
            bank, queries = random(300, 8), random(30, 8)
            queries[12, 0] = value
            with pytest.raises(ValueError, match="row 12 of queries is"):
                nearest_neighbours(bank, queries, k=3, metric=metric)
            bank[217, 3] = value
            with pytest.raises(ValueError, match="row 217 of bank is"):
                nearest_neighbours(bank, queries[:10], k=3, metric=metric)
    for k in (0, 31):
        with pytest.raises(ValueError, match=rf"\[1, 30\].*got {k}"):
            nearest_neighbours(random(30, 4), random(2, 4), k=k)


def labelled_features(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.randint(NUM_CLASSES, (rows,), generator=torch.Generator().manual_seed(seed))
    return random(rows, columns, seed=seed) + 0.5 * labels[:, None], labels


def accuracy(classifier, queries, labels) -> float:
    return 100 * float((classifier.predict(queries) == labels.numpy()).mean())


@pytest.mark.parametrize("metric", METRICS)
def test_knn_equals_scikit_learn_near_and_far_from_the_origin(monkeypatch, metric):
    monkeypatch.setattr(neighbours, "_VOTE_CHUNK", 100)
    for k, weights, offset in (
        (1, "uniform", 0),
        (2, "uniform", 0),
        (5, "uniform", 1000 if metric == "euclidean" else 0),
        (300, "uniform", 0),
        (5, "distance", 0),
        (50, "distance", 0),
    ):
        (bank, bank_labels), (features, labels) = (labelled_features(n, 16, seed=n) for n in (300, 501))
        bank, features = bank + offset, features + offset
        classifier = KNeighborsClassifier(k, metric=metric, weights=weights, algorithm="brute")
        classifier.fit(bank.double().numpy(), bank_labels.numpy())
        expected = accuracy(classifier, features.double().numpy(), labels)
        weighting = "inverse" if weights == "distance" else "uniform"
        found = knn(bank, bank_labels, features, labels, k=k, metric=metric, weighting=weighting)
        assert found["knn_top1"] == pytest.approx(expected), (k, weights, offset)


def test_neighbours_at_distance_0_decide_inverse_votes_alone():
    bank = torch.tensor([[0.0], [0.0], [1e-3], [1e-3], [1e-3]])
    result = knn(bank, torch.tensor([1, 1, 0, 0, 0]), torch.zeros(1, 1), torch.tensor([1]), k=5, metric="euclidean",
                 weighting="inverse")  # fmt: skip
    assert result == {"knn_top1": 100}


def test_several_k_at_once_equal_each_alone():
    (bank, bank_labels), (features, labels) = (labelled_features(n, 16, seed=n) for n in (300, 400))
    for weighting in neighbours.WEIGHTINGS:
        together = knn(bank, bank_labels, features, labels, k=(20, 1, 100), weighting=weighting)
        assert list(together) == ["knn_top1_k20", "knn_top1_k1", "knn_top1_k100"]
        for k in (1, 20, 100):
            alone = knn(bank, bank_labels, features, labels, k=k, weighting=weighting)["knn_top1"]
            assert together[f"knn_top1_k{k}"] == alone


def test_exponential_votes_equal_lightly_and_are_the_same_of_distances_on_the_sphere():
    lightly = pytest.importorskip("lightly.utils.benchmarking")
    bank, bank_labels = labelled_features(1000, 64, seed=0)
    features, labels = labelled_features(300, 64, seed=1)
    bank, features = normalize(bank), normalize(features)
    theirs = lightly.knn_predict(features, bank.T, bank_labels, NUM_CLASSES, knn_k=200, knn_t=0.1)[:, 0]
    for seen in (labels, theirs):  # the same accuracy, and the same class for each query
        expected = 100 * float((theirs == seen).double().mean())
        for metric in METRICS:
            options = {"k": 200, "weighting": "exponential", "temperature": 0.1, "metric": metric}
            assert knn(bank, bank_labels, features, seen, **options)["knn_top1"] == pytest.approx(expected)


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


def test_exponentially_weighted_knn_equals_the_loop():
    (bank, bank_labels), (features, labels) = (labelled_features(n, 6, seed=n) for n in (80, 60))
    for temperature in (0.002, 1.0):
        winners = weighted_votes_by_loop(bank, bank_labels, features, 20, temperature)
        expected = 100 * sum(a == b for a, b in zip(winners, labels.tolist(), strict=True)) / 60
        options = {"k": 20, "weighting": "exponential", "temperature": temperature}
        assert knn(bank, bank_labels, features, labels, **options)["knn_top1"] == pytest.approx(expected)


def test_a_tie_of_uniform_votes_goes_to_the_smallest_class():
    bank, bank_labels = torch.tensor([[0.0], [1.0]]), torch.tensor([3, 1])
    for label, expected in [(1, 100), (3, 0)]:
        result = knn(bank, bank_labels, torch.tensor([[0.1]]), torch.tensor([label]), k=2, metric="euclidean")
        assert result["knn_top1"] == expected


def test_large_class_ids_cost_no_memory_and_the_bank_may_lack_classes():
    bank, bank_labels = labelled_features(30, 4, seed=0)
    assert knn(bank, bank_labels + 10**15, bank, bank_labels + 10**15, k=1) == {"knn_top1": 100}
    assert knn(bank.bfloat16(), bank_labels, bank.bfloat16(), torch.full((30,), 9), k=1) == {"knn_top1": 0}


def test_knn_refuses_what_is_not_defined():
    bank, bank_labels = labelled_features(30, 4, seed=0)
    arguments = {"bank": bank, "bank_labels": bank_labels, "features": bank[:3], "labels": bank_labels[:3], "k": 3}
    for changes, message in (
        ({"k": 0}, r"\[1, 30\]"),
        ({"k": 31}, r"\[1, 30\]"),
        ({"k": ()}, r"\[1, 30\]"),
        ({"k": (1, 31)}, r"\[1, 30\]"),
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
    ):
        with pytest.raises(ValueError, match=message):
            knn(**(arguments | changes))
