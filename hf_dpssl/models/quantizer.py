"""Vector quantiser: EMA or gradient codebook, L2 or cosine codes, k-means start, revival of dead codes.

Source: van den Oord et al. 2017 (section 3.2, appendix A.1 for the EMA codebook); Yu et al. 2022 (codes on the unit
sphere); Fifty et al. 2024 (rotation trick); Chang et al. 2022 and Yu et al. 2024 (entropy term). The commitment cost is
on the encoder's side only. Codebook and statistics stay float32 whatever the model's precision, and are the same on
every process: counts and sums are added over processes, random choices broadcast.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, library, nn
from torch.utils.checkpoint import checkpoint

from .codebook_search import code_statistics, k_means, nearest_codes, perplexity_of
from .float32_module import Float32Module
from .gather import broadcast_, gather_without_gradient, is_distributed
from .matrix_products import differentiable_product

_LEAST_COUNT = 1e-6  # of a code whose row is still computed from its statistics
_ENTROPY_ELEMENTS = 2**24  # probabilities held at once by the entropy term


@dataclass
class QuantizerOutput:
    """quantized: like the latents; codes: (B, H, W) int64; the rest scalars.

    commitment: mean squared distance of latents to their (constant) codes. codebook_loss: of codes to their (constant)
    latents, 0 with an EMA codebook. entropy: mean entropy of a vector's soft assignment minus the entropy of the mean
    assignment, in nats, 0 without `entropy_temperature`. perplexity: of this batch's codes, in [1, num_codes].
    """

    quantized: Tensor
    codes: Tensor
    commitment: Tensor
    perplexity: Tensor
    codebook_loss: Tensor
    entropy: Tensor


class VectorQuantizer(Float32Module):
    """Replaces each latent vector by the nearest of `num_codes` vectors; gradients pass to the latents.

    In training mode each forward also moves an EMA codebook: running means of the vectors assigned to
    each code. Codes used less than `revival_threshold` times the mean restart at vectors of the
    batch, with either codebook. Set `defer_update` and call `update_codebook_()` once per optimiser step when
    gradients are accumulated over several forwards.

    Args:
        num_codes: size of the codebook.
        code_dim: channels of the latents.
        decay: share kept of the running statistics at each update.
        revival_threshold: a code is dead below this share of the mean usage; 0 never revives.
        update: "ema", or "gradient": the codebook is a parameter that `codebook_loss` pulls to its latents. A revived
            row keeps its optimiser's moments.
        distance: "l2", or "cosine": latents and codes are divided by their norms before they are compared, and the
            quantised vector is the unit code.
        gradient: "straight_through", or "rotation": the latent turned and scaled onto its code (`rotate_onto`).
        entropy_temperature: divides the squared distances in the soft assignments of the entropy term; None: no term.
    """

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        *,
        decay: float = 0.99,
        revival_threshold: float = 0.03,
        update: str = "ema",
        distance: str = "l2",
        gradient: str = "straight_through",
        entropy_temperature: float | None = None,
    ):
        super().__init__()
        if num_codes < 1 or code_dim < 1:
            raise ValueError(f"num_codes and code_dim must be at least 1, got {num_codes} and {code_dim}.")
        if not 0 <= decay < 1 or not 0 <= revival_threshold < 1:
            raise ValueError(f"decay and revival_threshold lie in [0, 1), got {decay} and {revival_threshold}.")
        for name, value, allowed in (
            ("update", update, ("ema", "gradient")),
            ("distance", distance, ("l2", "cosine")),
            ("gradient", gradient, ("straight_through", "rotation")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}.")
        if entropy_temperature is not None and entropy_temperature <= 0:
            raise ValueError(f"entropy_temperature must be positive, got {entropy_temperature}.")
        self.num_codes = num_codes
        self.code_dim = code_dim
        self.decay = decay
        self.revival_threshold = revival_threshold
        self.update = update
        self.distance = distance
        self.gradient = gradient
        self.entropy_temperature = entropy_temperature
        self.defer_update = False
        self._pending: list[tuple[Tensor, Tensor]] = []
        codebook = self._normalize(torch.randn(num_codes, code_dim, dtype=torch.float32))
        if update == "gradient":
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
        self.register_buffer("counts", torch.ones(num_codes, dtype=torch.float32))
        self.register_buffer("sums", codebook.clone())
        self.register_buffer("is_initialized", torch.zeros((), dtype=torch.int64))
        self._known_as_started = False  # the buffer is not read in every step, which a GPU would be waited for

    def _normalize(self, vectors: Tensor) -> Tensor:
        return _normalized(vectors, self.distance)

    def _state(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.codebook, self.counts, self.sums

    @torch.no_grad()
    def _start_if_new(self, vectors: Tensor) -> None:
        if torch.compiler.is_dynamo_compiling():
            _start_in_a_graph_(vectors, *self._state(), self.is_initialized, self.distance)
        elif not self._known_as_started:
            _start_if_new_(vectors, *self._state(), self.is_initialized, self.distance)
            self._known_as_started = True

    def _load_from_state_dict(self, *arguments, **options) -> None:
        super()._load_from_state_dict(*arguments, **options)
        self._known_as_started = False

    def forward(self, latents: Tensor) -> QuantizerOutput:
        """Quantise latents (B, D, H, W); raises ValueError when D is not `code_dim`."""
        if latents.ndim != 4 or latents.shape[1] != self.code_dim:
            raise ValueError(f"latents must be (B, {self.code_dim}, H, W), got {tuple(latents.shape)}.")
        with torch.autocast(latents.device.type, enabled=False):
            vectors = self._normalize(latents.float().permute(0, 2, 3, 1).reshape(-1, self.code_dim))  # (B*H*W, D)
            exact = vectors.detach()
            if self.training:
                self._start_if_new(exact)
            # A copy where the graph needs the codes, which may be revived before its backward pass.
            copied = self.training and (self.update == "gradient" or self.entropy_temperature is not None)
            codebook = self._normalize(self.codebook.clone() if copied else self.codebook)
            codes = nearest_codes(exact, codebook.detach())
            rows = codebook[codes]  # (B*H*W, D)
            nearest = rows.detach()
            if self.training:
                self._pending.append((exact, codes))
                if not self.defer_update:
                    self.update_codebook_()
            commitment = F.mse_loss(vectors, nearest)
            zero = commitment.new_zeros(())
            codebook_loss = F.mse_loss(rows, exact) if self.update == "gradient" else zero
            entropy = zero if self.entropy_temperature is None else self._entropy(vectors, codebook)
            if self.gradient == "rotation":
                quantized = rotate_onto(vectors, nearest)
            else:
                quantized = nearest + (vectors - exact)  # value of the code, gradient of the latent
            shape = (latents.shape[0], *latents.shape[2:])
            quantized = quantized.view(*shape, -1).permute(0, 3, 1, 2).to(latents.dtype)
            perplexity = perplexity_of(codes, self.num_codes)
        return QuantizerOutput(quantized, codes.view(shape), commitment, perplexity, codebook_loss, entropy)

    def _entropy(self, vectors: Tensor, codebook: Tensor) -> Tensor:
        """Mean entropy of the soft assignments minus the entropy of their mean; low: sharp, and all codes used."""
        centre = codebook.detach().mean(0)  # an offset does not change distances, only their rounding
        vectors = vectors - centre
        codebook = codebook - centre
        parts = vectors.split(max(1, _ENTROPY_ELEMENTS // self.num_codes))
        total = vectors.new_zeros(())
        mean = vectors.new_zeros(self.num_codes)
        for part in parts:
            if len(parts) > 1 and torch.is_grad_enabled():  # computed again in the backward pass, not kept for it
                found = checkpoint(_assignments, part, codebook, self.entropy_temperature, use_reentrant=False)
            else:
                found = _assignments(part, codebook, self.entropy_temperature)
            total = total + found[0]
            mean = mean + found[1]
        mean = mean / len(vectors)
        # Codes so far away that their share is 0 have no gradient, instead of 0 / 0.
        return total / len(vectors) + torch.special.xlogy(mean, mean.clamp_min(torch.finfo(mean.dtype).tiny)).sum()

    def lookup(self, codes: Tensor) -> Tensor:
        """The code vectors of codes (B, H, W): (B, D, H, W) float32; IndexError on an id out of range."""
        if codes.numel() and not (0 <= int(codes.min()) and int(codes.max()) < self.num_codes):
            raise IndexError(
                f"codes must lie in [0, {self.num_codes - 1}], got {int(codes.min())} to {int(codes.max())}."
            )
        return self._normalize(self.codebook)[codes].permute(0, 3, 1, 2)

    @torch.no_grad()
    def initialize_(self, vectors: Tensor) -> None:
        """Start the codebook at the k-means centres of vectors (N, D) of all processes.

        Fewer vectors than codes give a UserWarning: such a codebook is larger than the data it starts from.
        """
        _start_(vectors, *self._state(), self.is_initialized, self.distance)

    @torch.no_grad()
    def update_codebook_(self) -> None:
        """Apply the statistics of all forwards since the last update; a no-op without any."""
        if not self._pending:
            return
        vectors = torch.cat([vectors for vectors, _ in self._pending])
        codes = torch.cat([codes for _, codes in self._pending])
        self._pending.clear()
        move = _move_in_a_graph_ if torch.compiler.is_dynamo_compiling() else _move_
        move(vectors, codes, *self._state(), self.decay, self.revival_threshold, self.update, self.distance)

    def usage(self) -> dict[str, float]:
        """Of the running counts: code_usage, percent of the codes above the revival threshold, and dead_codes below."""
        dead = int((self.counts < self.revival_threshold * self.counts.mean()).sum())
        return {"code_usage": 100 * (1 - dead / self.num_codes), "dead_codes": float(dead)}


def _normalized(vectors: Tensor, distance: str) -> Tensor:
    return F.normalize(vectors, dim=1) if distance == "cosine" else vectors


def _start_(
    vectors: Tensor, codebook: Tensor, counts: Tensor, sums: Tensor, is_initialized: Tensor, distance: str
) -> None:
    """`VectorQuantizer.initialize_` on its tensors."""
    num_codes = len(codebook)
    vectors = gather_without_gradient(_normalized(vectors.float(), distance))
    if len(vectors) < num_codes:
        warnings.warn(
            f"the codebook of {num_codes} codes starts from {len(vectors)} latent vectors only, so that codes "
            "repeat: use a smaller --num_codes, a larger batch, or more images.",
            stacklevel=4,
        )
    centres = _normalized(broadcast_(k_means(vectors, num_codes)), distance)
    usage = len(vectors) / num_codes
    codebook.copy_(centres)
    counts.fill_(usage)
    sums.copy_(centres * usage)
    is_initialized.fill_(1)


def _start_if_new_(
    vectors: Tensor, codebook: Tensor, counts: Tensor, sums: Tensor, is_initialized: Tensor, distance: str
) -> None:
    if not is_initialized:
        _start_(vectors, codebook, counts, sums, is_initialized, distance)


def _move_(
    vectors: Tensor,
    codes: Tensor,
    codebook: Tensor,
    counts: Tensor,
    sums: Tensor,
    decay: float,
    revival_threshold: float,
    update: str,
    distance: str,
) -> None:
    """`VectorQuantizer.update_codebook_` on its tensors, by vectors (N, D) and their codes (N,)."""
    new_counts, new_sums = code_statistics(vectors, codes, len(codebook))
    if is_distributed():
        dist.all_reduce(new_counts)
        dist.all_reduce(new_sums)
    counts.lerp_(new_counts, 1 - decay)
    sums.lerp_(new_sums, 1 - decay)
    mean_usage = counts.mean()
    dead = counts < revival_threshold * mean_usage
    if dead.any():
        # Dead codes restart at random vectors of this batch, chosen by process 0 for all.
        chosen = broadcast_(vectors[torch.randint(len(vectors), (len(codebook),), device=vectors.device)])
        sums.copy_(torch.where(dead[:, None], chosen * mean_usage, sums))
        counts.copy_(torch.where(dead, mean_usage, counts))
        if update == "gradient":
            codebook.copy_(torch.where(dead[:, None], chosen, codebook))
    if update == "gradient":
        return
    # A code unused for so long that nothing of its statistics is left stays where it is.
    used = (counts > _LEAST_COUNT)[:, None]
    codebook.copy_(torch.where(used, _normalized(sums / counts[:, None], distance), codebook))


# What values decide (whether a codebook is new, whether codes are dead) is within a graph an operation of its own.
_STATE = "Tensor(a!) codebook, Tensor(b!) counts, Tensor(c!) sums"
_start_in_a_graph_ = library.custom_op(
    "hf_dpssl::start_codebook",
    _start_if_new_,
    mutates_args=("codebook", "counts", "sums", "is_initialized"),
    schema=f"(Tensor vectors, {_STATE}, Tensor(d!) is_initialized, str distance) -> ()",
)
_move_in_a_graph_ = library.custom_op(
    "hf_dpssl::move_codebook",
    _move_,
    mutates_args=("codebook", "counts", "sums"),
    schema=f"(Tensor vectors, Tensor codes, {_STATE}, float decay, float revival_threshold, str update, "
    "str distance) -> ()",
)


def _assignments(vectors: Tensor, codebook: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Of soft assignments to codes: their entropies summed up, and the sum of the assignments (K,)."""
    products = differentiable_product(vectors, codebook)
    log_p = ((2 * products - codebook.pow(2).sum(1)) / temperature).log_softmax(1)  # |v|^2 cancels
    p = log_p.exp()
    return -(p * log_p).sum(), p.sum(0)


def rotate_onto(vectors: Tensor, targets: Tensor) -> Tensor:
    """`targets` (N, D) by value; by gradient `vectors` turned and scaled onto them, turn and scale held constant.

    With unit vectors v, t and w = (v + t) / |v + t|, the turn x -> x - 2 w (w x) + 2 t (v x) takes v to t. Opposite
    vectors have no such w, and a vector of zeros no direction: these pass the gradient straight through.

    Source: Fifty et al. 2024, section 4.2.
    """
    exact = vectors.detach()
    lengths = exact.norm(dim=1, keepdim=True)
    target_lengths = targets.norm(dim=1, keepdim=True)
    v = F.normalize(exact, dim=1)
    t = F.normalize(targets, dim=1)
    middle = v + t
    w = F.normalize(middle, dim=1)
    turned = vectors - 2 * w * (w * vectors).sum(1, keepdim=True) + 2 * t * (v * vectors).sum(1, keepdim=True)
    turned = turned * (target_lengths / lengths.clamp_min(1e-12))
    defined = (lengths > 1e-6) & (target_lengths > 1e-6) & (middle.norm(dim=1, keepdim=True) > 1e-6)
    moved = torch.where(defined, turned, vectors)
    return targets + (moved - moved.detach())
