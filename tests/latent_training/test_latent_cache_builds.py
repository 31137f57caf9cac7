"""Builds of a cache: mirrored copies, several processes, kill -9, damaged and foreign shards, what the user is told."""

import json
import logging
import os
import shutil
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from cases import for_each
from datasets import IterableDataset
from kills import die_at_rename
from pictures import noise
from tiny_latents import COUNT, assert_holds, build, encoded, make_autoencoder, make_table, written

from hf_dpssl.data import keyed_random
from hf_dpssl.data.batches import ordered_batches
from hf_dpssl.data.image_table import ImageTable
from hf_dpssl.latent_training.latent_cache import CodeTable, LatentTable, _parts_of_stream, build_latent_cache
from hf_dpssl.runs import shared_storage


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture(scope="module")
def autoencoder():
    return make_autoencoder()


@pytest.fixture
def table(tmp_path):
    return make_table(tmp_path / "set")


@torch.no_grad()
def encoded_mirrored(autoencoder, rows):
    """Latents of the mirrored pictures (numpy reverses the columns), one by one, without table or cache."""
    pixels = [torch.from_numpy(noise(i, 16, 16)[:, ::-1].copy()).permute(2, 0, 1)[None] / 127.5 - 1 for i in rows]
    return torch.cat([autoencoder.encode(p).latents for p in pixels])


def test_mirrored_copies_are_the_latents_of_mirrored_images(autoencoder, table, tmp_path):
    cached = build(autoencoder, table, tmp_path / "cache", flipped=True)
    rows = torch.arange(COUNT)
    assert_holds(cached, autoencoder, range(COUNT))  # unasked for, no image is mirrored
    assert [len(shard) for shard in cached.shards] == [5, 5, 5, 5, 3]  # ten latents to a shard
    mirrored = encoded_mirrored(autoencoder, range(COUNT))
    assert torch.allclose(cached.latents(rows, torch.ones(COUNT, dtype=torch.bool)), mirrored, atol=1e-5)
    assert (mirrored - encoded(autoencoder, range(COUNT))).abs().flatten(1).amax(1).min() > 1e-2
    codes = build(autoencoder, table, tmp_path / "codes", content="codes", flipped=True)
    expected = torch.cdist(mirrored.permute(0, 2, 3, 1).double(), autoencoder.quantizer.codebook.double()).argmin(-1)
    assert torch.equal(codes.codes(rows, torch.ones(COUNT, dtype=torch.bool)), expected)
    assert torch.equal(codes.codes(), codes.codes(rows))


def test_each_epoch_mirrors_another_half_whatever_batch_and_worker(autoencoder, table, tmp_path):
    build(autoencoder, table, tmp_path / "cache", flipped=True)
    cached = LatentTable(tmp_path / "cache", flip_seed=7)
    both = torch.stack([encoded(autoencoder, range(COUNT)), encoded_mirrored(autoencoder, range(COUNT))])
    shown = {}
    for batch_size, num_workers in ((5, 0), (3, 2)):
        for batch, _ in zip(ordered_batches(cached, batch_size, 0, num_workers=num_workers), range(40), strict=False):
            ids, mirrored = batch["sample_ids"], batch["mirrored"]
            assert torch.allclose(batch["latents"], both[mirrored.long(), ids], atol=1e-5)
            for sample, is_mirrored in zip(ids.tolist(), mirrored.tolist(), strict=True):
                assert shown.setdefault((batch["epoch"], sample), is_mirrored) == is_mirrored
    share = np.mean(list(shown.values()))
    assert len(shown) > 150 and abs(share - 0.5) < 4 * 0.5 / len(shown) ** 0.5
    assert len({tuple(cached.mirrored(torch.arange(COUNT), epoch).tolist()) for epoch in range(20)}) == 20
    drawn = keyed_random.uniform(torch.arange(COUNT), 1, seed=7, stream="cached flip", epoch=3)[:, 0]
    assert torch.equal(cached.mirrored(torch.arange(COUNT), 3), drawn < 0.5)


def test_cache_without_mirrored_copies_does_not_pretend_to_have_them(autoencoder, table, tmp_path, caplog):
    plain = build(autoencoder, table, tmp_path / "cache")
    with pytest.raises(ValueError, match="no mirrored copies"):
        LatentTable(tmp_path / "cache", flip_seed=0)
    with pytest.raises(ValueError, match="no mirrored copies"):
        plain.latents(torch.tensor([0]), torch.tensor([True]))
    assert "mirrored" not in plain.__getitems__([(0, 1)])
    build(autoencoder, table, tmp_path / "cache", flipped=True)
    assert "mirrored copies ...no, now ...yes" in caplog.text
    assert LatentTable(tmp_path / "cache", flip_seed=0).flipped


def _stream(data, read_log):
    """The training images as a stream of four shards, whose every row leaves a mark where it is read."""

    def read(parts):
        for part in parts:
            for number in range(6 * part, min(6 * part + 6, COUNT)):
                with open(read_log, "a") as file:
                    file.write(".")
                yield data.train[number]

    stream = IterableDataset.from_generator(read, gen_kwargs={"parts": [0, 1, 2, 3]})
    return replace(data, train=stream.cast(data.train.features))


def _build_share(set_folder, cache_folder, streaming=False) -> dict:
    from hf_dpssl.data.image_data import load_images

    rank = torch.distributed.get_rank()
    data = load_images(set_folder)
    if streaming:
        data = _stream(data, f"{set_folder}/read")
    options = dict(batch_size=4, rows_per_shard=3, process=(rank, 2), wait=torch.distributed.barrier)
    wrote = []
    rename = os.replace
    os.replace = lambda source, target: (wrote.append(os.path.basename(target)), rename(source, target))
    try:
        cached = build_latent_cache(make_autoencoder(), ImageTable(data, data.train, 16), cache_folder, **options)
    finally:
        os.replace = rename
    numbers = [name.removesuffix(".npy").split("-")[1:] for name in wrote if name.startswith("latents-")]
    mine = torch.tensor([int("".join(number)) for number in numbers if number[-1].isdigit()])
    index = torch.tensor("index.json" in wrote)
    return {"latents": cached.latents(torch.arange(len(cached))), "labels": cached.labels, "mine": mine, "index": index}


@for_each("streaming", [False, True])
def test_two_processes_share_the_shards_and_the_main_one_writes_the_index(run_in_two, autoencoder, tmp_path, streaming):
    """Parts of three rows; of a stream those of its own shards (here six rows each), of which each is read once."""
    make_table(tmp_path / "set")
    shares = [[0, 2, 4, 6], [1, 3, 5, 7]]
    some = {"latents-00001.npy": 1, "latents-00004.npy": 0}
    if streaming:
        shares = [[0, 1, 200_000, 200_001], [100_000, 100_001, 300_000, 300_001]]
        some = {"latents-00001-00000.npy": 1, "latents-00002-00000.npy": 0}
    first, second = run_in_two(_build_share, str(tmp_path / "set"), str(tmp_path / "cache"), streaming)
    assert [first["mine"].tolist(), second["mine"].tolist()] == shares
    assert not streaming or len((tmp_path / "set/read").read_text()) == COUNT
    assert bool(first["index"]) and not bool(second["index"])
    assert torch.equal(first["latents"], second["latents"]) and torch.equal(first["labels"], second["labels"])
    assert_holds(LatentTable(tmp_path / "cache"), autoencoder, range(COUNT))
    again = run_in_two(_build_share, str(tmp_path / "set"), str(tmp_path / "cache"), streaming)
    assert not any(len(process["mine"]) or process["index"] for process in again)  # reused
    for name in ("index.json", *some):
        (tmp_path / "cache" / name).unlink()
    finished = run_in_two(_build_share, str(tmp_path / "set"), str(tmp_path / "cache"), streaming)
    missing = {owner: int(name[8:-4].replace("-", "")) for name, owner in some.items()}
    assert [process["mine"].tolist() for process in finished] == [[missing[0]], [missing[1]]]
    assert_holds(LatentTable(tmp_path / "cache"), autoencoder, range(COUNT))


def test_shards_that_another_process_wrote_elsewhere_are_missed(autoencoder, table, tmp_path, monkeypatch):
    monkeypatch.setattr(shared_storage, "_PATIENCE", 0.0)
    with pytest.raises(FileNotFoundError, match=r"lacks 4 of 8 shards \(latents-00001, .*shared storage"):
        build(autoencoder, table, tmp_path / "cache", rows_per_shard=3, process=(0, 2))
    assert not (tmp_path / "cache" / "index.json").exists()


def test_processes_share_the_parts_of_a_stream_that_has_fewer_shards_than_they_are(tmp_path):
    data = make_table(tmp_path / "set").data
    stream = replace(data, train=data.train.to_iterable_dataset(1))
    table = ImageTable(stream, stream.train, 16)
    names = [[name for name, _, _ in _parts_of_stream(table, 3, (index, 3))] for index in range(3)]
    assert all(names) and sorted(sum(names, [])) == [name for name, _, _ in _parts_of_stream(table, 3, (0, 1))]


def _build_in_child(set_folder, cache_folder, cache, dies_at):
    from hf_dpssl.data.image_data import load_images

    die_at_rename(dies_at, "*/latents-*.npy")
    datasets.config.HF_DATASETS_CACHE = cache
    data = load_images(set_folder)
    build(make_autoencoder(), ImageTable(data, data.train, 16), cache_folder, rows_per_shard=1)
    os._exit(0)


def test_killed_build_is_finished_and_what_it_wrote_is_kept(fork_server, autoencoder, table, tmp_path):
    folder, dies_at = tmp_path / "cache", 10
    arguments = (str(tmp_path / "set"), folder, tmp_path / "datasets", dies_at)
    process = fork_server.Process(target=_build_in_child, args=arguments)
    process.start(), process.join()
    assert process.exitcode == -9 and not (folder / "index.json").exists()
    with pytest.raises(FileNotFoundError, match="no finished cache"):
        LatentTable(folder)
    before = written(folder)
    assert_holds(build(autoencoder, table, folder, rows_per_shard=1), autoencoder, range(COUNT))
    after = written(folder)
    whole = [name for name in before if name.endswith(".npy") and name.replace(".npy", ".json") in before]
    assert len(whole) == dies_at - 1 and all(before[name] == after[name] for name in whole)
    assert not list(folder.glob(".*"))


def damage_by_truncation(folder, other):
    path = folder / "latents-00001.npy"
    path.write_bytes(path.read_bytes()[:-100])


def damage_by_a_foreign_shard(folder, other):
    shutil.copy(other / "latents-00001.npy", folder / "latents-00001.npy")


def damage_by_a_foreign_shard_with_its_record(folder, other):
    damage_by_a_foreign_shard(folder, other)
    shutil.copy(other / "latents-00001.json", folder / "latents-00001.json")


def damage_by_a_lost_shard(folder, other):
    (folder / "latents-00001.npy").unlink()


@for_each("finished", [True, False])
@for_each(
    "damage",
    [
        damage_by_truncation,
        damage_by_a_foreign_shard,
        damage_by_a_foreign_shard_with_its_record,
        damage_by_a_lost_shard,
    ],
)
def test_damaged_shard_is_noticed_said_and_encoded_again(autoencoder, table, tmp_path, caplog, damage, finished):
    folder, other = tmp_path / "cache", tmp_path / "other"
    build(autoencoder, table, folder), build(make_autoencoder(seed=1), table, other)
    if not finished:
        (folder / "index.json").unlink()
    damage(folder, other)
    before = written(folder)
    assert_holds(build(autoencoder, table, folder), autoencoder, range(COUNT))
    assert "latents-00001.npy is truncated, or not what this run would write" in caplog.text
    assert all(before[name] == written(folder)[name] for name in ("latents-00000.npy", "latents-00002.npy"))


def test_reading_a_truncated_shard_says_what_to_do(autoencoder, table, tmp_path):
    build(autoencoder, table, tmp_path / "cache"), damage_by_truncation(tmp_path / "cache", None)
    with pytest.raises(ValueError, match="latents-00001.npy is damaged .*start the run again"):
        LatentTable(tmp_path / "cache")
    with pytest.raises(FileNotFoundError, match="no finished cache"):
        CodeTable(tmp_path / "nowhere")


def test_changed_autoencoder_and_data_set_are_said_and_an_unchanged_one_is_not(autoencoder, table, tmp_path, caplog):
    folder = tmp_path / "cache"
    caplog.set_level(logging.WARNING)
    build(autoencoder, table, folder), build(autoencoder, table, folder)
    assert not caplog.records
    other = make_autoencoder(seed=1)
    build(other, table, folder)
    old, new = autoencoder.fingerprint()[-24:], other.fingerprint()[-24:]
    assert f"autoencoder ...{old}, now ...{new}): encoding anew" in caplog.text
    caplog.clear()
    changed = make_table(tmp_path / "set", first=100)
    assert_holds(build(other, changed, folder), other, range(COUNT), first=100)
    assert "data set ..." in caplog.text and "autoencoder ..." not in caplog.text


def test_folder_with_other_files_is_left_alone(autoencoder, table, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds \['notes.txt'\] and no cache: choose another folder"):
        build(autoencoder, table, tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


def test_at_most_a_shard_is_in_memory(autoencoder, table, tmp_path, monkeypatch):
    made = []
    empty = np.empty
    monkeypatch.setattr(np, "empty", lambda shape, *rest: made.append(shape) or empty(shape, *rest))
    build(autoencoder, table, tmp_path / "cache", rows_per_shard=6, flipped=True)
    assert made and all(shape[0] * shape[1] <= 6 for shape in made)
    index = json.loads((tmp_path / "cache" / "index.json").read_text())
    assert [shard["rows"] for shard in index["shards"]] == [3] * 7 + [2]
