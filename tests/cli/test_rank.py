"""`hf-dpssl rank` on tiny encoders and pictures of three domains."""

import argparse
import io
import json
import re
import shlex
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from domain_pictures import CLASSES, DOMAINS, PLACES, picture, write_pictures
from PIL import Image
from tiny_encoders import save_ours

from hf_dpssl.cli.commands import main
from hf_dpssl.cli.domain_flags import notes_of
from hf_dpssl.cli.embed import parser
from hf_dpssl.domains import load_domains
from hf_dpssl.embedding.embedder import ImageEmbedder
from hf_dpssl.zoo import leave_one_domain_out
from hf_dpssl.zoo.zoo_ranking import _agreement


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Two encoders, and one that has no weights."""
    root = tmp_path_factory.mktemp("zoo")
    save_ours(root / "narrow")
    save_ours(root / "wide", model_args={"channels": [8, 16, 16, 32]})
    save_ours(root / "broken")
    (root / "broken/model.safetensors").write_bytes(b"nothing")
    return [str(root / name) for name in ("broken", "narrow", "wide")]


def rank(capsys, *argv) -> list[dict]:
    assert main(["rank", *map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_features_of_other_pictures_are_not_taken_from_the_cache(pictures, zoo, tmp_path, capsys):
    """So many images are drawn of domains, or of the classes within them."""
    some = [pictures, "--zoo", *zoo[1:], "--images", 12]
    rank(capsys, *some, "--no_labels", "--output_dir", tmp_path / "used")
    again = rank(capsys, *some, "--output_dir", tmp_path / "used")
    fresh = rank(capsys, *some, "--output_dir", tmp_path / "new")
    assert [entry["domains"] for entry in again] == [entry["domains"] for entry in fresh]


def test_ranking_is_that_of_the_encoders_own_features_and_a_broken_one_stands_last(pictures, zoo, tmp_path, capsys):
    found = rank(capsys, pictures, "--zoo", *zoo, "--output_dir", tmp_path)
    assert found[-1].keys() == {"name", "encoder", "error"} and found[-1]["encoder"] == zoo[0]
    domains, labels, _ = torch.tensor(PLACES).T
    for entry in found[:2]:
        embedder = ImageEmbedder(entry["encoder"])
        features = embedder.embed_pictures([picture(*place) for place in PLACES])
        wanted = leave_one_domain_out(features, labels, domains)
        for name, expected in zip(DOMAINS, wanted, strict=True):
            assert entry["domains"][name] == pytest.approx(expected, rel=1e-3, abs=1e-3)
        scores = [expected["score"] for expected in wanted]
        assert entry["score"]["mean"] == pytest.approx(np.mean(scores), abs=1e-3)
        assert entry["score"]["low"] < entry["score"]["mean"] < entry["score"]["high"]
        assert entry["width"] == features.shape[1] and entry["parameters"] > 1000 and not entry["cached"]
    assert found[0]["score"]["mean"] >= found[1]["score"]["mean"]
    assert found[0]["behind"] == {"mean": 0, "low": 0, "high": 0} and found[1]["behind"]["mean"] >= 0
    written = json.loads((tmp_path / "rank.json").read_text())
    assert written["metrics"][Path(zoo[1]).name]["score"] == next(e["score"] for e in found if e["encoder"] == zoo[1])
    assert Image.open(tmp_path / "rank.png").size[0] > 100

    assert main(["rank", f"vlcs={pictures}", "--zoo", *zoo, "--output_dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert f"\n{Path(zoo[0]).name} " in printed and "failed: " in printed
    assert f"hf-dpssl embed {found[0]['encoder']} {pictures} --output_dir outputs/embeddings\n" in printed
    assert len(re.findall(r" [.\d]+ \(cached\) ", printed)) == 2
    assert "domains are the folders of the first level" in printed and "\nvlcs: not the whole set" in printed
    again = json.loads((tmp_path / "rank.json").read_text())["metrics"]
    assert all(again[e["name"]]["cached"] and again[e["name"]]["score"] == e["score"] for e in found[:2])


@pytest.mark.extended
def test_tables_say_when_encoders_computed_in_bfloat16(pictures, zoo, tmp_path, capsys, monkeypatch):
    """As on a GPU that does; here the CPU is made to."""
    said = "features were computed in bfloat16"
    common = [str(pictures), "--zoo", *zoo[1:], "--output_dir"]
    assert main(["rank", *common, str(tmp_path / "exact")]) == 0
    assert said not in capsys.readouterr().out
    monkeypatch.setattr(ImageEmbedder, "rounded", property(lambda self: True, lambda self, value: None), raising=False)
    for command, arguments in {"rank": common, "zood": ["--dataset", *common]}.items():
        folder = tmp_path / command
        assert main([command, *arguments, str(folder)]) == 0
        assert said in capsys.readouterr().out, command
        metrics = json.loads((folder / f"{command}.json").read_text())["metrics"]
        entries = metrics["encoders"] if command == "zood" else metrics.values()
        assert {entry["precision"] for entry in entries} == {"bfloat16"}, command


def test_random_weights_of_timm_are_ranked_without_network_and_said_to_be_random(pictures, zoo, tmp_path, capsys):
    flags = ["rank", str(pictures), "--output_dir", str(tmp_path), "--zoo"]
    assert main([*flags, "untrained:test_vit", zoo[1]]) == 0
    printed = capsys.readouterr()
    assert "warning: weights are random, for comparison only: untrained:test_vit" in printed.err
    assert main([*flags, zoo[1], zoo[1] + "/"]) == 0  # the other one is measured
    printed = capsys.readouterr()
    assert "weights are random" not in printed.err and "the same encoder as" in printed.out
    assert main([*flags, "untrained:test_vit"]) == 0
    assert "nothing: its weights are random, and no trained encoder is better" in capsys.readouterr().out


@pytest.mark.extended
def test_domains_of_a_column_give_what_folders_give(pictures, zoo, tmp_path, capsys):
    def png(place) -> dict:
        file = io.BytesIO()
        picture(*place).save(file, "PNG")
        return {"bytes": file.getvalue(), "path": None}

    domains, labels, _ = torch.tensor(PLACES).T
    types = {"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES), "style": datasets.Value("string")}
    columns = {"image": [png(place) for place in PLACES], "label": labels.tolist()}
    columns["style"] = [DOMAINS[domain] for domain in domains.tolist()]
    datasets.Dataset.from_dict(columns, features=datasets.Features(types)).to_parquet(tmp_path / "table.parquet")
    arguments = ["--zoo", zoo[1], "--output_dir"]
    of_column = rank(capsys, tmp_path / "table.parquet", "--domain_column", "style", *arguments, tmp_path / "column")
    of_folders = rank(capsys, pictures, *arguments, tmp_path / "folders")
    assert of_column[0]["domains"] == of_folders[0]["domains"]


def test_without_labels_pictures_are_told_apart_by_their_views(pictures, zoo, tmp_path, capsys):
    found = rank(capsys, pictures, "--zoo", *zoo[1:], "--no_labels", "--output_dir", tmp_path)
    for entry in found:
        assert list(entry["domains"]) == DOMAINS and 1 <= entry["effective_rank"] <= entry["width"]
        assert entry["views"] <= np.log(14) and entry["contaminated"] == "not known"
        assert 0 <= entry["score"]["mean"] <= 100
    domains = torch.arange(60) // 30
    told = torch.randn(60, 8)
    cases = {"told": told, "noise": torch.randn(60, 8), "collapsed": torch.ones(60, 8)}
    for name, first in cases.items():
        scores = [entry["score"] for entry in _agreement(first, first if name == "collapsed" else told + 0.01, domains)]
        assert scores == [100, 100] if name == "told" else max(scores) < 15, name


def test_views_are_embedded_once_for_each_seed(pictures, zoo, tmp_path, capsys, monkeypatch):
    embedded = []
    embed = ImageEmbedder.embed_pictures
    monkeypatch.setattr(
        ImageEmbedder, "embed_pictures", lambda self, many: embedded.append(len(many)) or embed(self, many)
    )

    def ranked(*flags):
        embedded.clear()
        found = rank(capsys, pictures, "--zoo", zoo[1], "--no_labels", "--output_dir", tmp_path, *flags)[0]
        return found, sum(embedded)

    first, again, other = ranked(), ranked(), ranked("--seed", 1)
    assert [count for _, count in (first, again, other)] == [3 * len(PLACES), 0, 2 * len(PLACES)]
    assert [found["cached"] for found, _ in (first, again, other)] == [False, True, False]
    assert again[0]["domains"] == first[0]["domains"] and again[0]["views"] == first[0]["views"] != other[0]["views"]


def test_a_domain_of_which_no_picture_can_be_read_is_named(zoo, tmp_path, capsys):
    """Also the last one, with which the number of domains ends; with labels and without, read or from the cache."""
    pictures = write_pictures(tmp_path / "pictures")
    for path in (pictures / DOMAINS[-1]).glob("*/*.png"):
        path.write_bytes(b"no picture")
    arguments = [str(pictures), "--zoo", zoo[1], "--on_bad_image", "skip", "--output_dir", str(tmp_path / "out")]
    for flags in ([], ["--no_labels"], []):
        assert main(["rank", *arguments, *flags]) == 2
        assert f"none of the 14 images of domain {DOMAINS[-1]!r}" in capsys.readouterr().err


def test_domains_that_nobody_names_are_clusters_of_colours_and_edges(pictures, zoo, tmp_path, capsys):
    """The folders name classes only; the domains differ in brightness and noise, and are found again."""
    for domain, label, number in PLACES:
        folder = tmp_path / "flat" / CLASSES[label]
        folder.mkdir(parents=True, exist_ok=True)
        picture(domain, label, number).save(folder / f"{DOMAINS[domain]}-{number}.png")
    given = load_domains(str(tmp_path / "flat"), clusters=3)
    assert given.class_names == CLASSES and torch.bincount(given.domains).tolist() == [14, 14, 14]
    files = [value["path"].rsplit("/", 1)[1].split("-")[0] for value in given.images["image"][:]]
    assert len(set(zip(files, given.domains.tolist(), strict=True))) == 3
    arguments = ["--cluster_domains", 3, "--zoo", zoo[1], "--output_dir", tmp_path / "out"]
    found = rank(capsys, tmp_path / "flat", *arguments)
    assert list(found[0]["domains"]) == ["cluster 0", "cluster 1", "cluster 2"]
    assert json.loads((tmp_path / "out/rank.json").read_text())["domains"].startswith("3 clusters")
    rank(capsys, tmp_path / "flat", *arguments, "--no_labels")

    flags = ["--features", "embeddings", "--on_bad_image", "skip", "--image_column", "image"]
    output = ["--output_dir", str(tmp_path / "by itself")]
    assert main(["rank", str(tmp_path / "flat"), "--zoo", zoo[1], *output, *flags]) == 0
    printed = capsys.readouterr()
    assert (
        "are classes only, so that domains are 3 clusters" in printed.err and "--cluster_domains N makes" in printed.err
    )
    assert "domains are 3 clusters of the pictures' colours and edges, as the folders are classes only" in printed.out
    embed = re.search(r"hf-dpssl (embed .*)", printed.out)[1]
    given = vars(parser().parse_args(shlex.split(embed)[1:]))
    assert all(given[name.removeprefix("--")] == value for name, value in zip(flags[::2], flags[1::2], strict=True))
    assert main(["zood", "--dataset", str(tmp_path / "flat"), "--zoo", "none", *output]) == 2
    assert "domains are 3 clusters" in (said := capsys.readouterr().err) and "no encoder could be measured" in said
    assert main(["zood", "--dataset", str(tmp_path / "flat"), "--zoo", "none", "--cluster_domains", "2"]) == 2
    assert "three domains or more are needed" in capsys.readouterr().err

    for line, message in {"--cluster_domains 1": "at least 2", "--cluster_domains 43": "too few to make 43"}.items():
        assert main(["rank", str(tmp_path / "flat"), "--zoo", zoo[1], *line.split()]) == 2
        assert message in capsys.readouterr().err


def test_what_cannot_be_ranked_is_refused_before_an_encoder_is_loaded(pictures, tmp_path, capsys):
    flat, lonely = tmp_path / "flat", tmp_path / "lonely"
    for number, name in enumerate(["a/1", "a/2", "b/1", "b/2", "b/x/3"]):
        (flat / name).parent.mkdir(parents=True, exist_ok=True)
        picture(0, 0, number).save(flat / f"{name}.png")
    for number, name in enumerate(["a/x/1", "a/x/2", "a/y/1", "b/x/1", "b/x/2"]):
        (lonely / name).parent.mkdir(parents=True, exist_ok=True)
        picture(0, 0, number).save(lonely / f"{name}.png")
    cases = [
        (f"{pictures / 'dark' / 'red'} --zoo none", "no folders of domains"),
        (f"{pictures / 'dark' / 'red'} --zoo none", "--cluster_domains N of hf-dpssl rank and zood makes domains"),
        (f"{flat} --zoo none", "4 of 5 images"),
        (f"{flat} --zoo none", "makes domains of the pictures where folders are classes only"),
        (f"{flat} --zoo none", "hf-dpssl rank --no_labels needs none"),
        ("vlcs --zoo none", "'vlcs' has no Hub id that we know of: download it"),
        (f"{lonely} --zoo none", "class 'y' is found in domain 'a' only"),
        ("digits --zoo none", "name the column of the domains with --domain_column"),
        ("digits --zoo none --domain_column style", "has no column 'style'"),
        ("digits --zoo none --domain_column label", "with --label_column"),
        (f"{pictures} --zoo none none", "the same encoder is given twice: ['none']"),
        (f"{pictures} --zoo none --images 2", "at least 4 images"),
        (f"{pictures} --zoo {pictures / 'zoo.yaml'}", "does not exist"),
        (f"{pictures} --zoo none --domain_column style --cluster_domains 2", "or clusters"),
    ]
    for line, message in cases:
        assert main(["rank", *line.split(), "--output_dir", str(tmp_path / "new")]) == 2, line
        assert message in capsys.readouterr().err, line
        assert not (tmp_path / "new").exists(), line


def test_classes_that_a_domain_lacks_and_sets_that_are_not_whole_are_named(tmp_path):
    folder = write_pictures(tmp_path, [place for place in PLACES if place[:2] != (2, 1)])
    args = argparse.Namespace(dataset=f"pacs={folder}", cluster_domains=None)
    whole, lacking = notes_of(args, load_domains(str(folder)))
    assert whole.startswith("pacs: not the whole set") and lacking == f"{DOMAINS[2]} has no {CLASSES[1]}."
    assert notes_of(args, load_domains(str(folder), labelled=False)) == [whole.replace("2 classes", "7 classes")]
    args.cluster_domains = 2
    assert notes_of(args, load_domains(str(folder), labelled=False, clusters=2)) == []


def test_a_limit_takes_of_each_class_of_each_domain_its_share(pictures):
    given = load_domains(str(pictures), limit=18)
    rows = list(given.rows)
    assert len(rows) == 18 and torch.bincount(given.domains[rows] * 2 + given.labels[rows]).tolist() == [3] * 6
