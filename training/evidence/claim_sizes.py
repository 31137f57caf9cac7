"""Parameters for equal quality: how large a generator must be, in each latent space, to be as good as a given one.

The quality is that of the reference arm's generator of one stated size with the same seed. Between the sizes that were
trained, the logarithm of the distance is linear in the logarithm of the parameters; a larger generator that is worse
than a smaller one counts as good as that. Outside of them nothing is extrapolated: the smallest or the largest size
stands for what may be smaller or larger still, and the cell says so under `beyond`. Differences of such figures are
bounds, whose spread says nothing, so no test is of them: "fewer parameters by more than the margin" means that at the
size that the margin leaves, images are nearer than the reference's at its own, and that is tested (`nearer_at_margin`).
"""

from __future__ import annotations

import math

import numpy as np

Cells = dict[str, dict[int, dict]]  # arm: {seed: what its cell wrote}
Curve = list[tuple[float, float]]  # (parameters, distance)


def with_parameters(cells: Cells, study: dict) -> Cells:
    """The cells with the metrics of `equal_quality`, of the seeds that the reference arm has.

    A cell whose curve does not reach the quality between its sizes has {"beyond": {metric: "smaller" or "larger"}}.
    """
    for name, about in study.get("equal_quality", {}).items():
        reference = cells.get(about["reference"], {})
        goals = {seed: cell["metrics"][about["at"]] for seed, cell in reference.items()}
        for of_arm in cells.values():
            for seed in of_arm.keys() & goals.keys():
                cell = of_arm[seed]
                cell["metrics"][name], beyond = parameters_for(_curve(cell["metrics"], about), goals[seed])
                if beyond:
                    cell.setdefault("beyond", {})[name] = beyond
    return cells


def parameters_for(curve: Curve, goal: float) -> tuple[float, str]:
    """Parameters at which a curve of (parameters, distance > 0) falls to `goal`, within the curve's own.

    Returns:
        The parameters, and "" or on which side of the curve's own they lie: "smaller", "larger".

    Raises:
        ValueError: fewer than two sizes, or a number that is not positive and finite.
    """
    _check(curve, goal)
    (size, reached), *larger = sorted(curve)
    if goal >= reached:
        return size, "smaller" if goal > reached else ""
    for parameters, distance in larger:
        if distance <= goal:
            share = math.log(reached / goal) / math.log(reached / distance)
            return size * (parameters / size) ** share, ""
        if distance < reached:
            size, reached = parameters, distance
    return max(parameters for parameters, _ in curve), "larger"


def nearer_at_margin(cells: Cells, comparison: dict, about: dict) -> dict[int, float]:
    """{seed: by how much less than its margin a comparison's `first` needs as many parameters}, above 0 if it does.

    In logarithms of distances: the reference's at its own size P, less that of the other arm at P / (1 + margin); where
    the reference is `first`, the other arm's at P * (1 + margin) less the reference's. Between sizes the logarithm is
    linear, without the rule for larger ones that are worse, which would favour the arm that it is applied to.

    Raises:
        ValueError: neither arm is the reference, or the margin leads beyond the sizes.
    """
    first, second, reference = comparison["first"], comparison["second"], about["reference"]
    if reference not in (first, second):
        raise ValueError(f"{comparison['metric']} of {first} and {second} has no test: one must be {reference}")
    at = next(size["parameters"] for size in about["sizes"] if size["distance"] == about["at"])
    ours, sign = (first, 1) if reference == second else (second, -1)
    found = {}
    for seed in sorted(cells.get(first, {}).keys() & cells.get(second, {}).keys()):
        own, other = (cells[arm][seed]["metrics"] for arm in (reference, ours))
        curve = sorted(_curve(other, about))
        _check(curve, own[about["at"]])
        sizes, distances = np.log(np.array(curve)).T
        wanted = math.log(own[at]) - sign * math.log1p(comparison["margin"])
        if not sizes[0] <= wanted <= sizes[-1]:
            raise ValueError(f"{comparison['metric']} of seed {seed}: {math.exp(wanted):.0f} lies beyond the sizes")
        found[seed] = sign * (math.log(own[about["at"]]) - float(np.interp(wanted, sizes, distances)))
    return found


def _curve(metrics: dict, about: dict) -> Curve:
    return [(metrics[size["parameters"]], metrics[size["distance"]]) for size in about["sizes"]]


def _check(curve: Curve, goal: float) -> None:
    numbers = [goal, *(value for point in curve for value in point)]
    if len({parameters for parameters, _ in curve}) < 2 or not all(0 < value < math.inf for value in numbers):
        raise ValueError(f"two sizes with positive distances are needed for the distance {goal}, got {curve}.")
