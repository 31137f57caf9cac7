"""The parts of a contrastive model that timm does not have: projection head, small-image stem, a guard of precision."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .choices import SMALL_IMAGE_STEMS


class ProjectionHead(nn.Sequential):
    """Linear - (BatchNorm) - ReLU blocks and a last linear layer, then the feature norm.

    Args:
        in_features, hidden_features, out_features: widths; `hidden_features` is that of all hidden layers.
        num_layers: linear layers, at least 1.
        batch_norm: batch norm after every hidden linear layer.
        feature_norm: of the output: "l2", "batch" (batch norm without affine) or "none".
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int,
        num_layers: int = 2,
        *,
        batch_norm: bool = False,
        feature_norm: str = "none",
    ):
        layers: list[nn.Module] = []
        for _ in range(num_layers - 1):
            layers.append(nn.Linear(in_features, hidden_features, bias=not batch_norm))
            layers += [nn.BatchNorm1d(hidden_features)] if batch_norm else []
            layers.append(nn.ReLU())
            in_features = hidden_features
        layers.append(nn.Linear(in_features, out_features))
        if feature_norm == "batch":
            layers.append(nn.BatchNorm1d(out_features, affine=False))
        super().__init__(*layers)
        self.normalize = feature_norm == "l2"

    def forward(self, features: Tensor) -> Tensor:
        """Embeddings (B, out_features) of features (B, in_features)."""
        embeddings = super().forward(features)
        return F.normalize(embeddings, dim=1) if self.normalize else embeddings


def use_small_image_stem_(resnet: nn.Module, stem: str = "small_image") -> None:
    """Give a timm ResNet a 3x3 stride-1 first convolution and no max-pooling, by the table SMALL_IMAGE_STEMS.

    Raises:
        ValueError: for a model that has no single `conv1` and `maxpool`.
    """
    options = SMALL_IMAGE_STEMS[stem]
    conv = getattr(resnet, "conv1", None)
    if not isinstance(conv, nn.Conv2d) or not hasattr(resnet, "maxpool"):
        raise ValueError(f"stem={stem!r} needs a timm ResNet with a single conv1, not {type(resnet).__name__}.")
    replacement = nn.Conv2d(conv.in_channels, conv.out_channels, 3, stride=1, padding=options["padding"], bias=False)
    nn.init.kaiming_normal_(replacement.weight, mode="fan_out", nonlinearity="relu")
    resnet.conv1 = replacement.to(conv.weight.device, conv.weight.dtype)
    resnet.maxpool = nn.Identity()
    if not options["activation"]:
        resnet.act1 = nn.Identity()


class OnePixelConv2d(nn.Conv2d):
    """A convolution that autocast leaves in float32 where it is given single pixels on a CPU.

    There a bfloat16 one of stride 2 has NaN among the gradients of its weight now and then (torch 2.14, seen on one of
    two processors), and a ResNet's last stage is such a one for images of 16 px.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """As nn.Conv2d."""
        if inputs.shape[-2:] != (1, 1) or inputs.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return super().forward(inputs)
        with torch.autocast("cpu", enabled=False):
            return super().forward(inputs.float())


def guard_one_pixel_convolutions_(model: nn.Module) -> None:
    """Make every plain strided convolution an `OnePixelConv2d`, in place; names and weights stay."""
    for module in model.modules():
        if type(module) is nn.Conv2d and max(module.stride) > 1 and max(module.kernel_size) > 1:
            module.__class__ = OnePixelConv2d
