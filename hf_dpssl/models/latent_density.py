"""Where a generator's latents are drawn from: the standard normal, a fitted Gaussian or mixture, or held-out latents.

All but the last are mixtures of Gaussians with full factors, so that one class holds and samples them. Latents of
training images would give back reconstructions and reward memorising: they are not among the choices.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .choices import GAN_DENSITIES

_JITTER = 1e-6  # share of the mean variance added to a fitted covariance


class LatentDensity(nn.Module):
    """A density of latents (N, dim), or a bank of them; all values are buffers, kept by checkpoints.

    Args:
        kind: one of GAN_DENSITIES. Until fitted, "prior" is the standard normal and the others are too.
        dim: of the latents.
        components: of "mixture".
        bank_size: rows of "held_out".
    """

    def __init__(self, kind: str, dim: int, *, components: int = 1, bank_size: int = 0):
        super().__init__()
        if kind not in GAN_DENSITIES:
            raise ValueError(f"the density of the latents must be one of {GAN_DENSITIES}, got {kind!r}.")
        if dim < 1 or components < 1 or (kind == "held_out") != (bank_size > 0):
            raise ValueError(
                f"dim and components must be at least 1, and only 'held_out' has a bank: got kind={kind!r}, dim={dim}, "
                f"components={components}, bank_size={bank_size}."
            )
        self.kind = kind
        self.dim = dim
        components = components if kind == "mixture" else 1
        self.register_buffer("weights", torch.full((components,), 1 / components))
        self.register_buffer("means", torch.zeros(components, dim))
        self.register_buffer("factors", torch.eye(dim).repeat(components, 1, 1))  # lower triangular
        self.register_buffer("bank", torch.zeros(bank_size, dim))

    @torch.no_grad()
    def fit_(self, latents: Tensor, *, seed: int = 0) -> LatentDensity:
        """Fit to latents (N, dim): maximum likelihood, or by EM for a mixture; "held_out" keeps the first rows.

        Raises:
            ValueError: another dimension, fewer latents than needed, or numbers that are not finite.
        """
        if latents.ndim != 2 or latents.shape[1] != self.dim or not bool(torch.isfinite(latents).all()):
            raise ValueError(f"latents must be finite and (N, {self.dim}), got {tuple(latents.shape)}.")
        needed = max(2, len(self.weights), len(self.bank))
        if len(latents) < needed:
            raise ValueError(f"{self.kind!r} with these settings needs at least {needed} latents, got {len(latents)}.")
        points = latents.double().cpu()
        if self.kind == "held_out":
            self.bank.copy_(latents[: len(self.bank)])
        elif self.kind == "mixture":
            self._fit_mixture(points, seed)
        elif self.kind != "prior":
            centred = points - points.mean(0)
            covariance = centred.T @ centred / len(points)
            self.means.copy_(points.mean(0)[None])
            self.factors.copy_(_factor(covariance.diag().diag() if self.kind == "diagonal" else covariance)[None])
        return self

    def _fit_mixture(self, points: Tensor, seed: int) -> None:
        # Guarded, so that checkpoints load with this file where scikit-learn is not installed.
        try:
            from sklearn.mixture import GaussianMixture
        except ImportError as error:
            raise ImportError("fitting a mixture needs scikit-learn: pip install scikit-learn.") from error
        jitter = _JITTER * float(points.var(0).mean())
        model = GaussianMixture(len(self.weights), reg_covar=max(jitter, 1e-12), random_state=seed, max_iter=200)
        model.fit(points.numpy())
        self.weights.copy_(torch.from_numpy(model.weights_))
        self.means.copy_(torch.from_numpy(model.means_))
        for component, covariance in enumerate(model.covariances_):
            self.factors[component] = _factor(torch.from_numpy(covariance)).to(self.factors)

    @torch.no_grad()
    def sample(self, number: int, generator: torch.Generator | None = None) -> Tensor:
        """(number, dim) float32 latents, drawn on the CPU; of a bank rows in random order, again and again.

        The first n of N > n latents of one generator are not those of a call for n.
        """
        if number < 1:
            raise ValueError(f"the number of latents must be at least 1, got {number}.")
        if self.kind == "held_out":
            rounds = -(-number // len(self.bank))
            order = [torch.randperm(len(self.bank), generator=generator) for _ in range(rounds)]
            return self.bank[torch.cat(order)[:number].to(self.bank.device)].float()
        noise = torch.randn(number, self.dim, generator=generator)
        chosen = torch.multinomial(self.weights.float().cpu(), number, replacement=True, generator=generator)
        latents = torch.empty_like(noise)
        for component in range(len(self.weights)):
            rows = chosen == component
            mean, factor = (of_all[component].float().cpu() for of_all in (self.means, self.factors))
            latents[rows] = mean + noise[rows] @ factor.T
        return latents.to(self.means.device)


def _factor(covariance: Tensor) -> Tensor:
    """Lower triangular factor of a covariance, whose diagonal is raised a little where it is singular."""
    scale = float(covariance.diagonal().mean())
    identity = torch.eye(len(covariance), dtype=covariance.dtype)
    for jitter in (0.0, _JITTER, 1e-4, 1e-2):
        factor, failed = torch.linalg.cholesky_ex(covariance + (jitter * scale + 1e-12 * (jitter > 0)) * identity)
        if not failed and bool((factor.diagonal() > 0).all()):
            return factor
    raise ValueError("the covariance of the latents has no factor: all latents are (nearly) the same.")
