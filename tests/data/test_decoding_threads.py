"""Decoding by threads: what comes out is what one thread gives, in order and not far ahead; and where it is used."""

import os
import threading
import time

import pytest
import torch
from cases import for_each
from datasets import ClassLabel
from pictures import BROKEN, encoded, noise, write_parquet

from hf_dpssl.data import decoding_threads, image_table
from hf_dpssl.data.batches import evaluation_batches
from hf_dpssl.data.decoding_threads import in_threads, usable_cores
from hf_dpssl.data.image_data import load_images
from hf_dpssl.data.image_table import BadImageError, ImageTable, decode_rows

COUNT = 30
ALL = [1, 2, 5]  # threads


def uneven(item: int) -> int:
    """The square; of every fifth item late."""
    time.sleep(0.003 * (item % 5 == 0))
    return item**2


@for_each("threads", ALL)
def test_results_come_in_the_order_of_their_items(threads):
    for count in (0, 1, 4, 41):
        assert list(in_threads(uneven, iter(range(count)), threads)) == [item**2 for item in range(count)]


def test_threads_work_at_the_same_time():
    together = threading.Barrier(3, timeout=60)  # passed by three at once
    assert len(list(in_threads(lambda item: together.wait(), range(0, 12), 3))) == 12


@for_each("threads", ALL)
def test_no_more_items_are_read_ahead_than_stated(threads):
    read = []
    results = in_threads(uneven, (read.append(item) or item for item in range(200)), threads)
    ahead = [len(read) - number for number, _ in enumerate(results)]
    assert max(ahead) <= (1 if threads == 1 else 4 * (threads + 3)) and len(read) == 200


@for_each("threads", ALL)
def test_an_error_comes_after_the_results_before_it_and_nothing_goes_on_behind_it(threads):
    done = []

    def fails(item: int) -> int:
        done.append(item)
        return item // (item != 40)

    found, before = [], threading.active_count()
    with pytest.raises(ZeroDivisionError):
        for result in in_threads(fails, range(1000), threads):
            found.append(result)
    assert found == list(range(40)) and len(done) < 100
    assert threading.active_count() == before


def test_cores_are_divided_by_the_processes_of_the_machine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    for processes, expected in ((1, 12), (4, 3), (5, 2), (24, 1)):
        monkeypatch.setattr(decoding_threads, "local_process", lambda count=processes: (0, count))
        assert usable_cores() == expected
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(96)), raising=False)
    monkeypatch.setattr(decoding_threads, "local_process", lambda: (0, 1))
    assert usable_cores() == 16


@pytest.fixture
def broken_set(tmp_path):
    """Noise of different sizes, as PNG and JPEG; 7 and 8 are no pictures."""
    sizes = [(9 + number % 5, 8 + number % 7) for number in range(COUNT)]
    files = [encoded(noise(i, *size), ("PNG", "JPEG")[i % 2]) for i, size in enumerate(sizes)]
    images = [BROKEN if i in (7, 8) else {"bytes": file, "path": f"{i}"} for i, file in enumerate(files)]
    labels = ([i % 3 for i in range(COUNT)], ClassLabel(names=["a", "b", "c"]))
    write_parquet(tmp_path / "set" / "test.parquet", images[:1], label=(labels[0][:1], labels[1]))
    return load_images(str(write_parquet(tmp_path / "set" / "train.parquet", images, label=labels).parent))


def tables(data, threads, monkeypatch, on_bad_image="skip", preload_bytes=10**6):
    """A table, preloaded or not, whose pictures so many threads decode."""
    monkeypatch.setattr(decoding_threads, "usable_cores", lambda: threads)
    monkeypatch.setattr(image_table, "_SMALL", 0)
    table = ImageTable(data, data.train, 8, on_bad_image)
    bad = table.preload(preload_bytes, show_progress=False)
    return table, bad


def test_tables_of_several_threads_equal_those_of_one(broken_set, monkeypatch):
    (expected, reasons), *others = [tables(broken_set, threads, monkeypatch) for threads in ALL]
    assert sorted(reasons) == [7, 8] and len(expected.images) == COUNT
    for found, bad in others:
        assert (
            bad == reasons and torch.equal(found.images, expected.images) and torch.equal(found.labels, expected.labels)
        )
    kept = [row for row in range(COUNT) if row not in (7, 8)]
    for threads in ALL:
        table, _ = tables(broken_set, threads, monkeypatch, preload_bytes=0)
        batches = list(evaluation_batches(table, 6))
        assert torch.equal(torch.cat([batch["images"] for batch in batches]), expected.images[kept])
        assert torch.cat([batch["labels"] for batch in batches]).tolist() == [row % 3 for row in kept]
        assert torch.cat([batch["sample_ids"] for batch in batches]).tolist() == kept
        assert table.skipped == {f"row {row}": reason for row, reason in reasons.items()}


@for_each("threads", ALL)
def test_the_first_unreadable_picture_is_named_after_the_batches_before_it(threads, broken_set, monkeypatch):
    message = r"^row 7 of data set '.*set' \(broken.png\) is not a readable picture: no picture format"
    with pytest.raises(BadImageError, match=message):
        tables(broken_set, threads, monkeypatch, "error")
    table, _ = tables(broken_set, threads, monkeypatch, "error", preload_bytes=0)
    batches = evaluation_batches(table, 5)
    assert len(next(batches)["images"]) == 5
    with pytest.raises(BadImageError, match=message):
        next(batches)


def test_whole_pictures_come_with_their_labels_and_bad_ones_as_errors(broken_set, monkeypatch):
    monkeypatch.setattr(decoding_threads, "usable_cores", lambda: 3)
    monkeypatch.setattr(image_table, "_SMALL", 0)
    split = broken_set.train
    found = list(decode_rows(broken_set, ((split[row], f"row {row}") for row in range(COUNT))))
    for row, one in enumerate(found):
        if row in (7, 8):
            assert isinstance(one, BadImageError) and f"row {row} of" in str(one)
        else:
            assert one[0].size == (8 + row % 7, 9 + row % 5) and one[1] == row % 3


def test_small_pictures_are_decoded_by_the_callers_thread_and_others_beside_it(broken_set, monkeypatch):
    monkeypatch.setattr(decoding_threads, "usable_cores", lambda: 3)
    seen, decode_row = set(), image_table.decode_row

    def watched(*given):
        seen.add(threading.current_thread() is threading.main_thread())
        return decode_row(*given)

    monkeypatch.setattr(image_table, "decode_row", watched)
    for side, by_caller in ((95, True), (96, False)):
        seen.clear()
        values = {"image": {"bytes": encoded(noise(0, side, side)), "path": None}, "label": 0}
        found = list(decode_rows(broken_set, ((values, f"row {row}") for row in range(9)), size=8))
        assert len(found) == 9 and seen == {by_caller}
    assert list(decode_rows(broken_set, [])) == []
