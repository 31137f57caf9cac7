"""The usual sets of domain generalisation: read from the Hub by name, counted, and what is said where that fails."""

import io

import datasets
import pytest
from domain_pictures import CLASSES, DOMAINS, PLACES, picture, write_pictures
from hub_server import HubServer

from hf_dpssl.domains.known_sets import KNOWN_SETS, KnownSet, account, load_set


@pytest.fixture
def data_hub(hub: HubServer, monkeypatch, tmp_path) -> HubServer:
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.endpoint)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return hub


def publish(hub: HubServer, spec: KnownSet, folder) -> None:
    """Pictures of three domains as a set of the table has them: columns image, domain and label."""
    columns = {"image": [], spec.domain_column: [], "label": []}
    for domain, label, number in PLACES:
        file = io.BytesIO()
        picture(domain, label, number).save(file, "PNG")
        columns["image"].append({"bytes": file.getvalue(), "path": None})
        columns[spec.domain_column].append(DOMAINS[domain])
        columns["label"].append(label)
    types = {"image": datasets.Image(), spec.domain_column: datasets.Value("string")}
    types["label"] = datasets.ClassLabel(names=CLASSES)
    (folder / "data").mkdir(parents=True)
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(types))
    table.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    hub.add_repo("dataset", spec.hub_id, folder)


def test_a_set_is_read_by_its_name_and_only_a_whole_one_compares(data_hub, tmp_path, monkeypatch):
    for name, spec in KNOWN_SETS.items():
        assert not spec.verified, name  # none of these ids could be loaded and counted
        if spec.hub_id is not None:
            publish(data_hub, spec, tmp_path / name)
            given = load_set(name)
            assert given.domain_names == DOMAINS and given.class_names == CLASSES and len(given.rows) == len(PLACES)
            text = account(name, given)
            assert f"{name}: not the whole set, so that published figures do not compare" in text
            assert f"The Hub id {spec.hub_id} was not checked by us" in text and "t-MoCo-v2" not in text
    assert load_set("pacs", clusters=2).domain_names == ["cluster 0", "cluster 1"]
    counts, where = (3, 2, len(PLACES)), ("flwrlabs/pacs", "domain")
    monkeypatch.setitem(KNOWN_SETS, "pacs", KnownSet(*counts, *where, verified=True))
    assert account("pacs", load_set("pacs")) == f"pacs: the whole set, as published ({len(PLACES)} images)."
    monkeypatch.setitem(KNOWN_SETS, "pacs", KnownSet(*counts, *where, published=(1.0, 2.5)))
    assert account("pacs", load_set("pacs")).endswith("(frozen features?): MoCo-v2 1.0, t-MoCo-v2 2.5.")
    assert account("mine", load_set("pacs")) is None


def test_what_cannot_be_had_says_what_to_download_and_how_to_sort_it(data_hub):
    for name, spec in KNOWN_SETS.items():
        with pytest.raises(FileNotFoundError) as refused:
            load_set(name)
        text = str(refused.value)
        assert f"download it ({spec.domains} domains, {spec.classes} classes, {spec.images:,} images" in text, text
        assert f"give its folder as {name}=FOLDER, sorted as DOMAIN/CLASS/image" in text
        assert "no Hub id that we know of" in text if spec.hub_id is None else f"{spec.hub_id} of the Hub" in text
        assert spec.hub_id is None or "which was not checked by us" in text


def test_a_set_that_lies_in_a_folder_is_counted_as_one_of_its_name(tmp_path, monkeypatch):
    folder = write_pictures(tmp_path / "with=sign")
    given = load_set(f"vlcs={folder}")
    assert given.domain_names == DOMAINS and len(given.rows) == len(load_set(str(folder)).rows) == len(PLACES)
    found = account(f"vlcs={folder}", given)
    assert found.startswith("vlcs: not the whole set, so that published figures do not compare: ")
    assert found.endswith(": 3 domains, 2 classes, 42 images of 4, 5 and 10,729.")
    assert account(str(folder), given) is None
    monkeypatch.setitem(KNOWN_SETS, "vlcs", KnownSet(3, 2, len(PLACES), published=(70.4, 75.1)))
    for labelled in (True, False):
        whole = account(f"vlcs={folder}", load_set(f"vlcs={folder}", labelled=labelled))
        assert whole.startswith("vlcs: the whole set, as published (42 images). Published means"), labelled
        assert whole.endswith("MoCo-v2 70.4, t-MoCo-v2 75.1.")
    for wrong in (f"mine={folder}", "vlcs="):
        with pytest.raises(ValueError, match="NAME=FOLDER takes a folder of pacs, vlcs, office_home"):
            load_set(wrong)
