"""How far a Frechet distance of N features can be trusted: its interval, and the value for infinitely many."""

from __future__ import annotations

import torch
from torch import Tensor

from .feature_checks import check_clouds
from .frechet import frechet_distance_of_features


def frechet_interval(
    real: Tensor,
    generated: Tensor,
    *,
    resamples: int = 100,
    level: float = 0.95,
    resample_real: bool = True,
    generator: torch.Generator | None = None,
) -> dict[str, float]:
    """Bootstrap interval of the Frechet distance of features (N, D) and (M, D).

    Features are drawn with replacement. A resample has fewer different features, so that its distance is larger on
    average by about the bias of N features; the interval is therefore the spread of the resamples around their own
    mean, put around the distance of all features. It covers the sampling of these features, and neither that bias
    (`frechet_extrapolation`) nor another training run.

    Args:
        real, generated: the features. With fewer of them than half of D a resample costs a small SVD, otherwise
            one `frechet_distance`.
        resamples: how many, at least 2.
        level: share of the resamples inside, in (0, 1).
        resample_real: False keeps the real features as they are, the interval then is for this reference set.
        generator: of the draws; default: seeded with 0.

    Returns:
        {"fid", "fid_low", "fid_high", "fid_std": standard deviation of the resamples}.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, or options outside their range.
    """
    check_clouds(real, generated)
    if resamples < 2 or not 0 < level < 1:
        raise ValueError(f"resamples must be at least 2 and level in (0, 1), got {resamples} and {level}.")
    generator = generator or torch.Generator().manual_seed(0)
    real, generated = real.detach().cpu(), generated.detach().cpu()
    values = []
    for _ in range(resamples):
        drawn = generated[torch.randint(len(generated), (len(generated),), generator=generator)]
        beside = real[torch.randint(len(real), (len(real),), generator=generator)] if resample_real else real
        values.append(frechet_distance_of_features(beside, drawn))
    values = torch.tensor(values, dtype=torch.float64)
    value = frechet_distance_of_features(real, generated)
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = (value + torch.quantile(values - values.mean(), tails)).tolist()
    return {"fid": value, "fid_low": low, "fid_high": high, "fid_std": float(values.std())}


def frechet_extrapolation(
    real: Tensor,
    generated: Tensor,
    *,
    points: int = 15,
    smallest: float | None = None,
    vary_real: bool = True,
    generator: torch.Generator | None = None,
) -> dict[str, float]:
    """The Frechet distance of infinitely many features, from a line in 1 / N through those of several N.

    Chong and Forsyth, "Effectively unbiased FID and inception score and where to find them", CVPR 2020, section 4:
    the bias of N features is linear in 1 / N to first order, with a slope that depends on the generator, so that even
    distances at equal N do not compare. They keep the reference fixed; with `vary_real` it shrinks in proportion, and
    its own bias goes too.

    Args:
        real, generated: features (N, D) and (M, D).
        points: sizes, evenly spaced from `smallest` to all features, each a random subset; at least 3.
        smallest: share of the features in the smallest subset, in (0, 1); default: a tenth, but at least 2 D features.
        vary_real: whether the real features are cut in the same proportion.
        generator: of the subsets; default: seeded with 0.

    Returns:
        {"fid_infinity": the line at 1 / N = 0; "fid": of all features; "fid_slope": fid is about fid_infinity +
        fid_slope / M}.

    Raises:
        ValueError: fewer than 4 D features (the line holds for more features than dimensions only), or options
            outside their range.
    """
    check_clouds(real, generated)
    least, dimension = min(len(real), len(generated)), real.shape[1]
    if least < 4 * dimension:
        raise ValueError(
            f"extrapolation needs at least 4 x {dimension} = {4 * dimension} features of either kind, got {least}: "
            "use more images, an extractor of fewer dimensions, or kernel_distance, which has no bias."
        )
    smallest = max(0.1, 2 * dimension / least) if smallest is None else smallest
    if points < 3 or not 0 < smallest < 1 or smallest * least < 2:
        raise ValueError(f"points must be at least 3 and smallest in (0, 1), got {points} and {smallest}.")
    generator = generator or torch.Generator().manual_seed(0)
    real, generated = real.detach().cpu(), generated.detach().cpu()
    inverse, values = [], []
    for share in torch.linspace(smallest, 1, points).tolist():
        part = _subset(generated, share, generator)
        inverse.append(1 / len(part))
        values.append(frechet_distance_of_features(_subset(real, share if vary_real else 1.0, generator), part))
    design = torch.stack([torch.ones(points), torch.tensor(inverse)], 1).double()
    intercept, slope = torch.linalg.lstsq(design, torch.tensor(values, dtype=torch.float64)[:, None]).solution[:, 0]
    return {"fid_infinity": float(intercept), "fid": values[-1], "fid_slope": float(slope)}


def _subset(features: Tensor, share: float, generator: torch.Generator) -> Tensor:
    number = round(share * len(features))
    return (
        features if number == len(features) else features[torch.randperm(len(features), generator=generator)[:number]]
    )
