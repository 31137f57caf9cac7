"""Domains where none are named: pictures that are alike in colours and edges, whatever they show."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from datasets import Dataset
from sklearn.cluster import KMeans
from torch import Tensor
from tqdm.auto import tqdm

from ..data.image_data import ImageData
from ..data.image_table import BadImageError, decode_rows

_SIDE = 32  # of the thumbnails


def domain_clusters(data: ImageData, images: Dataset, rows: Sequence[int], clusters: int, *, seed: int = 0) -> Tensor:
    """(len(rows),) ids of k-means clusters, the largest first, of what `picture_statistics` says, standardised.

    Pictures that cannot be read are counted to the largest one: whoever reads them next refuses or skips them.

    Raises:
        ValueError: fewer than two clusters, or fewer different pictures than clusters.
    """
    if clusters < 2:
        raise ValueError(f"at least 2 clusters are needed, one of which is left out, got {clusters}.")
    found = {}
    decoded = decode_rows(data, ((images[row], f"row {row}") for row in rows))
    for place, one in enumerate(tqdm(decoded, "colours and edges", len(rows), unit="img", leave=False)):
        if not isinstance(one, BadImageError):
            small = one[0].resize((_SIDE, _SIDE))
            found[place] = picture_statistics(np.asarray(small, dtype=np.float64) / 255)
    values = np.stack(list(found.values())) if found else np.zeros((0, 9))
    if len(np.unique(values, axis=0)) < clusters:
        raise ValueError(f"{len(found)} pictures of {data.name!r} can be read: too few to make {clusters} clusters.")
    values = (values - values.mean(0)) / np.where(values.std(0) > 0, values.std(0), 1)
    ids = KMeans(clusters, n_init=4, random_state=seed).fit_predict(values)
    order = np.argsort(-np.bincount(ids, minlength=clusters), kind="stable")
    all_ids = torch.zeros(len(rows), dtype=torch.int64)
    all_ids[list(found)] = torch.from_numpy(np.argsort(order)[ids])
    return all_ids


def picture_statistics(pixels: np.ndarray) -> np.ndarray:
    """(9,) of pixels (S, S, 3) in [0, 1]: mean and deviation of each colour, mean saturation, mean step between
    neighbours, share of pixels that are nearly white."""
    steps = np.abs(np.diff(pixels, axis=0)).mean() + np.abs(np.diff(pixels, axis=1)).mean()
    saturation = (pixels.max(2) - pixels.min(2)).mean()
    return np.array([*pixels.mean((0, 1)), *pixels.std((0, 1)), saturation, steps, (pixels.min(2) > 0.9).mean()])
