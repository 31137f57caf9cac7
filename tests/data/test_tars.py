"""WebDataset tar files: paths, folders and streams of them, classes in cls and json members, and what is refused."""

import io
import json
import tarfile

import datasets
import numpy as np
import pytest
from cases import for_each
from pictures import encoded, noise, row, write_parquet

from hf_dpssl.data.batches import ImageSource, evaluation_batches
from hf_dpssl.data.image_data import load_images
from hf_dpssl.latent_training.dit_arguments import DiTArguments
from hf_dpssl.latent_training.latent_run import classes_of_run


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_tar(path, rows, suffix="png", **members):
    """A tar file of `noise(row)` for each row, and of members suffix=function(row) -> text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in rows:
            contents = {suffix: encoded(noise(number))}
            contents |= {name: function(number).encode() for name, function in members.items()}
            for name, content in contents.items():
                member = tarfile.TarInfo(f"pictures/{number:04d}.{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def shards(folder, **members):
    """A folder of two tar files to train on, of rows 0 to 8 and 9 to 17, and one of rows 18 to 23."""
    for name, rows in (("train-000", range(9)), ("train-001", range(9, 18)), ("val-000", range(18, 24))):
        write_tar(folder / f"{name}.tar", rows, **members)
    return folder


def found(data, split):
    """{row of the picture: class} of a split, decoded as for training."""
    source = ImageSource(data, image_size=8, batch_size=1, seed=0)
    table = source.training_table() if split == "train" else source.evaluation_table()
    (batch,) = evaluation_batches(table, 100)
    known = {noise(i).tobytes(): i for i in range(24)}
    marks = [known[np.ascontiguousarray(image.permute(1, 2, 0).numpy()).tobytes()] for image in batch["images"]]
    assert len(set(marks)) == len(marks)
    return dict(zip(marks, batch["labels"].tolist(), strict=True))


@for_each("streaming", [False, True])
def test_a_folder_of_tar_files_is_read_as_a_table_and_as_a_stream(tmp_path, streaming):
    data = load_images(str(shards(tmp_path / "set", cls=lambda i: str(i % 3))), streaming=streaming)
    assert isinstance(data.train, datasets.IterableDataset) is streaming
    assert data.class_names == (None if streaming else ["0", "1", "2"])
    assert found(data, "train") == {i: -1 if streaming else i % 3 for i in range(18)}
    assert found(data, "evaluation") == {i: -1 if streaming else i % 3 for i in range(18, 24)}
    if streaming:  # the classes of integers are not known, which is said
        assert data.train.num_shards == 2 and "leave --streaming out" in data.label_problem
        with pytest.raises(ValueError, match="cannot be known while streaming: .* learn without classes by --uncond"):
            classes_of_run(DiTArguments(streaming=True), data)  # which is asked before anything else of a run
        assert classes_of_run(DiTArguments(streaming=True, unconditional=True), data) == []


def test_one_tar_file_is_a_set_of_which_a_tenth_is_held_out(tmp_path):
    data = load_images(str(write_tar(tmp_path / "some.tar", range(20))))
    assert (len(data.train), len(data.evaluation), data.class_names) == (18, 2, None)
    assert found(data, "train").keys() | found(data, "evaluation").keys() == set(range(20))


def test_classes_are_found_in_json_members_by_their_usual_names_or_the_one_given(tmp_path):
    def about(number):
        return json.dumps({"label": f"class {number % 2}", "width": 8, "photographer": number % 3})

    folder = str(shards(tmp_path / "set", json=about))
    for column, names, modulus in ((None, ["class 0", "class 1"], 2), ("json.photographer", ["0", "1", "2"], 3)):
        data = load_images(folder, label_column=column)
        assert data.class_names == names
        assert found(data, "train") == {i: i % modulus for i in range(18)}
    stream = load_images(folder, streaming=True)
    assert "json.label" in stream.label_problem and found(stream, "train").keys() == set(range(18))
    both = shards(tmp_path / "both", cls=lambda i: str(i % 3), json=about)  # cls is a class and nothing else
    assert load_images(str(both)).label_column == "cls"


@for_each("streaming", [False, True])
def test_tar_files_that_cannot_be_read_are_refused_before_anything_is_read_of_them(tmp_path, streaming):
    def refuses(path, message):
        with pytest.raises(ValueError, match=message):
            load_images(str(path), streaming=streaming)

    whole = shards(tmp_path / "set").joinpath("train-001.tar")
    content = whole.read_bytes()
    whole.write_bytes(content[:-700])
    refuses(tmp_path / "set", "set/train-001.tar is truncated or no tar file.*no multiple of 512.*copy it")
    whole.write_bytes(b"this is no tar file ".ljust(1024))
    refuses(tmp_path / "set", "set/train-001.tar is truncated or no tar file")
    whole.write_bytes(bytes(10240))
    refuses(tmp_path / "set", "set/train-001.tar holds no sample")
    refuses(write_tar(tmp_path / "texts.tar", range(3), "txt"), "texts.tar: no sample has a picture")
    write_tar(tmp_path / "mixed" / "train-1.tar", range(5))
    write_tar(tmp_path / "mixed" / "train-2.tar", range(5, 8), "jpg")
    refuses(tmp_path / "mixed", r"2 tar files in .*mixed: .*several suffixes \(.*have png, .*have jpg\)")
    write_parquet(tmp_path / "mixed" / "test.parquet", [row(0)])
    refuses(tmp_path / "mixed", "1 parquet files and 2 tar files .*give the one or the other")


def test_a_tar_file_that_ends_between_two_samples_is_refused_where_all_of_it_is_wanted(tmp_path):
    path = write_tar(tmp_path / "set.tar", range(20))
    with tarfile.open(path) as tar:
        end = tar.getmembers()[10].offset_data
    path.write_bytes(path.read_bytes()[:end])  # the head of a member, and nothing of it
    with pytest.raises(ValueError, match="set.tar is truncated"):
        load_images(str(path))


def test_a_tar_file_beside_images_is_left_out_and_counted(tmp_path):
    (tmp_path / "set").mkdir()
    for number in range(10):
        (tmp_path / "set" / f"{number}.png").write_bytes(encoded(noise(number)))
    write_tar(tmp_path / "set" / "original.tar", range(10))
    data = load_images(str(tmp_path / "set"))
    assert len(data.train) + len(data.evaluation) == 10 and data.left_out == {".tar files": 1}
