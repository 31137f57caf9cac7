"""Random subsets: exact sizes, shares of classes, seeds; samples of streams; no alias with ordered data."""

import numpy as np
import torch
from datasets import ClassLabel
from pictures import row, write_parquet

from hf_dpssl.data.image_data import load_images
from hf_dpssl.data.subsets import random_rows, sample_of_parts
from hf_dpssl.evaluation import knn


def test_subsets_have_exactly_the_size_asked_for_and_are_functions_of_the_seed():
    for size, limit in [(10, 3), (10, 10), (10, 99), (1, 1), (1000, 7), (1000, 999), (5, 0), (7, None)]:
        for labels in (None, torch.arange(size) % 3):
            rows = list(random_rows(size, limit, labels=labels))
            assert len(rows) == (size if limit is None else min(size, limit))
            assert rows == sorted(set(rows)) and set(rows) <= set(range(size))
            assert rows == list(random_rows(size, limit, labels=labels, seed=0))
    assert random_rows(1000, 100, seed=1) != random_rows(1000, 100) != list(range(0, 1000, 10))


def test_each_class_has_its_share_to_within_a_row():
    counts = [500, 300, 3, 1, 96, 100]
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(-1, 5), counts))
    for limit in (10, 100, 257, 999):
        found = np.bincount(labels[random_rows(1000, limit, labels=labels)] + 1, minlength=6)
        assert found.sum() == limit and (np.abs(found - limit * np.array(counts) / 1000) <= 1).all()


def test_every_row_is_drawn_equally_often_over_seeds():
    drawn = np.zeros((2, 40))
    labels = [0] * 30 + [1] * 10
    for seed in range(2000):
        drawn[0][random_rows(40, 8, seed=seed)] += 1
        drawn[1][random_rows(40, 8, labels=labels, seed=seed)] += 1
    assert (np.abs(drawn / 2000 - 0.2) < 5 * (0.16 / 2000) ** 0.5).all()


def test_a_sample_holds_every_row_of_all_parts_equally_often_in_their_order():
    parts = [(0, [{"row": i} for i in range(20)]), (1, []), (2, [{"row": i} for i in range(20, 50)])]
    held = np.zeros(50)
    for seed in range(2000):
        found = [entry["row"] for entry in sample_of_parts(parts, 10, seed=seed)]
        assert len(found) == 10 and found == sorted(found)
        held[found] += 1
    assert (np.abs(held / 2000 - 0.2) < 5 * (0.16 / 2000) ** 0.5).all()
    for few in (20, 0):
        assert sample_of_parts(parts[: few and 2], 30) == [{"row": i} for i in range(few)]


def test_ten_interleaved_classes_have_the_neighbours_of_all_rows():
    """A stride of ten would leave one class in the bank, and accuracy at a tenth."""
    centres = torch.randn(10, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(2000) % 10
    points = centres[labels] + 0.5 * torch.randn(2000, 8, generator=torch.Generator().manual_seed(1))
    bank, queries = torch.arange(1000), torch.arange(1000, 2000)
    whole = knn(points[bank], labels[bank], points[queries], labels[queries], k=5)["knn_top1"]
    rows = torch.tensor(random_rows(1000, 100, labels=labels[bank]))
    found = knn(points[rows], labels[rows], points[queries], labels[queries], k=5)["knn_top1"]
    assert whole > 90 and found > whole - 10


def test_a_tenth_is_held_out_of_each_class_and_no_class_is_lost(tmp_path):
    names = ClassLabel(names=["many", "few", "one"])
    labels = [0] * 60 + [1] * 39 + [2]
    path = write_parquet(tmp_path / "set.parquet", [row(i) for i in range(100)], label=(labels, names))
    data = load_images(str(path))
    assert np.bincount(data.evaluation["label"][:], minlength=3).tolist() == [6, 4, 0]
    assert np.bincount(data.train["label"][:], minlength=3).tolist() == [54, 35, 1]
