"""Key layouts of other codes: what they are, and errors that name what does not fit."""

import argparse

import pytest
import timm
import torch
import torchvision
from cases import for_each
from torch import nn
from transformers import AutoModel

from hf_dpssl.convert.encoder_importers import import_checkpoint
from hf_dpssl.convert.foreign_layouts import (
    _RESNETS,
    ORIGINS,
    find_origin,
    find_statistics,
    head_settings,
    resnet_architecture,
    split,
    to_timm,
)


@for_each("name", sorted(_RESNETS.values()))
def test_architecture_is_read_off_the_shapes(name):
    with torch.device("meta"):
        ours, theirs = timm.create_model(name, num_classes=0), getattr(torchvision.models, name)()
    assert resnet_architecture(ours.state_dict()) == (name, None)
    backbone, classifier = to_timm(theirs.state_dict())
    assert {n: v.shape for n, v in backbone.items()} == {n: v.shape for n, v in ours.state_dict().items()}
    assert sorted(classifier) == ["fc.bias", "fc.weight"]


def test_unusual_resnets_get_model_args_that_make_them_again():
    with torch.device("meta"):
        for model_args in ({"layers": [1, 2, 1, 3]}, {"layers": [2, 2, 2, 2], "channels": [64, 96, 128, 160]}):
            shapes = timm.create_model("resnet18", num_classes=0, **model_args).state_dict()
            name, found = resnet_architecture(shapes)
            again = timm.create_model(name, num_classes=0, **found).state_dict()
            assert {n: v.shape for n, v in again.items()} == {n: v.shape for n, v in shapes.items()}
        with pytest.raises(ValueError, match=r"32 groups: name its architecture"):
            resnet_architecture(timm.create_model("resnext50_32x4d", num_classes=0, layers=[1, 1, 1, 1]).state_dict())
        with pytest.raises(ValueError, match="no ResNet"):
            resnet_architecture(timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict())


def test_sequential_numbers_become_names_with_and_without_the_activation_between():
    with torch.device("meta"):
        resnet = torchvision.models.resnet18()
        named = {name: value.shape for name, value in resnet.state_dict().items() if not name.startswith("fc.")}
        numbered = nn.Sequential(*list(resnet.children())[:-1]).state_dict()
    assert {name: value.shape for name, value in to_timm(numbered)[0].items()} == named
    shifted = {str(int(n.split(".")[0]) - 2) + n[1:] if int(n[0]) > 3 else n: v for n, v in numbered.items()}
    assert {name: value.shape for name, value in to_timm(shifted)[0].items()} == named


def test_statistics_of_split_batch_norm_are_averaged():
    tensors = {"layer1.0.conv1.weight": torch.zeros(2, 2, 3, 3), "bn1.weight": torch.ones(2)}
    tensors["bn1.running_mean"] = torch.tensor([1.0, 2.0, 3.0, 6.0])
    assert torch.equal(to_timm(tensors)[0]["bn1.running_mean"], torch.tensor([2.0, 4.0]))


def test_every_code_is_recognised_and_its_parts_are_told_apart():
    for origin in ORIGINS:
        prefixes = {part: getattr(origin, part) for part in ("backbone", "head", "key_backbone", "key_head")}
        state = {f"{prefix}{part}.weight": part for part, prefix in prefixes.items() if prefix is not None}
        state |= {f"{mark}rest": "mark" for mark in origin.marks}
        assert find_origin(state) is origin
        for part, tensors in split(state, origin)[0].items():
            assert {value for value in tensors.values()} - {"mark"} == ({part} if prefixes[part] is not None else set())


def test_keys_of_no_known_code_are_listed():
    with pytest.raises(ValueError, match=r"begin with student_backbone \(2 tensors\), teacher \(1 tensor\); known are"):
        find_origin({"student_backbone.a": 0, "student_backbone.b": 0, "teacher.c": 0})


def test_heads_that_fit_ours_and_heads_that_do_not():
    fits = nn.Sequential(nn.Linear(8, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4))
    expected = {"projection_hidden_dim": 6, "projection_dim": 4, "projection_layers": 2, "projection_batch_norm": True}
    assert head_settings(fits.state_dict()) == expected
    assert head_settings(nn.Linear(8, 4).state_dict())["projection_layers"] == 1
    normed = nn.Sequential(
        nn.Linear(8, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4), nn.BatchNorm1d(4)
    )
    uneven = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    assert head_settings(normed.state_dict()) is head_settings(uneven.state_dict()) is head_settings({}) is None


def test_statistics_of_a_data_set_of_ones_own_are_read_or_asked_for():
    t_simclr = ORIGINS[1]
    settings = vars(argparse.Namespace(dataset="path", mean="(0.1, 0.2, 0.3)", std="(1, 1, 1)", size=64))
    assert find_statistics(t_simclr, {}, settings, True) == ((0.1, 0.2, 0.3), (1.0, 1.0, 1.0))
    for mean in ("__import__('os')", "0.5", None):
        with pytest.raises(ValueError, match="without readable mean and std: give them"):
            find_statistics(t_simclr, {}, settings | {"mean": mean}, True)


def refusal(tmp_path, state: dict, **options) -> str:
    """What `import_checkpoint` says of a state dict; asserts that it leaves no folder behind."""
    torch.save(state, tmp_path / "state.pth")
    with pytest.raises(ValueError) as refused:
        import_checkpoint(tmp_path / "state.pth", tmp_path / "encoder", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["state.pth"]
    return str(refused.value)


@pytest.mark.extended
def test_backbone_that_does_not_fit_is_refused_with_the_names(tmp_path):
    state = timm.create_model("resnet18", num_classes=0, layers=[1, 1, 1, 1]).state_dict()
    missing = {name: value for name, value in state.items() if name not in ("bn1.bias", "layer4.0.bn2.weight")}
    assert "missing: bn1.bias, layer4.0.bn2.weight (2)" in refusal(tmp_path, missing)
    assert "unexpected: layer2.0.extra (1)" in refusal(tmp_path, state | {"layer2.0.extra": torch.ones(1)})
    assert "bn1.bias [3] instead of [64] (1)" in refusal(tmp_path, state | {"bn1.bias": torch.ones(3)})
    assert "not finite: bn1.bias (1)" in refusal(tmp_path, state | {"bn1.bias": torch.full([64], torch.nan)})
    assert "missing: layer1.1.conv1.weight" in refusal(tmp_path, state, architecture="resnet18")
    assert "no tensor stands under 'student.'" in refusal(tmp_path, state, prefix="student.")
    assert "Did you mean resnet50" in refusal(tmp_path, state, architecture="resnet5O")
    assert "mean and std belong together" in refusal(tmp_path, state, mean=[0.5] * 3)
    assert "no tensors under 'state_dict'" in refusal(tmp_path, {"epoch": 3, "model": {}})


def test_any_timm_backbone_is_imported_by_name_from_under_a_prefix(tmp_path):
    model = timm.create_model("test_vit", num_classes=0, img_size=96).half()
    state = {f"module.student.{name}": value for name, value in model.state_dict().items()}
    state["module.teacher.a"] = torch.ones(1)
    options = dict(prefix="student.", architecture="test_vit")
    assert "pos_embed [1, 37, 64] instead of [1, 101, 64]" in refusal(tmp_path, state, **options)
    report = import_checkpoint(tmp_path / "state.pth", tmp_path / "encoder", image_size=96, **options)
    assert report.left_out == ["teacher (1 tensor)"] and report.method == "unknown"
    loaded, images = timm.create_model(f"local-dir:{report.folder}", pretrained=True).eval(), torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(loaded(images), model.float().eval()(images))
        assert torch.equal(AutoModel.from_pretrained(report.folder).eval()(images).pooler_output, loaded(images))
