"""Kernels: log-similarities of points, cosine, Gaussian or Student-t.

    "cosine"     log k(x, y) = cos(x, y) / temperature
    "gaussian"   log k(x, y) = -|x - y|^2 / temperature                     SNE's bandwidth: temperature = 2 sigma^2
    "student_t"  log k(x, y) = -(dof + 1)/2 log(1 + |x - y|^2 / (temperature dof))

`temperature` always divides: the cosine, or the squared distance. As dof grows, Student-t tends to the Gaussian of
twice the temperature, which infinite dof give. Every kernel returns LOG-similarities, so that losses can work with
log-sum-exp. Half-precision inputs are computed in float32, since squared distances and exponentials do not survive
bfloat16, and no product is rounded to TF32 or bfloat16 on its way, whatever torch's float32 precision says.

Source: van der Maaten and Hinton 2008 (Gaussian, Student-t); Hu et al., ICLR 2023, section 4
(Student-t with temperature and degrees of freedom).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.matrix_products import differentiable_product

KERNELS = ("cosine", "gaussian", "student_t")


def log_similarities(
    x: Tensor, y: Tensor, *, kernel: str, temperature: float | Tensor, dof: float | Tensor = 5.0
) -> Tensor:
    """Logarithms of the similarities of every x_i with every y_j, not normalised over j.

    Args:
        x: (N, D) points; L2-normalised here for "cosine", used as they are otherwise.
        y: (M, D) points.
        kernel: "cosine", "gaussian" or "student_t".
        temperature: > 0, divides the cosine or the squared distance.
        dof: degrees of freedom, > 0, read for "student_t" only; 1 is Cauchy, math.inf the Gaussian of twice the
            temperature.

    Returns:
        (N, M), float32 or the wider type of the points.

    Raises:
        ValueError: on an unknown kernel, or a temperature or dof out of range.
    """
    return make_kernel(kernel, temperature, dof).matrix(x, y)


def make_kernel(name: str, temperature: float | Tensor, dof: float | Tensor = 5.0) -> Kernel:
    """The kernel of `log_similarities`' options; numbers may be 0-dim tensors, which get their gradient.

    Raises:
        ValueError: on an unknown kernel, or a temperature or dof out of range.
    """
    if name not in KERNELS:
        raise ValueError(f"kernel must be one of {KERNELS}, got {name!r}.")
    check_positive(temperature=temperature)
    if name != "student_t":
        return Kernel(name, 1 / temperature)
    if not dof > 0:
        raise ValueError(f"dof must be positive (math.inf is the Gaussian kernel), got {_number(dof)}.")
    if math.isinf(_number(dof)):
        return Kernel("gaussian", 1 / (2 * temperature))
    return Kernel("student_t", 1 / (temperature * dof), (dof + 1) / 2)


class Kernel(NamedTuple):
    """A kernel as it is computed: scale cos, -scale |x - y|^2, or -exponent log(1 + scale |x - y|^2)."""

    form: str
    scale: float | Tensor
    exponent: float | Tensor = 1.0

    def of_squared_distances(self, distances: Tensor) -> Tensor:
        """Log-similarities, elementwise, of squared distances; not for "cosine"."""
        if self.form == "gaussian":
            return -self.scale * distances
        return -self.exponent * torch.log1p(self.scale * distances)

    def matrix(self, x: Tensor, y: Tensor) -> Tensor:
        """Log-similarities (N, M) of x (N, D) and y (M, D)."""
        if self.form != "cosine":
            return self.of_squared_distances(squared_distances(x, y))
        with torch.autocast(x.device.type, enabled=False):
            x, y = in_float32(x, y)
            return self.scale * differentiable_product(F.normalize(x, dim=1), F.normalize(y, dim=1))

    def pairs(self, x: Tensor, y: Tensor) -> Tensor:
        """Log-similarities (N,) of x_i with y_i, both (N, D), exact also where they nearly coincide."""
        x, y = in_float32(x, y)
        if self.form == "cosine":
            return self.scale * (F.normalize(x, dim=1) * F.normalize(y, dim=1)).sum(1)
        return self.of_squared_distances((x - y).pow(2).sum(1))

    def scaled(self, *sets: Tensor) -> list[Tensor]:
        """The sets of points (N, D) such that the kernel of the same form with a scale of 1 is this kernel.

        They carry the scale's gradient. For distances they are centred, which changes none and lets cancellation
        shrink; for "cosine", log k is then their inner product.
        """
        points = in_float32(*sets)
        if self.form == "cosine":
            return [F.normalize(part, dim=1) * self.scale**0.5 for part in points]
        centre = torch.stack([part.detach().mean(0) for part in points]).mean(0)
        return [(part - centre) * self.scale**0.5 for part in points]


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
        x = x - centre
        y = y - centre
        distances = x.pow(2).sum(1)[:, None] + y.pow(2).sum(1)[None] - 2 * differentiable_product(x, y)
        return distances.clamp_min(0)


def in_float32(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, with bfloat16 and float16 raised to float32 (float64 is kept)."""
    return tuple(t.float() if t.dtype in (torch.bfloat16, torch.float16) else t for t in tensors)


def check_positive(**values: float | Tensor) -> None:
    """Raise ValueError for a value (number or 0-dim tensor) that is not a positive finite number.

    A tensor of another device than a CPU is not read here: what is out of range makes the kernel NaN.
    """
    for name, value in values.items():
        if isinstance(value, Tensor) and value.device.type != "cpu":
            continue
        if not (math.isfinite(_number(value)) and value > 0):
            raise ValueError(f"{name} must be a positive finite number, got {_number(value)}.")


def _number(value: float | Tensor) -> float:
    return float(value.detach()) if isinstance(value, Tensor) else float(value)
