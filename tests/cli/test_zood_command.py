"""`hf-dpssl zood` on tiny encoders and pictures of three domains, and encoders that differ in size or fail."""

import json

import numpy as np
import pytest
import torch
from domain_pictures import CLASSES, DOMAINS, PLACES, picture, write_pictures
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_encoders import INPUT, grey_encoder, save_ours

from hf_dpssl.cli.commands import main
from hf_dpssl.embedding.embedder import ImageEmbedder
from hf_dpssl.zoo import zood_of_features


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Encoders of two input sizes, an untrained one, and ones that cannot be measured: no weights, weights 0, weights
    NaN, one channel, a copy of another."""
    root = tmp_path_factory.mktemp("zoo")
    save_ours(root / "small")
    save_ours(root / "large", pretrained_cfg=INPUT | {"input_size": [3, 32, 32]})
    save_ours(root / "broken")
    (root / "broken/model.safetensors").write_bytes(b"nothing")
    for name, value in {"constant": 0.0, "nan": torch.nan}.items():
        save_ours(root / name)
        weights = load_file(root / name / "model.safetensors")
        weights = {key: w.fill_(value) if w.is_floating_point() else w for key, w in weights.items()}
        save_file(weights, root / name / "model.safetensors", metadata={"format": "pt"})
    grey_encoder(root / "grey")
    save_ours(root / "copy")
    lines = [f"- {root}/{name}" for name in ("broken", "constant", "nan", "grey")]
    lines += [f"- {{encoder: {root}/small, name: small, data: photos}}", f"- {root}/copy"]
    lines += [f"- {{encoder: {root}/large, name: large}}", "- {encoder: 'untrained:test_vit', name: random}"]
    (root / "zoo.yaml").write_text("encoders:\n" + "\n".join(lines) + "\n")
    return root


def test_zood_measures_all_encoders_that_load_and_names_the_others(pictures, zoo, tmp_path, capsys):
    arguments = ["zood", "--zoo", str(zoo / "zoo.yaml"), "--dataset", f"vlcs={pictures}"]
    assert main([*arguments, "--output_dir", str(tmp_path), "--top", "2"]) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "zood.json").read_text())["metrics"]
    names = ["small", "large", "random"]
    by_name = {entry["name"]: entry for entry in found["encoders"]}
    failed = {"broken": "cannot be read", "constant": "the same for all samples", "nan": "that are not finite"}
    failed |= {"grey": "Use an encoder of three channels", "copy": "the same encoder as 'small'"}
    for name, message in failed.items():
        assert set(by_name[name]) == {"name", "encoder", "error"} and message in by_name[name]["error"], by_name[name]
        assert not any(name in target["encoders"] for target in found["targets"].values())
    assert str(zoo) not in (tmp_path / "zood.json").read_text()  # folders of a machine are not written down
    assert [by_name[name]["contaminated"] for name in names] == ["no", "not known", "no"]
    assert "\nvlcs: not the whole set" in printed and "failed: " in printed and "weighted Kendall's tau" in printed
    for name in DOMAINS:
        scores = {encoder: value["score"] for encoder, value in found["targets"][name]["encoders"].items()}
        order = " > ".join(f"{encoder} {scores[encoder]:.3f}" for encoder in sorted(scores, key=lambda e: -scores[e]))
        assert f"{name}: ranked by the others {order}; selected of " in printed
    domains, labels, _ = torch.tensor(PLACES).T
    encoders = {"small": f"{zoo}/small", "large": f"{zoo}/large", "random": "untrained:test_vit"}
    rows = [picture(*place) for place in PLACES]
    features = {name: ImageEmbedder(encoder).embed_pictures(rows) for name, encoder in encoders.items()}
    wanted = zood_of_features(features, labels, domains, DOMAINS, top=2)
    for name in DOMAINS:
        target, expected = found["targets"][name], wanted["targets"][name]
        assert target["single"] == expected["single"] and target["selection"] == expected["selection"]
        for encoder in names:
            assert target["encoders"][encoder] == pytest.approx(expected["encoders"][encoder], rel=1e-3, abs=1e-3)
    assert Image.open(tmp_path / "zood.png").size[0] > 100


def test_an_encoder_that_sees_nothing_in_two_domains_fails_and_the_others_go_on(zoo, tmp_path, capsys):
    """It is blind to blue, which alone differs there."""
    for domain, label, number in PLACES:
        folder = tmp_path / "pictures" / DOMAINS[domain] / CLASSES[label]
        folder.mkdir(parents=True, exist_ok=True)
        shown = np.asarray(picture(domain, label, number)).copy()
        if domain:
            shown[..., 2] = shown[..., 0]
            shown[..., :2] = 100
        Image.fromarray(shown).save(folder / f"{number}.png")
    save_ours(tmp_path / "blind")
    weights = load_file(tmp_path / "blind/model.safetensors")
    weights["conv1.0.weight"][:, 2] = 0
    save_file(weights, tmp_path / "blind/model.safetensors", metadata={"format": "pt"})
    encoders = [str(tmp_path / "blind"), str(zoo / "small")]
    flags = ["--dataset", str(tmp_path / "pictures"), "--output_dir", str(tmp_path / "out")]
    assert main(["zood", "--zoo", *encoders, *flags]) == 0
    assert "blind" in capsys.readouterr().out
    blind, small = json.loads((tmp_path / "out/zood.json").read_text())["metrics"]["encoders"]
    assert blind["error"].startswith("ValueError: with domain 'dark' as the target: the features are the same for all")
    assert small["name"] == "small" and "error" not in small


def test_what_zood_cannot_measure_is_refused_before_an_encoder_is_loaded(pictures, zoo, tmp_path, capsys):
    two = write_pictures(tmp_path / "two", [place for place in PLACES if place[0] < 2])
    lonely = tmp_path / "lonely"
    for name in ["a/x/1", "a/x/2", "b/x/1", "b/x/2", "b/y/1", "c/x/1", "c/x/2", "c/y/1"]:
        (lonely / name).parent.mkdir(parents=True, exist_ok=True)
        picture(0, 0, 0).save(lonely / f"{name}.png")
    cases = [
        (f"--dataset {two} --zoo none", "three domains or more are needed"),
        (f"--dataset {lonely} --zoo none", "with domain 'b' as the target: class 'y' is found in domain 'c' only"),
        (f"--dataset {pictures} --zoo none --top 0", "top must be at least 1"),
        (f"--dataset {pictures} --zoo {zoo / 'broken'}", "no encoder could be measured"),
        (f"--dataset {pictures} --zoo untrained:none", "timm has no architecture 'none'"),
    ]
    for line, message in cases:
        assert main(["zood", *line.split(), "--output_dir", str(tmp_path / "new")]) == 2, line
        assert message in capsys.readouterr().err, line
        assert not (tmp_path / "new/zood.json").exists(), line
