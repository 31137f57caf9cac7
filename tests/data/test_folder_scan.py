"""Folders as people have them: which splits and classes come out, and that every file is accounted for."""

import os

import pytest
from cases import for_each
from PIL import Image

from hf_dpssl.data.folder_scan import scan_folder


def make(root, names):
    """Files of these names below a folder: pictures where the suffix says so, or there is none."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".png", ".jpg", ""):
            Image.new("RGB", (4, 4)).save(path, format="PNG")
        else:
            path.write_text("no picture")
    return root


def numbered(folder, count):
    return [f"{folder}/{i}.png" for i in range(count)]


@for_each(
    "names, splits, classes, left_out",
    [
        # a class called train
        (
            numbered("bus", 30) + numbered("car", 30) + numbered("train", 30),
            {"train": [30, 30, 30]},
            ["bus", "car", "train"],
            0,
        ),
        # a flat folder
        (["photo-of-a-train.png", *(f"{i}.png" for i in range(29))], {"train": 30}, None, 0),
        # file names that look like splits
        (
            [*numbered("cat", 3), "cat/dev-1.png", "cat/dev-2.png", *numbered("dog", 5)],
            {"train": [5, 5]},
            ["cat", "dog"],
            0,
        ),
        # splits of plain images
        (numbered("train", 5) + numbered("test", 3), {"train": 5, "test": 3}, None, 0),
        # synonyms of splits with classes
        (
            numbered("Training/cat", 2) + numbered("Training/dog", 3) + numbered("DEV/dog", 1),
            {"train": [2, 3], "validation": [0, 1]},
            ["cat", "dog"],
            0,
        ),
        # a stray picture, a table, hidden files and a hidden class
        (
            [
                *numbered("cat", 10),
                *numbered("dog", 10),
                "preview.png",
                "metadata.csv",
                ".DS_Store",
                "cat/.hidden.png",
                ".ant/1.png",
            ],
            {"train": [10, 10]},
            ["cat", "dog"],
            5,
        ),
        # names with words of splits among others in one folder, which are no splits
        (
            [*numbered("all/bullet_train", 2), *numbered("all/test_tube", 2), *numbered("all/cat", 6)],
            {"train": 10},
            None,
            0,
        ),
        # classes are the first level
        (["cat/day1/1.png", "cat/day2/1.png", "dog/day1/2.png"], {"train": [2, 1]}, ["cat", "dog"], 0),
        # other formats
        (
            ["a/1.png", "a/noext", "b/2.png", "b/x.heic", "b/y.svg", "b/readme.txt", "all.zip", "b/z.<img>"],
            {"train": [2, 1]},
            ["a", "b"],
            5,
        ),
        # a class called train and one called like a test among others
        (
            [f"{name}/1.png" for name in ("bus", "car", "ship", "test tube", "train")],
            {"train": [1, 1, 1, 1, 1]},
            ["bus", "car", "ship", "test tube", "train"],
            0,
        ),
        # few pictures in a folder beside those of splits
        (
            numbered("train/cat", 10) + numbered("train/dog", 10) + numbered("val/dog", 5) + numbered("docs", 2),
            {"train": [10, 10], "validation": [0, 5]},
            ["cat", "dog"],
            2,
        ),
        # one folder is no class
        (numbered("photos", 4), {"train": 4}, None, 0),
        # names that patterns would read otherwise
        (
            [f"{name}/1.png" for name in ("[x]", "a*b", "50% off?", "é")],
            {"train": [1, 1, 1, 1]},
            ["50% off?", "[x]", "a*b", "é"],
            0,
        ),
    ],
)
def test_splits_classes_and_left_out_files(tmp_path, names, splits, classes, left_out):
    scan = scan_folder(make(tmp_path, names))
    assert scan.class_names == classes
    found = {}
    for split, rows in scan.splits.items():
        labels = [label for _, label in rows]
        found[split] = [labels.count(i) for i in range(len(classes))] if classes else len(labels)
        assert classes or set(labels) == {-1}
        for path, label in rows:
            assert os.path.isfile(path) and (not classes or f"/{classes[label]}/" in path)
    assert found == splits
    assert sum(map(len, scan.left_out.values())) == left_out
    read = [path for rows in scan.splits.values() for path, _ in rows]
    assert len(set(read)) + left_out == len(names)  # every file is read or named


@for_each(
    "names, message",
    [
        # nothing
        ([], "no file at all"),
        # no picture
        (["notes.txt"], "{'.txt files': 1}"),
        # stray
        (["train/1.png", "test/1.png", "preview.png"], "preview.png.* lie beside the split"),
        # synonyms
        (["train/1.png", "val/1.png", "dev/1.png"], "'dev', 'val'.* for one split"),
        # many in a folder beside splits
        (
            numbered("train/a", 10) + numbered("test/a", 6) + numbered("unlabeled", 2),
            r"2 of 18 images of .* in the folders unlabeled beside the split folders \['test', 'train'\]: move them",
        ),
        # no training split, few pictures elsewhere
        (numbered("val", 10) + numbered("test", 10) + ["docs/1.png"], "no training images"),
        # called like splits
        (
            ["train_set/a/1.png", "Test Set/a/1.png"],
            "Test Set, train_set .* like splits: rename them to train and test",
        ),
        # splits in a folder
        (
            ["archive/set/train/a/1.png", "archive/set/train/b/1.png", "archive/set/test/a/1.png", "preview.png"],
            "the split folders test, train of .* lie in the folder archive/set: give .*/archive/set itself",
        ),
        # no training split
        (["val/1.png", "test/1.png"], "no training images"),
        # new class
        (["train/a/1.png", "train/b/1.png", "test/c/1.png"], "has the classes c, which"),
        # classes in one split
        (["train/a/1.png", "train/b/1.png", "test/1.png"], "some have none"),
        # case
        (["train/a/1.png", "train/b/1.png", "test/B/1.png"], "'B', 'b'.*spelling"),
        # forms
        (["cafe\u0301/1.png", "caf\u00e9/1.png", "x/1.png"], "two class folders.*café"),
        # parquet beside images
        (["a/1.png", "b/1.png", "rows.parquet"], "2 images and 1 parquet"),
        # as many beside class folders
        (["a/1.png", "1.png", "2.png"], "2 of 3 images"),
    ],
)
def test_what_could_mean_two_things_is_refused(tmp_path, names, message):
    with pytest.raises(ValueError, match=message) as refusal:
        scan_folder(make(tmp_path, names))
    assert str(tmp_path) in str(refusal.value)


def test_pictures_beside_splits_are_named(tmp_path):
    scan = scan_folder(make(tmp_path, [*numbered("train", 10), *numbered("test", 10), "docs/a/1.png", "x/2.png"]))
    assert scan.left_out == {"images in folders beside split folders": ["docs/a/1.png", "x/2.png"]}


def test_unicode_forms_of_one_name_are_one_class_in_two_splits(tmp_path):
    names = ["train/caf\u00e9/1.png", "train/tea/1.png", "test/cafe\u0301/1.png"]
    scan = scan_folder(make(tmp_path, names))
    assert scan.class_names == ["caf\u00e9", "tea"] and [label for _, label in scan.splits["test"]] == [0]


def test_links_are_followed_and_loops_end(tmp_path):
    make(tmp_path / "elsewhere", ["1.png", "2.png"])
    root = make(tmp_path / "root", ["cat/1.png"])
    (root / "dog").symlink_to(tmp_path / "elsewhere")
    (root / "cat" / "again").symlink_to(root)
    (root / "cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    scan = scan_folder(root)
    assert scan.class_names == ["cat", "dog"] and [label for _, label in scan.splits["train"]] == [0, 1, 1]
    assert scan.left_out == {"links to a folder above": ["cat/again"], "broken links": ["cat/gone.png"]}


def test_a_name_that_is_not_utf_8_is_left_out_and_named(tmp_path):
    root = make(tmp_path, ["a/1.png", "b/1.png"])
    os.rename(root / "b" / "1.png", os.fsencode(root / "b") + b"/\xff\xfe.png")
    make(root, ["b/2.png", "b/\x1b[2J.txt"])
    scan = scan_folder(root)
    assert [label for _, label in scan.splits["train"]] == [0, 1]
    assert "b/\\xff\\xfe.png" in scan.examples() and list(scan.counts().values()) == [1, 1]
    assert "\x1b" not in scan.examples() and "\\x1b[2J.txt" in scan.examples()


def test_empty_folders_are_named(tmp_path):
    root = make(tmp_path, ["a/1.png", "b/1.png"])
    (root / "c").mkdir()
    assert scan_folder(root).left_out == {"empty folders": ["c"]}
