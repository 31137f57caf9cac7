"""Checkpoints of other codes become our encoder folders: same outputs, nothing lost without being named.

The files are written with torch.save in the key layout of each code; the outputs to compare come from
torchvision's ResNets or from `forward_by_names`, which knows neither timm nor our modules.
"""

import argparse
import copy
import json
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from transformers import AutoModel

from hf_dpssl import ContrastiveConfig, ContrastiveEncoder, MoCoForPreTraining, SimCLRForPreTraining
from hf_dpssl.cli.commands import main
from hf_dpssl.contrastive.warm_start import start_from_encoder_
from hf_dpssl.convert.encoder_importers import import_checkpoint


def resnet10() -> nn.Module:
    """torchvision's ResNet with one basic block per stage: small, and not among timm's names."""
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])


def draw_statistics_(module: nn.Module) -> nn.Module:
    """Random batch-norm statistics and weights, so that no layer is an identity; in evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor, shift in ((layer.running_mean, -0.5), (layer.running_var, 0.5), (layer.weight, 0.5)):
                if tensor is not None:
                    tensor.data = torch.rand(tensor.shape, generator=generator) + shift
    return module.eval()


def forward_by_names(tensors: dict, images: torch.Tensor, activation: bool = True) -> torch.Tensor:
    """Features of a 3x3-stem ResNet of one basic block per stage, from its tensors by the t-SimCLR code's names."""

    def norm(values, name):
        names = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(values, *(tensors[f"{name}.{part}"] for part in names))

    values = norm(F.conv2d(images, tensors["conv1.weight"], padding=1), "bn1")
    values = values.relu() if activation else values
    for stage in range(1, 5):
        name, stride = f"layer{stage}.0", 2 if stage > 1 else 1
        inner = norm(F.conv2d(values, tensors[f"{name}.conv1.weight"], stride=stride, padding=1), f"{name}.bn1")
        inner = norm(F.conv2d(inner.relu(), tensors[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
        if f"{name}.shortcut.0.weight" in tensors:
            values = F.conv2d(values, tensors[f"{name}.shortcut.0.weight"], stride=stride)
            values = norm(values, f"{name}.shortcut.1")
        values = (values + inner).relu()
    return values.mean((2, 3))


def small_resnet(seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of a ResNet with 3x3 stem and the names of the t-SimCLR code and of lightly's ResNetGenerator."""
    torch.manual_seed(seed)
    resnet = draw_statistics_(resnet10())
    resnet.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    tensors = {name.replace("downsample", "shortcut"): value for name, value in resnet.state_dict().items()}
    return {name: value for name, value in tensors.items() if not name.startswith("fc.")}


def head(width: int = 512) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 48), nn.ReLU(), nn.Linear(48, 16))


def under(prefix: str, tensors: dict) -> dict:
    return {prefix + name: value for name, value in tensors.items()}


def features(folder: Path, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return ContrastiveEncoder.from_pretrained(folder).eval()(images).pooler_output


def moco_state(student: bool = False, mlp: bool = True) -> tuple[dict, nn.Module, nn.Module]:
    """State dict of facebookresearch/moco under DDP; query and key encoder."""
    torch.manual_seed(1)
    encoders = []
    for _ in range(2):
        encoder = draw_statistics_(resnet10())
        encoder.fc = head() if mlp else nn.Linear(512, 16)
        encoders.append(encoder.eval())
    state = under("module.encoder_q.", encoders[0].state_dict()) | under("module.encoder_k.", encoders[1].state_dict())
    state |= {"module.queue": F.normalize(torch.randn(16, 40), dim=0), "module.queue_ptr": torch.tensor([24])}
    if student:
        norm = draw_statistics_(nn.BatchNorm1d(16, affine=False))
        state |= under("module.bn.", norm.state_dict())
        encoders = [nn.Sequential(encoder, norm) for encoder in encoders]
    return state, *encoders


@pytest.mark.parametrize("zipped", [True, pytest.param(False, marks=pytest.mark.extended)])
def test_moco_file_gives_backbone_heads_momentum_branch_and_queue(tmp_path, zipped):
    state, query, key = moco_state()
    content = {"epoch": 200, "arch": "resnet18", "state_dict": state, "optimizer": {"lr": 0.03}}
    torch.save(content, tmp_path / "checkpoint_0199.pth.tar", _use_new_zipfile_serialization=zipped)
    report = import_checkpoint(tmp_path / "checkpoint_0199.pth.tar", tmp_path / "encoder")
    assert (report.architecture, report.stem, report.method) == ("resnet18", "timm", "MoCo-v2")
    assert report.left_out == ["epoch", "arch", "optimizer"] and "queue of 40 keys" in report.taken
    images = torch.randn(2, 3, 64, 64)
    model = MoCoForPreTraining.from_pretrained(tmp_path / "encoder", subfolder="pretraining").eval()
    with torch.no_grad():
        output = model(images, images)
        assert torch.allclose(output.embeddings, F.normalize(query(images), dim=1), atol=1e-6)
        assert torch.allclose(output.paired_embeddings, F.normalize(key(images), dim=1), atol=1e-6)
        query.fc = nn.Identity()
        assert torch.allclose(features(tmp_path / "encoder", images), query(images), atol=1e-5)
    assert torch.equal(model.queue.T, state["module.queue"])
    assert (int(model.queue_cursor), int(model.queue_filled)) == (24, 40)


def test_imported_folder_loads_with_stock_automodel_and_timm(tmp_path):
    state, query, _ = moco_state()
    torch.save({"state_dict": state}, tmp_path / "moco.pth.tar")
    report = import_checkpoint(tmp_path / "moco.pth.tar", tmp_path / "encoder")
    images, query.fc = torch.randn(2, 3, 64, 64), nn.Identity()
    stock = AutoModel.from_pretrained(report.folder)
    with torch.no_grad():
        assert type(stock).__name__ == "TimmWrapperModel"
        assert torch.allclose(stock.eval()(images).pooler_output, query(images), atol=1e-5)
        from_timm = timm.create_model(f"local-dir:{report.folder}", pretrained=True).eval()
        assert torch.allclose(from_timm(images), query(images), atol=1e-5)
    config = json.loads((report.folder / "config.json").read_text(encoding="utf-8"))
    assert config["pretrained_cfg"]["mean"] == [0.485, 0.456, 0.406]
    imported = config["dpssl"]["imported"]
    assert (imported["code"], imported["file"]) == ("facebookresearch/moco", "moco.pth.tar")
    assert config["dpssl"]["method"]["kernel"] == "cosine" and len(imported["sha256"]) == 64


@pytest.mark.extended
def test_t_moco_file_shares_its_batch_norm_between_the_branches(tmp_path):
    state, query, key = moco_state(student=True)
    torch.save({"state_dict": state}, tmp_path / "t.pth.tar")
    report = import_checkpoint(tmp_path / "t.pth.tar", tmp_path / "encoder")
    model, images = (
        MoCoForPreTraining.from_pretrained(tmp_path / "encoder/pretraining").eval(),
        torch.randn(2, 3, 64, 64),
    )
    with torch.no_grad():
        output = model(images, images)
        assert torch.allclose(output.embeddings, query(images), atol=1e-5)
        assert torch.allclose(output.paired_embeddings, key(images), atol=1e-5)
    assert (report.method, model.config.kernel, model.config.feature_norm) == ("t-MoCo-v2", "student_t", "batch")
    assert (model.config.temperature, model.config.dof) == (5.0, 10.0) and "5 and dof 10" in report.notes[0]


@pytest.mark.extended
def test_moco_v1_head_is_one_linear_layer(tmp_path):
    state, query, _ = moco_state(mlp=False)
    torch.save({"state_dict": state}, tmp_path / "v1.pth.tar")
    import_checkpoint(tmp_path / "v1.pth.tar", tmp_path / "encoder")
    model, images = (
        MoCoForPreTraining.from_pretrained(tmp_path / "encoder/pretraining").eval(),
        torch.randn(2, 3, 64, 64),
    )
    with torch.no_grad():
        assert torch.allclose(model(images).embeddings, F.normalize(query(images), dim=1), atol=1e-6)


@pytest.mark.parametrize(("method", "place"), [("t-SimCLR", "encoder."), ("SimCLR", "encoder.module.")])
def test_t_simclr_file_brings_its_kernel_temperature_and_statistics(tmp_path, method, place):
    tensors, projection = small_resnet(), head()
    options = argparse.Namespace(method=method, temp=7.0, t_df=3.0, dataset="cifar100", size=32)
    state = under(place, tensors) | under("head.", projection.state_dict())
    torch.save({"opt": options, "model": state, "optimizer": {}, "epoch": 1000}, tmp_path / "last.pth")
    report = import_checkpoint(tmp_path / "last.pth", tmp_path / "encoder")
    assert (report.method, report.stem, report.architecture) == (method, "small_image", "resnet18")
    images = torch.randn(2, 3, 32, 32)
    model = SimCLRForPreTraining.from_pretrained(tmp_path / "encoder", subfolder="pretraining").eval()
    with torch.no_grad():
        expected = forward_by_names(tensors, images)
        assert torch.allclose(features(tmp_path / "encoder", images), expected, rtol=1e-5, atol=1e-5)
        embeddings = projection(expected)
        embeddings = F.normalize(embeddings, dim=1) if method == "SimCLR" else embeddings
        assert torch.allclose(model(images).embeddings, embeddings, rtol=1e-4, atol=1e-5)
    config = model.config
    expected = ("student_t", "joint", "none") if method == "t-SimCLR" else ("cosine", "anchor", "l2")
    assert (config.kernel, config.normalization, config.feature_norm) == expected
    assert (config.temperature, config.dof) == (7.0, 3.0)
    assert config.pretrained_cfg["std"] == [0.2675, 0.2565, 0.2761] and config.pretrained_cfg["input_size"][1] == 32


@pytest.mark.parametrize("momentum", [False, True])
def test_solo_learn_cifar_file_keeps_its_padded_stem(tmp_path, momentum):
    torch.manual_seed(2)
    resnet = draw_statistics_(resnet10())
    resnet.conv1, resnet.maxpool, resnet.fc = nn.Conv2d(3, 64, 3, 1, 2, bias=False), nn.Identity(), nn.Identity()
    projection, classifier = head(), nn.Linear(512, 10)
    state = under("backbone.", resnet.state_dict()) | under("projector.", projection.state_dict())
    state |= under("classifier.", classifier.state_dict())
    if momentum:
        state |= under("momentum_backbone.", resnet.state_dict()) | {"queue": torch.randn(2, 16, 64)}
        state |= under("momentum_projector.", projection.state_dict()) | {"queue_ptr": torch.tensor([0])}
    torch.save({"state_dict": state, "loops": {}, "epoch": 3}, tmp_path / "solo.ckpt")
    report = import_checkpoint(tmp_path / "solo.ckpt", tmp_path / "encoder")
    assert report.stem == "small_image_padded" and "classifier (2 tensors)" in report.left_out
    assert ("queue (1 tensor)" in report.left_out) is momentum
    images = torch.randn(2, 3, 32, 32)
    model = (MoCoForPreTraining if momentum else SimCLRForPreTraining).from_pretrained(tmp_path / "encoder/pretraining")
    with torch.no_grad():
        assert torch.allclose(features(tmp_path / "encoder", images), resnet(images), atol=1e-5)
        expected = F.normalize(projection(resnet(images)), dim=1)
        assert torch.allclose(model.eval()(images).embeddings, expected, atol=1e-6)
    assert model.config.pretrained_cfg["std"] == [0.247, 0.2435, 0.2616]


@pytest.mark.extended
def test_momentum_branch_and_methods_that_are_not_ours_are_left_out_by_name(tmp_path):
    tensors, projection = resnet10().state_dict(), head()
    state = under("backbone.", tensors) | under("projector.", projection.state_dict())
    state |= under("classifier.", nn.Linear(512, 10).state_dict())
    torch.save({"state_dict": state | under("momentum_backbone.", tensors)}, tmp_path / "half.ckpt")
    report = import_checkpoint(tmp_path / "half.ckpt", tmp_path / "half")  # a momentum backbone without its head
    assert report.method == "SimCLR" and any("momentum_backbone" in line for line in report.left_out)
    SimCLRForPreTraining.from_pretrained(tmp_path / "half/pretraining")
    torch.save({"state_dict": state | under("predictor.", projection.state_dict())}, tmp_path / "simsiam.ckpt")
    report = import_checkpoint(tmp_path / "simsiam.ckpt", tmp_path / "simsiam")
    assert report.method == "unknown" and "predictor" in report.notes[0] and "projector (4 tensors)" in report.left_out
    options = argparse.Namespace(method="SupCon", temp=0.1, dataset="cifar10")
    content = {"opt": options, "model": under("encoder.", tensors) | under("head.", projection.state_dict())}
    torch.save(content, tmp_path / "supcon.pth")
    report = import_checkpoint(tmp_path / "supcon.pth", tmp_path / "supcon")
    assert report.method == "unknown" and "'SupCon'" in report.notes[0]
    assert not (tmp_path / "supcon/pretraining").exists()


def test_only_encoder_folders_are_overwritten(tmp_path):
    torch.save(small_resnet(), tmp_path / "plain.pth")
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.txt").write_text("years of work", encoding="utf-8")
    for output in (tmp_path / "home", tmp_path / "home/thesis.txt"):
        with pytest.raises(FileExistsError, match="no encoder folder and is not replaced"):
            import_checkpoint(tmp_path / "plain.pth", output, overwrite=True)
    assert (tmp_path / "home/thesis.txt").read_text(encoding="utf-8") == "years of work"


def test_trainer_refuses_to_start_from_an_encoder_with_another_stem():
    encoder, wanted = (
        ContrastiveConfig("resnet10t", {"layers": [1, 1, 1, 1], "stem_type": ""}, stem=stem)
        for stem in ("small_image_padded", "small_image")
    )
    with pytest.raises(ValueError, match="has the stem 'small_image_padded', the run asks for 'small_image'"):
        start_from_encoder_(SimCLRForPreTraining(wanted), ContrastiveEncoder(encoder))


def test_folder_with_a_foreign_stem_loads_with_remote_code(tmp_path):
    torch.save(under("module.", {k: v for k, v in small_resnet().items()}), tmp_path / "plain.pth")
    report = import_checkpoint(tmp_path / "plain.pth", tmp_path / "encoder", stem="small_image_padded")
    images = torch.randn(2, 3, 32, 32)
    remote = AutoModel.from_pretrained(report.folder, trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.equal(remote(images).pooler_output, features(report.folder, images))
        padded = F.pad(images, [1] * 4)
        assert torch.allclose(remote(images).pooler_output, forward_by_names(small_resnet(), padded), atol=1e-4)


@pytest.mark.extended
def test_command_line_imports_prints_the_report_and_refuses_with_status_2(tmp_path, capsys):
    state, *_ = moco_state()
    torch.save({"state_dict": copy.deepcopy(state)}, tmp_path / "moco.pth.tar")
    argv = ["import", str(tmp_path / "moco.pth.tar"), "--output_dir", str(tmp_path / "encoder")]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert "resnet18, stem timm, MoCo-v2 from facebookresearch/moco" in printed and "taken: queue of 40 keys" in printed
    assert main(argv) == 2 and "exists" in capsys.readouterr().err
    assert main([*argv, "--overwrite", "--mean", "0.5", "0.5", "0.5", "--std", "1", "1", "1"]) == 0
    assert ContrastiveEncoder.from_pretrained(tmp_path / "encoder").config.pretrained_cfg["std"] == [1, 1, 1]
