"""Embedding into parquet shards: what they hold, going on after SIGKILL, several processes, bad input."""

import json
import os
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from kills import die_at_rename
from pictures import CLASSES, encoded, noise, write_parquet, write_pictures
from PIL import Image
from tiny_encoders import save_ours

from hf_dpssl.cli.commands import main
from hf_dpssl.data.image_table import BadImageError
from hf_dpssl.embedding.embedding_job import EmbedJob, embed_images


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    save_ours(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def shards(folder: Path) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in sorted((folder / "data").iterdir())}
    assert found
    return found


@pytest.fixture(scope="module")
def whole(encoder, pictures, tmp_path_factory) -> Path:
    """The uninterrupted result of one process, 2 pictures to a shard."""
    folder = tmp_path_factory.mktemp("whole") / "embeddings"
    embed_images(EmbedJob(str(encoder), str(pictures), str(folder), rows_per_shard=2))
    return folder


@pytest.mark.parametrize("features", ["features", "embeddings"])
def test_each_row_is_what_the_model_gives_for_its_picture(features, encoder, pictures, tmp_path):
    job = EmbedJob(str(encoder), str(pictures), str(tmp_path / "out"), features, rows_per_shard=10, batch_size=4)
    table = embed_images(job)
    assert [path.name for path in sorted((tmp_path / "out/data").iterdir())] == [
        f"train-{i:05d}-of-00003.parquet" for i in range(3)
    ]
    files = [f"cat/{i:03d}.png" for i in range(0, 23, 2)] + [f"dog/{i:03d}.png" for i in range(1, 23, 2)]
    assert table.files == files and table.rows.tolist() == list(range(23)) and set(table.splits) == {"train"}
    assert table.class_names == CLASSES and table.labels.tolist() == [0] * 12 + [1] * 11
    model = save_ours(tmp_path / "model")
    assert table.embeddings.shape == (23, {"features": 16, "embeddings": 4}[features])
    for file, vector in zip(files, table.embeddings, strict=True):
        pixels = torch.from_numpy(noise(int(file[4:7]), 16, 16)).permute(2, 0, 1)[None].float() / 255
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4]))
        with torch.no_grad():
            expected = model((pixels - mean) / std)[features][0]
        torch.testing.assert_close(vector, expected, rtol=0, atol=2e-6)


def test_datasets_reads_the_folder_and_a_shard_with_classes_and_fixed_width(whole, tmp_path):
    options = {"split": "train", "cache_dir": str(tmp_path)}
    one = datasets.Dataset.from_parquet(str(sorted((whole / "data").iterdir())[0]), cache_dir=str(tmp_path))
    for loaded in (
        datasets.load_dataset("parquet", data_dir=str(whole), **options),
        datasets.load_dataset(str(whole), **options),
        one,
    ):
        assert loaded.features["label"] == datasets.ClassLabel(names=CLASSES)
        assert loaded.features["embedding"] == datasets.List(datasets.Value("float32"), length=16)
        assert len(loaded) == (2 if loaded is one else 23)
        assert loaded[1]["file"] == "cat/002.png" and loaded[1]["row"] == 1 and loaded[1]["label"] == 0


def test_every_split_is_embedded_and_what_is_left_out_is_named(encoder, tmp_path):
    counts = {"train": 4, "val": 2, "test": 3}
    for split, count in counts.items():
        write_pictures(tmp_path / "set" / split, count)
    write_pictures(tmp_path / "set" / "test" / "more", 1)  # a class of the test split only: test/more/cat/000.png
    (tmp_path / "set" / "notes.txt").write_text("mine")
    table = embed_images(EmbedJob(str(encoder), str(tmp_path / "set"), str(tmp_path / "out")))
    found = [(split, file.split("/")[0]) for split, file in zip(table.splits, table.files, strict=True)]
    assert found == [("train", "train")] * 4 + [("evaluation", "val")] * 2 + [("evaluation", "test")] * 4
    assert [table.class_names[label] for label in table.labels] == [file.split("/")[1] for file in table.files]
    assert table.manifest["splits"] == {"train": 4, "evaluation": 6}
    assert table.manifest["split_names"] == {"train": "train", "evaluation": "validation + test"}
    assert table.manifest["left_out"] == {".txt files": 1}
    picture = table.pictures([9])[0]
    assert table.files[9] == "test/more/cat/000.png" and (np.asarray(picture) == noise(0, 16, 16)).all()
    images = [{"bytes": encoded(noise(i, 16, 16)), "path": None} for i in range(3)]
    names = datasets.ClassLabel(names=CLASSES)
    for split in ("train", "val"):
        write_parquet(tmp_path / "rows" / f"{split}.parquet", images, label=([0, 1, 1], names))
    write_parquet(tmp_path / "rows" / "test.parquet", images, caption=(["a"] * 3, datasets.Value("string")))
    table = embed_images(EmbedJob(str(encoder), str(tmp_path / "rows"), str(tmp_path / "unlabelled")))
    assert table.labels.tolist() == [0, 1, 1] * 2 + [-1] * 3
    # Of one split the others need not be alike.
    write_parquet(tmp_path / "rows" / "test.parquet", images, label=(["a"] * 3, datasets.Value("string")))
    with pytest.raises(ValueError, match="give both the same ones"):
        embed_images(EmbedJob(str(encoder), str(tmp_path / "rows"), str(tmp_path / "unlike")))
    table = embed_images(EmbedJob(str(encoder), str(tmp_path / "rows"), str(tmp_path / "train"), split="train"))
    assert table.labels.tolist() == [0, 1, 1] and set(table.splits) == {"train"}


def test_files_are_relative_to_the_folder_however_it_is_given(encoder, tmp_path, monkeypatch):
    write_pictures(tmp_path / "real" / "set", 2)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path / "link")
    given = ["set", "./set/", str(tmp_path / "real" / "set"), str(tmp_path / "link" / "set"), "set/../set"]
    for number, folder in enumerate(given):
        table = embed_images(EmbedJob(str(encoder), folder, str(tmp_path / f"out-{number}")))
        assert table.files == ["cat/000.png", "dog/001.png"]
    monkeypatch.chdir(tmp_path / "real" / "set")
    assert embed_images(EmbedJob(str(encoder), ".", str(tmp_path / "here"))).files == ["cat/000.png", "dog/001.png"]


@pytest.mark.extended
def test_labelled_splits_of_a_data_set_and_one_split_alone(encoder, tmp_path):
    table = embed_images(EmbedJob(str(encoder), "digits", str(tmp_path / "both"), batch_size=256))
    assert table.manifest["splits"] == {"train": 1437, "evaluation": 360} and len(table) == 1797
    assert table.files == [None] * 1797 and table.class_names == [str(digit) for digit in range(10)]
    alone = embed_images(EmbedJob(str(encoder), "digits", str(tmp_path / "one"), split="evaluation", batch_size=256))
    assert alone.embeddings.equal(table.embeddings[1437:]) and alone.labels.equal(table.labels[1437:])


def _embed_in_child(argv: list[str], environment: dict[str, str], dies_at: int | None) -> None:
    os.environ.update(environment)
    if dies_at:
        die_at_rename(dies_at, "*/data/*.parquet")
    os._exit(main(["embed", *argv]))


def start(context, encoder, pictures, folder, world: int = 1, dies_at: int | None = None) -> list:
    """The first process is killed as it finishes its shard number `dies_at` of this run."""
    argv = [str(encoder), str(pictures), "--output_dir", str(folder), "--rows_per_shard", "2"]
    started = []
    for rank in range(world):
        ranks = {"RANK": str(rank), "WORLD_SIZE": str(world)} if world > 1 else {}
        started.append(context.Process(target=_embed_in_child, args=(argv, ranks, None if rank else dies_at)))
        started[-1].start()
    return started


@pytest.mark.extended
@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_killed_run_goes_on_to_the_same_bytes(world, fork_server, encoder, pictures, whole, tmp_path):
    folder = tmp_path / "killed"
    for dies_at in (2, 3):  # of the first process's 12 shards, or 6 where there are two
        first, *others = start(fork_server, encoder, pictures, folder, world, dies_at)
        first.join()
        for process in others:
            process.kill(), process.join()
        assert first.exitcode == -9 and not (folder / "manifest.json").exists()
    assert 3 <= len([name for name in shards(folder) if name.endswith(".parquet")]) < 12  # others are what kills left
    for process in start(fork_server, encoder, pictures, folder, world):
        process.join()
        assert process.exitcode == 0
    assert shards(folder) == shards(whole)
    found, expected = (json.loads((place / "manifest.json").read_text()) for place in (folder, whole))
    assert found["shards"] == expected["shards"] and found["rows"] == 23


@pytest.mark.slow
def test_two_processes_started_by_the_command_write_the_bytes_of_one(encoder, pictures, whole, tmp_path, capsys):
    argv = [str(encoder), str(pictures), "--output_dir", str(tmp_path / "two"), "--rows_per_shard", "2"]
    assert main(["embed", *argv, "--num_processes", "2"]) == 0
    assert "23 features of 16 numbers" in capsys.readouterr().out
    assert shards(tmp_path / "two") == shards(whole)


@pytest.mark.extended
def test_finished_run_is_not_repeated_and_another_one_is_refused(encoder, whole, tmp_path, capsys):
    folder, mine = tmp_path / "mine", write_pictures(tmp_path / "pictures", 5)
    argv = [str(encoder), str(mine), "--output_dir", str(folder), "--rows_per_shard", "2"]
    assert main(["embed", *argv]) == 0
    first = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert main(["embed", *argv]) == 0 and {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == first
    capsys.readouterr()
    assert main(["embed", *argv, "--json"]) == 0
    about = {"features": "features", "dimension": 16, "skipped": 0}
    assert json.loads(capsys.readouterr().out) == {"folder": str(folder), "pictures": 5} | about
    save_ours(tmp_path / "other", projection_dim=5, model_args={"channels": [8, 8, 16, 24]})
    cases = [
        ([str(tmp_path / "other"), *argv[1:]], "was begun with encoder .*, not .*other"),
        ([*argv, "--features", "embeddings"], "features 'features', not 'embeddings'"),
        ([*argv[:-1], "3"], "rows_per_shard 2, not 3"),
        ([argv[0], "digits", *argv[2:]], "dataset .*, not 'digits'"),
    ]
    for changed, message in cases:
        capsys.readouterr()
        assert main(["embed", *changed]) == 2
        assert re.search(message, capsys.readouterr().err)
    Image.fromarray(noise(99, 16, 16)).save(mine / "cat" / "000.png")  # the same name, another picture
    assert main(["embed", *argv]) == 2 and "dataset" in capsys.readouterr().err
    assert main(["embed", *argv, "--overwrite"]) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} != first


def test_unreadable_picture_is_named_or_skipped_also_where_a_whole_shard_is_unreadable(encoder, tmp_path):
    mine = write_pictures(tmp_path / "pictures", 6)
    for number in (0, 2, 5):  # rows 0, 1 (the whole first shard) and 5
        path = mine / CLASSES[number % 2] / f"{number:03d}.png"
        path.write_bytes(b"not a picture")
    job = EmbedJob(str(encoder), str(mine), str(tmp_path / "out"), rows_per_shard=2)
    with pytest.raises(BadImageError, match=r"row 0 of train.*000\.png.*--on_bad_image skip"):
        embed_images(job)
    skipping = EmbedJob(**vars(job) | {"on_bad_image": "skip"})
    table = embed_images(skipping)
    assert table.rows.tolist() == [2, 3, 4]
    skipped = table.manifest["skipped"]
    assert skipped["count"] == 3 and set(skipped["images"]) == {"train row 0", "train row 1", "train row 5"}
    loaded = datasets.load_dataset("parquet", data_dir=str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert loaded["train"]["row"][:] == [2, 3, 4]


def test_bad_input_says_which_value_and_what_is_allowed(encoder, pictures, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    out = ["--output_dir", str(tmp_path / "out")]
    given, shown = str(encoder), str(pictures)
    for argv, message in [
        ([given, str(tmp_path / "empty"), *out], "empty holds no image that can be read (no file at all): put images"),
        ([given, str(tmp_path / "nowhere"), *out], "is no path"),
        ([str(tmp_path / "no-encoder"), shown, *out], "no-encoder"),
        ([given, shown, *out, "--batch_size", "0"], "batch_size must be at least 1, got 0"),
        ([given, shown, *out, "--split", "evaluation"], "has no evaluation split"),
        ([given, shown, *out, "--num_processes", "0"], "num_processes=0"),
        ([given, shown, "--output_dir", str(tmp_path / "full")], "is not empty and holds no embeddings"),
        ([given, shown, "--output_dir", str(tmp_path / "full"), "--overwrite"], "is not empty and holds no embeddings"),
    ]:
        assert main(["embed", *argv]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and (tmp_path / "full" / "notes.txt").exists()


def test_process_that_accelerate_started_alone_by_mistake_is_an_error(encoder, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no"), monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert main(["embed", str(encoder), str(pictures), "--output_dir", str(tmp_path / "out")]) == 1
    assert "accelerate was asked for several processes and started one" in capsys.readouterr().err
