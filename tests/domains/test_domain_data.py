"""Pictures of several domains as they are loaded: which count, where the classes are, and what is refused."""

import datasets
import pytest
import torch
from domain_pictures import CLASSES, DOMAINS, picture, write_pictures
from PIL import Image

from hf_dpssl.data.image_data import load_images
from hf_dpssl.domains import load_domains
from hf_dpssl.embedding.embeddings_table import dataset_fingerprint

SPLITS = ["train", "val", "test"]


def places(numbers) -> list[tuple[int, int, int]]:
    return [(domain, label, number) for domain in range(3) for label in range(2) for number in numbers]


def table(classes=CLASSES, domain_type=None) -> datasets.Dataset:
    """Columns image, domain and label: two pictures of each class of each domain."""
    rows = places(range(2))
    domain_type = domain_type or datasets.ClassLabel(names=DOMAINS)
    types = {"image": datasets.Image(), "domain": domain_type, "label": datasets.ClassLabel(names=classes)}
    columns = {"image": [picture(*row) for row in rows], "domain": [DOMAINS[row[0]] for row in rows]}
    columns["label"] = [CLASSES[row[1]] for row in rows]
    return datasets.Dataset.from_dict(columns, features=datasets.Features(types))


def test_pictures_of_all_splits_count_together(tmp_path):
    for number, split in enumerate(SPLITS):
        write_pictures(tmp_path / split, places(range(2 * number, 2 * number + 2)))
    given = load_domains(str(tmp_path))
    files = [value["path"] for value in given.images["image"][:]]
    assert len(set(files)) == len(list(given.rows)) == len(list(tmp_path.rglob("*.png"))) == 36
    for file, domain, label in zip(files, given.domains.tolist(), given.labels.tolist(), strict=True):
        assert file.split("/")[-3:-1] == [DOMAINS[domain], CLASSES[label]]
    before = given.fingerprint
    assert load_domains(str(tmp_path)).fingerprint == before
    Image.new("RGB", (20, 20)).save(files[-1])  # of the last split
    assert load_domains(str(tmp_path)).fingerprint != before
    for split in SPLITS:
        table().to_parquet(tmp_path / "columns" / f"{split}.parquet")
    assert len(load_domains(str(tmp_path / "columns"), domain_column="domain").rows) == 36


def test_a_domain_or_a_class_may_be_in_one_split_only(tmp_path):
    parts = {
        "train": [0, 1, 2, 3, 8, 9, 10, 11],
        "val": [4, 5],
        "test": [6, 7],
    }  # val and test are of the second domain
    for kind in (datasets.ClassLabel(names=DOMAINS), datasets.Value("string")):
        for split, rows in parts.items():
            table(domain_type=kind).select(rows).to_parquet(tmp_path / "columns" / f"{split}.parquet")
        given = load_domains(str(tmp_path / "columns"), domain_column="domain")
        assert (given.domain_names, given.class_names) == (sorted(DOMAINS), CLASSES)
        assert torch.bincount(2 * given.domains + given.labels).tolist() == [2] * 6
    for split, rows in {"train": [0, 1, 4, 5, 8, 9], "test": [2, 3, 6, 7, 10, 11]}.items():  # a class each
        table().select(rows).to_parquet(tmp_path / "classes" / f"{split}.parquet")
    assert load_domains(str(tmp_path / "classes"), domain_column="domain").class_names == CLASSES
    write_pictures(tmp_path / "folder" / "train", [(0, label, number) for label in range(2) for number in range(2)])
    write_pictures(tmp_path / "folder" / "test", [(1, label, number) for label in range(2) for number in range(2)])
    given = load_domains(str(tmp_path / "folder"))
    assert (given.domain_names, given.class_names) == (DOMAINS[:2], CLASSES)
    assert torch.bincount(2 * given.domains + given.labels).tolist() == [2] * 4


def test_classes_of_two_domains_that_differ_by_spelling_only_are_refused(tmp_path):
    write_pictures(tmp_path, places(range(2)))
    folder = tmp_path / DOMAINS[2] / CLASSES[1]
    folder.rename(folder.with_name(CLASSES[1].upper()))
    with pytest.raises(ValueError, match=f"class folders .'{CLASSES[1].upper()}', '{CLASSES[1]}'. .*by spelling only"):
        load_domains(str(tmp_path))
    assert load_domains(str(tmp_path), labelled=False).domain_names == DOMAINS


def test_of_two_splits_the_fingerprint_is_that_of_train_and_evaluation(tmp_path):
    """Features that are kept stay good."""
    for number, split in enumerate(["train", "test"]):
        write_pictures(tmp_path / split, places(range(2 * number, 2 * number + 2)))
    data = load_images(str(tmp_path), hold_out=False)
    given = load_domains(str(tmp_path)).fingerprint
    assert given.startswith(dataset_fingerprint({"train": data.train, "evaluation": data.evaluation}) + "-")


def test_splits_whose_classes_have_other_names_are_refused(tmp_path):
    for split in SPLITS:
        table(CLASSES[::-1] if split == "test" else CLASSES).to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(ValueError, match=r"the splits 'val' and 'test' of .* differ in the column 'label'"):
        load_domains(str(tmp_path), domain_column="domain")


def test_a_column_of_domains_is_not_taken_for_classes(tmp_path):
    """Domains and classes are both of type ClassLabel; with the domains named, the classes are what is left."""
    table().to_parquet(tmp_path / "table.parquet")
    given = load_domains(str(tmp_path), domain_column="domain")
    assert (given.domain_names, given.class_names) == (DOMAINS, CLASSES)
    assert torch.bincount(2 * given.domains + given.labels).tolist() == [2] * 6
    with pytest.raises(ValueError, match="may all hold them: name one with --label_column"):
        load_domains(str(tmp_path), clusters=2)
    table().remove_columns("label").to_parquet(tmp_path / "table.parquet")
    with pytest.raises(ValueError, match="has no classes: name their column with --label_column"):
        load_domains(str(tmp_path), domain_column="domain")


def test_what_is_wrong_with_clusters_is_not_mended_in_folders(tmp_path):
    write_pictures(tmp_path, [(0, 0, number) for number in range(3)] + [(1, 1, 0)])
    with pytest.raises(ValueError, match="at least 2 are needed. Clusters depend on the pictures: try fewer clusters"):
        load_domains(str(tmp_path), clusters=2, labelled=False)
