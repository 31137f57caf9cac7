"""The k nearest rows: against float64, whatever the precision, the tiles and the chunks; ties; bad input."""

import pytest
import torch
from torch.nn.functional import normalize

from hf_dpssl.evaluation import candidates, nearest_neighbours
from hf_dpssl.evaluation.candidates import Search

BOTH = pytest.mark.parametrize("precision", ["float32", "bfloat16"])
METRICS = pytest.mark.parametrize("metric", ["cosine", "euclidean"])


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def near_ties(rows: int, columns: int, spread: float) -> torch.Tensor:
    """Vectors around one direction, closer together than bfloat16 can tell apart."""
    return random(1, columns, seed=7) + spread * random(rows, columns, seed=8)


def exact_similarities(bank, queries, metric) -> torch.Tensor:
    bank, queries = bank.double(), queries.double()
    if metric == "cosine":
        return normalize(queries, dim=1) @ normalize(bank, dim=1).T
    return -torch.cdist(queries, bank, compute_mode="donot_use_mm_for_euclid_dist")


CLOUDS = {
    "gaussian": (random(2048, 48), random(64, 48, seed=1)),
    "few columns": (random(2048, 2), random(64, 2, seed=1)),
    "after a relu": (random(2048, 48).relu() + 1, random(64, 48, seed=1).relu() + 1),
    "far from the origin": (random(2048, 48) + 1000, random(64, 48, seed=1) + 1000),
    "near ties": (near_ties(2048, 48, 1e-3), near_ties(64, 48, 1e-3)),
    "one outlier": (torch.cat([random(2047, 48), 1e4 * random(1, 48)]), random(64, 48, seed=1)),
    "tiny": (1e-15 * random(2048, 48), 1e-15 * random(64, 48, seed=1)),
}


@BOTH
@METRICS
@pytest.mark.parametrize("cloud", CLOUDS)
@pytest.mark.parametrize("k", [1, 20, 2048])
def test_neighbours_are_those_of_float64(cloud, metric, precision, k):
    bank, queries = CLOUDS[cloud]
    similarities, indices = nearest_neighbours(bank, queries, k=k, metric=metric, candidates=precision)
    exact = exact_similarities(bank, queries, metric)
    scale = 1.0 if metric == "cosine" else float(exact.abs().median())
    # What is returned is the similarity of the row that is named, and no other row is nearer than float32 can tell.
    torch.testing.assert_close(similarities.double() / scale, exact.gather(1, indices) / scale, rtol=1e-6, atol=1e-6)
    best = exact.topk(k).values
    torch.testing.assert_close(exact.gather(1, indices) / scale, best / scale, rtol=1e-6, atol=1e-6)
    assert all(len(row.unique()) == k for row in indices)


@METRICS
@pytest.mark.parametrize("cloud", CLOUDS)
def test_bfloat16_candidates_give_the_very_same_result(cloud, metric):
    bank, queries = CLOUDS[cloud]
    by_precision = [
        nearest_neighbours(bank, queries, k=20, metric=metric, candidates=precision)
        for precision in ("float32", "bfloat16")
    ]
    for ours, theirs in zip(*by_precision, strict=True):
        assert torch.equal(ours, theirs)


def test_bfloat16_alone_would_lose_neighbours_among_near_ties():
    bank, queries = CLOUDS["near ties"]
    bank, queries = normalize(bank, dim=1), normalize(queries, dim=1)
    naive = (queries.bfloat16() @ bank.bfloat16().T).topk(20).indices
    _, indices = nearest_neighbours(bank, queries, k=20, candidates="bfloat16")
    shared = [len(set(a.tolist()) & set(b.tolist())) for a, b in zip(naive, indices, strict=True)]
    assert sum(shared) / len(shared) < 10


@pytest.mark.parametrize(("cloud", "separates"), [("gaussian", True), ("near ties", False)])
def test_bfloat16_is_used_where_it_separates_and_float32_where_it_does_not(monkeypatch, cloud, separates):
    answers, narrow = [], Search._narrow

    def recorded(self, tile, part):
        answers.append((tile.rows.dtype, narrow(self, tile, part)))
        return answers[-1][1]

    monkeypatch.setattr(Search, "_narrow", recorded)
    nearest_neighbours(*CLOUDS[cloud], k=20, candidates="bfloat16")
    assert answers == [(torch.bfloat16, separates)] + ([] if separates else [(torch.float32, True)])


@METRICS
@pytest.mark.parametrize("cloud", ["gaussian", "near ties", "after a relu"])
def test_tiles_and_chunks_change_nothing(monkeypatch, cloud, metric):
    bank, queries = CLOUDS[cloud][0][:600], CLOUDS[cloud][1][:20]
    whole = nearest_neighbours(bank, queries, k=30, metric=metric, candidates="float32")
    for tile, chunk, pairs in ((2**14, 2**12, 2**21), (2**16, 2**13, 2**9), (2**15, 1, 2**21)):
        monkeypatch.setattr(candidates, "_TILE_BYTES", tile)
        monkeypatch.setattr(candidates, "_CHUNK_BYTES", chunk)
        monkeypatch.setattr(candidates, "_MAX_PAIRS", pairs)
        for precision in ("float32", "bfloat16"):
            parts = nearest_neighbours(bank, queries, k=30, metric=metric, candidates=precision)
            assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@METRICS
@BOTH
def test_equal_rows_come_in_the_order_of_the_bank(monkeypatch, metric, precision):
    monkeypatch.setattr(candidates, "_TILE_BYTES", 2**14)
    monkeypatch.setattr(candidates, "_MAX_PAIRS", 1000)
    bank = random(10, 8).repeat(60, 1)  # row i equals row i + 10
    similarities, indices = nearest_neighbours(bank, bank[:10], k=60, metric=metric, candidates=precision)
    assert torch.equal(indices, torch.arange(10)[:, None] + 10 * torch.arange(60))
    assert bool((similarities == similarities[:, :1]).all())


@BOTH
def test_ties_on_a_grid_are_broken_by_the_smaller_index(precision):
    grid = torch.cartesian_prod(torch.arange(20.0), torch.arange(20.0))
    similarities, indices = nearest_neighbours(grid, grid, k=9, metric="euclidean", candidates=precision)
    distances = torch.cdist(grid.double(), grid.double(), compute_mode="donot_use_mm_for_euclid_dist")
    expected = torch.argsort(distances.float(), dim=1, stable=True)[:, :9]
    assert torch.equal(indices, expected)
    assert bool((similarities[:, 0] == 0).all())


@METRICS
def test_approximate_similarities_err_by_less_than_their_margin(metric):
    for name, (bank, queries) in CLOUDS.items():
        if name == "tiny":
            continue
        spread = normalize(bank, dim=1) if metric == "cosine" else bank
        for matmul in ("highest", "medium"):
            torch.set_float32_matmul_precision(matmul)
            try:
                for dtype in (torch.float32, torch.bfloat16):
                    search = Search(queries, spread.mean(0), 1, metric, dtype)
                    tile = candidates._Tile(bank, bank.norm(dim=1), search.centre, metric, dtype)
                    extra = torch.ones(len(queries), tile.rows.shape[1] - bank.shape[1])
                    rows = torch.cat([search.centred, extra], 1).to(dtype)
                    error = rows.double() @ tile.rows.double().T - exact_ranking(search, bank, metric)
                    computed = candidates.product(rows, tile.rows).double() - exact_ranking(search, bank, metric)
                    margin = search._margin(tile, slice(0, len(queries))).double()
                    rounding = 2.0**-8 * candidates.product(rows, tile.rows).abs().double()
                    assert bool((error.abs().amax(1) <= margin).all()), name
                    allowed = margin[:, None] + (rounding if dtype == torch.bfloat16 else 0)
                    assert bool((computed.abs() <= allowed).all()), name
            finally:
                torch.set_float32_matmul_precision("highest")


def exact_ranking(search: Search, bank, metric) -> torch.Tensor:
    exact = exact_similarities(bank, search.queries, metric)
    exact = exact if metric == "cosine" else -exact.square() / 2
    constant = search.constant.double()
    if metric == "cosine":
        constant = search.queries.double() @ search.centre.double()
    return exact - constant[:, None]


@METRICS
def test_gathered_pairs_have_the_same_similarity_as_sampled_products(metric):
    bank, queries = CLOUDS["gaussian"]
    search = Search(queries, bank.mean(0), 5, metric, torch.float32)
    tile = candidates._Tile(bank, bank.norm(dim=1), search.centre, metric, torch.float32)
    query, row = torch.arange(64).repeat_interleave(3), torch.arange(192) * 7
    expected = exact_similarities(bank, queries, metric)[query, row]
    for compare in (search._compare, search._compare_gathered):
        found = compare(tile, search.queries, query, row)
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_a_row_of_zeros_has_cosine_0():
    bank = torch.cat([torch.zeros(1, 4), random(1, 4), -random(1, 4)])
    similarities, indices = nearest_neighbours(bank, random(1, 4), k=3)
    assert indices.tolist() == [[1, 0, 2]] and float(similarities[0, 1]) == 0


def test_half_precision_and_more_queries_than_one_block(monkeypatch):
    monkeypatch.setattr("hf_dpssl.evaluation.neighbours._QUERY_BYTES", 2**12)
    bank, queries = CLOUDS["gaussian"]
    half = nearest_neighbours(bank.half(), queries.half(), k=4)
    whole = nearest_neighbours(bank.half().float(), queries.half().float(), k=4)
    assert all(torch.equal(a, b) for a, b in zip(half, whole, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_features_that_are_not_finite_are_refused_by_name_and_row(monkeypatch, metric, value):
    monkeypatch.setattr(candidates, "_TILE_BYTES", 2**12)
    bank, queries = random(300, 8), random(30, 8)
    bank[217, 3] = value
    with pytest.raises(ValueError, match="row 217 of bank is"):
        nearest_neighbours(bank, queries, k=3, metric=metric)
    queries[12, 0] = value
    with pytest.raises(ValueError, match="row 12 of queries is"):
        nearest_neighbours(bank, queries, k=3, metric=metric)


@pytest.mark.parametrize("k", [0, 31])
def test_more_neighbours_than_rows_are_refused(k):
    with pytest.raises(ValueError, match=rf"\[1, 30\].*got {k}"):
        nearest_neighbours(random(30, 4), random(2, 4), k=k)
