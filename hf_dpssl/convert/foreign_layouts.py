"""Key names and shapes of other codes' contrastive checkpoints, and what they are in ours.

Pure functions on dictionaries of tensors. The keys of torchvision's ResNets are timm's; the numbers of an
nn.Sequential and the `shortcut` of small-image ResNets are translated, and the architecture is read off the shapes.

Source: the codes named in ORIGINS, read for their facts.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..data.image_data import TABLE
from ..models.blocks import ProjectionHead

_IMAGENET = TABLE["imagenet-1k"].statistics
# By number of classes, from solo/data/pretrain_dataloader.py; the deviations are not those of the t-SimCLR code.
_SOLO_LEARN_CIFAR = {
    10: ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    100: ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
# (bottleneck, blocks per stage, width of the first 3x3 convolution, groups): timm's name, which is torchvision's.
_RESNETS = {
    (False, (2, 2, 2, 2), 64, 1): "resnet18",
    (False, (3, 4, 6, 3), 64, 1): "resnet34",
    (True, (3, 4, 6, 3), 64, 1): "resnet50",
    (True, (3, 4, 23, 3), 64, 1): "resnet101",
    (True, (3, 8, 36, 3), 64, 1): "resnet152",
    (True, (3, 4, 6, 3), 128, 1): "wide_resnet50_2",
    (True, (3, 4, 23, 3), 128, 1): "wide_resnet101_2",
    (True, (3, 4, 6, 3), 128, 32): "resnext50_32x4d",
    (True, (3, 4, 23, 3), 256, 32): "resnext101_32x8d",
    (True, (3, 4, 23, 3), 256, 64): "resnext101_64x4d",
}


# Parts beside backbone and head that say nothing about the method; a predictor or prototypes do.
_WITHOUT_METHOD = {"classifier", "momentum_classifier", "online_classifier", "criterion", "queue", "queue_ptr"}


@dataclass(frozen=True)
class Origin:
    """A code that writes checkpoints: the beginnings of keys that mark its files, and where the parts stand."""

    code: str
    marks: tuple[str, ...]
    backbone: str
    head: str | None = None
    key_backbone: str | None = None
    key_head: str | None = None


ORIGINS = (
    Origin("facebookresearch/moco", ("encoder_q.",), "encoder_q.", "encoder_q.fc.", "encoder_k.", "encoder_k.fc."),
    Origin("wrhuang/t-SimCLR", ("encoder.", "head."), "encoder.", "head."),
    Origin(
        "lightly", ("backbone.", "projection_head."), "backbone.", "projection_head.layers.",
        "backbone_momentum.", "projection_head_momentum.layers.",
    ),
    Origin(
        "solo-learn", ("backbone.", "classifier."), "backbone.", "projector.",
        "momentum_backbone.", "momentum_projector.",
    ),
    Origin("plain backbone", ("conv1.", "layer1."), ""),
)  # fmt: skip


def find_origin(tensors: Mapping[str, Tensor], prefix: str | None = None) -> Origin:
    """The code that wrote these keys; with `prefix`, an unknown code whose backbone stands there.

    Raises:
        ValueError: keys of no known code; says what they begin with.
    """
    if prefix is not None:
        return Origin(f"prefix {prefix!r}", (), prefix)
    for origin in ORIGINS:
        if all(any(name.startswith(mark) for name in tensors) for mark in origin.marks):
            return origin
    known = ", ".join(f"{origin.code} ({' and '.join(origin.marks)})" for origin in ORIGINS)
    raise ValueError(
        f"the keys are those of no known code: they begin with {', '.join(count_by_part(tensors))}; known are {known}. "
        "Say where the backbone stands with prefix, e.g. 'student_backbone.' (--prefix)."
    )


def split(tensors: Mapping[str, Tensor], origin: Origin) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Tensors of backbone, head, key_backbone and key_head without their prefix (the longest that fits); the rest."""
    prefixes = {part: getattr(origin, part) for part in ("backbone", "head", "key_backbone", "key_head")}
    parts, rest = {part: {} for part in prefixes}, {}
    for name, value in tensors.items():
        fitting = [part for part, prefix in prefixes.items() if prefix is not None and name.startswith(prefix)]
        if fitting:
            part = max(fitting, key=lambda part: len(prefixes[part]))
            parts[part][name.removeprefix(prefixes[part])] = value
        else:
            rest[name] = value
    return parts, rest


def count_by_part(names: Iterable[str]) -> list[str]:
    """ "part (number of tensors)" for each first component of the names."""
    counts = Counter(name.split(".")[0] for name in names)
    return [f"{name} ({count} tensor{'s' * (count > 1)})" for name, count in counts.items()]


def to_timm(backbone: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(backbone, classifier) by timm's names; what is no ResNet stays as it is."""
    numbers, places = {name.split(".")[0] for name in backbone}, {}
    if numbers and all(number.isdigit() for number in numbers):  # nn.Sequential(*list(resnet.children())[:-1])
        first = 2 if "2" in numbers else 4  # torchvision has ReLU and max-pooling at 2 and 3, lightly's own has not
        places = {"0": "conv1", "1": "bn1"} | {str(first + i): f"layer{i + 1}" for i in range(4)}
    renamed = {}
    for name, value in backbone.items():
        start, dot, end = name.partition(".")
        renamed[places.get(start, start) + dot + end.replace("shortcut.", "downsample.")] = value
    if "layer1.0.conv1.weight" not in renamed:
        return dict(backbone), {}
    for name, value in renamed.items():
        if name.endswith((".running_mean", ".running_var")):  # lightly's SplitBatchNorm keeps one per split
            features = len(renamed.get(name.rpartition(".")[0] + ".weight", value))
            renamed[name] = value.view(-1, features).mean(0) if len(value) % features == 0 else value
    classifier = {name: value for name, value in renamed.items() if name.split(".")[0] in ("fc", "linear")}
    return {name: value for name, value in renamed.items() if name not in classifier}, classifier


def resnet_architecture(backbone: Mapping[str, Tensor]) -> tuple[str, dict | None]:
    """timm's name and `model_args` of a ResNet with timm's keys.

    Raises:
        ValueError: no ResNet, or one that timm's plain ResNets do not express; the architecture must be named.
    """
    stages = ["layer1", "layer2", "layer3", "layer4"]
    if any(f"{stage}.0.conv2.weight" not in backbone for stage in stages):
        raise ValueError(f"no ResNet ({', '.join(list(backbone)[:3])}, ...): name its timm architecture.")
    layers = [len({name.split(".")[1] for name in backbone if name.startswith(f"{stage}.")}) for stage in stages]
    bottleneck = "layer1.0.conv3.weight" in backbone
    widths = [len(backbone[f"{stage}.0.conv2.weight"]) for stage in stages]
    groups = widths[0] // backbone["layer1.0.conv2.weight"].shape[1]
    known = _RESNETS.get((bottleneck, tuple(layers), widths[0], groups))
    if known and widths == [widths[0] * 2**i for i in range(4)]:
        return known, None
    if groups > 1:
        raise ValueError(f"a ResNet of {layers} blocks, {widths} channels and {groups} groups: name its architecture.")
    channels = {} if widths == [64, 128, 256, 512] else {"channels": widths}
    return "resnet50" if bottleneck else "resnet18", {"layers": layers} | channels


def find_stem(origin: Origin, original: Mapping[str, Tensor], backbone: Mapping[str, Tensor]) -> str:
    """The stem of `ContrastiveConfig`: original are the code's own keys, backbone timm's."""
    if "conv1.weight" not in backbone or backbone["conv1.weight"].shape[-1] != 3:
        return "timm"
    if origin.code == "solo-learn":
        return "small_image_padded"
    return "small_image_linear" if "2.0.conv1.weight" in original else "small_image"


def find_method(
    origin: Origin, parts: Mapping[str, Mapping], rest: Mapping[str, Tensor], settings: Mapping
) -> tuple[str | None, dict, list[str]]:
    """(method, its fields of `ContrastiveConfig`, notes on what the file does not say); None: not one of ours."""
    cosine = {"kernel": "cosine", "normalization": "anchor", "feature_norm": "l2"}
    if origin.code == "wrhuang/t-SimCLR":
        method = settings.get("method", "t-SimCLR")
        numbers = {"temperature": float(settings.get("temp", 8.0)), "dof": float(settings.get("t_df", 5.0))}
        notes = [] if "temp" in settings else ["no settings in the file: t-SimCLR, temperature 8, dof 5 are assumed"]
        if method not in ("SimCLR", "t-SimCLR"):  # SupContrast, from which that code comes, writes the same keys
            return None, cosine, [f"the method is none of ours: {method!r}"]
        if method == "SimCLR":
            return method, cosine | numbers, notes
        return "t-SimCLR", {"kernel": "student_t", "normalization": "joint", "feature_norm": "none"} | numbers, notes
    if origin.code == "facebookresearch/moco":
        queue = {"queue_size": rest["queue"].shape[-1]} if "queue" in rest else {}
        if "bn.running_mean" not in rest:
            return "MoCo-v2", cosine | queue | {"temperature": 0.2}, ["the file holds no temperature: MoCo-v2's 0.2"]
        student = {"kernel": "student_t", "normalization": "anchor", "feature_norm": "batch"}
        notes = ["the file holds no temperature: 5 and dof 10 by the name of the script, which itself says 0.2 and 5"]
        return "t-MoCo-v2", student | queue | {"temperature": 5.0, "dof": 10.0}, notes
    others = sorted({name.split(".")[0] for name in rest} - _WITHOUT_METHOD)
    if origin.head is None or others:
        return None, cosine, [f"the method is none of ours: the file also holds {', '.join(others)}"] if others else []
    method = "MoCo-v2" if parts["key_backbone"] and parts["key_head"] else "SimCLR"
    queue = {"queue_size": rest["queue"].shape[-1] if "queue" in rest else 4096}
    notes = [f"the file names no method: its keys fit {method}, temperature 0.5 is assumed"]
    return method, cosine | queue | {"temperature": 0.5}, notes


def find_statistics(origin: Origin, tensors: Mapping[str, Tensor], settings: Mapping, small: bool) -> tuple:
    """(mean, std) with which the code trains; small: the stem is one for images of about 32 px.

    Raises:
        ValueError: a t-SimCLR file of a data set that its code does not know.
    """
    dataset = settings.get("dataset", "cifar10")
    if origin.code == "wrhuang/t-SimCLR" and dataset not in ("cifar10", "cifar100"):
        try:
            return tuple(tuple(map(float, ast.literal_eval(settings[name]))) for name in ("mean", "std"))
        except (KeyError, ValueError, SyntaxError, TypeError) as error:
            raise ValueError(
                f"data set {dataset!r} without readable mean and std: give them (--mean, --std)."
            ) from error
    if origin.code == "wrhuang/t-SimCLR":
        return TABLE[dataset].statistics
    classes = len(tensors.get("classifier.weight", ()))
    if origin.code == "solo-learn" and small and classes in _SOLO_LEARN_CIFAR:
        return _SOLO_LEARN_CIFAR[classes]
    return _IMAGENET


def head_settings(head: Mapping[str, Tensor]) -> dict | None:
    """Fields of `ContrastiveConfig` of the projection head that holds exactly these tensors; None if none does."""
    linear = [value for value in head.values() if value.ndim == 2]
    if not 1 <= len(linear) <= 3:
        return None
    norm = any(name.endswith("running_mean") for name in head)
    hidden, out = len(linear[0]), len(linear[-1])
    ours = ProjectionHead(linear[0].shape[1], hidden, out, len(linear), batch_norm=norm).state_dict()
    if {name: value.shape for name, value in ours.items()} != {n: v.shape for n, v in numbered(head).items()}:
        return None
    return {
        "projection_hidden_dim": hidden if len(linear) > 1 else None,
        "projection_dim": out,
        "projection_layers": len(linear),
        "projection_batch_norm": norm,
    }


def numbered(head: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A head's tensors by their place in an nn.Sequential; a bare nn.Linear is its first."""
    return {name if name[0].isdigit() else f"0.{name}": value for name, value in head.items()}
