"""transformers.Trainer takes SimCLRForPreTraining and VQAutoencoder as they are."""

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
