"""Mean flow: a DiT learns the mean velocity between two noise levels, so that one step may go all the way.

    z_t = (1 - t) x + t e,  v = e - x,  u(z_t, r, t) = 1 / (t - r) x integral of v from r to t

The definition times t - r, differentiated by t along the path, is what is trained (equation 6 of the paper):

    u = v - (t - r) du/dt,  du/dt = v du/dz + du/dt at constant z

with v of the single picture, as in flow matching, and the right-hand side held fixed. du/dt is one product of the
network's Jacobian with (v, 0, 1), by forward differentiation; where r = t it is not needed, and u is the velocity.

Source: Geng, Deng, Bai, Kolter, He 2025, "Mean Flows for One-step Generative Modeling", arXiv 2505.13447; levels,
share of r = t and weights of the loss as in its table 1.
"""

from __future__ import annotations

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..data import keyed_random
from ..generation.interval_channel import with_interval

_LEVEL = (-0.4, 1.0)  # mean and spread of the normal distribution whose sigmoid a noise level is
_APART = 0.25  # share of images with r < t
_LEAST_ERROR = 1e-3  # added to squared errors before they divide


def mean_flow_example(
    latents: Tensor, sample_ids: Tensor, epoch: int, *, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a batch becomes, a function of (seed, epoch, sample).

    Args:
        latents: (B, C, h, w), normalised.
        sample_ids: (B,) int64.
        epoch, seed: of the draws.

    Returns:
        noised (B, C, h, w), times (B,) t in (0, 1), intervals (B,) t - r, velocity (B, C, h, w).
    """
    key = {"seed": seed, "epoch": epoch}
    noise = keyed_random.normal(sample_ids, tuple(latents.shape[1:]), stream="noise", **key)
    mean, spread = _LEVEL
    levels = (mean + spread * keyed_random.normal(sample_ids, (2,), stream="timestep", **key)).sigmoid()
    times = levels.amax(1)
    apart = keyed_random.uniform(sample_ids, 1, stream="interval", **key)[:, 0] < _APART
    intervals = torch.where(apart, times - levels.amin(1), 0.0)
    sigma = times.view(-1, 1, 1, 1)
    return (1 - sigma) * latents + sigma * noise, times, intervals, noise - latents


@torch.no_grad()
def mean_flow_target(
    transformer: DiTTransformer2DModel,
    noised: Tensor,
    times: Tensor,
    intervals: Tensor,
    velocity: Tensor,
    labels: Tensor,
) -> Tensor:
    """v - (t - r) du/dt (B, C, h, w), a constant.

    Args:
        transformer: of `make_transformer(..., mean_flow=True)`, not compiled and not sharded.
        noised, times, intervals, velocity: as of `mean_flow_example`.
        labels: (B,) classes.
    """

    with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():  # the fused kernels have no forward derivative
        moving = forward_ad.make_dual(noised, velocity)
        time, interval = (forward_ad.make_dual(given, torch.ones_like(given)) for given in (times, intervals))
        # `forward`: a compiled module would be compiled once more, for forward differentiation.
        output = transformer.forward(with_interval(moving, interval), timestep=time, class_labels=labels).sample
        slope = forward_ad.unpack_dual(output).tangent.float()
    return velocity - intervals.view(-1, 1, 1, 1) * slope


def mean_flow_loss(prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Loss of a batch, each image's squared error divided by itself, and the error, which says how training goes.

    Args:
        prediction, target: (B, C, h, w).

    Returns:
        {"loss": scalar, about 1 by construction, "error": mean squared error}.
    """
    squares = (prediction.float() - target).square().flatten(1).sum(1)
    weighted = squares / (squares.detach() + _LEAST_ERROR)
    return {"loss": weighted.mean(), "error": squares.detach().mean() / target[0].numel()}
