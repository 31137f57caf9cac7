"""Queue, momentum and batch norm of training/contrastive.py, as a user starts it."""

import json

import contrastive
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModel

from hf_dpssl import MoCoForPreTraining, SimCLRForPreTraining
from hf_dpssl.cli.commands import main
from hf_dpssl.contrastive.momentum import momentum_at
from hf_dpssl.runs.contrastive_arguments import ContrastiveArguments

TINY = ["--model_args", '{"channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1]}', "--projection_dim", 8]
COMMON = [*TINY, "--max_train_steps", 3, "--logging_steps", 1, "--evaluation_images", 64]
MOCO = ["--negatives", "queue", "--normalization", "anchor", "--feature_norm", "batch"]


def final_state(folder) -> dict[str, torch.Tensor]:
    return torch.load(next((folder / "checkpoints").rglob("step-00000003/state.pt")), weights_only=True)["model"]


@pytest.mark.parametrize("method", ["t_moco", pytest.param("t_simclr", marks=pytest.mark.extended)])
def test_two_processes_with_global_batch_norm_follow_one_process_of_twice_the_batch(
    method, run_script, launch, tmp_path
):
    flags = [*COMMON, "--projection_batch_norm", *(MOCO if method == "t_moco" else [])]
    flags += ["--optimizer", "sgd", "--learning_rate", 0.05]  # AdamW turns the rounding of tiny gradients into signs
    two = [*flags, "--batch_size", 32, "--batch_norm", "global", "--num_processes", 2]
    launched = launch("contrastive", [*two, "--output_dir", tmp_path / "two"], 2)
    run_script("contrastive", [*flags, "--batch_size", 64, "--output_dir", tmp_path / "one"])
    launched.wait()
    one, two = final_state(tmp_path / "one"), final_state(tmp_path / "two")
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-3, msg=lambda m, name=name: f"{name}: {m}")
    metas = [json.loads(next(tmp_path.glob(f"{run}/checkpoints/**/meta.json")).read_text()) for run in ("one", "two")]
    losses = [[entry["loss"] for entry in meta["history"]] for meta in metas]
    assert len(losses[0]) == len(losses[1]) == 3 and [meta["num_processes"] for meta in metas] == [1, 2]
    if method == "t_simclr":  # MoCo's is the loss of the first process's queries
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_queue_size_is_chosen_printed_saved_and_key_encoder_follows_the_momentum_schedule(run_script, tmp_path):
    flags = [*COMMON, *MOCO, "--batch_size", 64, "--learning_rate", 0, "--weight_decay", 0]
    schedule = ["--momentum", 0.5, "--momentum_schedule", "cosine", "--checkpointing_steps", 1]
    first = run_script("contrastive", [*flags, "--output_dir", tmp_path / "first"])
    assert "queue of 512 keys (chosen): the oldest are 0.356 epochs old" in first  # 1,437 digits
    assert yaml.safe_load((tmp_path / "first/encoder/recipe.yaml").read_text())["queue_size"] == 512
    model = MoCoForPreTraining.from_pretrained(tmp_path / "first" / "encoder" / "pretraining")
    assert len(model.queue) == model.config.queue_size == 512
    moving = [*flags, *schedule, "--learning_rate", 0.1, "--optimizer", "sgd", "--checkpoints_total_limit", 9]
    run_script("contrastive", [*moving, "--output_dir", tmp_path / "second"])
    states = [
        torch.load(path / "state.pt", weights_only=True)["model"]
        for path in sorted((tmp_path / "second" / "checkpoints" / "encoder").glob("step-*"))
    ]
    for step in (1, 2):  # the key branch moves towards the queries of before the step
        old, new = states[step - 1], states[step]
        momentum = momentum_at(step, 3, momentum=0.5, schedule="cosine")
        for name in ("head.0.weight", "encoder.timm_model.conv1.0.weight"):
            expected = momentum * old[f"key_{name}"] + (1 - momentum) * old[name]
            torch.testing.assert_close(new[f"key_{name}"], expected, rtol=1e-5, atol=1e-7)
            assert not torch.allclose(new[f"key_{name}"], 0.5 * old[f"key_{name}"] + 0.5 * old[name], atol=1e-6)


@pytest.mark.extended
def test_neighbours_mean_the_same_in_training_and_in_evaluate(run_script, tmp_path, capsys):
    run_script("contrastive", [*TINY, "--max_train_steps", 3, "--output_dir", tmp_path])
    folder = tmp_path / "encoder"
    trained = json.loads((folder / "results.json").read_text())
    assert trained["knn"] == {"k": 20, "metric": "cosine"} and trained["samples"]["bank"] == 1437
    assert trained["images"].startswith("1437 images in 10 classes (train), 360 images in 10 classes (evaluation)")
    for features, name in (("features", "knn_top1"), ("embeddings", "knn_top1_embeddings")):
        flags = ["--protocol", "knn", "--features", features, "--json"]
        assert main(["evaluate", str(folder), *flags]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["metrics"]["knn_top1"] == pytest.approx(trained["metrics"][name], abs=0.3)  # a picture is 0.28
        assert found["samples"] == {"evaluation": 360, "bank": 1437}


@pytest.mark.extended
def test_stream_gets_the_largest_queue_and_says_that_its_age_is_not_known(run_script, tmp_path):
    flags = [*COMMON, *MOCO, "--batch_size", 64, "--streaming", "--output_dir", tmp_path]
    assert "queue of 65,536 keys (chosen); its age in epochs is not known" in run_script("contrastive", flags)


@pytest.mark.extended
def test_split_batch_norm_trains_and_its_encoder_is_stock(run_script, tmp_path):
    split = ["--batch_norm", "split", "--batch_norm_splits", 4, "--projection_batch_norm"]
    run_script("contrastive", [*COMMON, *split, "--batch_size", 64, "--output_dir", tmp_path])
    folder = tmp_path / "encoder"
    stock = AutoModel.from_pretrained(folder)
    assert {type(m) for m in stock.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {torch.nn.BatchNorm2d}
    assert not any("split" in name or "timm_model" in name for name in load_file(folder / "model.safetensors"))
    model = SimCLRForPreTraining.from_pretrained(folder / "pretraining")
    assert model.config.batch_norm == "split" and "splits=4" in repr(model.encoder) and "splits=4" in repr(model.head)
    images = torch.randn(8, 3, 32, 32)
    torch.testing.assert_close(stock(images).pooler_output, model(images).features, rtol=0, atol=1e-6)


def test_queue_and_batch_norm_that_cannot_be_are_refused(refusal, tmp_path):
    for flags, message in [
        ([*MOCO, "--queue_size", 63], "--queue_size 63 is smaller than the batch of all processes (64): give at least"),
        ([*MOCO, "--sigreg_weight", 0.1], "--sigreg_weight needs no negatives"),
        (["--batch_norm", "split"], "needs batch_norm_splits of at least 2"),
        (["--batch_norm", "split", "--batch_norm_splits", 3], "128 images cannot be split into 3 equal parts"),
    ]:
        argv = [*COMMON, "--batch_size", 64, *flags, "--output_dir", tmp_path / "out", "--overwrite"]
        assert message in refusal("contrastive", argv)
        assert not (tmp_path / "out" / "encoder").exists()


def test_memory_format_changes_rounding_only_and_is_not_saved(run_script, tmp_path):
    flags = [*COMMON, "--batch_size", 32, "--optimizer", "sgd", "--learning_rate", 0.05]
    for name, given in (("plain", "False"), ("last", "True")):
        run_script("contrastive", [*flags, "--channels_last", given, "--output_dir", tmp_path / name])
    plain, last = (load_file(tmp_path / name / "encoder" / "model.safetensors") for name in ("plain", "last"))
    for name, tensor in plain.items():
        assert last[name].is_contiguous()
        torch.testing.assert_close(last[name], tensor, rtol=1e-3, atol=1e-4)


def test_either_optimiser_updates_all_weights_at_once():
    model = torch.nn.Linear(2, 2)
    model.trainable_parameters, model.undecayed_parameters = lambda: [model.weight], lambda: [model.bias]
    for name, kind in {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}.items():
        optimizer = contrastive.make_optimizer(ContrastiveArguments(optimizer=name), model)
        assert isinstance(optimizer, kind) and all(group["fused"] for group in optimizer.param_groups)
