"""Checkpoints that lightly and Lightning's trainer really write: features, queries and keys equal ours to 1e-5."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from cases import for_each
from torch import nn

from hf_dpssl import ContrastiveEncoder, MoCoForPreTraining
from hf_dpssl.convert.encoder_importers import import_checkpoint

lightly_models = pytest.importorskip("lightly.models")
pl = pytest.importorskip("pytorch_lightning")

from lightly.loss import NTXentLoss  # noqa: E402
from lightly.models.modules import MoCoProjectionHead, SimCLRProjectionHead  # noqa: E402
from lightly.models.utils import update_momentum  # noqa: E402


class SimCLR(pl.LightningModule):
    """As in lightly's documented example."""

    def __init__(self, backbone: nn.Module, width: int):
        super().__init__()
        self.save_hyperparameters(ignore=["backbone"])
        self.backbone, self.projection_head = backbone, SimCLRProjectionHead(width, 64, 32)
        self.criterion = NTXentLoss()

    def forward(self, images):
        return self.projection_head(self.backbone(images).flatten(start_dim=1))

    def training_step(self, views, batch_idx):
        return self.criterion(self(views[0]), self(views[1]))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.06, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)]


class MoCo(SimCLR):
    """As in lightly's documented example."""

    def __init__(self, backbone: nn.Module, width: int):
        super().__init__(backbone, width)
        self.projection_head = MoCoProjectionHead(width, 64, 32)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        self.criterion = NTXentLoss(memory_bank_size=(64, 32))

    def keys(self, images):
        return self.projection_head_momentum(self.backbone_momentum(images).flatten(start_dim=1)).detach()

    def training_step(self, views, batch_idx):
        update_momentum(self.backbone, self.backbone_momentum, m=0.9)
        update_momentum(self.projection_head, self.projection_head_momentum, m=0.9)
        return self.criterion(self(views[0]), self.keys(views[1]))


def from_torchvision() -> nn.Sequential:
    return nn.Sequential(*list(torchvision.models.resnet18().children())[:-1])


def from_lightly(splits: int) -> nn.Sequential:
    resnet = lightly_models.ResNetGenerator("resnet-9", num_splits=splits)
    return nn.Sequential(*list(resnet.children())[:-1], nn.AdaptiveAvgPool2d(1))


@pytest.mark.extended
@for_each(
    "method, make_backbone, stem",
    [
        (SimCLR, from_torchvision, "timm"),
        (MoCo, from_torchvision, "timm"),
        (SimCLR, lambda: from_lightly(0), "small_image_linear"),
        (MoCo, lambda: from_lightly(4), "small_image_linear"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_checkpoint_of_lightlys_example_gives_its_features(tmp_path, method, make_backbone, stem):
    torch.manual_seed(0)
    module = method(make_backbone(), 512)
    views = [(torch.randn(3, 32, 32), torch.randn(3, 32, 32)) for _ in range(16)]
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    trainer.fit(module, torch.utils.data.DataLoader(views, batch_size=8))
    trainer.save_checkpoint(tmp_path / "last.ckpt")

    report = import_checkpoint(tmp_path / "last.ckpt", tmp_path / "encoder")
    assert (report.code, report.stem) == ("lightly", stem) and "optimizer_states" in report.left_out
    images = torch.randn(4, 3, 64, 64)
    module.eval()
    with torch.no_grad():
        features = ContrastiveEncoder.from_pretrained(report.folder).eval()(images).pooler_output
        torch.testing.assert_close(features, module.backbone(images).flatten(1), rtol=1e-5, atol=1e-5)
        if method is SimCLR:  # its head ends in a batch norm with weights, ours does not
            assert not (report.folder / "pretraining").exists() and "head is none of ours" in report.notes[-1]
            return
        output = MoCoForPreTraining.from_pretrained(report.folder, subfolder="pretraining").eval()(images, images)
        torch.testing.assert_close(output.embeddings, F.normalize(module(images), dim=1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            output.paired_embeddings, F.normalize(module.keys(images), dim=1), rtol=1e-5, atol=1e-5
        )
