"""Exact sizes of linear and convolutional layers as operators, not of their kernels as matrices.

A product of these norms is no bound of a network: normalization layers and attention are not linear, and their own
Lipschitz constants can be far above 1. The table says how large the linear parts are, nothing more.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import vjp

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@torch.no_grad()
def circular_singular_values(weight: Tensor, size: tuple[int, ...]) -> Tensor:
    """All singular values of a circular convolution of stride 1, descending, from one matrix per frequency.

    Args:
        weight: (C_out, C_in, *kernel) of a convolution without groups; the kernel may be larger than the map.
        size: height, width, ... of the feature map, one number per axis of the kernel.

    Returns:
        (prod(size) * min(C_out, C_in),) float64: exact, for any C_out and C_in.

    Raises:
        ValueError: a size that does not fit the kernel's number of axes.

    Source: Sedghi, Gupta and Long 2019.
    """
    axes = weight.ndim - 2
    if axes < 1 or len(size) != axes or min(size) < 1:
        raise ValueError(f"weight {tuple(weight.shape)} needs a size of {axes} positive numbers, got {tuple(size)}.")
    spectrum = _wrapped(weight.double(), size)
    spectrum = torch.fft.fftn(spectrum, dim=tuple(range(2, weight.ndim)))  # (C_out, C_in, *size)
    matrices = spectrum.flatten(2).permute(2, 0, 1)
    return torch.linalg.svdvals(matrices).flatten().sort(descending=True).values


def _wrapped(weight: Tensor, size: tuple[int, ...]) -> Tensor:
    """The kernel laid on a torus of this size: (C_out, C_in, *size); what is too long wraps around."""
    for axis, length in enumerate(size, start=2):
        shape = list(weight.shape)
        shape[axis] = length
        places = torch.arange(weight.shape[axis], device=weight.device) % length
        weight = weight.new_zeros(shape).index_add_(axis, places, weight)
    return weight


def operator_norm(
    layer: nn.Module, size: tuple[int, ...] = (), *, iterations: int = 1000, tolerance: float = 1e-6, seed: int = 0
) -> float:
    """Largest singular value of a linear layer or of a convolution on a feature map of this size; biases are ignored.

    Linear layers by their singular values; convolutions that wrap around, with stride 1, no groups and no dilation, in
    closed form; all others (zero padding, strides, transposed ones) by power iteration with the layer and its
    adjoint in float64, which approaches the norm from below and stops when the value's relative move is below
    `tolerance`.

    Args:
        layer: nn.Linear or a convolution of torch.nn, transposed or not.
        size: of the input's feature map: (height, width) of a 2-d convolution; ignored for nn.Linear.
        iterations, tolerance, seed: of the power iteration and its start.

    Raises:
        ValueError: another layer, or a size with a wrong number of axes.
    """
    if isinstance(layer, nn.Linear):
        return float(torch.linalg.matrix_norm(layer.weight.detach().double(), 2))
    if not isinstance(layer, _CONVOLUTIONS):
        raise ValueError(f"operator norms are defined for nn.Linear and convolutions, got {type(layer).__name__}.")
    axes = len(layer.kernel_size)
    if len(size) != axes:
        raise ValueError(f"{type(layer).__name__} needs a size of {axes} numbers, got {tuple(size)}.")
    if _wraps_around(layer, size):
        return float(circular_singular_values(layer.weight.detach(), size)[0])
    parameters = {name: value.detach().double() for name, value in layer.named_parameters()}
    if "bias" in parameters:
        parameters["bias"] = torch.zeros_like(parameters["bias"])

    def linear(x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,))

    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(1, layer.in_channels, *size, generator=generator, dtype=torch.float64)
    vector = (vector / vector.norm()).to(parameters["weight"].device)
    _, pullback = vjp(linear, vector)
    norm = 0.0
    for _ in range(iterations):
        pulled = pullback(linear(vector).detach())[0].detach()
        square = float(pulled.norm())  # |A^T A v| of a unit vector: at most the norm's square
        if square == 0:
            break
        vector = pulled / square
        before, norm = norm, max(norm, square**0.5)
        if norm - before <= tolerance * norm:
            break
    return norm


def _wraps_around(layer: nn.Module, size: tuple[int, ...]) -> bool:
    """Whether a convolution is the circular one on this map: it wraps around once, and keeps the size."""
    if layer.transposed or layer.padding_mode != "circular" or layer.groups != 1:
        return False
    if any(step != 1 for step in (*layer.stride, *layer.dilation)):
        return False
    if layer.padding == "same":
        return True
    if isinstance(layer.padding, str):
        return False
    return all(2 * p == k - 1 and p <= s for p, k, s in zip(layer.padding, layer.kernel_size, size, strict=True))


def operator_norms(module: nn.Module, inputs: Tensor, **options) -> dict[str, float]:
    """The norm of each linear and convolutional layer that a forward pass meets, by the layer's name.

    Their product does NOT bound the network's Lipschitz constant (see above); compare layers, or arms, with each
    other.

    Args:
        module: any network; it is run once, without gradients.
        inputs: what it is called with; decides the sizes of the feature maps. A layer called at several sizes is
            measured at the first.
        options: of `operator_norm`.

    Raises:
        ValueError: a module without such layers.
    """
    sizes: dict[str, tuple[int, ...]] = {}

    def note(name: str):
        def hook(layer: nn.Module, arguments: tuple) -> None:
            axes = len(getattr(layer, "kernel_size", ()))
            sizes.setdefault(name, tuple(arguments[0].shape[-axes:]) if axes else ())

        return hook

    layers = {n: m for n, m in module.named_modules() if isinstance(m, (nn.Linear, *_CONVOLUTIONS))}
    hooks = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            module(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if not sizes:
        raise ValueError(f"{type(module).__name__} calls no linear or convolutional layer.")
    return {name: operator_norm(layers[name], size, **options) for name, size in sizes.items()}
