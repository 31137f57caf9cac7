"""From `--dataset` to splits, classes and columns, for every kind of source, and the errors of each."""

import pickle

import datasets
import huggingface_hub.constants
import numpy as np
import pytest
import torch
from cases import for_each
from datasets import ClassLabel, Value
from pictures import encoded, row, write_parquet
from sklearn.datasets import load_digits

from hf_dpssl.data.decoding import decode_image
from hf_dpssl.data.image_data import TABLE, load_images
from hf_dpssl.data.image_table import ImageTable

CAT_DOG = ClassLabel(names=["cat", "dog"])


@pytest.fixture(autouse=True)
def own_cache(request, monkeypatch, tmp_path):
    """What `datasets` converts goes to the test's folder; that of the large real sets is kept."""
    if "data_folder" not in request.fixturenames:
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def identity(image):
    """The red value of a one-coloured picture."""
    return decode_image(image).getpixel((0, 0))[0]


def marked(number):
    return {"bytes": encoded(np.full((4, 4, 3), number, np.uint8)), "path": None}


def write_pictures(folder, count=10, first=0):
    folder.mkdir(parents=True)
    for number in range(first, first + count):
        (folder / f"{number}.png").write_bytes(marked(number)["bytes"])


def labelled(path, count=20, feature=CAT_DOG, labels=None, first=0):
    values = labels or [i % 2 for i in range(count)]
    return write_parquet(path, [marked(first + i) for i in range(count)], label=(values, feature))


def pairs(data, split):
    """{(mark of the picture, class name)} of a split."""
    return {(identity(r[data.image_column]), data.class_names[r[data.label_column]]) for r in split}


def test_digits_are_split_into_1437_and_360_with_every_class_in_proportion():
    data = load_images("digits")
    assert (len(data.train), len(data.evaluation)) == (1437, 360)
    assert data.class_names == [str(digit) for digit in range(10)]
    shares = np.bincount(load_digits().target) / 1797
    assert np.abs(np.bincount(data.evaluation["label"]) - 360 * shares).max() < 1
    assert np.abs(np.bincount(data.train["label"]) - 1437 * shares).max() < 1


def test_digits_pixels_and_labels_are_those_of_scikit_learn():
    data, source = load_images("digits"), load_digits()
    expected = sorted(zip([tuple(np.rint(i.ravel() * 255 / 16)) for i in source.images], source.target, strict=True))
    rows = [*data.train, *data.evaluation]
    found = sorted((tuple(np.asarray(decode_image(r["image"]))[..., 0].ravel()), r["label"]) for r in rows)
    assert found == expected


def test_fingerprint_changes_with_the_content_and_not_from_one_load_to_the_next(tmp_path):
    assert load_images("digits").fingerprint == load_images("digits").fingerprint
    name, found = str(tmp_path / "set.parquet"), []
    for labels in ([0, 1] * 10, [1, 0] * 10):
        labelled(tmp_path / "set.parquet", 20, labels=labels)
        found += [load_images(name).fingerprint, load_images(name).fingerprint]
    assert found[0] == found[1] != found[2] == found[3]


def test_image_folder_has_its_folders_as_classes(tmp_path):
    for split, count in (("train", 10), ("test", 3)):
        for first, name in ((0, "cat"), (100, "dog")):
            write_pictures(tmp_path / "set" / split / name, count, first)
    (tmp_path / "set" / "train" / "cat" / "notes.txt").write_text("no picture")
    data = load_images(str(tmp_path / "set"))
    assert data.class_names == ["cat", "dog"]
    assert pairs(data, data.train) == {(i, "cat") for i in range(10)} | {(i, "dog") for i in range(100, 110)}
    assert pairs(data, data.evaluation) == {(i, "cat") for i in range(3)} | {(i, "dog") for i in range(100, 103)}


def test_image_folder_without_class_folders_is_unlabelled(tmp_path):
    write_pictures(tmp_path / "set", 10)
    data = load_images(str(tmp_path / "set"))
    assert data.class_names is None and data.label_column is None
    assert {identity(r["image"]) for split in (data.train, data.evaluation) for r in split} == set(range(10))


def test_a_worker_is_sent_few_bytes_of_a_folder_and_reads_the_same_pictures(tmp_path):
    for name in ("cat", "dog", "horse", "owl"):
        write_pictures(tmp_path / "images" / name, 250)
    for hold_out in (False, True):
        data = load_images(str(tmp_path / "images"), hold_out=hold_out)
        table = ImageTable(data, data.train, 4)
        sent = pickle.dumps(table)
        assert len(sent) < 10_000
        received = pickle.loads(sent)
        rows = [(0, row) for row in range(1000 - 100 * hold_out)]
        expected, found = table.__getitems__(rows), received.__getitems__(rows)
        assert len(received) == len(rows) and torch.equal(found["images"], expected["images"])
        assert torch.equal(found["labels"], expected["labels"]) and len(found["labels"].unique()) == 4
        if hold_out:
            assert received.data.evaluation[:] == data.evaluation[:]


@for_each(
    "root, train, held_out",
    [
        ("set", "train", "test-00000-of-00001"),
        ("set", "train", "set_val"),
        ("set", "train", "validation"),
        ("set", "train", "test/part"),
        ("set", "train", "test/tiles/part"),
        ("set", "train.0", "test.0"),
        ("set", "train0", "test0"),
        ("set", "train", "Test Set"),
        ("dev", "train", "test"),  # the given folder's own name says nothing
        ("test", "training", "val"),
        ("set", "test/train", "train/test"),  # the file's name comes first
        ("set", "contest-train", "contest-dev"),
    ],
)
def test_parquet_folder_is_split_by_file_name(tmp_path, root, train, held_out):
    folder = tmp_path / root
    labelled(folder / f"{train}-00000-of-00002.parquet", 6)
    labelled(folder / f"{train}-00001-of-00002.parquet", 6, first=6)
    labelled(folder / f"{held_out}.parquet", 4, first=50)
    data = load_images(str(folder))
    assert {mark for mark, _ in pairs(data, data.train)} == set(range(12))
    assert {mark for mark, _ in pairs(data, data.evaluation)} == set(range(50, 54))


def test_parquet_files_that_name_no_split_are_one_set_and_beside_others_refused(tmp_path):
    folder = tmp_path / "test"
    labelled(folder / "contest-0.parquet", 6)
    labelled(folder / "contest-1.parquet", 6, first=6)
    data = load_images(str(folder), hold_out=False)
    assert {mark for mark, _ in pairs(data, data.train)} == set(range(12)) and data.splits == {"train": "train"}
    labelled(folder / "test.parquet", 4)
    with pytest.raises(ValueError, match=r"some name a split .*test.parquet.* and 2 do not \(contest-0.parquet, ..."):
        load_images(str(folder))
    alone = labelled(tmp_path / "both" / "train_val.parquet", 4)
    assert len(load_images(str(alone), hold_out=False).train) == 4
    labelled(tmp_path / "both" / "test.parquet", 4)
    with pytest.raises(ValueError, match="train_val.parquet speaks of the splits train and val: rename it"):
        load_images(str(tmp_path / "both"))


def test_set_without_a_test_split_holds_out_a_fixed_tenth(tmp_path):
    name = str(labelled(tmp_path / "only.parquet", 60))
    data, again = load_images(name), load_images(name)
    train, evaluation = pairs(data, data.train), pairs(data, data.evaluation)
    assert len(evaluation) == 6 and not train & evaluation
    assert train | evaluation == {(i, CAT_DOG.names[i % 2]) for i in range(60)}
    assert (pairs(again, again.train), pairs(again, again.evaluation)) == (train, evaluation)
    assert data.fingerprint == again.fingerprint


def test_integer_labels_are_numbered_from_0_over_both_splits(tmp_path):
    labelled(tmp_path / "set" / "train.parquet", 4, Value("int64"), [700, 3, 700, 3])
    labelled(tmp_path / "set" / "test.parquet", 2, Value("int64"), [700, 700], first=10)
    data = load_images(str(tmp_path / "set"))
    assert data.class_names == ["3", "700"]
    assert data.train["label"][:] == [1, 0, 1, 0] and data.evaluation["label"][:] == [1, 1]
    assert pairs(data, data.train) == {(0, "700"), (1, "3"), (2, "700"), (3, "3")}


def test_string_labels_become_classes_in_alphabetical_order(tmp_path):
    labelled(tmp_path / "set" / "train.parquet", 3, Value("string"), ["pear", "apple", "fig"])
    labelled(tmp_path / "set" / "test.parquet", 1, Value("string"), ["fig"])
    data = load_images(str(tmp_path / "set"))
    assert data.class_names == ["apple", "fig", "pear"]
    assert data.train["label"][:] == [2, 0, 1] and data.evaluation["label"][:] == [1]


def test_union_of_sets_with_the_same_classes_keeps_every_picture_and_label(tmp_path):
    first, second = labelled(tmp_path / "a.parquet", 20), labelled(tmp_path / "b.parquet", 20, first=100)
    data = load_images(f"{first}+{second}")
    assert data.class_names == ["cat", "dog"] and (len(data.train), len(data.evaluation)) == (36, 4)
    expected = {(start + i, CAT_DOG.names[i % 2]) for start in (0, 100) for i in range(20)}
    assert pairs(data, data.train) | pairs(data, data.evaluation) == expected


def mixed_parts(tmp_path):
    """Two sets whose classes overlap in "dog", the second with other column names and a row without label."""
    labelled(tmp_path / "a.parquet", 20)
    images, labels = [marked(100 + i) for i in range(20)], [i % 2 for i in range(19)] + [-1]
    write_parquet(tmp_path / "b.parquet", images, "image_bytes", class_id=(labels, ClassLabel(names=["dog", "ant"])))
    return f"{tmp_path}/a.parquet + {tmp_path}/b.parquet"


@pytest.mark.parametrize("streaming", [False, True])
def test_union_merges_different_classes_by_name(tmp_path, streaming):
    data = load_images(mixed_parts(tmp_path), streaming=streaming)
    assert data.class_names == ["ant", "cat", "dog"]
    rows = [*data.train] if streaming else [*data.train, *data.evaluation]
    found = {identity(r[data.image_column]): r[data.label_column] for r in rows}
    expected = {i: 1 + i % 2 for i in range(20)} | {100 + i: 2 - 2 * (i % 2) for i in range(19)} | {119: -1}
    assert found == expected


def test_union_with_an_unlabelled_part_is_unlabelled(tmp_path):
    write_pictures(tmp_path / "plain", 10, first=200)
    data = load_images(f"{labelled(tmp_path / 'a.parquet')}+{tmp_path / 'plain'}")
    assert data.class_names is None and data.label_column is None
    marks = {identity(r[data.image_column]) for split in (data.train, data.evaluation) for r in split}
    assert marks == set(range(20)) | set(range(200, 210))


def test_named_columns_override_the_search(tmp_path):
    columns = {"first": ([0] * 20, CAT_DOG), "second": ([1, 2] * 10, ClassLabel(names=["x", "y", "z"]))}
    write_parquet(tmp_path / "set.parquet", [marked(5)] * 20, "photo", **columns)
    name = str(tmp_path / "set.parquet")
    assert load_images(name).label_column is None  # two candidates, none called label
    data = load_images(name, image_column="photo", label_column="second")
    assert (data.image_column, data.label_column, data.class_names) == ("photo", "second", ["y", "z"])
    assert set(data.train["second"]) == {0, 1} and data.train.column_names == ["photo", "second"]


@pytest.mark.parametrize(
    "option, message",
    [
        (dict(image_column="photo"), r"set.parquet.*no column 'photo', only \['image', 'label'\].*--image_column"),
        (dict(label_column="kind"), r"set.parquet.*no column 'kind', only \['image', 'label'\].*--label_column"),
    ],
)
def test_missing_column_is_named_with_those_there_are(tmp_path, option, message):
    name = str(labelled(tmp_path / "set.parquet"))
    with pytest.raises(ValueError, match=message):
        load_images(name, **option)


def test_two_image_columns_ask_for_a_choice(tmp_path):
    write_parquet(tmp_path / "set.parquet", [row(0)] * 2, mask=([row(1)] * 2, datasets.Image()))
    with pytest.raises(ValueError, match=r"2 image columns among \['image', 'mask'\].*--image_column"):
        load_images(str(tmp_path / "set.parquet"))


def test_label_column_is_found_by_type_or_by_its_usual_names(tmp_path):
    for i, column in enumerate(["label", "labels", "target", "Label", "class"]):
        images = [marked(n) for n in range(20)]
        kind = {column: (["b", "a"] * 10, Value("string")), "size": ([7] * 20, Value("int64"))}
        data = load_images(str(write_parquet(tmp_path / f"{i}.parquet", images, **kind)))
        assert data.label_column == column and data.class_names == ["a", "b"]
        assert pairs(data, data.train) <= {(n, "ba"[n % 2]) for n in range(20)}


def test_columns_that_cannot_be_classes_leave_images_unlabelled_and_are_refused_where_classes_are_needed(tmp_path):
    cases = {
        "floats": (Value("float32"), [0.5, 1.5] * 10, r"Value\('float32'\); classes are integers, strings or"),
        "lists": (datasets.List(Value("int64")), [[0, 1], [1]] * 10, "List.*; classes are integers, strings or"),
        "signs": (Value("int64"), [-1, 1] * 10, "-1 stands for no class: number the classes from 0"),
        "empty": (Value("string"), [None] * 20, "no training image has a class"),
    }
    for case, (feature, labels, message) in cases.items():
        name = str(labelled(tmp_path / f"{case}.parquet", 20, feature, labels))
        data = load_images(name)
        assert data.class_names is None and len(data.train) == 18 and data.train.column_names == ["image"]
        with pytest.raises(ValueError, match=rf"{case}.parquet' has no classes .*{message}.*, which kNN needs"):
            data.require_classes("kNN needs")
        with pytest.raises(ValueError, match=f"column 'label' of .*{message}.*another --label_column"):
            load_images(name, label_column="label")


def test_images_without_label_have_class_minus_1_and_are_counted(tmp_path):
    columns = [(CAT_DOG, -1), (CAT_DOG, None), (Value("int64"), None), (Value("int8"), -1)]
    for case, (feature, none) in enumerate(columns):
        path = labelled(tmp_path / f"{case}.parquet", 20, feature, [0, 1, none, 1] * 5)
        data = load_images(str(path), hold_out=False)
        assert data.train["label"][:] == [0, 1, -1, 1] * 5 and len(data.class_names) == 2
        assert "20 images in 2 classes (train, 5 of them without class)" in data.account()
        with pytest.raises(ValueError, match="5 of 20 training images of .* have no class, which kNN needs"):
            data.require_classes("kNN needs")


@pytest.mark.parametrize("streaming", [False, True])
def test_held_out_split_without_labels_is_without_class(tmp_path, streaming):
    labelled(tmp_path / "set" / "train.parquet", 4)
    write_parquet(tmp_path / "set" / "test.parquet", [marked(9)] * 3)
    data = load_images(str(tmp_path / "set"), streaming=streaming)
    assert [r["label"] for r in data.evaluation] == [-1] * 3 and data.class_names == ["cat", "dog"]
    assert [r["label"] for r in data.train] == [0, 1, 0, 1]


def held_out_names(tmp_path, train, test, number):
    """A data set whose splits number these names in their order, one picture of each."""
    folder = tmp_path / str(number)
    for split, names in (("train", train), ("test", test)):
        labelled(folder / f"{split}.parquet", len(names), ClassLabel(names=names), list(range(len(names))))
    return str(folder)


def test_splits_are_aligned_by_name_in_any_order_case_and_unicode_form(tmp_path):
    cases = [
        (["cat", "dog"], ["dog", "cat"]),
        (["Polish", "polish", "x"], ["x", "polish", "Polish"]),  # the same but for case: two classes
        (["caf\u00e9", "tea"], ["tea", "cafe\u0301"]),
    ]
    for number, (train, test) in enumerate(cases):
        for streaming in (False, True):
            data = load_images(held_out_names(tmp_path, train, test, number), streaming=streaming)
            assert data.class_names == train
            found = [data.class_names[r["label"]] for r in data.evaluation]
            assert found == [{"cafe\u0301": "caf\u00e9"}.get(name, name) for name in test]


def test_held_out_classes_that_no_training_image_has_are_no_classes(tmp_path, capsys):
    for number, (train, test) in enumerate([(["cat", "dog"], ["cat", "Dog"]), (["cat", "dog"], ["cat", "dog", "ant"])]):
        name = held_out_names(tmp_path, train, test, number)
        data = load_images(name)
        assert data.class_names is None and len(data.evaluation) == len(test)
        message = rf"the held-out images have the classes \['{test[-1]}' *\], which no training image has"
        assert "which no training image has" in capsys.readouterr().err
        with pytest.raises(ValueError, match=message.replace(" *", "")):
            load_images(name, label_column="label")


def test_classes_without_images_are_no_classes(tmp_path):
    names = ["ant", "bee", "cat", "dog"]
    for split in ("train", "test"):
        labelled(tmp_path / "set" / f"{split}.parquet", 4, ClassLabel(names=names), [3, 1, 1, 3])
    data = load_images(str(tmp_path / "set"))
    assert data.class_names == ["bee", "dog"]
    assert data.train["label"][:] == data.evaluation["label"][:] == [1, 0, 0, 1]
    assert pairs(data, data.train) == {(0, "dog"), (1, "bee"), (2, "bee"), (3, "dog")}


def test_folders_of_save_to_disk_are_read(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": CAT_DOG})
    write_pictures(tmp_path / "pictures")
    paths = sorted(map(str, (tmp_path / "pictures").iterdir()))
    whole = datasets.Dataset.from_dict({"image": paths, "label": [0, 1] * 5}, features=features)
    whole.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=whole.select(range(6)), test=whole.select(range(6, 10))).save_to_disk(tmp_path / "two")
    expected = {(n, CAT_DOG.names[n % 2]) for n in range(10)}
    for folder, sizes in (("one", (9, 1)), ("two", (6, 4))):
        data = load_images(str(tmp_path / folder))
        assert (len(data.train), len(data.evaluation)) == sizes
        assert pairs(data, data.train) | pairs(data, data.evaluation) == expected
    assert len(list(load_images(str(tmp_path / "two"), streaming=True).train)) == 6
    next((tmp_path / "two" / "test").glob("*.arrow")).unlink()
    with pytest.raises(ValueError, match="two looks like a folder of save_to_disk and cannot be read"):
        load_images(str(tmp_path / "two"))


def test_account_counts_what_is_used_and_what_is_left_out_without_naming_files(tmp_path, capsys):
    for split, name, count in (("train", "cat", 6), ("train", "dog", 5), ("val", "cat", 2)):
        write_pictures(tmp_path / "set" / split / name, count)
    (tmp_path / "set" / "train" / "cat" / "secret-notes.txt").write_text("no picture")
    data = load_images(str(tmp_path / "set"))
    account = "11 images in 2 classes (train), 2 images in 1 classes (evaluation); left out: 1 .txt files"
    assert data.account() == account
    assert "secret-notes.txt" in capsys.readouterr().err
    write_pictures(tmp_path / "set" / "test" / "dog", 3)
    account += ", 1 unused split 'test'"
    assert load_images(str(tmp_path / "set")).account() == account and account in capsys.readouterr().err
    splits = {split: datasets.Dataset.from_dict({"image": [marked(1)] * 4}) for split in ("train", "val", "extra")}
    features = datasets.Features({"image": datasets.Image()})
    datasets.DatasetDict({s: d.cast(features) for s, d in splits.items()}).save_to_disk(tmp_path / "three")
    account = (
        "4 images without classes (train), 4 images without classes (evaluation); left out: 1 unused split 'extra'"
    )
    assert load_images(str(tmp_path / "three")).account() == account


@pytest.mark.parametrize("empty", ["train", "test"])
def test_empty_split_is_refused(tmp_path, empty):
    for split in ("train", "test"):
        labelled(tmp_path / "set" / f"{split}.parquet", 0 if split == empty else 5)
    with pytest.raises(ValueError, match=rf"set/{empty}.parquet.*at least one image"):
        load_images(str(tmp_path / "set"))


def test_single_image_is_too_few(tmp_path):
    with pytest.raises(ValueError, match="one.parquet' holds a single image"):
        load_images(str(write_parquet(tmp_path / "one.parquet", [row(0)])))


def test_folder_and_file_without_pictures_are_refused(tmp_path):
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    with pytest.raises(ValueError, match="folder .*empty holds no image .*: put images"):
        load_images(str(tmp_path / "empty"))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("text")
    with pytest.raises(ValueError, match="folder .*texts holds no image .*.txt files.*put images"):
        load_images(str(tmp_path / "texts"))
    with pytest.raises(ValueError, match="a.txt is one .txt file: give a folder"):
        load_images(str(tmp_path / "texts" / "a.txt"))
    (tmp_path / "broken.parquet").write_bytes(b"this is no parquet file")
    with pytest.raises(ValueError, match="broken.parquet.*[Pp]arquet.*Check that the files can be read"):
        load_images(str(tmp_path / "broken.parquet"))


def test_unknown_name_lists_the_table_and_suggests_close_names(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'cifar10-jpg' .*digits, mnist.*Did you mean cifar10-jpeg"):
        load_images("cifar10-jpg")
    with pytest.raises(FileNotFoundError, match=r"'.*/nowhere' is no path") as raised:
        load_images(str(tmp_path / "nowhere"))
    assert "Did you mean" not in str(raised.value)


def test_a_name_of_the_table_comes_before_a_folder_and_a_folder_before_a_revision(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    load_images("digits")
    assert capsys.readouterr().err == ""
    write_pictures(tmp_path / "digits", 2)
    assert len(load_images("digits").train) == 1437
    note = "note: digits is the data set of the table; the path ./digits is not read: give that if you mean it."
    assert capsys.readouterr().err.strip() == note
    assert len(load_images("./digits", hold_out=False).train) == 2 and capsys.readouterr().err == ""
    write_pictures(tmp_path / "cifar10@home", 3)
    assert len(load_images("cifar10@home", hold_out=False).train) == 3


def test_local_set_without_its_folder_names_the_environment_variable(monkeypatch, tmp_path):
    monkeypatch.delenv("DPSSL_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"'pacs-64px' is read from pacs-64px\*.parquet .*DPSSL_DATA.*None"):
        load_images("pacs-64px")
    monkeypatch.setenv("DPSSL_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"DPSSL_DATA.*{tmp_path}"):
        load_images("pacs-64px")


def test_unreachable_hub_set_says_where_it_was_sought_and_what_to_check(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"nobody/nothing at revision 'v1' on http.*network.*HF_HUB_OFFLINE"):
        load_images("nobody/nothing@v1")


def test_streams_hold_the_same_rows_as_tables(tmp_path):
    labelled(tmp_path / "set" / "train.parquet", 10)
    labelled(tmp_path / "set" / "test.parquet", 4, first=50)
    data, stream = load_images(str(tmp_path / "set")), load_images(str(tmp_path / "set"), streaming=True)
    assert isinstance(stream.train, datasets.IterableDataset) and stream.class_names == data.class_names
    assert list(stream.train) == list(data.train) and list(stream.evaluation) == list(data.evaluation)


def test_streams_have_the_classes_of_a_class_label_only(tmp_path):
    name = str(labelled(tmp_path / "set.parquet", 4, Value("int64")))
    assert load_images(name, streaming=True).class_names is None
    with pytest.raises(ValueError, match=r"'label' .*Value\('int64'\), not a ClassLabel.*leave --streaming out"):
        load_images(name, label_column="label", streaming=True)


CLASSES = {
    "mnist": 10, "cifar10-jpeg": 10, "cifar10-jpeg-small": 10, "mnist-m-small": 10, "pacs-64px": 7,
    "tiny-imagenet-20c": 20, "caltech101-20c": 20, "dtd-10c-128px": 10, "orl-faces": 40,
}  # fmt: skip


def test_every_local_set_of_the_table_is_tested_below():
    assert set(CLASSES) == {name for name, entry in TABLE.items() if entry.local}


def test_local_set_loads_with_its_classes_and_readable_pictures(data_folder):
    for name in CLASSES:
        data = load_images(name)
        assert len(data.class_names) == CLASSES[name]
        assert set(data.train[data.label_column]) == set(range(CLASSES[name]))
        assert len(data.train) > len(data.evaluation) > 0
        size = np.asarray(decode_image(data.train[0][data.image_column])).shape
        assert len(size) == 3 and size[2] == 3 and min(size[:2]) >= 28
