"""Calibration of Q's kernel without tuning: a temperature set by perplexity, degrees of freedom that are learned.

SNE chooses each bandwidth of P so that the neighbourhoods have a given perplexity. `KernelCalibration` chooses Q's one
temperature the same way: the mean perplexity of Q_{.|i} is a fixed share of the candidates. A share, not a number:
at a given temperature the perplexity grows in proportion to the candidates, whatever the batch or the queue.

Source: van der Maaten and Hinton 2008, section 2 (perplexity); van der Maaten 2009, "Learning a parametric embedding
by preserving local structure" (dof learned with the map).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..models.choices import DOF_RANGE, check_learnable_dof, check_share
from ..models.float32_module import Float32Module
from ..models.gather import broadcast_, gather_without_gradient
from .kernels import Kernel, log_similarities, make_kernel, squared_distances

PERPLEXITY = 0.2  # of Q, as a share of the candidates, where the scale of the embeddings is bounded
FREE_PERPLEXITY = 0.6  # at the first step, where it is free: training then narrows the kernel by spreading the points
_SEARCH = (1e-6, 1e6)  # of temperatures, in units of the mean dissimilarity
_BISECTIONS = 24  # of the range's logarithm: 2e-6 relative
COSINE_START = 0.2  # MoCo-v2's; untrained embeddings nearly coincide, which says nothing of the right temperature
COSINE_BOUNDS = (0.1, 1.0)  # the published range; without it, coinciding points lead to ever lower temperatures
STUDENT_T_BOUNDS = (1e-2, 1e2)  # in units of the mean squared distance: the kernel keeps its flat top
_ANCHORS = 64  # rows that are looked at, at most
_CANDIDATES = 2048  # columns that are looked at, at most
_MEMORY = 0.99  # share kept of the old log-temperature at each step


def mean_perplexity(log_similarities: Tensor, counts: Tensor | None = None) -> Tensor:
    """exp of the mean row entropy (in nats) of the row-normalised similarities.

    Args:
        log_similarities: (N, M) from kernels.py; -inf leaves an entry out, such as a point itself.
        counts: (M,) or (N, M), so many points of this similarity stand behind an entry; None: one.

    Returns:
        Scalar between 1 and the number of candidates of a row.
    """
    log_counts = torch.zeros_like(log_similarities) if counts is None else counts.to(log_similarities).log()
    log_q = (log_similarities + log_counts).log_softmax(1)  # of all points behind an entry together
    return torch.where(log_q.isfinite(), log_q.exp() * (log_counts - log_q), 0.0).sum(1).mean().exp()


@torch.no_grad()
def temperature_of_perplexity(
    dissimilarities: Tensor, counts: Tensor | None = None, *, share: float, dof: float | None = None
) -> Tensor:
    """The temperature at which the mean perplexity is a given share of the candidates, by bisection.

    Args:
        dissimilarities: (N, M), 1 - cosine (dof=None) or squared distances; +inf leaves an entry out.
        counts: as in `mean_perplexity`.
        share: in (0, 1).
        dof: degrees of freedom of the Student-t kernel; None: exp(-dissimilarity / temperature).

    Returns:
        Scalar, within 1e-6 and 1e6 mean dissimilarities. A Student-t kernel cannot have any perplexity: towards
        temperature 0 it becomes a power of the distance; where even that is too wide, the lower end comes back.

    Raises:
        ValueError: share outside (0, 1), or on a CPU dissimilarities that are negative or NaN.
    """
    check_share(share)
    # Elsewhere than on a CPU reading would wait; the temperature is NaN then, and the loss refuses it.
    on_cpu = dissimilarities.device.type == "cpu"
    if on_cpu and (bool(dissimilarities.isnan().any()) or bool((dissimilarities < 0).any())):
        raise ValueError("dissimilarities must be non-negative numbers; a negative or NaN one was given.")
    counts = _counts(dissimilarities, counts)
    dissimilarities = dissimilarities.masked_fill(dissimilarities.isinf(), 0)
    target = share * counts.sum(1).mean()
    unit = _mean(dissimilarities, counts)
    low = unit.log() + math.log(_SEARCH[0])
    high = unit.log() + math.log(_SEARCH[1])
    for _ in range(_BISECTIONS):  # the entropy of a row grows with the temperature, for both kernels
        middle = (low + high) / 2
        too_wide = mean_perplexity(_log_similarities(dissimilarities, middle.exp(), dof), counts) > target
        low = torch.where(too_wide, low, middle)
        high = torch.where(too_wide, middle, high)
    return ((low + high) / 2).exp()


def _counts(dissimilarities: Tensor, counts: Tensor | None) -> Tensor:
    counts = torch.ones_like(dissimilarities) if counts is None else counts.to(dissimilarities)
    return counts.expand_as(dissimilarities).masked_fill(dissimilarities.isinf(), 0)


def _mean(dissimilarities: Tensor, counts: Tensor) -> Tensor:
    total = torch.where(counts > 0, counts * dissimilarities, 0.0).sum()
    return (total / counts.sum()).clamp_min(1e-30)


def _log_similarities(dissimilarities: Tensor, temperature: Tensor, dof: float | None) -> Tensor:
    # 1 - cosine is half a squared distance of unit vectors, so that without dof the kernel is a Gaussian one.
    kernel = Kernel("gaussian", 1 / temperature) if dof is None else make_kernel("student_t", temperature, dof)
    return kernel.of_squared_distances(dissimilarities)


class KernelCalibration(Float32Module):
    """Temperature and degrees of freedom of a kernel: given numbers, or calibrated and learned.

    temperature="auto", embeddings of a bounded scale (cosine, or normalised features): each training step finds the
    temperature at which the detached global batch has the wanted perplexity, and moves the running geometric mean
    there by a hundredth, within `COSINE_BOUNDS` or, for Student-t, `STUDENT_T_BOUNDS` mean squared distances. A cosine
    starts at 0.2, a Student-t kernel at what its first batch says.

    temperature="auto", embeddings of a free scale (Student-t on raw outputs): the first batch sets it, then it is held.
    Dividing by a temperature that follows the embeddings would make the loss blind to their scale, which nothing then
    bounds, and would fix a perplexity that the map itself has to find (0.5 % to 4 % of the candidates at the end of
    runs on mnist, by dimension and normalisation). What is left to choose is the width of the start: wide enough that
    each point repels most others. A temperature 20 times higher than the best one learned slowly there.

    The two shares, 0.2 and 0.6, were chosen on validation images of mnist at d = 2, 8 and 128
    (training/evidence/dimensions.py compares them with tuned temperatures).

    learnable_dof=True: dof = 0.1 * 10^(4 sigmoid(parameter)), so it stays in (0.1, 1000) whatever the step.

    Everything that changes is a buffer or a parameter, so it is part of the checkpoint. With given numbers there is
    nothing to save.

    Args:
        kernel: "cosine" or "student_t".
        temperature: a number, or "auto".
        perplexity: share of the candidates, in (0, 1), with "auto"; None: 0.2, or 0.6 where the scale is free.
        dof: of the Student-t kernel, and where learning starts.
        learnable_dof: makes it a parameter.
        free_scale: True where nothing fixes the scale of the embeddings.
    """

    def __init__(
        self,
        kernel: str,
        temperature: float | str,
        perplexity: float | None,
        dof: float,
        learnable_dof: bool = False,
        free_scale: bool = False,
    ):
        super().__init__()
        self.kernel = kernel
        self.free_scale = free_scale
        self.perplexity = perplexity or (FREE_PERPLEXITY if free_scale else PERPLEXITY)
        self.given_temperature = temperature
        self.given_dof = dof
        if temperature == "auto":
            check_share(self.perplexity)
            self.register_buffer("log_temperature", torch.tensor(math.log(COSINE_START), dtype=torch.float32))
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
            self._begun = False  # known without reading the device
        if learnable_dof:
            self.raw_dof = nn.Parameter(raw_from_dof(dof))

    @property
    def temperature(self) -> float | Tensor:
        """The number given, or the calibrated one as a 0-dim tensor."""
        return self.log_temperature.exp() if self.given_temperature == "auto" else self.given_temperature

    @property
    def dof(self) -> float | Tensor:
        """The number given, or the learned one as a 0-dim tensor with gradient."""
        return dof_from_raw(self.raw_dof) if hasattr(self, "raw_dof") else self.given_dof

    @torch.no_grad()
    def numbers(self) -> dict[str, float]:
        """{"temperature", "dof"} as they are now."""
        return {"temperature": float(self.temperature), "dof": float(self.dof)}

    @torch.no_grad()
    def calibrate(self, view_1: Tensor, view_2: Tensor) -> None:
        """Follow a batch, (N, D) twice, of all processes; the candidates are its other points. Only with "auto"."""
        if self._calibrating():
            embeddings = torch.cat([view_1, view_2])
            rows = _spread(len(embeddings), _ANCHORS, embeddings.device)
            columns = _spread(len(embeddings), _CANDIDATES, embeddings.device)
            values = self._dissimilarities(embeddings[rows], embeddings[columns])
            values = values.masked_fill(rows[:, None] == columns[None], torch.inf)
            self._follow(values, None)

    @torch.no_grad()
    def calibrate_queue(self, queries: Tensor, keys: Tensor, queue: Tensor) -> None:
        """Follow queries (B, D) of this and all other processes; keys (of all) are theirs, like the queue (K, D)."""
        if self._calibrating():
            queries = gather_without_gradient(queries)
            rows = _spread(len(queries), _ANCHORS, queries.device)
            columns = _spread(len(queue), _CANDIDATES, queries.device)
            positive = self._dissimilarities(queries[rows], keys[rows]).diagonal()[:, None]
            values = torch.cat([positive, self._dissimilarities(queries[rows], queue[columns])], dim=1)
            counts = values.new_full((values.shape[1],), len(queue) / len(columns))  # each stands for some of the queue
            counts[0] = 1
            self._follow(values, counts)

    def _calibrating(self) -> bool:
        if self.given_temperature != "auto":
            return False
        if self.free_scale and not self._begun:
            self._begun = int(self.steps) > 0
        return self.training and not (self.free_scale and self._begun)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._begun = False  # whether a batch was seen is read again
        super()._load_from_state_dict(*args, **kwargs)

    def _dissimilarities(self, x: Tensor, y: Tensor) -> Tensor:
        if self.kernel == "cosine":
            return (1 - log_similarities(x, y, kernel="cosine", temperature=1.0)).clamp_min(0)
        return squared_distances(x, y)

    def _follow(self, values: Tensor, counts: Tensor | None) -> None:
        dof = None if self.kernel == "cosine" else float(self.dof)
        wanted = temperature_of_perplexity(values, counts, share=self.perplexity, dof=dof)
        if dof is None:
            wanted = wanted.clamp(*COSINE_BOUNDS)
        else:
            mean_distance = _mean(values, _counts(values, counts))
            wanted = wanted.clamp(STUDENT_T_BOUNDS[0] * mean_distance, STUDENT_T_BOUNDS[1] * mean_distance)
        share = torch.full_like(self.log_temperature, 1 - _MEMORY)
        if self.kernel == "student_t":
            share = torch.where(self.steps == 0, 1.0, share)
        self.log_temperature.lerp_(wanted.log().to(self.log_temperature), share)
        broadcast_(self.log_temperature)  # rounding may differ between processes
        self.steps += 1


def dof_from_raw(raw: Tensor) -> Tensor:
    """A number in `DOF_RANGE` for any real one, its logarithm by a sigmoid; differentiable."""
    low = math.log(DOF_RANGE[0])
    high = math.log(DOF_RANGE[1])
    return (low + (high - low) * raw.sigmoid()).exp()


def raw_from_dof(dof: float) -> Tensor:
    """The inverse of `dof_from_raw`; ValueError unless dof lies inside `DOF_RANGE`."""
    check_learnable_dof(dof)
    low, high = DOF_RANGE
    return torch.tensor(math.log(dof / low) / math.log(high / low), dtype=torch.float64).logit().float()


def _spread(size: int, most: int, device: torch.device) -> Tensor:
    """At most so many of `size` rows, evenly spread; the same in every process."""
    count = min(size, most)
    return torch.arange(count, device=device) * size // count
