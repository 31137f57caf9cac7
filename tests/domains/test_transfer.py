"""The transfer suite: layouts of all nine sets, what may be called by their names, protocols, and going on."""

import io
import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tiny_encoders import save_ours

from hf_dpssl.cli.commands import main
from hf_dpssl.domains import TRANSFER_SETS, load_transfer_set
from hf_dpssl.domains.fine_tuning import Setting, accuracy, fine_tune, normalisation
from hf_dpssl.domains.transfer_sets import TransferSet
from hf_dpssl.embedding.embedder import ImageEmbedder
from hf_dpssl.evaluation.probes import STRENGTHS


def encoded(number: int, label: int, kind: str = "PNG") -> bytes:
    random = np.random.default_rng([number, label])
    pixels = random.normal(90, 30, (16, 16, 3)) + 90 * np.eye(3)[label % 3]
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, kind)
    return file.getvalue()


def table(labels, names, spec: TransferSet, kind="PNG"):
    columns = {spec.image_column: [{"bytes": encoded(n, c, kind), "path": None} for n, c in enumerate(labels)]}
    columns[spec.label_column] = list(labels)
    types = {spec.image_column: datasets.Image(), spec.label_column: datasets.ClassLabel(names=names)}
    if spec.label_column == "variant":  # beside other columns of classes
        columns["family"] = [0] * len(labels)
        types["family"] = datasets.ClassLabel(names=["one", "two"])
    return datasets.Dataset.from_dict(columns, features=datasets.Features(types))


def save_set(folder, spec: TransferSet, *, classes=3, train=8, test=4, validation=0, kind="PNG"):
    """Parquet files of a set with so many pictures of each class, in its own layout."""
    names = [f"class {number}" for number in range(classes)]
    counts = {"train": train + test if spec.drawn else train, "validation": validation, "test": test}
    (folder / "data").mkdir(parents=True)
    for split, count in counts.items():
        if count and not (spec.drawn and split == "test"):
            labels = [label for label in range(classes) for _ in range(count)]
            table(labels, names, spec, kind).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture
def data_hub(hub, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.endpoint)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return hub


def test_every_set_is_read_from_the_hub_in_its_layout_and_a_part_is_not_called_by_its_name(data_hub, tmp_path):
    for key, spec in TRANSFER_SETS.items():
        size = {"train": 34 if spec.drawn else 8, "validation": 4 if key == "aircraft" else 0}
        folder = save_set(tmp_path / key, spec, **size)
        commit = data_hub.add_repo("dataset", spec.hub_id, folder)
        source = f"{spec.hub_id}@{commit}"
        if spec.revision == "main":
            found = load_transfer_set(key)
        else:  # pinned to a commit that only the real Hub has
            found = load_transfer_set(key, source)
        parts = {name: getattr(found, name) for name in ("train", "validation", "test")}
        sizes = {name: np.bincount(part.labels).tolist() for name, part in parts.items()}
        wanted = {"train": [8] * 3, "validation": [4] * 3} if size["validation"] else None
        if spec.drawn:
            wanted = {"train": [24] * 3, "validation": [6] * 3, "test": [8] * 3}
        assert sum(sum(s) for s in sizes.values()) == 3 * (size["train"] + size["validation"] + 4), key
        assert sizes == (wanted or {}) | {"test": sizes["test"]} if wanted else len(parts["validation"].rows) == 5, key
        for part in parts.values():
            stored = [part.images[int(row)][found.data.label_column] for row in part.rows]
            assert stored == part.labels.tolist()
        if spec.drawn:
            rows = [set(part.rows) for part in parts.values()]
            assert not rows[0] & rows[1] and not (rows[0] | rows[1]) & rows[2]
        assert not found.whole and found.title.startswith(found.data.name), key
        assert f"not {spec.title}" in found.title and f"3 of {spec.classes} classes" in found.title
        assert not spec.verified


def test_folders_sorted_as_the_error_says_are_read(tmp_path):
    for key, layout in {"dtd": {"train": 6, "val": 3, "test": 2}, "pets": {"train": 10, "test": 2}}.items():
        write_folders(tmp_path / key, {f"{split}/": count for split, count in layout.items()})
        with pytest.raises(ValueError, match="train/CLASS/image and test/CLASS/image \\(val/ where there is one\\)"):
            load_transfer_set(key, str(tmp_path / "none"))
        found = load_transfer_set(key, str(tmp_path / key))
        sizes = [np.bincount(part.labels).tolist() for part in (found.train, found.validation, found.test)]
        assert sizes == ([[6] * 3, [3] * 3, [2] * 3] if key == "dtd" else [[8] * 3, [2] * 3, [2] * 3])
        assert found.class_names == ["blue", "green", "red"] and not found.whole
    write_folders(tmp_path / "caltech101", {"": 33})
    with pytest.raises(ValueError, match="into a folder as CLASS/image, or"):
        load_transfer_set("caltech101", str(tmp_path / "none"))
    found = load_transfer_set("caltech101", str(tmp_path / "caltech101"))
    sizes = [np.bincount(part.labels).tolist() for part in (found.train, found.validation, found.test)]
    assert sizes == [[24] * 3, [6] * 3, [3] * 3]


def write_folders(root, counts):
    """Pictures of three classes in folders: {what stands before CLASS/image: pictures of each class}."""
    for before, count in counts.items():
        for label, name in enumerate(["blue", "green", "red"]):
            folder = root / f"{before}{name}"
            folder.mkdir(parents=True)
            for number in range(count):
                (folder / f"{number}.png").write_bytes(encoded(number, label))


def test_a_whole_set_bears_its_name_unless_it_is_jpeg_or_unbalanced(tmp_path, monkeypatch):
    small = TransferSet(
        "Small", 3, 24, 12, "top1", "org/small", "label", (1.0, 2.0), "https://example.org", per_class=(4, 4),
        lossless=True,
    )  # fmt: skip
    monkeypatch.setitem(TRANSFER_SETS, "small", small)
    whole = load_transfer_set("small", str(save_set(tmp_path / "whole", small)))
    assert whole.whole and whole.title == "Small" and whole.difference is None
    jpeg = load_transfer_set("small", str(save_set(tmp_path / "jpeg", small, kind="JPEG")))
    assert not jpeg.whole and "JPEG" in jpeg.title and not jpeg.title.startswith("Small")
    names = ["class 0", "class 1", "class 2"]
    skewed = save_set(tmp_path / "skewed", small)
    table([0] * 6 + [1] * 4 + [2] * 2, names, small).to_parquet(skewed / "data/test-00000-of-00001.parquet")
    assert "2 to 6 test images a class, not 4 to 4" in load_transfer_set("small", str(skewed)).difference

    cases = [
        (str(tmp_path / "none"), "Download Small \\(3 classes, 24 \\+ 12 images\\) from https://example.org"),
        (str(skewed / "data/train-00000-of-00001.parquet"), "has no test split.*--data small=FOLDER"),
    ]
    lacking = save_set(tmp_path / "lacking", small)
    table([0] * 9 + [1] * 9, names, small).to_parquet(lacking / "data/train-00000-of-00001.parquet")
    cases.append((str(lacking), "the held-out images have the classes \\['class 2'\\]"))
    for source, message in cases:
        with pytest.raises(ValueError, match=message):
            load_transfer_set("small", source)
    with pytest.raises(ValueError, match="no set of the transfer suite"):
        load_transfer_set("imagenet")


def test_accuracy_of_each_metric_and_its_interval():
    labels = np.array([0] * 90 + [1] * 10)
    predicted = np.array([0] * 90 + [0] * 5 + [1] * 5)
    assert accuracy(predicted, labels, "top1")["mean"] == 95
    assert accuracy(predicted, labels, "per_class")["mean"] == 75
    random = np.random.default_rng(0)
    shares = np.array([0.9, 0.5, 0.7])
    for metric, truth in (("top1", 100 * np.average(shares, weights=[60, 20, 40])), ("per_class", 70)):
        covered = 0
        ids = np.repeat(np.arange(3), [60, 20, 40])
        for _ in range(400):
            right = random.random(120) < shares[ids]
            interval = accuracy(np.where(right, ids, (ids + 1) % 3), ids, metric)
            covered += interval["low"] <= truth <= interval["high"]
        assert 0.92 < covered / 400 < 0.99, metric


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder") / "encoder"
    save_ours(folder)
    return folder


def suite(capsys, encoder, folder, *argv) -> list[dict]:
    line = ["evaluate", str(encoder), "--suite", "transfer", "--output_dir", str(folder), *map(str, argv), "--json"]
    assert main(line) == 0
    return json.loads(capsys.readouterr().out)["rows"]


def test_suite_measures_what_scikit_learn_measures_and_goes_on_where_it_was(encoder, tmp_path, capsys, monkeypatch):
    sources = {key: save_set(tmp_path / key, TRANSFER_SETS[key], train=15, test=8) for key in ("dtd", "pets")}
    data = ["--data", *[f"{key}={folder}" for key, folder in sources.items()]]
    fitted = []

    class Counted(LogisticRegression):
        def fit(self, rows, labels):
            fitted.append(len(rows))
            return super().fit(rows, labels)

    monkeypatch.setattr("hf_dpssl.domains.transfer.LogisticRegression", Counted)
    rows = suite(capsys, encoder, tmp_path / "out", "--sets", "dtd", "pets", "cars", *data, "cars=/none")
    assert [(r["set"], r.get("protocol")) for r in rows[:4]] == [(s, p) for s in sources for p in ("knn", "linear")]
    assert rows[4].keys() == {"set", "error"} and "Download Stanford Cars" in rows[4]["error"]
    assert not any("published" in row or row["whole"] for row in rows[:4])
    assert str(tmp_path) not in json.dumps(rows[:4])  # folders of a machine are not written down
    given = load_transfer_set("pets", str(sources["pets"]))
    embedder = ImageEmbedder(str(encoder))

    def features(part):
        values = [part.images[int(row)][given.data.image_column]["bytes"] for row in part.rows]
        return embedder.embed_pictures([Image.open(io.BytesIO(value)) for value in values]).numpy()

    x = {name: features(getattr(given, name)) for name in ("train", "validation", "test")}
    both = np.concatenate([x["train"], x["validation"]])
    labels = np.concatenate([given.train.labels, given.validation.labels])
    nearest = KNeighborsClassifier(20, metric="cosine", algorithm="brute").fit(both, labels).predict(x["test"])
    wanted = accuracy(nearest, given.test.labels, "per_class")
    assert {name: rows[2][name] for name in wanted} == pytest.approx(wanted) and rows[2]["metric"] == "per_class"
    model = make_pipeline(StandardScaler(), LogisticRegression(C=rows[3]["chosen"]["c"], max_iter=1000))
    wanted = accuracy(model.fit(both, labels).predict(x["test"]), given.test.labels, "per_class")
    assert rows[3]["mean"] == pytest.approx(wanted["mean"])
    assert fitted == 2 * [*[len(given.train.rows)] * len(STRENGTHS), len(both)]  # of dtd, then of pets

    def nothing_is_measured_again(*_):
        raise AssertionError("measured twice")

    monkeypatch.setattr("hf_dpssl.domains.transfer._measured", nothing_is_measured_again)
    assert suite(capsys, encoder, tmp_path / "out", "--sets", "dtd", "pets", *data) == rows[:4]
    assert main(["evaluate", str(encoder), "--suite", "transfer", "--output_dir", str(tmp_path / "out"), "--sets",
                 "dtd", *data[:2]]) == 0  # fmt: skip
    printed = capsys.readouterr().out
    assert f"not {TRANSFER_SETS['dtd'].title}" in printed and "published figures stand beside" in printed
    assert json.loads((tmp_path / "out/transfer.json").read_text())["metrics"]["precision"] == "float32"
    monkeypatch.undo()
    monkeypatch.setattr(ImageEmbedder, "rounded", property(lambda self: True, lambda self, value: None), raising=False)
    assert main(["evaluate", str(encoder), "--suite", "transfer", "--output_dir", str(tmp_path / "rounded"), "--sets",
                 "dtd", *data[:2], "--protocol", "knn"]) == 0  # fmt: skip
    assert "bfloat16" in capsys.readouterr().out and "bfloat16" not in printed


def test_fine_tuning_learns_chooses_on_validation_and_trains_the_encoder(encoder, tmp_path, capsys, monkeypatch):
    small = TransferSet("Small", 3, 60, 24, "top1", "org/small", "label", (1.0, 2.0), "https://example.org")
    monkeypatch.setitem(TRANSFER_SETS, "small", small)
    folder = save_set(tmp_path / "small", small, train=20, test=8)
    arguments = ["--sets", "small", "--data", f"small={folder}", "--protocol", "finetune", "--batch_size", 16]
    trained_on = []

    def counted(encoder, data, splits, *more, **options):
        trained_on.append([len(split.rows) for split in splits])
        return fine_tune(encoder, data, splits, *more, **options)

    monkeypatch.setattr("hf_dpssl.domains.transfer.fine_tune", counted)
    arguments += ["--steps", 12, "--learning_rates", "1e-7", "0.05", "1e9", "--weight_decays", "0"]
    (row,) = suite(capsys, encoder, tmp_path / "out", *arguments)
    assert row["chosen"]["learning_rate"] == 0.05 and row["chosen"]["tried"] == 3
    assert trained_on == [[48], [48], [48], [48, 12]]  # the grid on train, the best setting on validation too
    assert row["whole"] and row["published"] == {"MoCo-v2": 1.0, "t-MoCo-v2": 2.0} and row["mean"] > 60, row
    tried = [value for value in json.loads((tmp_path / "out/measured.json").read_text()).values() if value != row]
    assert any("diverged" in value for value in tried)
    given = load_transfer_set("small", str(folder))
    with pytest.raises(FloatingPointError, match="the loss is"):
        fine_tune(str(encoder), given.data, [given.train], 3, Setting(1e9, 0.0), steps=8, batch_size=16)


def test_normalisation_is_that_of_the_encoders_config(encoder):
    mean, std, side = normalisation(ImageEmbedder(str(encoder)))
    assert side == 16 and torch.allclose(torch.tensor(mean), torch.tensor([0.4, 0.5, 0.6]), atol=1e-4)
    assert torch.allclose(torch.tensor(std), torch.tensor([0.2, 0.3, 0.4]), atol=1e-4)


def test_wrong_flags_of_the_suite_are_refused_before_the_encoder_is_loaded(tmp_path, capsys):
    save = ["--output_dir", str(tmp_path / "out")]
    cases = [
        (["--suite", "transfer", "--sets", "imagenet", *save], "sets are of aircraft"),
        (["--suite", "transfer", "--data", "cifar10", *save], "--data takes SET=SOURCE"),
        (["--suite", "transfer", "--data", "x=y", *save], "sets are of aircraft"),
        (["--suite", "transfer", "--protocol", "views", *save], "--protocol views is not for --suite"),
        (["--suite", "transfer", "--dataset", "mnist", *save], "--dataset is not for --suite transfer"),
        (["--suite", "transfer", "--protocol", "finetune", "--steps", "0", *save], "steps, batch_size and learning"),
        (["--suite", "transfer", "--steps", "9", *save], "--steps is of fine-tuning: add --protocol finetune"),
        (["--suite", "transfer", "--sets", "dtd", "dtd", *save], "dtd: a set is measured once"),
        (["--suite", "transfer", "--sets", "dtd", "--data", "pets=y", *save], "pets: a source of a set that is not"),
        (["--steps", "5"], "--steps is for --suite transfer"),
        (["--protocol", "finetune"], "--protocol finetune is for --suite transfer"),
    ]
    for argv, message in cases:
        assert main(["evaluate", "org/none", *argv]) == 2, argv
        assert message in capsys.readouterr().err, argv
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_suite_on_real_pictures_names_the_parts_that_it_has(encoder, data_folder, tmp_path, capsys):
    data = ["--data", "cifar10=cifar10-jpeg-small", "caltech101=caltech101-20c", "dtd=dtd-10c-128px"]
    rows = suite(capsys, encoder, tmp_path, "--sets", "cifar10", "caltech101", "dtd", *data, "--protocol", "knn")
    assert [row["title"].split(" ")[0] for row in rows] == ["cifar10-jpeg-small", "caltech101-20c", "dtd-10c-128px"]
    assert not any(row["whole"] for row in rows) and all(row["mean"] > 5 for row in rows)
