"""Log-similarities between two sets of points: cosine, Gaussian, Student-t.

Every kernel returns LOG-similarities of shape (N, M), so that losses can work with log-sum-exp.
`temperature` always divides: the cosine, or the squared distance. Half-precision inputs are
computed in float32, since squared distances and exponentials do not survive bfloat16.

Source: van der Maaten and Hinton 2008 (Gaussian, Student-t); Hu et al., ICLR 2023, section 4
(Student-t with temperature and degrees of freedom).
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.contrastive_options import KERNELS


def check_positive(**values: float | Tensor) -> None:
    """Raise ValueError for a temperature or dof (number or 0-dim tensor) that is not a positive finite number."""
    for name, value in values.items():
        if not (math.isfinite(number(value)) and value > 0):
            raise ValueError(f"{name} must be a positive finite number, got {number(value)}.")


def number(value: float | Tensor) -> float:
    """A number, or the value of a 0-dim tensor."""
    return float(value.detach()) if isinstance(value, Tensor) else float(value)


def in_float32(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, with bfloat16 and float16 raised to float32 (float64 is kept)."""
    return tuple(t.float() if t.dtype in (torch.bfloat16, torch.float16) else t for t in tensors)


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Squared Euclidean distances by the Gram trick, never negative.

    Args:
        x: (N, D) points.
        y: (M, D) points.

    Returns:
        (N, M). Points are centred first: distances do not change, cancellation shrinks.
    """
    with torch.autocast(x.device.type, enabled=False):
        x, y = in_float32(x, y)
        centre = y.detach().mean(0)
        x, y = x - centre, y - centre
        gram = x @ y.T
        distances = x.pow(2).sum(1)[:, None] + y.pow(2).sum(1)[None] - 2 * gram
        return distances.clamp_min(0)


def log_cosine(x: Tensor, y: Tensor, *, temperature: float) -> Tensor:
    """cos(x_i, y_j) / temperature, (N, M); rows of x (N, D) and y (M, D) are L2-normalised here."""
    check_positive(temperature=temperature)
    with torch.autocast(x.device.type, enabled=False):
        x, y = in_float32(x, y)
        return F.normalize(x, dim=1) @ F.normalize(y, dim=1).T / temperature


def log_gaussian(x: Tensor, y: Tensor, *, temperature: float) -> Tensor:
    """-|x_i - y_j|^2 / temperature, (N, M); SNE's bandwidth is temperature = 2 sigma^2."""
    check_positive(temperature=temperature)
    return -squared_distances(x, y) / temperature


def student_t_from_squared_distance(squared_distance: Tensor, *, temperature: float, dof: float) -> Tensor:
    """-(dof + 1)/2 * log(1 + d^2 / (temperature * dof)), elementwise.

    As dof grows it tends to -d^2 / (2 temperature), the Gaussian kernel of twice the temperature.
    """
    check_positive(temperature=temperature, dof=dof)
    return -(dof + 1) / 2 * torch.log1p(squared_distance / (temperature * dof))


def log_student_t(x: Tensor, y: Tensor, *, temperature: float, dof: float) -> Tensor:
    """Student-t log-similarity of x (N, D) and y (M, D), (N, M); the points are not normalised."""
    return student_t_from_squared_distance(squared_distances(x, y), temperature=temperature, dof=dof)


def check_kernel(kernel: str, temperature: float | Tensor, dof: float | Tensor) -> None:
    """Raise ValueError for an unknown kernel or a temperature or dof out of range; dof may be infinite."""
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {KERNELS}, got {kernel!r}.")
    check_positive(temperature=temperature)
    if kernel == "student_t" and not dof > 0:
        raise ValueError(f"dof must be positive (math.inf is the Gaussian kernel), got {number(dof)}.")


def distance_kernel(temperature: float | Tensor, dof: float | Tensor) -> tuple[float | Tensor, str, float | Tensor]:
    """(scale, form, exponent) of a Student-t kernel as tiles.py writes it; infinite dof gives the Gaussian form."""
    if math.isinf(number(dof)):
        return 1 / (2 * temperature), "gaussian", 1.0
    return 1 / (temperature * dof), "student_t", (dof + 1) / 2


def scaled_points(
    embeddings: list[Tensor], kernel: str, temperature: float | Tensor, dof: float | Tensor
) -> tuple[list[Tensor], str, float | Tensor]:
    """(sets of points, form, exponent) such that tiles.py's kernels of the points need no temperature.

    The points carry the temperature's gradient. For distances they are centred, which changes none and lets
    cancellation shrink.
    """
    embeddings = list(in_float32(*embeddings))
    if kernel == "cosine":
        return [F.normalize(part, dim=1) * temperature**-0.5 for part in embeddings], "cosine", 1.0
    scale, form, exponent = distance_kernel(temperature, dof)
    centre = torch.stack([part.detach().mean(0) for part in embeddings]).mean(0)
    return [(part - centre) * scale**0.5 for part in embeddings], form, exponent


def log_of_pairs(points: Tensor, others: Tensor, form: str, exponent: float | Tensor) -> Tensor:
    """Log-similarities (N,) of row i with row i of scaled points (N, D), exact also where they nearly coincide."""
    if form == "cosine":
        return (points * others).sum(1)
    return log_of_distances((points - others).pow(2).sum(1), form, exponent)


def log_of_distances(squared_distances: Tensor, form: str, exponent: float | Tensor) -> Tensor:
    """Log-similarities, elementwise, of squared distances of scaled points."""
    return -squared_distances if form == "gaussian" else -exponent * torch.log1p(squared_distances)


def perplexity_temperatures(squared_distances: Tensor, perplexity: float) -> Tensor:
    """Temperature of each row at which the Gaussian softmax(-d^2 / temperature) has a given perplexity.

    perplexity = exp(entropy of the row in nats): the effective number of neighbours. It grows
    with the temperature, whose logarithm is found by bisection with Newton steps, in float64.

    Args:
        squared_distances: (N, M); an infinite entry is left out (a point's distance to itself).
        perplexity: > 1 and below the number of entries that each row keeps; met within 1e-10.

    Returns:
        (N,) float64, SNE's 2 sigma_i^2.

    Raises:
        ValueError: on a perplexity out of range, NaN or -inf, or a row in which so many nearest
            points are equally near that every temperature gives more than the perplexity.

    Source: Hinton and Roweis 2002 (SNE); van der Maaten and Hinton 2008, section 2.
    """
    distances = squared_distances.detach().double()
    if distances.ndim != 2 or bool((distances.isnan() | (distances == -math.inf)).any()):
        raise ValueError(f"squared_distances must be (N, M) without NaN or -inf, got {tuple(distances.shape)}.")
    kept = distances.isfinite()  # (N, M)
    fewest = int(kept.sum(1).min())
    if not 1 < perplexity < fewest:
        raise ValueError(f"perplexity must lie in (1, {fewest}), the number of neighbours, got {perplexity}.")
    gaps = distances - distances.amin(1, keepdim=True)  # a shift of the row changes no probability
    ties = ((gaps == 0) & kept).sum(1)
    if bool((ties >= perplexity).any()):
        row = int((ties >= perplexity).nonzero()[0])
        raise ValueError(
            f"row {row} has {int(ties[row])} nearest points at one distance, so its perplexity cannot fall to "
            f"{perplexity}: raise the perplexity or remove duplicate points."
        )
    longest = gaps.where(kept, 0).amax(1)
    shortest = gaps.where(kept & (gaps > 0), math.inf).amin(1)
    low = torch.maximum(shortest / 1e3, longest * 1e-300).log()  # only the nearest points count
    high = longest.log() + math.log(1e9)  # all count alike
    log_t = gaps.kthvalue(math.ceil(perplexity), dim=1).values.log()
    for step in itertools.count():
        log_p = (-gaps / log_t.exp()[:, None]).log_softmax(1)
        p, log_p = log_p.exp(), log_p.where(kept, 0)
        entropy = -(p * log_p).sum(1)
        excess = entropy - math.log(perplexity)
        low, high = low.where(excess > 0, log_t), high.where(excess <= 0, log_t)
        done = (excess.abs() < 1e-12) | (high - low <= log_t.abs() * 1e-15)
        if bool(done.all()):
            return log_t.exp()
        slope = (p * (log_p + entropy[:, None]).square()).sum(1)  # of the entropy in log_t
        newton, middle = log_t - excess / slope, (low + high) / 2
        inside = (newton > low) & (newton < high) & (step < 20)
        log_t = log_t.where(done, newton.where(inside, middle))
