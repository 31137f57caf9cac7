"""Fine-tuning of a whole encoder with a linear layer on top: protocol of Ericsson et al. (2021, "How well do ...").

SGD with Nesterov momentum 0.9 and a cosine schedule without warm-up; random-resized-crop and mirror image for training,
the encoder's own preparation for testing. Weight decay is given divided by the learning rate, as in their grid.
Not as theirs: crops are antialiased bilinear (theirs bicubic), and of the side that the encoder has (theirs 224).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.stats import binomtest
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data.image_data import ImageData
from ..data.image_table import BadImageError, decode_rows, stack
from ..data.views import Augmentation, TwoViews
from ..embedding.embedder import ImageEmbedder
from .transfer_sets import Split

LEARNING_RATES = tuple(np.logspace(-4, -1, 4).tolist())
WEIGHT_DECAYS = (0.0, *np.logspace(-6, -3, 4).tolist())  # divided by the learning rate
_CROP = Augmentation(crop_scale=(0.08, 1.0), jitter=0.0, hue=0.0, grey=0.0)


class Setting(NamedTuple):
    """What the grid varies."""

    learning_rate: float
    weight_decay: float


def grid(learning_rates: Sequence[float], weight_decays: Sequence[float]) -> list[Setting]:
    """All pairs; weight decays are divided by the learning rate."""
    return [Setting(rate, decay / rate) for rate, decay in product(learning_rates, weight_decays)]


def fine_tune(
    encoder: str,
    data: ImageData,
    splits: Sequence[Split],
    classes: int,
    setting: Setting,
    *,
    steps: int = 5000,
    batch_size: int = 64,
    seed: int = 0,
) -> Callable[[Split], np.ndarray]:
    """Train on all rows of `splits`; returns what predicts the classes of a split's rows.

    Args:
        encoder: as `ImageEmbedder` takes it, loaded anew.
        data: how the pictures of the splits are read.
        splits: to train on.
        classes: of the linear layer, which starts from 0.
        setting: learning rate and weight decay.
        steps, batch_size: of SGD.
        seed: of order and crops.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    embedder = ImageEmbedder(encoder)
    mean, std, side = normalisation(embedder)
    head = nn.Linear(embedder.dimension, classes).to(embedder.device)
    nn.init.zeros_(head.weight)
    embedder.model.train().requires_grad_(True)
    parameters = [*embedder.model.parameters(), *head.parameters()]
    options = {"lr": setting.learning_rate, "momentum": 0.9, "nesterov": True, "weight_decay": setting.weight_decay}
    options["fused"] = True
    optimizer = torch.optim.SGD(parameters, **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    views = TwoViews(_CROP, mean, std, seed, crop=False)
    places = [(split, place) for split in splits for place in range(len(split.rows))]
    order = _order(len(places), steps * batch_size, seed)
    for step in tqdm(range(steps), "fine-tuning", unit="step", leave=False):
        ids = order[step * batch_size : (step + 1) * batch_size]
        epoch = step * batch_size // len(places)
        chosen = [places[i] for i in ids]
        pictures = _pictures(data, chosen)
        labels = torch.tensor([int(split.labels[p]) for split, p in chosen], device=embedder.device)
        sample_ids = torch.from_numpy(ids)
        images, _ = views(stack(pictures, side, views, sample_ids, epoch), sample_ids, epoch)
        loss = F.cross_entropy(head(embedder.embed(images.to(embedder.device)).float()), labels)
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError(f"the loss is {loss.item()} at step {step}, with {setting}.")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    embedder.model.eval()

    @torch.no_grad()
    def predict(split: Split) -> np.ndarray:
        found = []
        for start in range(0, len(split.rows), batch_size):
            stop = min(start + batch_size, len(split.rows))
            pictures = _pictures(data, [(split, place) for place in range(start, stop)])
            features = embedder.embed(embedder.preprocess(pictures).to(embedder.device)).float()
            found.append(head(features).argmax(1).cpu().numpy())
        return np.concatenate(found)

    return predict


def _pictures(data: ImageData, places: list[tuple[Split, int]]) -> list[Image.Image]:
    given = ((split, int(split.rows[place])) for split, place in places)
    pictures = []
    for found in decode_rows(data, ((split.images[row], f"row {row}") for split, row in given)):
        if isinstance(found, BadImageError):
            raise found
        pictures.append(found[0])
    return pictures


def _order(count: int, length: int, seed: int) -> np.ndarray:
    """`length` places of `count`, each once in an order of its own before any comes again."""
    random = np.random.default_rng(seed)
    return np.concatenate([random.permutation(count) for _ in range(-(-length // count))])[:length]


def normalisation(embedder: ImageEmbedder) -> tuple[list[float], list[float], int]:
    """Mean and deviation that the encoder's preparation subtracts and divides by, and the side of its pictures."""
    ends = embedder.preprocess([Image.new("RGB", (64, 64), colour) for colour in ("black", "white")])  # (2, 3, S, S)
    black, white = ends.double().mean((2, 3))
    std = 1 / (white - black)
    return (-black * std).tolist(), std.tolist(), ends.shape[-1]


def accuracy(predicted: np.ndarray | Tensor, labels: np.ndarray, metric: str) -> dict[str, float]:
    """Percent right {"mean", "low", "high"}, with the 95 % interval of drawing other test images.

    Args:
        predicted, labels: (N,) class ids.
        metric: "top1" (interval of Wilson 1927), or "per_class": mean over classes of percent right in each (normal
            interval; of each class one more right and one more wrong count in its variance).
    """
    right = np.asarray(predicted) == labels
    if metric == "top1":
        interval = binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
        return {"mean": 100 * float(right.mean()), "low": 100 * interval.low, "high": 100 * interval.high}
    counts = np.bincount(labels)
    hits = np.bincount(labels, weights=right)[counts > 0]
    counts = counts[counts > 0]
    mean = float((hits / counts).mean())
    share = (hits + 1) / (counts + 2)
    half = 1.96 * float(np.sqrt((share * (1 - share) / counts).sum())) / len(counts)
    return {"mean": 100 * mean, "low": 100 * max(0.0, mean - half), "high": 100 * min(1.0, mean + half)}
