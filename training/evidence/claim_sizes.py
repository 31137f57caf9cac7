"""Parameters for equal quality: how large a generator must be, in each latent space, to be as good as a given one.

The quality is that of the reference arm's generator of one stated size with the same seed. Between the sizes that were
trained, the logarithm of the distance is linear in the logarithm of the parameters; a larger generator that is worse
than a smaller one counts as good as that. Outside of them nothing is extrapolated: the smallest or the largest size
stands for what may be smaller or larger still, so that differences are rather too small than too large.
"""

from __future__ import annotations

import math

Cells = dict[str, dict[int, dict]]  # arm: {seed: what its cell wrote}


def with_parameters(cells: Cells, study: dict) -> Cells:
    """The cells with the metrics of `equal_quality`, of the seeds that the reference arm has."""
    for name, about in study.get("equal_quality", {}).items():
        reference = cells.get(about["reference"], {})
        goals = {seed: cell["metrics"][about["at"]] for seed, cell in reference.items()}
        for of_arm in cells.values():
            for seed in of_arm.keys() & goals.keys():
                metrics = of_arm[seed]["metrics"]
                curve = [(metrics[size["parameters"]], metrics[size["distance"]]) for size in about["sizes"]]
                metrics[name] = parameters_for(curve, goals[seed])
    return cells


def parameters_for(curve: list[tuple[float, float]], goal: float) -> float:
    """Parameters at which a curve of (parameters, distance > 0) falls to `goal`, within the curve's own.

    Raises:
        ValueError: fewer than two sizes, or a number that is not positive and finite.
    """
    numbers = [goal, *(value for point in curve for value in point)]
    if len({parameters for parameters, _ in curve}) < 2 or not all(0 < value < math.inf for value in numbers):
        raise ValueError(f"two sizes with positive distances are needed for the distance {goal}, got {curve}.")
    (size, reached), *larger = sorted(curve)
    if goal >= reached:
        return size
    for parameters, distance in larger:
        if distance <= goal:
            share = math.log(reached / goal) / math.log(reached / distance)
            return size * (parameters / size) ** share
        if distance < reached:
            size, reached = parameters, distance
    return max(parameters for parameters, _ in curve)
