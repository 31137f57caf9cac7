"""Cached latents against direct encoding; what is reused, what is rebuilt, what survives an interruption."""

import json
import pickle
import shutil

import datasets
import numpy as np
import pytest
import torch
from cases import for_each
from pictures import noise
from tiny_latents import COUNT, assert_holds, build, encoded, make_autoencoder, make_table, written

from hf_dpssl.data.batches import ordered_batches
from hf_dpssl.data.image_data import load_images
from hf_dpssl.data.image_table import BadImageError, ImageTable
from hf_dpssl.latent_training.latent_cache import LatentTable


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture(scope="module")
def autoencoder():
    return make_autoencoder()


@pytest.fixture
def table(tmp_path):
    return make_table(tmp_path / "set")


@for_each("rows_per_shard, shards", [(1000, 1), (23, 1), (22, 2), (10, 3), (1, 23)])
def test_cache_equals_direct_encoding_in_any_number_of_shards(autoencoder, table, tmp_path, rows_per_shard, shards):
    cached = build(autoencoder, table, tmp_path / "cache", rows_per_shard=rows_per_shard)
    assert len(cached.shards) == shards
    assert_holds(cached, autoencoder, range(COUNT))


@for_each("rows_per_shard", [1000, 10, 1])
def test_cache_of_a_stream_holds_the_whole_stream_and_survives_an_interruption(autoencoder, tmp_path, rows_per_shard):
    make_table(tmp_path / "set")
    stream = load_images(str(tmp_path / "set"), streaming=True)
    table = ImageTable(stream, stream.train, 16)
    built = build(autoencoder, table, tmp_path / "cache", rows_per_shard=rows_per_shard)
    assert_holds(built, autoencoder, range(COUNT))
    before = written(tmp_path / "cache")
    for name in ("index.json", "latents-00000-00000.npy"):
        (tmp_path / "cache" / name).unlink()
    assert_holds(
        build(autoencoder, table, tmp_path / "cache", rows_per_shard=rows_per_shard), autoencoder, range(COUNT)
    )
    after = written(tmp_path / "cache")
    rewritten = {name for name in before if after[name] != before[name]}
    assert rewritten == {"index.json", "labels.npy", "latents-00000-00000.npy", "latents-00000-00000.json"}


def test_unreadable_rows_of_a_stream_are_listed_by_their_number_in_it(autoencoder, tmp_path):
    broken = {3, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19}  # the second shard wholly
    make_table(tmp_path / "set", broken=broken)
    stream = load_images(str(tmp_path / "set"), streaming=True)
    table = ImageTable(stream, stream.train, 16, "skip")
    cached = build(autoencoder, table, tmp_path / "cache")
    assert_holds(cached, autoencoder, [i for i in range(COUNT) if i not in broken])
    assert set(table.skipped) == {f"row {i}" for i in broken}
    with pytest.raises(BadImageError, match="row 3 of"):
        build(autoencoder, ImageTable(stream, stream.train, 16), tmp_path / "other")


def test_autoencoder_of_grey_images_is_shown_the_mean_of_the_channels(table, tmp_path):
    model = make_autoencoder(num_channels=1)
    cached = build(model, table, tmp_path / "cache")
    colours = torch.from_numpy(np.stack([noise(i, 16, 16) for i in range(COUNT)])).permute(0, 3, 1, 2)
    grey = (colours.double().mean(1, keepdim=True) / 127.5 - 1).float()
    assert torch.allclose(cached.latents(torch.arange(COUNT)), model.encode(grey).latents, atol=1e-5)


def test_latents_of_different_pictures_differ(autoencoder):
    latents = encoded(autoencoder, range(COUNT)).flatten(1)
    assert torch.pdist(latents).min() > 1e-2  # else the comparisons above would show nothing


@for_each("rows", [[22, 0, 10, 9], [5, 5, 20], [19], list(range(COUNT))[::-1]])
def test_rows_come_in_the_order_asked_for(autoencoder, table, tmp_path, rows):
    cached = build(autoencoder, table, tmp_path / "cache")
    assert torch.allclose(cached.latents(torch.tensor(rows)), encoded(autoencoder, rows), atol=1e-5)
    batch = cached.__getitems__([(7, i) for i in rows])
    assert torch.equal(batch["latents"], cached.latents(torch.tensor(rows)))
    assert batch["labels"].tolist() == [i % 3 for i in rows]
    assert batch["sample_ids"].tolist() == rows and batch["epoch"] == 7


def test_cache_is_read_back_from_its_folder(autoencoder, table, tmp_path):
    built = build(autoencoder, table, tmp_path / "cache")
    read = LatentTable(tmp_path / "cache")
    assert read.fingerprint == built.fingerprint
    assert_holds(read, autoencoder, range(COUNT))


def test_training_batches_of_a_cache_hold_each_sample_once_per_epoch(autoencoder, table, tmp_path):
    cached = build(autoencoder, table, tmp_path / "cache")
    for num_workers in (0, 2):
        batches = [b for b, _ in zip(ordered_batches(cached, 5, 0, num_workers=num_workers), range(4), strict=False)]
        ids = torch.cat([batch["sample_ids"] for batch in batches])
        assert len(ids.unique()) == 20
        expected = encoded(autoencoder, ids.tolist())
        assert torch.allclose(torch.cat([batch["latents"] for batch in batches]), expected, atol=1e-5)


def test_matching_cache_is_reused_untouched(autoencoder, table, tmp_path):
    build(autoencoder, table, tmp_path / "cache")
    before = written(tmp_path / "cache")
    same_weights, same_data = make_autoencoder(), load_images(str(tmp_path / "set"))
    again = build(same_weights, ImageTable(same_data, same_data.train, 16), tmp_path / "cache")
    assert written(tmp_path / "cache") == before
    assert_holds(again, autoencoder, range(COUNT))


def test_another_autoencoder_rebuilds_the_cache(autoencoder, table, tmp_path):
    other, folder = make_autoencoder(seed=1), tmp_path / "cache"
    first = build(autoencoder, table, folder).fingerprint
    cached = build(other, table, folder, rows_per_shard=1000)
    assert cached.fingerprint != first
    assert_holds(cached, other, range(COUNT))
    assert sorted(path.name for path in folder.glob("latents-*")) == [
        "latents-00000.json",
        "latents-00000.npy",
    ]


def test_one_changed_weight_rebuilds_the_cache_and_a_new_decoder_does_not(table, tmp_path):
    autoencoder, folder = make_autoencoder(), tmp_path / "cache"
    build(autoencoder, table, folder)
    before = written(folder)
    autoencoder.replace_decoder([16, 16], 2)
    build(autoencoder, table, folder)
    assert written(folder) == before
    with torch.no_grad():
        autoencoder.quant_conv.bias[0] += 1
    assert_holds(build(autoencoder, table, folder), autoencoder, range(COUNT))
    assert written(folder) != before


def test_other_pictures_under_the_same_name_rebuild_the_cache(autoencoder, table, tmp_path):
    build(autoencoder, table, tmp_path / "cache")
    changed = make_table(tmp_path / "set", first=100)
    assert_holds(build(autoencoder, changed, tmp_path / "cache"), autoencoder, range(COUNT), first=100)


def test_image_size_is_part_of_the_fingerprint(autoencoder, table, tmp_path):
    build(autoencoder, table, tmp_path / "cache")
    smaller = ImageTable(table.data, table.split, 8)
    assert build(autoencoder, smaller, tmp_path / "cache").latents(torch.tensor([0])).shape == (1, 4, 4, 4)


@for_each("missing", [0, 1, 2])
def test_interrupted_build_is_finished_and_whole_shards_are_kept(autoencoder, table, tmp_path, missing):
    folder = tmp_path / "cache"
    build(autoencoder, table, folder)
    lost = [f"latents-{missing:05d}.npy", "index.json", "labels.npy"]
    for name in lost:
        (folder / name).unlink()
    (folder / f".latents-{missing:05d}.npy.123.tmp").write_bytes(b"half a shard")
    before = written(folder)
    assert_holds(build(autoencoder, table, folder), autoencoder, range(COUNT))
    kept = [f"latents-{number:05d}.npy" for number in range(3) if number != missing]
    assert all(written(folder)[name] == before[name] for name in kept)
    assert set(lost) <= set(written(folder))


def test_build_stopped_by_an_unreadable_picture_leaves_no_index_and_works_once_it_is_repaired(autoencoder, tmp_path):
    folder = tmp_path / "cache"
    with pytest.raises(BadImageError, match="row 15 .*broken.png"):
        build(autoencoder, make_table(tmp_path / "set", broken=[15]), folder)
    assert (folder / "latents-00000.npy").exists() and not (folder / "index.json").exists()
    assert not list(folder.glob(".*.tmp"))
    assert_holds(build(autoencoder, make_table(tmp_path / "set"), folder), autoencoder, range(COUNT))


def test_interrupted_build_of_other_weights_is_discarded(autoencoder, table, tmp_path):
    folder = tmp_path / "cache"
    build(make_autoencoder(seed=1), table, folder)
    (folder / "index.json").unlink()
    assert_holds(build(autoencoder, table, folder), autoencoder, range(COUNT))


def test_interrupted_build_with_other_shard_sizes_is_discarded(autoencoder, table, tmp_path):
    folder = tmp_path / "cache"
    build(autoencoder, table, folder, rows_per_shard=5)
    (folder / "index.json").unlink()
    (folder / "latents-00001.npy").unlink()
    cached = build(autoencoder, table, folder, rows_per_shard=10)
    assert [len(shard) for shard in cached.shards] == [10, 10, 3]
    assert_holds(cached, autoencoder, range(COUNT))


def test_folder_of_something_else_is_not_trusted(autoencoder, table, tmp_path):
    folder = tmp_path / "cache"
    build(autoencoder, table, tmp_path / "other")
    shutil.copytree(tmp_path / "other", folder)
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | {"fingerprint": "0" * 64}))
    (folder / "plan.json").unlink()
    np.save(folder / "latents-00001.npy", np.zeros((10, 4, 8, 8), np.float32))
    assert_holds(build(autoencoder, table, folder), autoencoder, range(COUNT))


@pytest.mark.extended
@for_each("preload", [False, True])
@for_each("broken", [[0], [3, 4, 12, 22], list(range(8, 16))])
def test_unreadable_pictures_are_left_out(autoencoder, tmp_path, broken, preload):
    table = make_table(tmp_path / "set", broken, on_bad_image="skip", preload=preload)
    cached = build(autoencoder, table, tmp_path / "cache")
    readable = [i for i in range(COUNT) if i not in broken]
    assert sum(len(shard) for shard in cached.shards) == len(readable)
    assert_holds(cached, autoencoder, readable)
    if not preload:
        assert [len(shard) for shard in cached.shards] == [
            sum(first <= i < first + 10 for i in readable) for first in (0, 10, 20)
        ]


def test_pickled_table_is_its_path_and_a_worker_reads_the_same(autoencoder, table, tmp_path):
    built = build(autoencoder, table, tmp_path / "cache")
    built.forget_labels()
    sent = pickle.dumps(built)
    assert len(sent) < 10_000
    opened, rows = pickle.loads(sent), torch.arange(len(built))
    assert torch.equal(opened.latents(rows), built.latents(rows))
    assert opened.fingerprint == built.fingerprint and torch.equal(opened.labels, torch.full((len(built),), -1))
