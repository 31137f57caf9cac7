"""Backbones of any size: fitted to the pictures, tried before data is read, and with activations computed again."""

import json
from itertools import pairwise

import pytest
import timm
import torch

from hf_dpssl import ContrastiveConfig, ContrastiveEncoder, MoCoForPreTraining, SimCLRForPreTraining
from hf_dpssl.contrastive.backbone_check import check_backbone, fitting_model_args

VIT = {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 8}
RESNET = {"channels": [8, 8, 16, 16]}


def test_models_of_fixed_size_get_the_size_of_the_pictures_and_others_stay_as_they_are():
    for architecture, given, size, expected in [
        ("vit_tiny_patch16_224", VIT, 32, VIT | {"img_size": 32}),
        ("vit_tiny_patch16_224", VIT, 224, VIT),
        ("vit_tiny_patch16_224", VIT | {"img_size": 64}, 32, VIT | {"img_size": 64}),
        ("resnet10t", RESNET, 32, RESNET),
        ("resnet10t", None, 32, None),
    ]:
        assert fitting_model_args(architecture, given, size) == expected


def test_backbones_that_do_not_fit_are_refused_with_timms_reason_and_no_random_number_is_used_up():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    check_backbone("vit_tiny_patch16_224", VIT, "timm", 32)
    check_backbone("resnet10t", RESNET, "timm", None)
    for architecture, model_args, size, message in [
        ("resnet10t", {"chanels": [8]}, 32, "cannot be built: TypeError.*chanels"),
        ("resnet10", None, 32, "cannot be built"),
        ("resnet10t", RESNET | {"in_chans": 1}, 32, "does not take RGB pictures of 32 x 32 pixels.*in_chans 3"),
        ("vit_tiny_patch16_224", VIT | {"img_size": 64}, 32, "does not take RGB pictures of 32 x 32.*64"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_backbone(architecture, model_args, "timm", size)
    assert torch.equal(torch.get_rng_state(), state)


def test_wrong_model_args_end_the_script_before_data_is_read(refusal, run_script, tmp_path, monkeypatch):
    import contrastive

    def read(args):
        raise AssertionError("data was read")

    monkeypatch.setattr(contrastive, "load_images_for", read)
    for given, message in [
        ("{channels: 8}", "must be a JSON object, got '{channels: 8}'"),
        ("[8, 16]", "must be a JSON object such as"),
        ('{"in_chans": 1}', "views are RGB, of 3 channels"),
        ('{"num_classes": 10}', "an encoder has none"),
        ('{"chanels": [8]}', "cannot be built: TypeError"),
    ]:
        assert message in refusal("contrastive", ["--model_args", given, "--output_dir", tmp_path])
    assert not any(tmp_path.iterdir())


def test_a_vision_transformer_made_for_224_trains_on_other_pictures_and_loads_with_timm(run_script, tmp_path):
    flags = [
        "--architecture",
        "vit_tiny_patch16_224",
        "--model_args",
        json.dumps(VIT),
        "--gradient_checkpointing",
        True,
    ]
    flags += ["--max_train_steps", 2, "--batch_size", 16, "--evaluation_images", 64, "--projection_dim", 4]
    run_script("contrastive", [*flags, "--output_dir", tmp_path])  # digits of 16 px
    encoder = ContrastiveEncoder.from_pretrained(tmp_path / "encoder").eval()
    stock = timm.create_model(f"local-dir:{tmp_path / 'encoder'}", pretrained=True).eval()
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(stock(images), encoder(images).pooler_output, rtol=0, atol=1e-6)


@pytest.mark.extended
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_class", [SimCLRForPreTraining, MoCoForPreTraining])
def test_gradient_checkpointing_changes_no_gradient_and_no_statistic(model_class):
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(8, 3, 32, 32, generator=generator)
    second = first + 0.1 * torch.randn(8, 3, 32, 32, generator=generator)
    split = {"batch_norm": "split", "batch_norm_splits": 2}
    for architecture, model_args, changes in [
        ("resnet10t", RESNET, {}),
        ("resnet10t", RESNET, split),
        ("vit_tiny_patch16_224", VIT | {"img_size": 32}, {}),
    ]:
        options = {"normalization": "anchor", "queue_size": 32, "projection_dim": 8, "projection_batch_norm": True}
        runs = []
        for asked in ("not", "of the config", "of the model"):
            torch.manual_seed(0)
            config = ContrastiveConfig(architecture, model_args, **options | changes)
            config.gradient_checkpointing = asked == "of the config"
            model = model_class(config).train()
            if asked == "of the model":
                model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing == (asked != "not")
            calls = []
            blocks = model.encoder.timm_model.layer2 if architecture == "resnet10t" else model.encoder.timm_model.blocks
            blocks[0].register_forward_pre_hook(lambda module, inputs, calls=calls: calls.append(module))
            for _ in range(2):
                model(first, second).loss.backward()
            gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            runs.append((len(calls), gradients, dict(model.state_dict())))
        assert [run[0] for run in runs] == [2, 4, 4], "the other models compute their activations again"
        for found, expected in pairwise(run[1:] for run in runs):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
