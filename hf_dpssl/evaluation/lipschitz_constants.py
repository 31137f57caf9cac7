"""How much a map stretches: singular values of its Jacobian at data, and ratios of distances between pairs.

Both bound the Lipschitz constant from below: they see the data they are given, not the whole space.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

Map = Callable[[Tensor], Tensor]
_MAX_PAIRED = 2000  # points whose pairs are all compared


@torch.no_grad()
def local_singular_values(
    module: Map,
    inputs: Tensor,
    *,
    count: int | None = 1,
    iterations: int = 100,
    tolerance: float = 1e-3,
    batch_size: int = 64,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Tensor:
    """Singular values of the Jacobian of a map at each input, largest first.

    Subspace iteration on J^T J with products of J (forward mode) and J^T (reverse mode); J itself is never held. A
    value is never above the true one, however few the iterations. Samples must not see each other (batch
    normalization in eval mode, no dropout). A straight-through quantiser must be left out: its gradient is that of
    another map, since the derivative of a rounding is 0.

    Args:
        module: nn.Module in eval mode, or any function, (B, ...) -> (B, ...) tensors; differentiable.
        inputs: (N, ...) points.
        count: how many of the largest values; None: all min(D_in, D_out) of them, the smallest included, from the
            whole Jacobian (D_in products of J; for small maps).
        iterations: at most; it stops when no value of a batch moved by more than `tolerance`, relatively.
        batch_size: points differentiated at once.
        dtype: computed in; of a copy when `module` is an nn.Module. A function must accept it by itself.
        seed: of the start vectors; the same for a point wherever it stands in a batch of the same size.

    Returns:
        (N, count) on the CPU.

    Raises:
        ValueError: a module in training mode, no floating point inputs, count out of range, outputs that are not
            one floating point tensor with a row per input, a map that is not differentiable from end to end (part of it
            under torch.no_grad), or values that are not finite.

    Source: power iteration on the Jacobian, as Miyato et al. 2018 of a layer, with J in place of a weight.
    """
    if not inputs.is_floating_point() or inputs.ndim < 2 or not inputs.numel():
        raise ValueError(f"inputs must be floating point (N, ...) and not empty, got {inputs.dtype} {inputs.shape}.")
    if count is not None and not 1 <= count <= inputs[0].numel():
        raise ValueError(f"count must be in [1, {inputs[0].numel()}] or None, got {count}.")
    if isinstance(module, nn.Module):
        if module.training:
            raise ValueError("the module is in training mode: call .eval() first, so that it is one fixed map.")
        module = copy.deepcopy(module).to(dtype) if dtype is not None else module
    inputs = inputs if dtype is None else inputs.to(dtype)
    generator, values = torch.Generator().manual_seed(seed), []
    # The fused attention kernels have no forward-mode derivative.
    with sdpa_kernel(SDPBackend.MATH):
        for batch in inputs.detach().split(batch_size):
            part = _all_values(module, batch) if count is None else None
            if part is None:
                start = torch.randn(count, *batch.shape, generator=generator)
                part = _top_values(module, batch, start.to(batch), iterations, tolerance)
            values.append(part.detach().cpu())
    return torch.cat(values)


def _top_values(module: Map, batch: Tensor, start: Tensor, iterations: int, tolerance: float) -> Tensor:
    outputs, pullback = vjp(module, batch)
    _check_outputs(outputs, batch)
    basis = _orthonormal(start.flatten(2).permute(1, 2, 0))  # (B, D_in, k)
    best = batch.new_zeros(len(batch), start.shape[0])
    for _ in range(iterations):
        tangents = [jvp(module, (batch,), (v.reshape(batch.shape),))[1] for v in basis.unbind(-1)]
        images = torch.stack([t.flatten(1) for t in tangents], -1)  # (B, D_out, k)
        values = _finite_values(images)  # J restricted to a subspace: its singular values never exceed J's
        values = nn.functional.pad(values, (0, best.shape[1] - values.shape[1]))
        moved = (values - best).abs() > tolerance * values
        best = torch.maximum(best, values)
        if not bool(moved.any()):
            break
        pulled = torch.stack([pullback(t)[0].flatten(1) for t in tangents], -1)
        _check_adjoint((basis * pulled).sum(1), images.square().sum(1))
        basis = _orthonormal(pulled)
    return best


def _orthonormal(vectors: Tensor) -> Tensor:
    """(B, D, k) orthonormal columns; a sample whose vectors are all 0 gets some basis all the same."""
    if vectors.shape[-1] == 1:
        return nn.functional.normalize(vectors, dim=1)
    return torch.linalg.qr(vectors).Q


def _check_adjoint(forward: Tensor, reverse: Tensor) -> None:
    """v . J^T J v against |J v|^2, (B, k) each."""
    if bool(((forward - reverse).abs() > 0.01 * reverse.amax(1, keepdim=True) + 1e-30).any()):
        raise ValueError(
            "forward and reverse derivatives of the map disagree: part of it runs under torch.no_grad or detaches, as "
            "a frozen encoder's forward does. Pass a function that is differentiable from input to output."
        )


def _all_values(module: Map, batch: Tensor) -> Tensor:
    _check_outputs(module(batch), batch)
    size, columns = batch[0].numel(), []
    for place in range(size):
        direction = torch.zeros_like(batch).flatten(1)
        direction[:, place] = 1
        columns.append(jvp(module, (batch,), (direction.reshape(batch.shape),))[1].flatten(1))
    return _finite_values(torch.stack(columns, -1))


def _finite_values(matrices: Tensor) -> Tensor:
    if not bool(matrices.isfinite().all()):
        raise ValueError("a Jacobian is not finite: the map has NaN or infinite values or derivatives at the inputs.")
    return torch.linalg.svdvals(matrices)


def _check_outputs(outputs: object, batch: Tensor) -> None:
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point() or outputs.shape[:1] != batch.shape[:1]:
        what = f"{outputs.dtype} {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(
            f"the map must return one floating point tensor with {len(batch)} rows, got {what}: wrap it in a function "
            "that returns the tensor itself."
        )


def local_lipschitz_values(module: Map, inputs: Tensor, **options) -> Tensor:
    """The largest local singular value at each input, ascending: (N,), a line of a plot over quantiles.

    Arguments as `local_singular_values`.
    """
    return local_singular_values(module, inputs, **options)[:, 0].sort().values


def distance_ratios(inputs: Tensor, outputs: Tensor, *, seed: int = 0) -> Tensor:
    """|f(x) - f(y)| / |x - y| of pairs of different points, ascending.

    Args:
        inputs, outputs: (N, ...) points x and f(x); of more than 2,000 a random subset of that size is compared.
        seed: of the subset.

    Returns:
        (P,) float64; pairs of equal inputs are left out. 0 where f(x) = f(y).

    Raises:
        ValueError: unequal numbers, fewer than two points, inputs that are all equal, numbers that are not finite.
    """
    if len(inputs) != len(outputs) or len(inputs) < 2:
        raise ValueError(f"distance ratios need two or more pairs, got {len(inputs)} inputs, {len(outputs)} outputs.")
    if len(inputs) > _MAX_PAIRED:
        rows = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))[:_MAX_PAIRED]
        inputs, outputs = inputs[rows.to(inputs.device)], outputs[rows.to(outputs.device)]
    before, after = (_pair_distances(points) for points in (inputs, outputs))
    different = before > 0
    if not bool(different.any()):
        raise ValueError("all inputs are the same: there is no pair to compare.")
    return (after[different] / before[different]).sort().values


def _pair_distances(points: Tensor) -> Tensor:
    points = points.detach().flatten(1).double().cpu()
    if not bool(points.isfinite().all()):
        raise ValueError("points hold NaN or infinite numbers.")
    return torch.pdist(points)


def _ratio_summary(ratios: Tensor, suffix: str = "") -> dict[str, float]:
    positive = ratios[ratios > 0]
    if len(positive) < 2:
        raise ValueError("the map sends all points to one: the spread of its log ratios is not defined.")
    low, middle, high = (float(positive[round(share * (len(positive) - 1))]) for share in (0.05, 0.5, 0.95))
    return {
        f"ratio_max{suffix}": float(ratios[-1]),
        f"ratio_median{suffix}": middle,
        f"log_ratio_sd{suffix}": float(positive.log().std(correction=0)),
        f"ratio_quantile_ratio{suffix}": high / low,
        f"ratio_zeros{suffix}": 100 * float((ratios == 0).double().mean()),
    }


@torch.no_grad()
def lipschitz(module: Map, inputs: Tensor, **options) -> dict[str, float]:
    """How much a map stretches at data and between data. Every "max" is a LOWER bound of the Lipschitz constant.

    Not comparable between maps with different units of input or output: see `lipschitz_pair` for an autoencoder.

    Args:
        module, inputs, options: as `local_singular_values`.

    Returns:
        lipschitz: the larger of the two maxima below, the best lower bound.
        lipschitz_local_max, lipschitz_local_median, lipschitz_local_min: over points, of the largest singular value.
        ratio_max, ratio_median: of |f(x) - f(y)| / |x - y| over pairs.
        log_ratio_sd: standard deviation of the log of the ratios; 0 = all distances are kept up to one scale. Does
            not change when input or output are scaled. ratio_quantile_ratio: their 95 % quantile by their 5 %.
        ratio_zeros: percent of pairs that become one point; left out of medians and spreads.

    Raises:
        ValueError: as `local_singular_values` and `distance_ratios`, or a map that sends all points to one.
    """
    local = local_lipschitz_values(module, inputs, **options)
    ratios = distance_ratios(inputs, apply(module, inputs, **options), seed=options.get("seed", 0))
    found = {
        "lipschitz_local_max": float(local[-1]),
        "lipschitz_local_median": float(local.median()),
        "lipschitz_local_min": float(local[0]),
    } | _ratio_summary(ratios)
    return {"lipschitz": max(found["lipschitz_local_max"], found["ratio_max"])} | found


@torch.no_grad()
def apply(module: Map, inputs: Tensor, *, batch_size: int = 64, dtype: torch.dtype | None = None, **_) -> Tensor:
    """module(inputs) in batches, in its own precision; further options are those of `local_singular_values`."""
    return torch.cat([module(batch) for batch in inputs.split(batch_size)])


def lipschitz_pair_values(
    encode: Map, decode: Map, images: Tensor, *, decoder_inputs: Tensor | None = None, **options
) -> dict[str, Tensor]:
    """What `lipschitz_pair` sums up, for plots: one line per autoencoder, all at the same latent scale.

    Args:
        encode: images (N, ...) -> latents (N, ...), without quantiser.
        decode: latents -> images, without quantiser.
        images: (N, ...), N >= 2.
        decoder_inputs: (N, ...) latents the decoder is measured at, as quantised ones; encode(images) when None.
        options: of `local_singular_values`.

    Returns:
        latent_scale: (1,) mean distance between two latents by that between two images, before scaling.
        local_encoder, local_decoder: (N,) largest singular values at each image, in the order of the images.
        ratios_encoder, ratios_decoder: as `distance_ratios`, ascending.

    Raises:
        ValueError: as `lipschitz`.
    """
    latents = apply(encode, images, **options)
    points = latents if decoder_inputs is None else decoder_inputs
    seed = options.get("seed", 0)
    kept = slice(0, _MAX_PAIRED)
    scale = _pair_distances(latents[kept]).mean() / _pair_distances(images[kept]).mean()
    if not bool(scale > 0) or not bool(scale.isfinite()):
        raise ValueError("all latents or all images are the same: the scale between them is not defined.")
    return {
        "latent_scale": scale[None],
        "local_encoder": local_singular_values(encode, images, **options)[:, 0].double() / scale,
        "local_decoder": local_singular_values(decode, points, **options)[:, 0].double() * scale,
        "ratios_encoder": distance_ratios(images, latents, seed=seed) / scale,
        "ratios_decoder": distance_ratios(points, apply(decode, points, **options), seed=seed) * scale,
    }


def lipschitz_pair(encode: Map, decode: Map, images: Tensor, **options) -> dict[str, float]:
    """How much an encoder f and a decoder g stretch, at a fixed scale of the latent, and figures without a scale.

    A latent times c (undone by the decoder) multiplies Lip(f) by c and divides Lip(g) by c, so that "closer to 1" can
    be had at will. Therefore latents are divided by `latent_scale` first, so that the mean distance between two
    latents is that between two images; the product Lip(f) Lip(g) and the spread of log ratios need no scale. All
    maxima are LOWER bounds of the constants.

    Args:
        encode, decode, images, options: as `lipschitz_pair_values`.

    Returns:
        latent_scale; of each of `encoder` and `decoder`, at the fixed scale: lipschitz_encoder (as `lipschitz`),
        lipschitz_local_max_encoder, lipschitz_local_median_encoder, and all of ratio_... and log_ratio_sd_encoder.
        lipschitz_product: Lip(f) Lip(g). lipschitz_product_median: median over images of the product of the local
        values at x and at f(x).

    Raises:
        ValueError: as `lipschitz`.
    """
    return summarise_lipschitz_pair(lipschitz_pair_values(encode, decode, images, **options))


def summarise_lipschitz_pair(values: dict[str, Tensor]) -> dict[str, float]:
    """The figures of `lipschitz_pair` from the values of `lipschitz_pair_values`."""
    found = {"latent_scale": float(values["latent_scale"])}
    for side in ("encoder", "decoder"):
        local, ratios = values[f"local_{side}"], values[f"ratios_{side}"]
        found |= {
            f"lipschitz_{side}": max(float(local.max()), float(ratios[-1])),
            f"lipschitz_local_max_{side}": float(local.max()),
            f"lipschitz_local_median_{side}": float(local.median()),
        } | _ratio_summary(ratios, f"_{side}")
    found["lipschitz_product"] = found["lipschitz_encoder"] * found["lipschitz_decoder"]
    found["lipschitz_product_median"] = float((values["local_encoder"] * values["local_decoder"]).median())
    return found
