"""Contrastive models: weights as their library made them, the key branch, losses, checkpoints."""

import copy
import json
import math
import shutil

import pytest
import timm
import torch
from cases import for_each
from safetensors.torch import load_file, save_file
from tiny_encoders import BACKBONES, config, images
from transformers import AutoConfig, AutoModel
from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperModel

from hf_dpssl import ContrastiveConfig, ContrastiveEncoder, MoCoForPreTraining, SimCLRForPreTraining
from hf_dpssl.contrastive.isotropy import lejepa, random_directions
from hf_dpssl.contrastive.losses import info_nce, moco, t_simclr

QUEUE = {"normalization": "anchor", "queue_size": 10, "momentum": 0.9}


def trained_moco(**options) -> MoCoForPreTraining:
    """A MoCo model after two optimiser steps: query and key differ, the queue holds 8 keys."""
    torch.manual_seed(0)
    model = MoCoForPreTraining(config(**(QUEUE | options))).train()
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=1.0)
    for step in range(2):
        optimizer.zero_grad()
        model(images(2 * step), images(2 * step + 1)).loss.backward()
        optimizer.step()
    return model


def assert_same_state(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    torch.testing.assert_close(dict(found.state_dict()), dict(expected.state_dict()), rtol=0, atol=0)


def buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_buffers())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(folder as training/contrastive.py writes it, the model in it)."""
    folder = tmp_path_factory.mktemp("checkpoint")
    mean_std = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1], "input_size": [3, 16, 16], "interpolation": "bicubic"}
    model = trained_moco(temperature=3.5, dof=7.0, pretrained_cfg=mean_std).eval()
    model.config.dpssl = {"steps": 2}
    model.encoder.save_pretrained(folder)
    model.save_pretrained(folder / "pretraining")
    return folder, model


# Construction.


def test_backbone_starts_with_timms_own_weights():
    for model_class in [ContrastiveEncoder, SimCLRForPreTraining, MoCoForPreTraining]:
        for backbone in BACKBONES:
            architecture, model_args = BACKBONES[backbone]
            torch.manual_seed(3)
            expected = timm.create_model(architecture, num_classes=0, **model_args)
            torch.manual_seed(3)
            model = model_class(config(backbone, **QUEUE))
            found = (model if model_class is ContrastiveEncoder else model.encoder).timm_model
            assert_same_state(found, expected)
            torch.testing.assert_close(buffers(found), buffers(expected), rtol=0, atol=0)


def test_head_starts_with_torchs_own_initialisation_and_not_with_that_of_transformers():
    for options in [{}, {"projection_layers": 3, "projection_batch_norm": True}]:
        torch.manual_seed(0)
        head = SimCLRForPreTraining(config(projection_hidden_dim=256, projection_dim=128, **options)).head
        for layer in (module for module in head if isinstance(module, torch.nn.Linear)):
            bound = layer.in_features**-0.5  # torch draws uniformly in +-1/sqrt(in_features)
            assert 0.9 * bound < layer.weight.abs().max() <= bound
            assert layer.bias is None or 0 < layer.bias.abs().max() <= bound


def test_head_has_the_layers_and_the_feature_norm_of_the_config():
    for layers, batch_norm, norm in [(1, False, "none"), (2, True, "l2"), (3, True, "batch")]:
        options = {"projection_layers": layers, "projection_batch_norm": batch_norm, "feature_norm": norm}
        model = SimCLRForPreTraining(config(projection_hidden_dim=20, **options)).train()
        linear = [module for module in model.head if isinstance(module, torch.nn.Linear)]
        assert [(m.out_features, m.bias is None) for m in linear] == [(20, batch_norm)] * (layers - 1) + [(6, False)]
        norms = [module for module in model.head if isinstance(module, torch.nn.BatchNorm1d)]
        assert len(norms) == (layers - 1) * batch_norm + (norm == "batch")
        embeddings = model(images(0, 32)).embeddings
        if norm == "l2":
            torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(32))
        if norm == "batch":
            torch.testing.assert_close(embeddings.mean(0), torch.zeros(6), atol=1e-5, rtol=0)


def test_config_refuses_what_is_not_defined_and_says_what_is():
    for options, allowed in [
        ({"stem": "cifar"}, "'timm', 'small_image'"),
        ({"kernel": "gaussian"}, "'cosine', 'student_t'"),
        ({"normalization": "row"}, "'joint', 'anchor'"),
        ({"feature_norm": "layer"}, "'l2', 'batch', 'none'"),
        ({"kernel": "cosine"}, "use 'anchor'"),
        *[({"projection_layers": count}, "1, 2 or 3") for count in (0, 4)],
        *[({"temperature": value}, "temperature must be positive") for value in (0, -1.0, math.nan, math.inf)],
        *[({name: 0}, f"{name} must be positive") for name in ("dof", "projection_dim", "queue_size")],
        *[({"momentum": value}, r"\[0, 1\]") for value in (-0.1, 1.1, math.nan)],
        *[({"sigreg_weight": value}, r"\(0, 1\)") for value in (-0.1, 1.0, math.nan)],
        ({"sigreg_weight": 0.1, "feature_norm": "l2"}, "need feature_norm='none'"),
    ]:
        with pytest.raises(ValueError, match=allowed):
            config(**options)


def test_classes_refuse_configs_that_they_cannot_follow():
    with pytest.raises(ValueError, match="takes 'anchor'"):
        MoCoForPreTraining(config(normalization="joint"))
    with pytest.raises(ValueError, match="take SimCLRForPreTraining"):
        MoCoForPreTraining(config(normalization="anchor", sigreg_weight=0.1))
    with pytest.raises(ValueError, match="needs a timm ResNet.*ConvNeXt"):
        ContrastiveEncoder(config("convnext", stem="small_image"))


# Losses.


def test_simclr_loss_is_that_of_its_embeddings_with_the_options_of_the_config():
    for options, loss in [
        ({"kernel": "cosine", "normalization": "anchor", "feature_norm": "l2"}, info_nce),
        ({"normalization": "joint", "dof": 3.0}, t_simclr),
        ({"normalization": "anchor", "dof": 3.0}, t_simclr),
    ]:
        model = SimCLRForPreTraining(config(temperature=0.7, **options)).eval()
        a, b, weights = images(0), images(1), torch.tensor([1.0, 2, 3, 4])
        output = model(a, b, weights=weights)
        kernel_options = {k: v for k, v in options.items() if k in ("normalization", "dof")} if loss is t_simclr else {}
        view_1, view_2 = model(a).embeddings, model(b).embeddings
        expected = loss(view_1, view_2, temperature=0.7, weights=weights, **kernel_options)
        torch.testing.assert_close(output.loss, expected)
        found, gradient = (torch.autograd.grad(value, model.head[0].weight)[0] for value in (output.loss, expected))
        torch.testing.assert_close(found, gradient)
        torch.testing.assert_close((output.embeddings, output.paired_embeddings), (view_1, view_2))
        torch.testing.assert_close(output.features, model.encoder(a).pooler_output)
        assert model(a).loss is None and not torch.isclose(output.loss, model(a, b).loss)


def test_loss_of_lejepa_is_that_of_its_embeddings_in_the_directions_of_the_step():
    model = SimCLRForPreTraining(config(sigreg_weight=0.3)).eval()
    a, b = images(0), images(1)
    views = [model(x).embeddings for x in (a, b)]
    for step in (0, 5):
        directions = random_directions(256, views[0].shape[1], step)
        torch.testing.assert_close(model(a, b, step=step).loss, lejepa(*views, directions, weight=0.3))
    assert model(a, b, step=0).loss != model(a, b, step=5).loss != model(a, b).loss


def test_moco_loss_uses_its_own_keys_first_and_then_the_filled_rows_of_the_queue():
    for options in [{"kernel": "cosine"}, {"kernel": "student_t", "dof": 3.0}]:
        model = MoCoForPreTraining(config(temperature=0.7, **QUEUE, **options)).train()
        for step, filled in enumerate([0, 4, 8, 10]):
            assert int(model.queue_filled) == filled
            negatives = model.queue[:filled].clone()
            output = model(images(2 * step), images(2 * step + 1))
            keys = output.paired_embeddings
            expected = moco(output.embeddings, keys, negatives if step else keys, temperature=0.7, **options)
            torch.testing.assert_close(output.loss, expected)
        torch.testing.assert_close(model.queue[[2, 3, 4, 5]], keys)  # the 13th to 16th key, in a queue of 10


# The key branch.


def test_query_and_key_are_equal_at_step_zero_and_differ_after_steps():
    model = MoCoForPreTraining(config("resnet", **QUEUE, projection_batch_norm=True))
    assert_same_state(model.key_encoder, model.encoder)
    assert_same_state(model.key_head, model.head)
    keys, queries = branches(trained_moco())
    assert not any(torch.equal(keys[name], queries[name]) for name in keys)


def branches(model: MoCoForPreTraining) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Parameters of the key branch by their name in the query branch, and those of the query branch."""
    parameters = dict(model.named_parameters())
    keys = {name.removeprefix("key_"): value for name, value in parameters.items() if name.startswith("key_")}
    return keys, {name: parameters[name] for name in keys}


def test_every_key_parameter_is_the_running_mean_of_its_query_even_in_an_optimiser_of_all_parameters():
    torch.manual_seed(0)
    model = MoCoForPreTraining(config("resnet", **QUEUE, projection_batch_norm=True)).train()
    keys, queries = branches(model)
    assert len(keys) == len(model.trainable_parameters()) > 30
    start = {name: value.detach().clone() for name, value in queries.items()}
    expected = start
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.5)
    for step in range(3):
        expected = {name: 0.9 * old + 0.1 * queries[name].detach() for name, old in expected.items()}
        before = copy.deepcopy(model)
        output = model(images(2 * step), images(2 * step + 1))
        assert not output.paired_embeddings.requires_grad
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        for name, value in expected.items():
            torch.testing.assert_close(keys[name].detach(), value, msg=lambda text, name=name: f"{name}: {text}")
            assert keys[name].grad is None, name
        before.key_encoder.load_state_dict(model.key_encoder.state_dict() | dict(before.key_encoder.named_buffers()))
        before.key_head.load_state_dict(model.key_head.state_dict() | dict(before.key_head.named_buffers()))
        with torch.no_grad():  # keys are those of the branch after it has moved
            moved = before.key_head(before.key_encoder(images(2 * step + 1)).pooler_output)
        torch.testing.assert_close(output.paired_embeddings, moved, rtol=1e-4, atol=1e-4)
    assert not any(torch.equal(queries[name], value) for name, value in start.items()), "every query learns"


def test_key_branch_takes_no_gradient_also_after_loading_and_train(checkpoint):
    folder, _ = checkpoint
    for model in (trained_moco(), MoCoForPreTraining.from_pretrained(folder / "pretraining").train()):
        key_names = {n for n, _ in model.named_parameters() if n.startswith(("key_encoder.", "key_head."))}
        assert len(key_names) == len(model.trainable_parameters())
        assert key_names == {n for n, p in model.named_parameters() if not p.requires_grad}
        model.zero_grad()
        model(images(0), images(1)).loss.backward()
        assert {n for n, p in model.named_parameters() if p.grad is None} == key_names
        assert {id(p) for p in model.trainable_parameters()} == {id(p) for p in model.parameters() if p.requires_grad}


def test_eval_mode_moves_neither_keys_nor_queue():
    model = trained_moco().eval()
    before = copy.deepcopy(model)
    model(images(8), images(9))
    assert_same_state(model, before)


# Checkpoints.


@for_each(
    "backbone, model_class",
    [
        *((backbone, MoCoForPreTraining) for backbone in BACKBONES),
        *(("resnet", model_class) for model_class in (ContrastiveEncoder, SimCLRForPreTraining)),
    ],
)
def test_saved_model_comes_back_bit_equal_with_all_buffers(backbone, model_class, tmp_path):
    torch.manual_seed(0)
    model = model_class(config(backbone, **QUEUE, projection_batch_norm=True)).train()
    views = [images(0)] if model_class is ContrastiveEncoder else [images(0), images(1)]
    model(*views)  # moves batch norms and the queue
    model.eval().save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path)
    assert not loaded.training
    assert_same_state(loaded, model)
    torch.testing.assert_close(buffers(loaded), buffers(model), rtol=0, atol=0)
    assert torch.equal(loaded(images(2))[0], model(images(2))[0])


def test_a_model_whose_queue_was_full_goes_on_from_a_state_that_is_not():
    """What is known without reading the device is forgotten when a state is loaded: of queue and temperature."""
    options = {"kernel": "student_t", "temperature": "auto", "feature_norm": "none"}
    fresh = MoCoForPreTraining(config(**QUEUE, **options)).train()
    start = {name: value.clone() for name, value in fresh.state_dict().items()}
    used = MoCoForPreTraining(config(**QUEUE, **options)).train()
    for step in range(5):  # the queue of 10 is full after three batches of 4
        used(images(2 * step), images(2 * step + 1))
    used.load_state_dict(start)
    expected, found = (model(images(20), images(21)) for model in (fresh, used))
    assert torch.equal(found.loss, expected.loss)
    torch.testing.assert_close(used.state_dict(), fresh.state_dict(), rtol=0, atol=0)


def test_queue_of_a_trained_model_comes_back_exactly(checkpoint):
    folder, model = checkpoint
    loaded = MoCoForPreTraining.from_pretrained(folder / "pretraining")
    assert int(loaded.queue_filled) == int(loaded.queue_cursor) == 8
    assert torch.equal(loaded.queue, model.queue) and model.queue[:8].abs().sum(1).min() > 0


def test_config_json_has_timms_layout_and_the_method(checkpoint):
    folder, _ = checkpoint
    written = json.loads((folder / "config.json").read_text())
    assert (written["architecture"], written["model_args"]) == BACKBONES["convnext"]
    assert written["num_classes"] == 0 and written["num_features"] == 16 and "model_type" not in written
    assert written["pretrained_cfg"]["mean"] == [0.5, 0.4, 0.3] and written["dpssl"]["steps"] == 2
    assert written["dpssl"]["method"].items() >= {"temperature": 3.5, "dof": 7.0, "queue_size": 10}.items()
    for auto_class, name in (("AutoModel", "ContrastiveEncoder"), ("AutoConfig", "ContrastiveConfig")):
        assert written["auto_map"][auto_class] == f"modeling_contrastive.{name}"
    assert {"modeling_contrastive.py", "blocks.py", "choices.py"} <= {p.name for p in folder.iterdir()}
    assert not any(key.startswith("timm_model") for key in load_file(folder / "model.safetensors"))


def test_an_encoder_whose_features_are_not_pooled_stays_so(tmp_path):
    encoder = ContrastiveEncoder(config(do_pooling=False)).eval()
    encoder.save_pretrained(tmp_path)
    for loaded in (ContrastiveEncoder.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        output = loaded(images(5))
        assert output.pooler_output is None and output.last_hidden_state.ndim == 4
    assert "do_pooling" not in config().to_timm_dict(16)


def test_encoder_loads_bit_equal_from_both_folders_by_us_by_transformers_and_by_timm(checkpoint):
    folder, model = checkpoint
    expected = model.encoder(images(5)).pooler_output
    for path in (folder, folder / "pretraining"):
        encoder = ContrastiveEncoder.from_pretrained(path)
        assert torch.equal(encoder(images(5)).pooler_output, expected)
        assert (encoder.config.temperature, encoder.config.dof, encoder.config.dpssl) == (3.5, 7.0, {"steps": 2})
    for path, model_class in ((folder, TimmWrapperModel), (folder / "pretraining", ContrastiveEncoder)):
        loaded = AutoModel.from_pretrained(path)
        assert type(loaded) is model_class and torch.equal(loaded(images(5)).pooler_output, expected)
    by_timm = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(by_timm(images(5)), expected)


def test_temperature_survives_saving_in_every_layout(checkpoint, tmp_path):
    folder, model = checkpoint
    for path in (folder, folder / "pretraining"):
        assert ContrastiveConfig.from_pretrained(path).temperature == 3.5
    loaded = AutoConfig.from_pretrained(folder / "pretraining")
    assert type(loaded) is ContrastiveConfig and loaded.temperature == 3.5
    MoCoForPreTraining.from_pretrained(folder / "pretraining").save_pretrained(tmp_path)
    assert MoCoForPreTraining.from_pretrained(tmp_path).config.temperature == 3.5


def test_incomplete_or_foreign_checkpoint_is_refused(checkpoint, tmp_path):
    folder, _ = checkpoint
    shutil.copytree(folder, tmp_path / "copy")
    for path, name in ((tmp_path / "copy", "stem.0.weight"), (tmp_path / "copy/pretraining", "queue")):
        weights = load_file(path / "model.safetensors")
        del weights[name]
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 tensors of ContrastiveEncoder .*stem.0.weight"):
        ContrastiveEncoder.from_pretrained(tmp_path / "copy")
    with pytest.raises(ValueError, match="lacks 1 tensors of MoCoForPreTraining .*queue"):
        MoCoForPreTraining.from_pretrained(tmp_path / "copy/pretraining")
    with pytest.raises(ValueError, match="of SimCLRForPreTraining"):
        SimCLRForPreTraining.from_pretrained(folder)
    wider = ContrastiveConfig.from_pretrained(folder / "pretraining", projection_dim=7)
    with pytest.raises(ValueError, match="another class or config"):
        MoCoForPreTraining.from_pretrained(folder / "pretraining", config=wider)


def test_small_image_stem_keeps_the_resolution_and_comes_back_bit_equal(tmp_path):
    model = ContrastiveEncoder(config("resnet", stem="small_image")).eval()
    assert model.timm_model.conv1.kernel_size == (3, 3)
    assert model(images(0)).last_hidden_state.shape == (4, 16, 2, 2)  # three strides, 16 -> 2
    model.save_pretrained(tmp_path)
    for loaded in (ContrastiveEncoder.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert type(loaded) is ContrastiveEncoder and loaded.config.stem == "small_image"
        assert torch.equal(loaded(images(0)).pooler_output, model(images(0)).pooler_output)
