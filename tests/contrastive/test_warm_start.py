"""Starting from an earlier run's encoder and head, and training of the last layer alone."""

import pytest
import torch
from cases import for_each

from hf_dpssl import ContrastiveConfig, MoCoForPreTraining, SimCLRForPreTraining
from hf_dpssl.contrastive.warm_start import freeze_all_but_last_layer_, last_layer, start_from_pretraining_

SHORT = ["--max_train_steps", 3, "--batch_size", 32, "--projection_batch_norm", True, "--learning_rate", 0.01]


def make(model_class=SimCLRForPreTraining, seed: int = 0, **changes):
    torch.manual_seed(seed)
    options = {"architecture": "resnet10t", "model_args": {"channels": [8, 8, 16, 16]}, "projection_dim": 6}
    options |= {"normalization": "anchor", "queue_size": 8, "projection_hidden_dim": 12, "projection_batch_norm": True}
    return model_class(ContrastiveConfig(**options | changes))


@for_each("model_class", [SimCLRForPreTraining, MoCoForPreTraining])
@for_each("dimension, feature_norm", [(6, "batch"), (2, "none")])
def test_encoder_and_head_are_copied_and_the_last_layer_where_it_fits(model_class, dimension, feature_norm, tmp_path):
    given = make(seed=1, feature_norm=feature_norm)
    given.save_pretrained(tmp_path / "pretraining")
    model = make(model_class, seed=2, projection_dim=dimension, feature_norm=feature_norm)
    start_from_pretraining_(model, tmp_path)
    expected, found = given.state_dict(), model.state_dict()
    place = last_layer(model)[0]
    for name, value in expected.items():
        is_new = dimension == 2 and name.startswith("head.") and int(name.split(".")[1]) >= place
        assert is_new or found[name].equal(value), name
    assert last_layer(model)[1].weight.shape == (dimension, 12)
    if model_class is MoCoForPreTraining:
        for query, key in ((model.encoder, model.key_encoder), (model.head, model.key_head)):
            assert all(value.equal(key.state_dict()[name]) for name, value in query.state_dict().items())


def test_new_last_layer_is_drawn_from_a_standard_normal(tmp_path):
    make(seed=1, projection_hidden_dim=2000).save_pretrained(tmp_path / "pretraining")
    model = make(seed=2, projection_hidden_dim=2000, projection_dim=2)
    start_from_pretraining_(model, tmp_path)
    weight = last_layer(model)[1].weight.detach()
    assert abs(float(weight.mean())) < 0.07 and abs(float(weight.std()) - 1) < 0.05  # 4.4 standard errors of 4,000


def test_other_backbone_or_head_is_refused(tmp_path):
    make().save_pretrained(tmp_path / "pretraining")
    for changes, message in [
        ({"projection_hidden_dim": 13}, "more than its last layer"),
        ({"projection_batch_norm": False}, "more than its last layer"),
        ({"projection_layers": 3}, "more than its last layer"),
        ({"model_args": {"channels": [8, 8, 16, 24]}}, "--init_pretraining holds resnet10t .*the run asks for"),
    ]:
        with pytest.raises(ValueError, match=message):
            start_from_pretraining_(make(**changes, projection_dim=2), tmp_path)


@pytest.mark.parametrize("model_class", [SimCLRForPreTraining, MoCoForPreTraining])
def test_frozen_model_has_one_trainable_layer_and_no_statistics_that_move(model_class):
    model = make(model_class, feature_norm="batch").train()
    freeze_all_but_last_layer_(model)
    assert [name for name, value in model.named_parameters() if value.requires_grad] == ["head.3.weight", "head.3.bias"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.rand(8, 3, 16, 16)
    model(images, images + 0.1 * torch.rand(8, 3, 16, 16)).loss.backward()
    moved = [name for name, value in model.state_dict().items() if not value.equal(before[name])]
    norms_after_the_last_layer = ("head.4.", "key_head.4.")
    assert moved and all(name.startswith((*norms_after_the_last_layer, "queue")) for name in moved), moved
    assert all((value.grad is not None) == value.requires_grad for value in model.parameters())


QUEUE = ["--negatives", "queue", "--normalization", "anchor", "--queue_size", 64]


@pytest.mark.slow
@pytest.mark.parametrize("negatives", [[], QUEUE])
def test_a_run_of_the_last_layer_alone_leaves_all_other_weights_bit_equal(negatives, run_script, tmp_path):
    kernel = ["--feature_norm", "none", "--temperature", 2]  # nothing follows the batches
    flags = [*SHORT, *negatives, *kernel, "--output_dir", tmp_path]
    run_script("contrastive", [*flags, "--name", "first", "--projection_dim", 8])
    second = ["--init_pretraining", tmp_path / "first", "--projection_dim", 2, "--freeze", "all_but_last_layer"]
    run_script("contrastive", [*flags, "--name", "second", *second])
    third = ["--init_pretraining", tmp_path / "second", "--projection_dim", 2]
    run_script("contrastive", [*flags, "--name", "third", *third])
    states = [
        SimCLRForPreTraining.from_pretrained(tmp_path / name / "pretraining").state_dict()
        for name in ("first", "second", "third")
    ]
    changed = {name for name, value in states[1].items() if not value.equal(states[0][name])}
    assert changed == {"head.3.weight", "head.3.bias"} and states[1]["head.3.weight"].shape == (2, 256)
    moved = [name for name, value in states[2].items() if not value.equal(states[1][name])]
    assert len(moved) > 0.9 * len(states[2])


def test_two_ways_to_start_are_refused(refusal, tmp_path):
    flags = ["--init_encoder", "a", "--init_pretraining", "b", "--output_dir", tmp_path]
    assert "leave --init_encoder out" in refusal("contrastive", flags)
