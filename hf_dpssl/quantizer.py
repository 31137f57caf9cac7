"""Vector quantiser with an EMA codebook, k-means start and revival of dead codes.

Source: van den Oord et al. 2017 (appendix A.1 for the EMA codebook); commitment cost on the
encoder's side only. Codebook and statistics stay float32 whatever the model's precision, and are
the same on every process: counts and sums are added over processes, random choices broadcast.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .gather import broadcast_, gather_without_gradient, is_distributed

_MAX_CHUNK_ELEMENTS = 2**25  # scores held at once in `nearest_codes`: 128 MiB
_LEAST_COUNT = 1e-6  # of a code whose row is still computed from its statistics


@dataclass
class QuantizerOutput:
    """quantized: like the latents; codes: (B, H, W) int64; commitment: scalar; perplexity: scalar, of this batch."""

    quantized: Tensor
    codes: Tensor
    commitment: Tensor
    perplexity: Tensor


def nearest_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index of the Euclidean-nearest row of `codebook` (K, D) for each of `vectors` (N, D): (N,) int64."""
    half_norms = codebook.pow(2).sum(1) / 2
    rows = max(1, _MAX_CHUNK_ELEMENTS // len(codebook))
    parts = [torch.addmm(half_norms, part, codebook.T, beta=-1).argmax(1) for part in vectors.split(rows)]
    return torch.cat(parts)


def k_means(vectors: Tensor, num_codes: int, iterations: int = 10) -> Tensor:
    """Lloyd's algorithm from a random start (torch's global generator): (num_codes, D).

    With fewer vectors than codes the rest are repeats with a little noise; empty clusters restart
    at random vectors.
    """
    picks = torch.randperm(len(vectors), device=vectors.device)
    repeats = -(-num_codes // len(vectors))
    centres = vectors[picks.repeat(repeats)[:num_codes]].clone()
    if repeats > 1:
        centres += 1e-3 * vectors.std() * torch.randn_like(centres)
    for _ in range(iterations):
        counts, sums = code_statistics(vectors, nearest_codes(vectors, centres), num_codes)
        restarts = vectors[torch.randint(len(vectors), (num_codes,), device=vectors.device)]
        centres = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp_min(1), restarts)
    return centres


def code_statistics(vectors: Tensor, codes: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """How often each code is used (K,), and the sum of its vectors (K, D)."""
    counts = torch.bincount(codes, minlength=num_codes)
    by_code = vectors[codes.argsort(stable=True)]
    # Deterministic on a GPU too, where index_add is not.
    return counts.to(vectors.dtype), torch.segment_reduce(by_code, "sum", lengths=counts)


class VectorQuantizer(nn.Module):
    """Replaces each latent vector by the nearest of `num_codes` vectors; gradients pass straight through.

    In training mode each forward also moves the codebook: running means of the vectors assigned to
    each code, and codes used less than `revival_threshold` times the mean restart at vectors of the
    batch. Set `defer_update` and call `update_codebook_()` once per optimiser step when gradients
    are accumulated over several forwards.

    Args:
        num_codes: size of the codebook.
        code_dim: channels of the latents.
        decay: share kept of the running statistics at each update.
        revival_threshold: a code is dead below this share of the mean usage; 0 never revives.
    """

    def __init__(self, num_codes: int, code_dim: int, *, decay: float = 0.99, revival_threshold: float = 0.03):
        super().__init__()
        if num_codes < 1 or code_dim < 1:
            raise ValueError(f"num_codes and code_dim must be at least 1, got {num_codes} and {code_dim}.")
        if not 0 <= decay < 1 or not 0 <= revival_threshold < 1:
            raise ValueError(f"decay and revival_threshold lie in [0, 1), got {decay} and {revival_threshold}.")
        self.num_codes, self.code_dim = num_codes, code_dim
        self.decay, self.revival_threshold = decay, revival_threshold
        self.defer_update = False
        self._pending: list[tuple[Tensor, Tensor]] = []
        self.register_buffer("codebook", torch.randn(num_codes, code_dim))
        self.register_buffer("counts", torch.ones(num_codes))
        self.register_buffer("sums", self.codebook.clone())
        self.register_buffer("is_initialized", torch.zeros((), dtype=torch.int64))

    def _apply(self, fn, recurse: bool = True):
        # Moves between devices are followed, changes of precision are not.
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if tensor.is_floating_point() and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        return super()._apply(keep_precision, recurse)

    def forward(self, latents: Tensor) -> QuantizerOutput:
        """Quantise latents (B, D, H, W); raises ValueError when D is not `code_dim`."""
        if latents.ndim != 4 or latents.shape[1] != self.code_dim:
            raise ValueError(f"latents must be (B, {self.code_dim}, H, W), got {tuple(latents.shape)}.")
        with torch.autocast(latents.device.type, enabled=False):
            exact = latents.float()
            vectors = exact.detach().permute(0, 2, 3, 1).reshape(-1, self.code_dim)  # (B*H*W, D)
            if self.training and not self.is_initialized:
                self.initialize_(vectors)
            codes = nearest_codes(vectors, self.codebook)
            shape = (latents.shape[0], *latents.shape[2:])
            nearest = self.codebook[codes].view(*shape, -1).permute(0, 3, 1, 2)  # (B, D, H, W)
            if self.training:
                self._pending.append((vectors, codes))
                if not self.defer_update:
                    self.update_codebook_()
            commitment = F.mse_loss(exact, nearest)
            quantized = nearest + (exact - exact.detach())  # value of the code, gradient of the latent
            usage = torch.bincount(codes, minlength=self.num_codes).float() / len(codes)
            perplexity = torch.exp(-torch.special.xlogy(usage, usage).sum())
        return QuantizerOutput(quantized.to(latents.dtype), codes.view(shape), commitment, perplexity)

    def lookup(self, codes: Tensor) -> Tensor:
        """The code vectors of codes (B, H, W): (B, D, H, W) float32; IndexError on an id out of range."""
        if codes.numel() and not (0 <= int(codes.min()) and int(codes.max()) < self.num_codes):
            raise IndexError(
                f"codes must lie in [0, {self.num_codes - 1}], got {int(codes.min())} to {int(codes.max())}."
            )
        return self.codebook[codes].permute(0, 3, 1, 2)

    @torch.no_grad()
    def initialize_(self, vectors: Tensor) -> None:
        """Start the codebook at the k-means centres of vectors (N, D) of all processes."""
        vectors = gather_without_gradient(vectors.float())
        centres = broadcast_(k_means(vectors, self.num_codes))
        usage = len(vectors) / self.num_codes
        self.codebook.copy_(centres)
        self.counts.fill_(usage)
        self.sums.copy_(centres * usage)
        self.is_initialized.fill_(1)

    @torch.no_grad()
    def update_codebook_(self) -> None:
        """Apply the statistics of all forwards since the last update; a no-op without any."""
        if not self._pending:
            return
        vectors = torch.cat([vectors for vectors, _ in self._pending])
        codes = torch.cat([codes for _, codes in self._pending])
        self._pending.clear()
        counts, sums = code_statistics(vectors, codes, self.num_codes)
        if is_distributed():
            dist.all_reduce(counts)
            dist.all_reduce(sums)
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        mean_usage = self.counts.mean()
        dead = self.counts < self.revival_threshold * mean_usage
        if dead.any():
            self._revive_(dead, vectors, mean_usage)
        # A code unused for so long that nothing of its statistics is left stays where it is.
        used = (self.counts > _LEAST_COUNT)[:, None]
        self.codebook.copy_(torch.where(used, self.sums / self.counts[:, None], self.codebook))

    def _revive_(self, dead: Tensor, vectors: Tensor, mean_usage: Tensor) -> None:
        """Restart dead codes at random vectors of this batch, chosen by process 0 for all."""
        chosen = vectors[torch.randint(len(vectors), (self.num_codes,), device=vectors.device)]
        chosen = broadcast_(chosen)
        self.sums.copy_(torch.where(dead[:, None], chosen * mean_usage, self.sums))
        self.counts.copy_(torch.where(dead, mean_usage, self.counts))
