"""Order, workers, processes, resuming, unreadable pictures and crops of the training batches."""

import os
import re
import tempfile
from dataclasses import replace
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import PartialState
from datasets import ClassLabel, IterableDataset
from pictures import BROKEN, noise, row, write_parquet
from PIL import Image

from hf_dpssl.data import batches as batches_module
from hf_dpssl.data.batches import ImageSource, evaluation_batches, ordered_batches
from hf_dpssl.data.image_data import load_images
from hf_dpssl.data.image_table import BadImageError, ImageTable
from hf_dpssl.data.views import NATURAL, TwoViews
from hf_dpssl.runs.recipe import RunArguments

CLASSES = ClassLabel(names=["a", "b", "c"])
KINDS = ["preloaded", "table", "stream"]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def make(tmp_path):
    """make(kind, ...) -> ImageSource of `noise(0)`, `noise(1)`, ... with the label row % 3; a stream has 4 shards."""

    def source(kind, count=27, broken=(), size=(8, 8), **options):
        folder = tmp_path / f"set-{count}-{len(broken)}-{size[0]}"
        if not folder.exists():
            images = [BROKEN if i in broken else row(i, *size) for i in range(count)]
            write_parquet(folder / "train.parquet", images, label=([i % 3 for i in range(count)], CLASSES))
            held_out = [row(1000 + i, *size) for i in range(5)]
            write_parquet(folder / "test.parquet", held_out, label=([0, 1, 2, 0, 1], CLASSES))
        data = load_images(str(folder))
        if kind == "stream":
            streams = dict(train=data.train.to_iterable_dataset(4), evaluation=data.evaluation.to_iterable_dataset(2))
            data = replace(data, **streams)
        defaults = dict(image_size=8, batch_size=4, seed=0, preload_bytes=2**20 if kind == "preloaded" else 0)
        return ImageSource(data, **(defaults | options))

    return source


def take(source, count, start=(0, 0)):
    return list(islice(source.loader(start), count))


def assert_same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a["epoch"] == b["epoch"] and a["skipped"] == b["skipped"]
        assert all(torch.equal(a[key], b[key]) for key in ("images", "labels", "sample_ids"))


def marks(batches):
    """Which of the pictures `noise(0)`, ... each image of the batches is."""
    known = {noise(i).tobytes(): i for i in range(28)}
    return [known[image.permute(1, 2, 0).numpy().tobytes()] for batch in batches for image in batch["images"]]


def test_every_sample_comes_at_most_once_per_epoch_and_the_incomplete_batch_is_dropped(make):
    for kind in KINDS:
        source = make(kind)
        assert source.steps_per_epoch == (None if kind == "stream" else 6)
        batches = take(source, 12)
        assert [batch["epoch"] for batch in batches] == [0] * 6 + [1] * 6
        first, second = marks(batches[:6]), marks(batches[6:])
        for epoch in (first, second):
            assert len(epoch) == len(set(epoch)) == 24 and set(epoch) < set(range(27))
        assert first != second and first != sorted(first)
        ids = torch.cat([batch["sample_ids"] for batch in batches[:6]]).tolist()
        assert ids == (list(range(24)) if kind == "stream" else first)


def test_order_is_a_function_of_the_seed_and_pictures_keep_their_labels(make):
    for kind in KINDS:
        batches, again, other = take(make(kind), 6), take(make(kind), 6), take(make(kind, seed=1), 6)
        assert_same(again, batches)
        assert marks(other) != marks(batches)
        labels = torch.cat([batch["labels"] for batch in batches])
        assert labels.dtype == torch.int64 and labels.tolist() == [mark % 3 for mark in marks(batches)]
        assert batches[0]["images"].dtype == torch.uint8 and batches[0]["images"].shape == (4, 3, 8, 8)


def test_start_continues_exactly_from_every_point(make):
    for kind in KINDS:
        source = make(kind)
        whole = take(source, 14)
        for start, position in (((0, 1), 1), ((0, 5), 5), ((0, 6), 6), ((1, 0), 6), ((1, 4), 10)):
            assert_same(take(source, 3, start), whole[position : position + 3])


def test_slices_of_two_processes_make_one_batch_of_double_size(make):
    for kind in KINDS:
        together = take(make(kind, batch_size=8), 7)
        halves = [take(make(kind, process=(index, 2)), 7) for index in (0, 1)]
        for whole, first, second in zip(together, *halves, strict=True):
            for key in ("images", "labels", "sample_ids"):
                assert torch.equal(torch.cat([first[key], second[key]]), whole[key])
            assert first["epoch"] == second["epoch"] == whole["epoch"]


@pytest.mark.extended
def test_workers_change_nothing(make):
    """Of a stream too, although iter() of a `datasets` stream in a worker leaves out other workers' shards."""
    for num_workers in [1, 2]:
        for kind in ["table", "stream"]:
            for count, start in ((13, (0, 0)), (5, (1, 3))):
                assert_same(take(make(kind, num_workers=num_workers), count, start), take(make(kind), count, start))


def test_workers_change_nothing_for_a_stream_of_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.2, raising=False)  # 5 s a pass
    for part in range(4):
        write_parquet(tmp_path / "set" / f"train-{part}.parquet", [row(7 * part + i) for i in range(7)])
    data = load_images(str(tmp_path / "set"), streaming=True)
    assert data.train.num_shards == 4
    options = dict(image_size=8, batch_size=4, seed=0)
    plain = take(ImageSource(data, **options), 9)
    assert sorted(marks(plain[:7])) == list(range(28))
    assert_same(take(ImageSource(data, num_workers=2, **options), 9), plain)


@pytest.mark.extended
def test_two_processes_with_two_workers_read_each_picture_of_a_stream_once(make):
    halves = [take(make("stream", 28, process=(index, 2), batch_size=7, num_workers=2), 2) for index in (0, 1)]
    assert sorted(marks(halves[0]) + marks(halves[1])) == list(range(28))


def folders_by_class(tmp_path) -> list[str]:
    """A folder of images and one of save_to_disk, of 4 classes with 256 times the same picture, class by class."""
    classes = ["a", "b", "c", "d"]
    for name in classes:
        (tmp_path / "folder" / name).mkdir(parents=True)
        (tmp_path / "folder" / name / "0.png").write_bytes(row(0)["bytes"])
        for number in range(1, 256):
            os.link(tmp_path / "folder" / name / "0.png", tmp_path / "folder" / name / f"{number}.png")
    features = datasets.Features({"image": datasets.Image(), "label": ClassLabel(names=classes)})
    columns = {"image": [row(0)] * 1024, "label": [number // 256 for number in range(1024)]}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "saved")
    return [str(tmp_path / "folder"), str(tmp_path / "saved")]


def test_the_stream_of_a_folder_mixes_its_classes_has_shards_for_readers_and_goes_on_exactly(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_dpssl.data.batches._SHUFFLE_BUFFER", 64)
    for name in folders_by_class(tmp_path):
        for reading, num_workers in (("whole", 0), ("shards", 2)):
            data = load_images(name, streaming=True)
            assert data.train.num_shards == 4
            options = dict(image_size=8, batch_size=32, seed=0, stream_reading=reading, num_workers=num_workers)
            source = ImageSource(data, **options)
            batches = list(islice(source.loader(), 34))
            counts = torch.stack([batch["labels"].bincount(minlength=4) for batch in batches])
            assert (counts > 0).sum(1).min() >= 3 and counts[:32].sum(0).tolist() == [256] * 4
            readers = dict(batch["reader"] for batch in batches[:21]) if reading == "shards" else None
            again = ImageSource(load_images(name, streaming=True), **options)
            assert_same(list(islice(again.loader((0, 21), readers), 13)), batches[21:])


def counted_stream(folder, shards: int, rows: int):
    """A set of one picture, `shards` times `rows` times, whose every row leaves a mark where it is read."""
    picture = row(0)

    def read(parts):
        for part in parts:
            for number in range(rows):
                with open(folder / "read", "a") as file:
                    file.write(".")
                yield {"image": picture, "label": part * rows + number}

    stream = IterableDataset.from_generator(read, gen_kwargs={"parts": list(range(shards))})
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("int64")})
    return stream.cast(features)


def test_readers_of_shards_read_each_row_once_where_readers_of_the_whole_read_it_as_often_as_they_are(
    make, tmp_path, monkeypatch
):
    """Two processes with two workers each, over an epoch of 8 shards of 24 rows."""
    monkeypatch.setattr("hf_dpssl.data.batches._SHUFFLE_BUFFER", 16)
    found = {}
    for reading in ("whole", "shards"):
        (tmp_path / "read").write_text("")
        data = replace(make("stream").data, train=counted_stream(tmp_path, 8, 24))
        options = dict(image_size=8, batch_size=4, seed=0, num_workers=2, stream_reading=reading)
        seen = []
        for process in (0, 1):
            loader = iter(ImageSource(data, process=(process, 2), **options).loader())
            batches = list(islice(loader, 24))
            seen += torch.cat([batch["labels"] for batch in batches]).tolist()
            assert {batch["epoch"] for batch in batches} == {0}
            del loader  # ends the workers
        assert sorted(seen) == list(range(192))  # both ways, every row once
        found[reading] = len((tmp_path / "read").read_text())
    ahead = 4 * 3 * 8  # each worker prepares two batches of the next epoch, and datasets looks one block ahead
    assert found["whole"] >= 4 * 192 and 192 <= found["shards"] <= 192 + ahead
    print(f"rows read in an epoch of 192: {found}")


def test_readers_of_shards_go_on_exactly_where_they_were_and_read_no_shard_before_it_again(make, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_dpssl.data.batches._SHUFFLE_BUFFER", 16)  # blocks of 8 rows for each of two workers
    data = replace(make("stream").data, train=counted_stream(tmp_path, 4, 50))
    options = dict(image_size=8, batch_size=4, seed=0, stream_reading="shards")
    for num_workers in (0, 2):
        source = ImageSource(data, num_workers=num_workers, **options)
        whole = list(islice(source.loader(), 70))  # into the second epoch
        assert len({(b["epoch"], i) for b in whole for i in b["sample_ids"].tolist()}) == 280
        for stop in (1, 7, 50, 61):
            readers = dict(batch["reader"] for batch in whole[:stop])
            (tmp_path / "read").write_text("")
            assert_same(list(islice(source.loader(readers=readers), 3)), whole[stop : stop + 3])
            assert num_workers or len((tmp_path / "read").read_text()) < 50 + 16 + 12


def test_a_reader_goes_on_from_the_end_of_its_epoch_and_as_the_run_began_whatever_the_readers_are(make):
    shards = make("stream", stream_reading="shards")  # one block holds all rows
    whole = list(islice(shards.loader(), 15))
    last = max(i for i, batch in enumerate(whole) if batch["epoch"] == 0) + 1
    for stop in (last - 1, last, last + 1):
        readers = dict(batch["reader"] for batch in whole[:stop])
        assert_same(list(islice(shards.loader(readers=readers), 3)), whole[stop : stop + 3])
    many = make("stream", num_workers=6, stream_reading="shards")  # more than shards: read whole
    began = list(islice(many.loader(), 9))
    assert "reader" not in began[0]
    found = list(islice(shards.loader((0, 4)), 3))
    assert_same(found, began[4:7])


def test_a_stream_of_fewer_shards_than_readers_is_read_whole_and_says_so(make, caplog):
    source = make("stream", process=(0, 2), num_workers=3, stream_reading="shards")
    source.loader()
    assert "has 4 shards for 6 readers (2 processes x 3 workers)" in caplog.text
    with pytest.raises(ValueError, match=r"reader 0 of 4 .* fewer images in its shards than its batch \(9\)"):
        next(iter(make("stream", process=(0, 4), batch_size=9, stream_reading="shards").loader()))


def test_preloading_gives_the_tensors_of_reading_row_by_row(make):
    for size in ((8, 8), (20, 13)):
        preloaded, table = make("preloaded", size=size), make("table", size=size)
        assert preloaded.table.images is not None and table.table.images is None
        assert_same(take(preloaded, 8), take(table, 8))


def images_of_one_of_two(folder: str, on_bad_image: str) -> dict[str, torch.Tensor]:
    """What a process of a machine holds, which rows it decoded itself, and its error."""
    rank = torch.distributed.get_rank()
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2")
    own = []
    read = ImageTable._squares

    def counted(table, rows):
        own.extend(rows)
        return read(table, rows)

    ImageTable._squares = counted
    try:
        source = ImageSource(
            load_images(folder), image_size=8, batch_size=1, seed=0, together=True, on_bad_image=on_bad_image
        )
        held_out = source.evaluation_table(together=True)
        assert source.evaluation_table() is held_out
    except BadImageError as error:
        return {"error": torch.tensor(list(str(error).encode()))}
    finally:
        ImageTable._squares = read
    if rank == 0:
        source.training_table()  # what one process alone may ask for
    rows = {"own": torch.tensor(own), "images": source.table.images, "labels": source.table.labels}
    rows["held out"] = held_out.images
    return rows | {"skipped": torch.tensor([int(name.split()[-1]) for name in source.skipped])}


@pytest.mark.extended
def test_processes_of_a_machine_decode_a_share_each_into_one_memory(make, run_in_two, tmp_path):
    whole = make("preloaded", count=11).table
    first, second = run_in_two(images_of_one_of_two, str(tmp_path / "set-11-0-8"), "error")
    assert first["own"].tolist() == [*range(5), *range(2)] and second["own"].tolist() == [*range(5, 11), *range(2, 5)]
    expected = make("preloaded", count=11).evaluation_table().images
    for found in (first, second):
        assert torch.equal(found["held out"], expected)
        assert torch.equal(found["images"], whole.images) and torch.equal(found["labels"], whole.labels)
    broken = make("preloaded", count=11, broken=(2, 9), on_bad_image="skip")
    for found in run_in_two(images_of_one_of_two, str(tmp_path / "set-11-2-8"), "skip"):
        assert torch.equal(found["images"], broken.table.images) and found["skipped"].tolist() == [2, 9]
        assert torch.equal(found["labels"], broken.table.labels)
    for found in run_in_two(images_of_one_of_two, str(tmp_path / "set-11-2-8"), "error"):
        assert "row 2 of data set" in bytes(found["error"].tolist()).decode()  # in both, the first one
    assert not list(Path(tempfile.gettempdir()).glob("hf_dpssl-images-*"))


def sample_of_one_of_two(folder: str, shards: int) -> dict[str, torch.Tensor]:
    """Rows of a sample of the stream whose every row marks the file FOLDER/read."""
    process = (torch.distributed.get_rank(), 2)
    stream = counted_stream(Path(folder), shards, 24)
    data = replace(load_images("digits"), name="counted", train=stream, evaluation=stream)
    data = replace(data, image_column="image", label_column="label")
    batches_module._OF_A_STREAM = 30
    source = ImageSource(data, image_size=8, batch_size=1, seed=0, process=process, together=True)
    table = source.training_table(together=True)
    assert source.training_table() is table
    return {"labels": table.labels}


def test_processes_read_a_stream_once_for_the_sample_that_one_process_draws(make, run_in_two, tmp_path, monkeypatch):
    monkeypatch.setattr(batches_module, "_OF_A_STREAM", 30)
    for shards in (1, 3):
        data = replace(make("stream").data, train=counted_stream(tmp_path, shards, 24))
        alone = ImageSource(data, image_size=8, batch_size=4, seed=0).training_table()
        (tmp_path / "read").unlink()
        for found in run_in_two(sample_of_one_of_two, str(tmp_path), shards):
            assert found["labels"].tolist() == alone.labels.tolist()
        assert len((tmp_path / "read").read_text()) == shards * 24  # of both together
        assert len(alone) == min(30, shards * 24)


def test_unreadable_picture_is_an_error_that_names_row_set_and_file(make):
    for num_workers in [0, 2]:
        for kind in KINDS:
            place = "image [0-9]+ of epoch 0" if kind == "stream" else "row 9"
            message = rf"{place} of data set '.*set-27-1-8' \(broken.png\) is not a readable picture: no picture format"
            found = ""
            try:
                take(make(kind, broken=[9], num_workers=num_workers), 7)
            except BadImageError as error:
                error.__traceback__, found = None, str(error)  # its frames keep the loader's workers, for 5 s each
            assert re.search(f"{message}.*--on_bad_image skip", found)


def test_preloading_counts_unreadable_pictures_and_gives_the_batches_of_a_table_that_is_not_preloaded(make):
    broken = [0, 9, 10, 26]
    source = make("preloaded", broken=broken, on_bad_image="skip", batch_size=6)
    assert list(source.skipped) == [f"train row {number}" for number in broken]
    assert all("broken.png" in reason for reason in source.skipped.values())
    assert source.steps_per_epoch == 4 and source.num_images == 27
    assert source.table.random_rows(None) == [number for number in range(27) if number not in broken]
    batches = take(source, 12)
    assert not any(batch["skipped"] for batch in batches)
    read = take(make("table", broken=broken, on_bad_image="skip", batch_size=6), 12)
    assert set().union(*(batch["skipped"] for batch in read)) == set(broken)
    assert_same(batches, [batch | {"skipped": {}} for batch in read])


def test_unreadable_row_is_replaced_by_the_next_readable_one(make):
    broken = [3, 4, 26]
    replacement = {3: 5, 4: 5, 26: 0}
    for batch in (batches := take(make("table", broken=broken, on_bad_image="skip"), 12)):
        ids = batch["sample_ids"].tolist()
        assert marks([batch]) == [replacement.get(i, i) for i in ids]
        assert batch["labels"].tolist() == [replacement.get(i, i) % 3 for i in ids]
        assert set(ids) & set(broken) <= set(batch["skipped"]) <= set(broken)
    skipped = {row: reason for batch in batches for row, reason in batch["skipped"].items()}
    assert set(skipped) == set(broken) and all("broken.png" in reason for reason in skipped.values())


def test_unreadable_picture_of_a_stream_is_replaced_by_others_of_its_batch(make):
    batches = take(make("stream", 28, broken=[3, 4], on_bad_image="skip"), 7)
    assert sum(len(batch["skipped"]) for batch in batches) == 2
    for number, batch in enumerate(batches):
        assert batch["sample_ids"].tolist() == list(range(4 * number, 4 * number + 4))
        assert set(batch["skipped"]) <= set(batch["sample_ids"].tolist())
        found = marks([batch])
        assert len(found) == 4 and len(set(found)) == 4 - len(batch["skipped"])
        assert batch["labels"].tolist() == [mark % 3 for mark in found]
    assert set(marks(batches)) == set(range(28)) - {3, 4}


def test_nothing_readable_is_an_error_also_when_skipping(make):
    for kind, message in [
        ("preloaded", "none of the 12 images"),
        ("table", "no image of .* can be read"),
        ("stream", "a whole batch of"),
    ]:
        with pytest.raises(BadImageError, match=f"{message}.*broken.png"):
            take(make(kind, 12, broken=range(12), on_bad_image="skip"), 1)


def test_fewer_images_than_one_batch_of_all_processes_is_an_error(make):
    for kind in KINDS:
        with pytest.raises(ValueError, match=r"fewer (images )?than one batch .*: lower --batch_size"):
            take(make(kind, batch_size=14, process=(0, 2)), 1)
        assert len(take(make(kind, batch_size=13, process=(0, 2)), 2)) == 2


def test_rows_must_fill_a_batch_whether_preloaded_or_not(make):
    for kind in ("preloaded", "table"):
        with pytest.raises(ValueError, match=r"holds 3 images, fewer than one batch of all processes \(4 x 1\)"):
            make(kind, 3, broken=[2], on_bad_image="skip")
        assert make(kind, 4, broken=[2], on_bad_image="skip").steps_per_epoch == 1


def test_on_bad_image_must_be_known(make):
    with pytest.raises(ValueError, match="'error' or 'skip', got 'ignore'"):
        make("table", on_bad_image="ignore")


def test_ordered_batches_of_too_few_samples_are_an_error_and_no_endless_loop(make):
    with pytest.raises(ValueError, match=r"27 samples are fewer than one batch of all processes \(7 x 4\)"):
        ordered_batches(make("table").table, 7, seed=0, process=(1, 4))


def views(seed=0):
    return TwoViews(NATURAL, [0.5] * 3, [0.5] * 3, seed, crop=False)


def test_views_cropped_while_loading_are_pillows_crops_of_the_full_picture(make):
    source = make("table", size=(30, 24), views=views())
    (batch,) = take(source, 1, start=(2, 1))
    assert batch["images"].shape == (4, 2, 3, 8, 8) and batch["images"].dtype == torch.uint8
    for number, sample in enumerate(batch["sample_ids"].tolist()):
        picture = Image.fromarray(noise(sample, 30, 24))
        for view in (1, 2):
            top, left, height, width = views().parameters(torch.tensor([sample]), 2, view, 30, 24).boxes[0].tolist()
            box = (left, top, left + width, top + height)
            expected = np.asarray(picture.resize((8, 8), Image.Resampling.BICUBIC, box=box))
            assert np.array_equal(batch["images"][number, view - 1].permute(1, 2, 0).numpy(), expected)


def test_views_cropped_while_loading_depend_on_seed_epoch_and_sample_alone(make):
    def crops(count, start=(0, 0), view_seed=0, **options):
        batches = take(make("table", size=(30, 24), views=views(view_seed), **options), count, start)
        return {i: image for b in batches for i, image in zip(b["sample_ids"].tolist(), b["images"], strict=True)}

    reference = crops(6)
    for other in (crops(12, batch_size=2), crops(3, seed=7, num_workers=2)):
        shared = reference.keys() & other.keys()
        assert len(shared) > 5 and all(torch.equal(reference[i], other[i]) for i in shared)
    for other in (crops(6, start=(1, 0)), crops(6, view_seed=1)):
        assert all(not torch.equal(reference[i], other[i]) for i in reference.keys() & other.keys())
    assert all(not torch.equal(first, second) for first, second in reference.values())


def test_stream_with_views_and_workers_equals_the_one_without_workers(make):
    plain = take(make("stream", size=(30, 24), views=views()), 7)
    assert plain[0]["images"].shape == (4, 2, 3, 8, 8)
    assert_same(take(make("stream", size=(30, 24), views=views(), num_workers=2), 7), plain)


def test_run_crops_while_loading_where_any_picture_is_larger_than_asked_for(tmp_path):
    sizes = [(8, 8)] * 19
    for case, more in enumerate([(8, 30), (30, 9)]):
        images = [row(i, *size) for i, size in enumerate([*sizes, more])]
        data = load_images(str(write_parquet(tmp_path / f"{case}.parquet", images)), hold_out=False)
        both = TwoViews(NATURAL, [0.5] * 3, [0.5] * 3, 0)
        source = ImageSource.from_arguments(data, RunArguments(batch_size=5), PartialState(), 8, both)
        assert both.crop is (case == 0) and take(source, 1)[0]["images"].ndim == 4 + case
        stream = replace(data, train=data.train.to_iterable_dataset(2))
        both = TwoViews(NATURAL, [0.5] * 3, [0.5] * 3, 0)
        source = ImageSource.from_arguments(stream, RunArguments(batch_size=5), PartialState(), 8, both)
        assert both.crop is False and take(source, 1)[0]["images"].shape == (5, 2, 3, 8, 8)


def test_run_crops_while_loading_where_pictures_are_larger_than_asked_for(make):
    for side, cropped in [(8, False), (9, True)]:
        arguments, both = (
            RunArguments(batch_size=5, seed=3, preload_gb=0.001),
            TwoViews(NATURAL, [0.5] * 3, [0.5] * 3, 0),
        )
        data = make("table", size=(side, side)).data
        source = ImageSource.from_arguments(data, arguments, PartialState(), 8, both)
        assert both.crop is not cropped
        (batch,) = take(source, 1)
        assert batch["images"].shape == ((5, 2, 3, 8, 8) if cropped else (5, 3, 8, 8))
        assert (source.batch_size, source.seed, source.process) == (5, 3, (0, 1))
        assert source.training_table().__getitems__([(0, 1)])["images"].shape == (1, 3, 8, 8)


def test_evaluation_batches_hold_every_row_once_in_order(make):
    for kind in KINDS:
        source = make(kind)
        batches = list(evaluation_batches(source.training_table(), 10))
        assert [len(batch["images"]) for batch in batches] == [10, 10, 7] and marks(batches) == list(range(27))
        (held_out,) = evaluation_batches(source.evaluation_table(), 10)
        assert held_out["labels"].tolist() == [0, 1, 2, 0, 1]
        assert np.array_equal(held_out["images"][3].permute(1, 2, 0).numpy(), noise(1003))


def test_tables_of_a_stream_sorted_by_class_are_of_all_its_classes(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_dpssl.data.batches._OF_A_STREAM", 30)
    for split in ("train", "test"):
        labels = ([i // 30 for i in range(90)], CLASSES)
        write_parquet(tmp_path / "set" / f"{split}.parquet", [row(i) for i in range(90)], label=labels)
    source = ImageSource(load_images(str(tmp_path / "set"), streaming=True), image_size=8, batch_size=4, seed=0)
    for table in (source.training_table(), source.evaluation_table()):
        (batch,) = evaluation_batches(table, 100)
        counts = batch["labels"].bincount(minlength=3)
        assert counts.sum() == 30 and counts.min() > 3  # the first 30 are of one class


def test_evaluation_batches_leave_out_unreadable_pictures(make):
    for kind in KINDS:
        broken, readable = [0, 5, 6, 7, 8, 26], [1, 2, 3, 4, *range(9, 26)]
        batches = list(evaluation_batches(make(kind, broken=broken, on_bad_image="skip").training_table(), 3))
        assert all(len(batch["images"]) for batch in batches) and marks(batches) == readable
        assert torch.cat([batch["labels"] for batch in batches]).tolist() == [i % 3 for i in readable]


def test_table_without_labels_gives_minus_one(tmp_path):
    data = load_images(str(write_parquet(tmp_path / "plain.parquet", [row(i) for i in range(10)])))
    batch = ImageTable(data, data.train, 8).__getitems__([(0, 2), (0, 5)])
    assert batch["labels"].tolist() == [-1, -1] and batch["sample_ids"].tolist() == [2, 5]
