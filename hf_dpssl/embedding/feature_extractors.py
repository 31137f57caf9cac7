"""Feature extractors for image quality, by name: what turns images into the features that distances compare.

"inception" is FID's own network (through torch-fidelity), "resnet20-cifar10" and "resnet56-cifar10" are classifiers of
CIFAR-10 (He et al. 2016, section 4.2) from a local file, "timm:<model>" is a pretrained model of timm, and anything
else a folder or Hub id of an image encoder. All see images rounded to 8 bits, as they would be saved.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from ..models.call_arguments import check_pixel_values
from ..models.weight_hashes import combined_sha256, tensor_sha256
from .embedder import ImageEmbedder, best_device, timm_model

_CIFAR_NAME = re.compile(r"resnet(20|32|44|56|110)-cifar10")
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class FeatureExtractor:
    """A frozen network in eval mode as a function of images in [-1, 1].

    Args:
        name: becomes the end of metric keys; characters that do not belong there turn into "-".
        function: uint8 images (B, num_channels, H, W) on the device to features (B, D).
        weights: tensors that decide the features, for the fingerprint.
        resize: how images reach the network's size, in words; part of the fingerprint.
        num_channels: of the images that `function` takes.
        head: features (B, D) to logits (B, classes); None where it is no classifier.
        device: where it runs; default: the accelerator, or the CPU.

    Attributes:
        fingerprint: SHA-256 of weights and resize. logits: images to (B, classes), or None where `head` is None.
    """

    def __init__(
        self,
        name: str,
        function: Callable[[Tensor], Tensor],
        *,
        weights: dict[str, Tensor],
        resize: str,
        num_channels: int = 3,
        head: Callable[[Tensor], Tensor] | None = None,
        device: torch.device | str | None = None,
    ):
        self.name = re.sub(r"[^0-9A-Za-z.-]+", "-", name).strip("-")
        self.resize = resize
        self.num_channels = num_channels
        self.device = torch.device(device or best_device())
        settings = hashlib.sha256(f"{resize} {num_channels}".encode()).hexdigest()
        self.fingerprint = combined_sha256(tensor_sha256(weights) | {"input": settings})
        self._function = function
        self._head = head
        self.head = None if head is None else self._logits_of_features
        self.logits = None if head is None else self._logits

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """float32 (B, D) on the CPU, of images (B, C, H, W) in [-1, 1]; grey ones are repeated to three channels.

        Raises:
            ValueError: another number of channels than the extractor's, or values that are not finite or outside
                [-1, 1].
        """
        return self._function(self._eight_bits(images).to(self.device)).float().cpu()

    @torch.no_grad()
    def _logits_of_features(self, features: Tensor) -> Tensor:
        return self._head(features.to(self.device)).float().cpu()

    def _logits(self, images: Tensor) -> Tensor:
        return self._logits_of_features(self.features(images))

    def _eight_bits(self, images: Tensor) -> Tensor:
        check_pixel_values(images, "images")
        if images.shape[1] == 1 and self.num_channels == 3:
            images = images.expand(-1, 3, -1, -1)
        if images.shape[1] != self.num_channels:
            raise ValueError(
                f"the extractor {self.name!r} takes images of {self.num_channels} channels, got {images.shape[1]}; "
                "only grey ones are repeated to three: convert the images, or use another extractor."
            )
        return ((images.detach() + 1) * 127.5).round_().clamp_(0, 255).to(torch.uint8)


def features_of(extractor: FeatureExtractor, images: Tensor, batch_size: int = 256) -> Tensor:
    """Features (N, D) of images (N, C, H, W) in [-1, 1], so many at once."""
    return torch.cat([extractor.features(batch) for batch in images.split(batch_size)])


def load_extractor(name: str, *, device: torch.device | str | None = None) -> FeatureExtractor:
    """The extractor of that name, ready to use.

    Args:
        name: "inception"; "resnet20-cifar10" or "resnet56-cifar10"; "timm:<model>", e.g. "timm:resnet18"; or a
            folder or Hub id of an encoder of this package, timm or transformers.
        device: where it runs; default: the accelerator, or the CPU.

    Raises:
        ValueError: weights that cannot be had; the message says where they were looked for.
        ImportError: "inception" without torch-fidelity.
    """
    if name == "inception":
        return _inception(device)
    if match := _CIFAR_NAME.fullmatch(name):
        return _cifar(name, int(match[1]), device)
    if name.startswith("timm:"):
        model = timm_model(name)
        folder = Path(name.removeprefix("timm:local-dir:"))
        return timm_extractor(model, f"timm:{folder.name}" if folder.is_dir() else name, device=device)
    return _encoder(name, device)


def timm_extractor(model: nn.Module, name: str, *, device: torch.device | str | None = None) -> FeatureExtractor:
    """A timm model with its pooled features (before the classifier) and, where it has one, its linear classifier.

    Images are resized to the size of its pretrained_cfg by antialiased bicubic or bilinear interpolation, whichever
    stands there, without a crop, and normalised by its mean and std (their average, for a model of grey images).
    """
    settings = timm.data.resolve_data_config({}, model=model)
    size = settings["input_size"][1:]
    channels = _channels(model)
    mode = "bilinear" if settings["interpolation"] == "bilinear" else "bicubic"
    device = torch.device(device or best_device())
    model = model.eval().requires_grad_(False).to(device)
    mean = _of_channels(settings["mean"], channels)
    std = _of_channels(settings["std"], channels)
    prepare = _Prepare(tuple(size), mode, mean, std)
    classifier = model.get_classifier()

    def function(images: Tensor) -> Tensor:
        return model.forward_head(model.forward_features(prepare(images)), pre_logits=True)

    return FeatureExtractor(
        name,
        function,
        weights=model.state_dict(),
        resize=prepare.description,
        num_channels=channels,
        head=classifier if isinstance(classifier, nn.Linear) else None,
        device=device,
    )


def _of_channels(values: tuple[float, ...], channels: int) -> list[float]:
    """The values of so many channels: as given, or the mean of them for each."""
    return list(values) if len(values) == channels else [sum(values) / len(values)] * channels


def _channels(model: nn.Module) -> int:
    """Of the images: what the first convolution takes, as timm's configuration names it; that keeps 3 always."""
    first = model.pretrained_cfg.get("first_conv")
    first = first if isinstance(first, str) or first is None else first[0]
    return model.get_submodule(first).in_channels if first else model.pretrained_cfg["input_size"][0]


class _Prepare:
    """uint8 images (B, C, H, W) to normalised float32 of one size."""

    def __init__(self, size: tuple[int, int], mode: str, mean, std):
        self.size = size
        self.mode = mode
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.description = f"antialiased {mode} to {size[0]} x {size[1]}, mean {self.mean}, std {self.std}"

    def __call__(self, images: Tensor) -> Tensor:
        images = images.float() / 255
        if tuple(images.shape[2:]) != self.size:
            images = F.interpolate(images, self.size, mode=self.mode, antialias=True, align_corners=False).clamp_(0, 1)
        mean = images.new_tensor(self.mean).view(1, -1, 1, 1)
        std = images.new_tensor(self.std).view(1, -1, 1, 1)
        return (images - mean) / std


def _encoder(name: str, device: torch.device | str | None) -> FeatureExtractor:
    embedder = ImageEmbedder(name, device=device)

    def function(images: Tensor) -> Tensor:
        arrays = images.permute(0, 2, 3, 1).cpu().numpy()
        return embedder.embed_pictures([Image.fromarray(array) for array in arrays])

    return FeatureExtractor(
        Path(name).name,
        function,
        weights=embedder.model.state_dict(),
        resize=f"the encoder's own image processor, {embedder.fingerprint}",
        device=embedder.device,
    )


def _inception(device: torch.device | str | None) -> FeatureExtractor:
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as library
    except ImportError as error:
        raise ImportError("the extractor 'inception' needs torch-fidelity: pip install 'hf_dpssl[eval]'.") from error
    try:  # checks and loads as plain tensors; the library then finds the same file in torch's cache
        torch.hub.load_state_dict_from_url(library.URL_INCEPTION_V3, progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise ValueError(
            f"the weights of 'inception' cannot be had: {error}. They are downloaded once from "
            f"{library.URL_INCEPTION_V3}; without a network put that file into {folder}, or use another extractor, "
            "such as a folder of an encoder or 'resnet56-cifar10' (figures of two extractors do not compare)."
        ) from error
    device = torch.device(device or best_device())
    model = library.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).to(device)

    def head(features: Tensor) -> Tensor:
        return features @ model.fc.weight.T  # without bias, as the inception score was defined

    return FeatureExtractor(
        "inception",
        lambda images: model(images)[0],
        weights=model.state_dict(),
        resize="torch-fidelity's bilinear of TensorFlow 1 to 299 x 299",
        head=head,
        device=device,
    )


def _cifar(name: str, depth: int, device: torch.device | str | None) -> FeatureExtractor:
    file_name = f"cifar10-resnet{depth}.safetensors"
    data = os.environ.get("DPSSL_DATA")
    places = [Path(data) / file_name, Path(data).parent / "weights" / file_name] if data else []
    path = next((place for place in places if place.exists()), None)
    if path is None:
        where = f"neither {places[0]} nor {places[1]} exists" if places else "DPSSL_DATA is not set"
        raise ValueError(
            f"the extractor {name!r} needs the file {file_name} in the folder DPSSL_DATA or in 'weights' beside it: "
            f"{where}. It holds the tensors of github.com/akamaster/pytorch_resnet_cifar10 without 'module.'."
        )
    device = torch.device(device or best_device())
    model = CifarResNet(depth)
    model.load_state_dict(load_file(path))
    model = model.eval().requires_grad_(False).to(device)
    prepare = _Prepare((32, 32), "bilinear", *_IMAGENET)
    return FeatureExtractor(
        name,
        lambda images: model.features(prepare(images)),
        weights=model.state_dict(),
        resize=prepare.description,
        head=model.linear,
        device=device,
    )


class CifarResNet(nn.Module):
    """Residual network for 32 x 32 images: He et al., "Deep residual learning ...", CVPR 2016, section 4.2.

    Three stages of (depth - 2) / 6 blocks with 16, 32 and 64 channels; shortcuts without parameters (option A).
    Parameter names are those of github.com/akamaster/pytorch_resnet_cifar10.
    """

    def __init__(self, depth: int, num_classes: int = 10):
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6 n + 2 with n >= 1, got {depth}.")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(_CifarBlock(16, 16) for _ in range(blocks)))
        self.layer2 = nn.Sequential(*(_CifarBlock(32 if i else 16, 32) for i in range(blocks)))
        self.layer3 = nn.Sequential(*(_CifarBlock(64 if i else 32, 64) for i in range(blocks)))
        self.linear = nn.Linear(64, num_classes)

    def features(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W), normalised, to the average over positions (B, 64)."""
        hidden = self.bn1(self.conv1(pixel_values)).relu()
        return self.layer3(self.layer2(self.layer1(hidden))).mean((2, 3))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W), normalised, to logits (B, num_classes)."""
        return self.linear(self.features(pixel_values))


class _CifarBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.stride, self.padding = (1, 0) if in_channels == out_channels else (2, (out_channels - in_channels) // 2)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return (hidden + F.pad(shortcut, (0, 0, 0, 0, self.padding, self.padding))).relu()


def check_classifier(classifier: FeatureExtractor, num_classes: int, image_size: int) -> None:
    """ValueError unless it gives one logit for each class of the generator."""
    if classifier.logits is None:
        raise ValueError(
            f"the extractor {classifier.name!r} has no classifier: name one with a head, such as resnet56-cifar10 "
            "or timm:<model>."
        )
    found = classifier.logits(torch.zeros(1, classifier.num_channels, image_size, image_size)).shape[1]
    if found != num_classes:
        raise ValueError(f"the classifier {classifier.name!r} knows {found} classes, the data set has {num_classes}.")
