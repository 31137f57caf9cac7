"""A map of points that is optimised a few steps at a time, while P, Q and the divergence may change under it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from ..contrastive import matching

SIMILARITIES = ("neighbours", "classes", "pairs")
SMOOTHING = 0.05  # of P under reverse KL, which is infinite where P is 0
DATA = ("digits", "clusters", "rings")


@dataclass(frozen=True)
class MapSettings:
    """What is matched with what; the defaults are t-SNE.

    similarities: P: "neighbours" (Gaussian of a perplexity), "classes" (same label) or "pairs" (row i and row i + n/2).
    perplexity: of "neighbours", in (1, n - 1).
    kernel, normalization, temperature, dof: of Q, as in `matching.q_similarities`.
    divergence, alpha: as in `matching.match`.
    """

    similarities: str = "neighbours"
    perplexity: float = 20.0
    kernel: str = "student_t"
    normalization: str = "joint"
    temperature: float = 1.0
    dof: float = 1.0
    divergence: str = "kl"
    alpha: float = 0.5


def map_data(name: str, count: int = 256, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points (count, D) in about [-1, 1] and classes (count,); rows i and i + count / 2 are of the same class.

    "digits": scikit-learn's 8x8 handwritten digits (ten classes, D = 64); "clusters": ten equal clusters, D = 50;
    "rings": three linked rings of D = 3, in two dimensions without a place for all of them.

    Raises:
        ValueError: an unknown name, or an odd count or one below 20.
    """
    if name not in DATA:
        raise ValueError(f"data must be one of {DATA}, got {name!r}.")
    if count < 20 or count % 2:
        raise ValueError(f"a map needs an even number of at least 20 points, got {count}.")
    generator, half = torch.Generator().manual_seed(seed), count // 2
    labels = torch.arange(half).remainder(3 if name == "rings" else 10).repeat(2)
    if name == "digits":
        source = load_digits()
        pixels, classes = torch.from_numpy(source.data).float() / 16, torch.from_numpy(source.target)
        rows = torch.randperm(len(pixels), generator=generator)
        of_class = [iter(rows[classes[rows] == digit].tolist()) for digit in range(10)]
        return pixels[[next(of_class[digit]) for digit in labels.tolist()]], labels
    if name == "clusters":
        centres = torch.randn(10, 50, generator=generator)
        return (0.6 * centres[labels] + 0.4 * torch.randn(count, 50, generator=generator)) / 2, labels
    angle = 2 * torch.pi * torch.rand(count, generator=generator)
    circle = torch.stack([angle.cos(), angle.sin(), torch.zeros(count)], dim=1)
    planes = torch.tensor([[0, 1, 2], [0, 2, 1], [0, 1, 2]])[labels]  # the middle ring stands upright on the others
    shift = torch.tensor([[-1.0, 0, 0], [0, 0, 0], [1, 0, 0]])[labels]
    noise = 0.03 * torch.randn(count, 3, generator=generator)
    return circle.gather(1, planes) + shift + noise, labels


def class_gap(points: Tensor, labels: Tensor) -> float:
    """How many times as far as its nearest point of its own class a point's nearest of another class is: the median.

    A crowded map has a gap of little more than 1. Not a number (nan) where a class has one point or there is one class.
    """
    distances = torch.cdist(points.double(), points.double())
    same = labels[:, None] == labels
    own = distances.masked_fill(~same | torch.eye(len(points), dtype=torch.bool), torch.inf).amin(1)
    other = distances.masked_fill(same, torch.inf).amin(1)
    gaps = other / own.clamp_min(1e-12)
    return float(gaps[own.isfinite() & other.isfinite()].median()) if bool(own.isfinite().any()) else float("nan")


class LiveMap:
    """Embeddings (n, 2) of points under a kernel, moved by Adam towards P.

    They start as the points' first two principal components, made small, with a little noise of the seed: from noise
    alone, groups that begin on the wrong sides of each other stay there (Kobak and Linderman 2021).

    Args:
        points: (n, D), what P of neighbours is made from.
        labels: (n,) classes.
        seed: of the noise.
        learning_rate: of Adam; the map's diameter is about 10.
    """

    def __init__(self, points: Tensor, labels: Tensor, *, seed: int = 0, learning_rate: float = 0.15):
        self.points, self.labels = points, labels
        noise = torch.randn(len(points), 2, generator=torch.Generator().manual_seed(seed))
        left, values, _ = torch.linalg.svd(points.double() - points.double().mean(0), full_matrices=False)
        components = left[:, :2] * values[:2]
        start = components / components[:, 0].std().clamp_min(1e-12)
        self.embeddings = torch.nn.Parameter(1e-2 * start.float() + 1e-3 * noise)
        self.optimizer = torch.optim.Adam([self.embeddings], lr=learning_rate)
        self.losses: list[float] = []
        self.p = lru_cache(maxsize=4)(self._p)

    def _p(self, similarities: str, perplexity: float, normalization: str) -> Tensor:
        if similarities == "neighbours":
            return matching.gaussian_similarities(self.points, perplexity, normalization=normalization).float()
        if similarities == "classes":
            return matching.label_similarities(self.labels, normalization=normalization).float()
        if similarities == "pairs":
            return matching.pair_similarities(len(self.points) // 2, normalization=normalization).float()
        raise ValueError(f"similarities must be one of {SIMILARITIES}, got {similarities!r}.")

    @torch.enable_grad()
    def advance(self, settings: MapSettings, steps: int = 1) -> float:
        """Take optimiser steps; returns the last divergence and appends all of them to `losses`.

        Raises:
            ValueError: an option out of range, or a divergence that is not finite: the embeddings stay as they were.
        """
        p = self.p(settings.similarities, settings.perplexity, settings.normalization)
        smoothing = SMOOTHING if settings.divergence == "reverse_kl" else 0.0
        for _ in range(steps):
            log_q = matching.q_similarities(
                self.embeddings,
                kernel=settings.kernel,
                normalization=settings.normalization,
                temperature=settings.temperature,
                dof=settings.dof,
            )
            loss = matching.match(p, log_q, settings.divergence, alpha=settings.alpha, smoothing=smoothing)
            self.optimizer.zero_grad()
            loss.backward()
            if not bool(loss.isfinite()) or not bool(self.embeddings.grad.isfinite().all()):
                raise ValueError(
                    f"{settings.divergence} is too large for a number here (it divides by similarities of 0): take "
                    "another divergence, a larger temperature or fewer degrees of freedom, or start again."
                )
            self.optimizer.step()
            self.losses.append(float(loss.detach()))
        return self.losses[-1]

    def places(self, kernel: str) -> Tensor:
        """Where to draw the points, (n, 2): the cosine kernel sees directions alone, so they lie on a circle."""
        places = self.embeddings.detach()
        return torch.nn.functional.normalize(places) if kernel == "cosine" else places - places.mean(0)
