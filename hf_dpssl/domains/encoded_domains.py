"""Pictures of several domains as tensors, and encoders on them: their features once, or the encoder as it learns."""

from __future__ import annotations

import copy
import os

import torch
from torch import Tensor

from ..data import keyed_random
from ..data.batches import evaluation_batches
from ..data.image_table import ImageTable
from ..data.views import Augmentation, TwoViews
from ..embedding.embedder import ImageEmbedder
from .cached_features import features_of
from .domain_data import DomainData
from .domain_tensors import DomainTensors
from .fine_tuning import normalisation
from .networks import TunedEncoder

# DomainBed's: its ResNets see random crops of 70 to 100 % of the area, mirrored, coloured and one in ten grey.
_VIEWS = Augmentation(
    crop_scale=(0.7, 1.0), jitter=1.0, brightness=0.3, contrast=0.3, saturation=0.3, hue=0.3, grey=0.1
)


def picture_tensors(given: DomainData, size: int, on_bad_image: str = "error") -> DomainTensors:
    """uint8 pictures (n, 3, size, size) of each domain.

    Raises:
        BadImageError: an unreadable one, unless on_bad_image is "skip". ValueError: what `DomainTensors` refuses.
    """
    table = ImageTable(given.data, given.images, size, on_bad_image)
    batches = list(evaluation_batches(table, 512, given.rows))
    return _by_domain(given, *(torch.cat([batch[key] for batch in batches]) for key in ("images", "labels")))


def feature_tensors(
    embedder: ImageEmbedder,
    given: DomainData,
    *,
    cache: str | os.PathLike | None = None,
    batch_size: int = 64,
    on_bad_image: str = "error",
) -> DomainTensors:
    """Features (n, D) of each domain; `cache` is the folder in which they are kept. Raises as `picture_tensors`."""
    reading = {"batch_size": batch_size, "on_bad_image": on_bad_image}
    features, rows, _ = features_of(embedder, given, cache, reading)
    return _by_domain(given, features, rows)


def _by_domain(given: DomainData, inputs: Tensor, rows: Tensor) -> DomainTensors:
    domains, labels = given.domains[rows], given.labels[rows]
    chosen = [domains == number for number in range(len(given.domain_names))]
    parts = [[values[at] for at in chosen] for values in (inputs, labels)]
    return DomainTensors(given.domain_names, *parts, given.class_names)


class PretrainedEncoder:
    """An encoder that is fine-tuned, from its own weights and at its own size.

    Args:
        embedder: the encoder.
    """

    def __init__(self, embedder: ImageEmbedder):
        self.embedder = embedder
        *self._statistics, self.size = mean, std, _ = normalisation(embedder)
        self.mean, self.std = (torch.tensor(part, device=embedder.device).view(3, 1, 1) for part in (mean, std))

    def tuned(self, extra_channels: int) -> tuple[TunedEncoder, int]:
        """A copy that learns, and the width of its features."""
        own = copy.deepcopy(self.embedder)
        return TunedEncoder(own.embed, own.model, extra_channels), own.dimension

    def normalized(self, images: Tensor) -> Tensor:
        """pixel_values of uint8 pictures (n, 3, S, S)."""
        return (images.float() / 255 - self.mean) / self.std

    def augmented(self, images: Tensor, rows: Tensor, step: int, *, seed: int, domain: int) -> Tensor:
        """pixel_values of a random view of each uint8 picture (n, 3, S, S), by seed, domain, its row and the step."""
        views = TwoViews(_VIEWS, *self._statistics, keyed_random.derive_seed(seed, "domain", domain))
        return views(images, rows.to(images.device, non_blocking=True), step)[0]
