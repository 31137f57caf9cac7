"""The losses inside the loops of lightly, sentence-transformers and transformers.Trainer, by one changed line each."""

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertModel, BertTokenizerFast, Trainer, TrainingArguments

from hf_dpssl import ContrastiveConfig, MoCoForPreTraining, SimCLRForPreTraining, info_nce, t_simclr
from hf_dpssl.contrastive.drop_ins import SentencePairLoss, over_processes
from hf_dpssl.contrastive.losses import clip
from hf_dpssl.models.gather import is_distributed

STEPS = 3
SAME = {"rtol": 1e-6, "atol": 1e-6}


def assert_trained(model: nn.Module, start: nn.Module) -> None:
    moved = [(a - b).abs().max() for a, b in zip(model.parameters(), start.parameters(), strict=True)]
    assert 1e-3 < max(moved) < torch.inf, "training moved nothing, or to infinity"


def assert_same_weights(found: nn.Module, expected: nn.Module, start: nn.Module) -> None:
    torch.testing.assert_close(dict(found.named_parameters()), dict(expected.named_parameters()), **SAME)
    assert_trained(expected, start)


# lightly.


def lightly_loop(model: nn.Module, criterion, data) -> list[float]:
    """The body of lightly's SimCLR example."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06)
    losses = []
    for x0, x1 in data:
        loss = criterion(model(x0), model(x1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_lightlys_loop_gives_the_same_with_our_criterion():
    lightly_loss = pytest.importorskip("lightly.loss")
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform
    from torchvision.datasets import FakeData

    torch.manual_seed(0)
    pictures = FakeData(24, (3, 40, 40), transform=SimCLRTransform(input_size=16, gaussian_blur=0.0))
    loader = torch.utils.data.DataLoader(pictures, batch_size=8)
    data = [[view.double() for view in views] for views, _ in loader]  # in float32 batch norm amplifies rounding
    head = SimCLRProjectionHead(16, 16, 8)
    start = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head
    ).double()
    theirs, ours, student_t = (copy.deepcopy(start) for _ in range(3))
    expected = lightly_loop(theirs, lightly_loss.NTXentLoss(temperature=0.5), data)
    found = lightly_loop(ours, partial(info_nce, temperature=0.5), data)
    assert found == pytest.approx(expected, abs=1e-6) and len(found) == STEPS
    assert_same_weights(ours, theirs, start)
    lightly_loop(student_t, partial(t_simclr, temperature=1.0, dof=5.0), data)
    assert_trained(student_t, start)


def over_processes_case() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Linear(6, 3).double()
    views = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if is_distributed():
        views, model = views.chunk(2, dim=1)[dist.get_rank()], DistributedDataParallel(model)
    result = {}
    for name, loss in (
        ("info_nce", partial(info_nce, temperature=0.5)),
        ("t_simclr", partial(t_simclr, temperature=2.0, dof=5.0)),
        ("clip", partial(clip, temperature=0.5)),
    ):
        model.zero_grad()
        value = over_processes(loss)(*model(views.reshape(-1, 6)).chunk(2))
        value.backward()
        result |= {name: value.detach(), f"{name} gradient": torch.cat([p.grad.flatten() for p in model.parameters()])}
    return result


def test_over_processes_gives_loss_and_gradient_of_one_process_with_the_whole_batch(run_in_two):
    expected = over_processes_case()
    for result in run_in_two(over_processes_case):
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)


# sentence-transformers.

WORDS = "a red green blue cat dog bird house tree sings runs sleeps".split()


@pytest.fixture(scope="module")
def sentence_model(tmp_path_factory):
    """A SentenceTransformer of a tiny random BERT, made without network."""
    library = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.models")
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    BertModel(BertConfig(vocab_size=5 + len(WORDS), **sizes, **no_dropout)).save_pretrained(folder)
    transformer = modules.Transformer(str(folder))
    return library.SentenceTransformer(modules=[transformer, modules.Pooling(16)], device="cpu")


def sentences(count: int = 24) -> dict[str, list[str]]:
    generator = torch.Generator().manual_seed(0)
    columns = {}
    for name, length in (("anchor", 3), ("positive", 5)):
        words = torch.randint(len(WORDS), (count, length), generator=generator).tolist()
        columns[name] = [" ".join(WORDS[index] for index in sentence) for sentence in words]
    return columns


def trained_sentence_model(start, make_loss, folder, count: int = 24):
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    model = copy.deepcopy(start)
    arguments = SentenceTransformerTrainingArguments(
        str(folder), per_device_train_batch_size=8, max_steps=STEPS, learning_rate=0.05, optim="sgd", report_to=[],
        use_cpu=True, save_strategy="no",
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_dict(sentences(count)), loss=make_loss(model)
    )
    trainer.train()
    return model


@pytest.mark.extended
def test_sentence_transformers_loop_gives_the_same_with_our_loss(sentence_model, tmp_path):
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    both_ways = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    expected = trained_sentence_model(
        sentence_model, lambda model: MultipleNegativesRankingLoss(model, scale=20.0, **both_ways), tmp_path
    )
    found = trained_sentence_model(
        sentence_model, lambda model: SentencePairLoss(model, partial(clip, temperature=1 / 20)), tmp_path
    )
    assert_same_weights(found, expected, sentence_model)
    student_t = partial(t_simclr, temperature=1.0, dof=5.0)
    other = trained_sentence_model(sentence_model, lambda model: SentencePairLoss(model, student_t), tmp_path)
    assert_trained(other, sentence_model)
    found.save_pretrained(str(tmp_path / "saved"))
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "SentencePairLoss" in card and '"temperature": 0.05' in card and '"loss": "clip"' in card


@pytest.mark.filterwarnings("ignore:a batch of one pair")
def test_sentence_transformers_loop_passes_a_last_batch_of_one_pair(sentence_model, tmp_path):
    loss = partial(t_simclr, temperature=1.0, dof=5.0)
    found = trained_sentence_model(sentence_model, lambda model: SentencePairLoss(model, loss), tmp_path, count=9)
    assert_trained(found, sentence_model)


class Columns(nn.Module):
    """Stands where a SentenceTransformer stands: embeddings that are given."""

    def forward(self, features):
        return {"sentence_embedding": features["embeddings"]}


def test_sentence_pair_loss_is_the_loss_of_both_columns_and_refuses_another_number_of_them():
    columns = [{"embeddings": torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))} for seed in range(3)]
    loss = SentencePairLoss(Columns(), partial(clip, temperature=0.1))
    expected = clip(columns[0]["embeddings"], columns[1]["embeddings"], temperature=0.1)
    assert torch.equal(loss(columns[:2], labels=None), expected)
    assert loss.get_config_dict() == {"loss": "clip", "temperature": 0.1}
    assert SentencePairLoss(Columns(), nn.PairwiseDistance()).get_config_dict() == {"loss": "PairwiseDistance"}
    with pytest.raises(ValueError, match=r"\(anchor, positive\), got 3 columns"):
        loss(columns)


# transformers.Trainer.


def pairs(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    views = torch.randn(count, 2, 3, 16, 16, generator=generator)
    return [{"pixel_values": view_1, "paired_pixel_values": view_2} for view_1, view_2 in views]


def tiny_model(model_class, **changes):
    torch.manual_seed(0)
    model_args = {"patch_size": 1, "depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "ls_init_value": 1.0}
    options = {"normalization": "anchor", "queue_size": 16, "momentum": 0.9, "temperature": 1.0} | changes
    config = ContrastiveConfig(architecture="convnext_atto", model_args=model_args, projection_dim=4, **options)
    return model_class(config).train()


def train(model, folder, dataset, **options) -> Trainer:
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=8, per_device_eval_batch_size=8, max_steps=STEPS, optim="sgd",
        learning_rate=0.05, lr_scheduler_type="constant", max_grad_norm=0.0, report_to=[], use_cpu=True,
        save_strategy="no", remove_unused_columns=False,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=dataset, **options)
    trainer.train()
    return trainer


@pytest.mark.extended
@pytest.mark.parametrize("model_class", [SimCLRForPreTraining, MoCoForPreTraining])
def test_trainer_gives_what_a_loop_by_hand_gives_and_reports_the_evaluation_loss(model_class, tmp_path):
    data = pairs(8)  # one batch an epoch, whose order changes nothing
    model, by_hand, start = (tiny_model(model_class) for _ in range(3))
    trainer = train(model, tmp_path, data, eval_dataset=data)
    optimizer = torch.optim.SGD(by_hand.trainable_parameters(), lr=0.05)
    view_1, view_2 = (torch.stack([pair[name] for pair in data]) for name in ("pixel_values", "paired_pixel_values"))
    for _ in range(STEPS):
        optimizer.zero_grad()
        by_hand(view_1, view_2).loss.backward()
        optimizer.step()
    assert_same_weights(model, by_hand, start)
    with torch.no_grad():
        expected = by_hand.eval()(view_1, view_2).loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected), abs=1e-5)
    assert model(view_1, view_2, return_loss=False).loss is None


@pytest.mark.filterwarnings("ignore:a batch of one pair")
@pytest.mark.parametrize("model_class", [SimCLRForPreTraining, MoCoForPreTraining])
def test_trainer_passes_a_last_batch_of_one_pair_and_evaluates_any_number(model_class, tmp_path):
    model = tiny_model(model_class, projection_batch_norm=True, feature_norm="batch", temperature="auto")
    trainer = train(model, tmp_path, pairs(9), eval_dataset=pairs(1))
    assert trainer.state.global_step == STEPS and all(p.isfinite().all() for p in model.parameters())
    assert model.calibration.temperature.isfinite()
    assert torch.tensor(trainer.evaluate()["eval_loss"]).isfinite()
    for count in (1, 2, 17):  # 17 are more than the queue holds
        batch = [torch.stack([pair[name] for pair in pairs(count)]) for name in ("pixel_values", "paired_pixel_values")]
        assert model.eval()(*batch).loss.isfinite()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    model.zero_grad()
    loss = model(*(view[:1] for view in batch)).loss
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert all(p.grad is None or p.grad.abs().max() < 1e-6 for p in model.parameters())
    if model_class is MoCoForPreTraining:  # whose batch norms cannot see one image
        torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
        assert all(module.training for module in model.modules())


class StackedViews(nn.Module):
    """Some model of a user, which knows nothing of this package: both views in one batch."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4))

    def forward(self, pixel_values):
        return {"embeddings": self.embed(pixel_values)}


def test_trainer_takes_a_loss_as_compute_loss_func(tmp_path):
    def collate(batch):
        return {"pixel_values": torch.stack([p[k] for k in ("pixel_values", "paired_pixel_values") for p in batch])}

    def compute_loss(outputs, labels=None, **_):
        return info_nce(*outputs["embeddings"].chunk(2), temperature=0.5)

    torch.manual_seed(0)
    data, model = pairs(8), StackedViews()
    by_hand, start = copy.deepcopy(model), copy.deepcopy(model)
    train(model, tmp_path, data, data_collator=collate, compute_loss_func=compute_loss)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.05)
    for _ in range(STEPS):
        optimizer.zero_grad()
        z = by_hand(**collate(data))["embeddings"]
        logits = nn.functional.normalize(z, dim=1) @ nn.functional.normalize(z, dim=1).T / 0.5
        positives = torch.arange(16).roll(8)
        nn.functional.cross_entropy(logits.fill_diagonal_(-torch.inf), positives).backward()
        optimizer.step()
    assert_same_weights(model, by_hand, start)
