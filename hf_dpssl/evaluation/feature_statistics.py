"""Mean and covariance of a stream of features, in float64, over batches, files and processes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..models.gather import is_distributed
from .feature_checks import widened


class FeatureStatistics:
    """Count, mean and scatter of features (N, D), without keeping them.

    Batches are added around their own means (Chan, Golub and LeVeque, "Algorithms for computing the sample
    variance", 1983), so that a mean far larger than the spread costs no digits; the order of batches and how they
    are cut change results by rounding only.
    """

    def __init__(self):
        self.count = 0
        self._mean: Tensor | None = None  # (D,)
        self._scatter: Tensor | None = None  # (D, D): sum of outer products of deviations from the mean

    def update(self, features: Tensor) -> FeatureStatistics:
        """Add features (N, D), N >= 0, of any float type and device; returns itself.

        Raises:
            ValueError: another shape or D than before, or values that are not finite.
        """
        if features.ndim != 2 or (self._mean is not None and features.shape[1] != len(self._mean)):
            expected = "(N, D)" if self._mean is None else f"(N, {len(self._mean)})"
            raise ValueError(f"features must be {expected}, got {tuple(features.shape)}.")
        if len(features) == 0:
            return self
        features = widened(features)
        mean = features.mean(0)
        if not torch.isfinite(mean).all():
            raise ValueError("features must be finite: NaN or infinity was given.")
        deviations = features - mean
        self._add(len(features), mean.cpu(), (deviations.T @ deviations).cpu())
        return self

    def merge(self, other: FeatureStatistics) -> FeatureStatistics:
        """Add what another one has seen; returns itself."""
        if other._mean is not None:
            if self._mean is not None and len(self._mean) != len(other._mean):
                raise ValueError(f"cannot merge statistics of {len(self._mean)} and {len(other._mean)} dimensions.")
            self._add(other.count, other._mean, other._scatter)
        return self

    def _add(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if self._mean is None:
            self.count, self._mean, self._scatter = count, mean.clone(), scatter.clone()
            return
        total = self.count + count
        step = mean - self._mean
        self._scatter = self._scatter + scatter + torch.outer(step, step) * (self.count * count / total)
        self._mean = self._mean + step * (count / total)
        self.count = total

    def gather(self) -> FeatureStatistics:
        """New statistics of what all processes have seen, the same on each; a copy of this one where there is one.

        A process that has seen nothing takes part too. Collective: every process must call it.
        """
        if not is_distributed():
            return FeatureStatistics().merge(self)
        device = "cuda" if torch.cuda.is_available() and dist.get_backend() != "gloo" else "cpu"
        size = torch.tensor(0 if self._mean is None else len(self._mean), device=device)
        dist.all_reduce(size, dist.ReduceOp.MAX)
        dimensions = int(size)
        own = torch.zeros(1 + dimensions * (1 + dimensions), dtype=torch.float64, device=device)
        if self._mean is not None:
            own[0] = self.count
            own[1 : 1 + dimensions] = self._mean
            own[1 + dimensions :] = self._scatter.flatten()
        gathered = FeatureStatistics()
        for rank in range(dist.get_world_size()):  # in this order, so that rounding is the same everywhere
            part = own.clone()
            dist.broadcast(part, src=rank)
            count, mean, scatter = part.cpu().split([1, dimensions, dimensions**2])
            if count:
                gathered._add(int(count), mean, scatter.view(dimensions, dimensions))
        return gathered

    @property
    def mean(self) -> Tensor:
        """(D,) float64."""
        self._check(1)
        return self._mean

    @property
    def covariance(self) -> Tensor:
        """(D, D) float64, divided by N - 1, as FID has it."""
        self._check(2)
        return self._scatter / (self.count - 1)

    @property
    def moments(self) -> tuple[Tensor, Tensor]:
        """(mean, covariance), as `frechet_distance(*first.moments, *second.moments)` takes them."""
        return self.mean, self.covariance

    def state_dict(self) -> dict[str, np.ndarray]:
        """Arrays for `numpy.savez`: "count" (), "mu" (D,), "sigma" (D, D), as FID's statistics files name them."""
        return {"count": np.array(self.count), "mu": self.mean.numpy(), "sigma": self.covariance.numpy()}

    @classmethod
    def from_state_dict(cls, arrays: Mapping[str, np.ndarray]) -> FeatureStatistics:
        """Back from `state_dict`.

        Raises:
            ValueError: arrays that lack or do not fit. A file without "count" cannot be merged with more features:
                give its mu and sigma to `frechet_distance` directly.
        """
        missing = sorted({"count", "mu", "sigma"} - set(arrays))
        if missing:
            raise ValueError(f"statistics need the arrays count, mu and sigma; {', '.join(missing)} lacks.")
        mean, covariance = (torch.from_numpy(np.array(arrays[k], dtype=np.float64)) for k in ("mu", "sigma"))
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)) or int(arrays["count"]) < 2:
            shapes = f"{tuple(mean.shape)}, {tuple(covariance.shape)} and {int(arrays['count'])}"
            raise ValueError(f"mu must be (D,), sigma (D, D), count at least 2; got {shapes}.")
        statistics = cls()
        statistics._add(int(arrays["count"]), mean, covariance * (int(arrays["count"]) - 1))
        return statistics

    def _check(self, least: int) -> None:
        if self.count < least:
            raise ValueError(f"at least {least} features are needed, got {self.count}.")
