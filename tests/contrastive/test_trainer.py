"""transformers.Trainer takes SimCLRForPreTraining and VQAutoencoder as they are."""

import os

import pytest
import torch
from cases import for_each
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments

from hf_dpssl import ContrastiveConfig, MoCoForPreTraining, SimCLRForPreTraining, VQAutoencoder, VQConfig


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def contrastive_model(model_class=SimCLRForPreTraining):
    torch.manual_seed(0)
    model_args = {"patch_size": 1, "depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "ls_init_value": 1.0}
    return model_class(
        ContrastiveConfig(
            architecture="convnext_atto", model_args=model_args, projection_dim=8, normalization="anchor", queue_size=32
        )
    )


def autoencoder() -> VQAutoencoder:
    torch.manual_seed(0)
    return VQAutoencoder(
        VQConfig(image_size=16, encoder_block_out_channels=[8, 16], norm_num_groups=4, num_codes=16, codebook_decay=0.8)
    )


MODELS = {
    "simclr": contrastive_model,
    "moco": lambda: contrastive_model(MoCoForPreTraining),
    "vq": autoencoder,
}


class Rows(IterableDataset):
    """The same rows in the same order, again and again: an image, or two views of one, and a label."""

    def __init__(self, count: int, dtype: torch.dtype, paired: bool):
        first = random(count, 3, 16, 16, seed=1).to(dtype)
        second = first + 0.1 * random(count, 3, 16, 16, seed=2)
        self.rows = [{"pixel_values": image, "label": i % 3} for i, image in enumerate(first)]
        for row, view in zip(self.rows, second, strict=True):
            row |= {"paired_pixel_values": view} if paired else {}

    def __iter__(self):
        while True:
            yield from self.rows


def train(model: torch.nn.Module, folder, *, rows: int, **options) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        lr_scheduler_type="constant",
        **options,
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=Rows(rows, model.dtype, not isinstance(model, VQAutoencoder))
    )
    trainer.train()
    return trainer


@pytest.mark.extended
@for_each("name", MODELS)
def test_trainer_lowers_the_loss_and_its_checkpoint_loads(name, tmp_path):
    model = MODELS[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    options = {"max_steps": 12, "learning_rate": 5e-3, "per_device_train_batch_size": 8}
    trainer = train(model, tmp_path, rows=8, **options)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 12
    if name != "moco":  # whose negatives change from step to step
        assert sum(losses[-3:]) < 0.95 * sum(losses[:3]), losses
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert {key for key, parameter in model.named_parameters() if parameter.requires_grad} <= moved
    trainer.save_model(tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model")
    torch.testing.assert_close(dict(loaded.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


@pytest.mark.extended
@pytest.mark.parametrize("name", ["simclr", "vq"])
def test_accumulating_over_equal_batches_with_labels_takes_the_same_step_as_one_batch(name, tmp_path):
    weights = []
    for accumulation in (1, 2):
        model = MODELS[name]().double()
        if name == "vq":
            model.train()(random(8, 3, 16, 16, seed=1))  # starts the codebook
            model.quantizer.defer_update = True
        options = {"max_steps": 1, "learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0}
        options |= {"per_device_train_batch_size": 8, "gradient_accumulation_steps": accumulation}
        before = [p.detach().clone() for p in model.parameters()]
        train(model, tmp_path, rows=8, remove_unused_columns=False, **options)
        weights.append([p.detach() for p in model.parameters()])
        assert any((new - old).abs().max() > 1e-4 for new, old in zip(weights[-1], before, strict=True))
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-9, atol=1e-9)


def trained_on_shares(folder: str, batch_size: int) -> dict[str, torch.Tensor]:
    """Of each model: weights of the best of two steps on 8 rows, and the losses that the Trainer reports."""
    if torch.distributed.is_initialized():
        rank = str(torch.distributed.get_rank())
        os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # the group stands already
    found = {}
    for name in MODELS:
        model = MODELS[name]().double()
        model.load_state_dict(torch.load(f"{folder}/{name}.pt", weights_only=True))
        rows = Rows(8, model.dtype, name != "vq").rows
        arguments = TrainingArguments(
            output_dir=f"{folder}/{name} by {batch_size}",
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            optim="sgd",
            learning_rate=0.3,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            max_steps=2,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=batch_size,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        found |= {f"{name} weight {key}": value.clone() for key, value in model.state_dict().items()}
        for key in ("loss", "eval_loss"):
            found[f"{name} {key}"] = torch.tensor([e[key] for e in trainer.state.log_history if key in e])
        found[f"{name} best"] = torch.tensor(trainer.state.best_metric)
    found["processes"] = torch.tensor(arguments.world_size)
    return found


@pytest.mark.extended
def test_trainer_on_two_processes_takes_the_steps_of_one_and_returns_the_best_model(run_in_two, tmp_path):
    for name, make in MODELS.items():
        model = make().double()
        if name == "vq":
            model.train()(random(8, 3, 16, 16, seed=1))  # starts the codebook
        torch.save(model.state_dict(), tmp_path / f"{name}.pt")
    both = run_in_two(trained_on_shares, str(tmp_path), 2)
    expected = trained_on_shares(str(tmp_path), 4)
    assert [int(found.pop("processes")) for found in (*both, expected)] == [2, 2, 1]
    for found in both:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for name, make in MODELS.items():
        losses = expected[f"{name} eval_loss"]
        assert len(losses) == 2 and expected[f"{name} best"] == losses.min()
        model = make().double()
        weight = f"{name} weight "
        model.load_state_dict({k.removeprefix(weight): v for k, v in expected.items() if k.startswith(weight)})
        rows = Rows(8, model.dtype, name != "vq").rows
        halves = [
            {key: torch.stack([row[key] for row in half]) for key in rows[0] if key != "label"}
            for half in (rows[:4], rows[4:])
        ]
        with torch.no_grad():
            best = sum(float(model.eval()(**half).loss) for half in halves) / 2
        assert float(expected[f"{name} best"]) == pytest.approx(best, rel=1e-5)
