"""Forecasts of what generators make of autoencoders' latents, from the autoencoders' own measures.

A forecast of a whole study is judged over its autoencoders: Spearman's correlation with a generator's result, over all
of them and over the worse half. A measure alone is a forecast; so is a regression on all of them, which learns from the
autoencoders of the other arms. Values of a seed are Tukey's pseudo-values (Tukey 1958), so that a mean over seeds and
Student's t interval are those of the jackknife.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from claim_statements import forecasts
from scipy.stats import spearmanr
from sklearn.impute import SimpleImputer
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

PENALTIES = np.logspace(-2, 4, 13)

Cells = dict[str, dict[int, dict]]  # arm: {seed: what its cell wrote}


def forecast_cells(cells: Cells, study: dict) -> Cells:
    """{forecast: {seed: {"metrics": pseudo-values}}} over the seeds that every arm has; {} with fewer than 3 of these.

    A forecast that is constant has correlation 0.
    """
    seeds = sorted(set.intersection(*(set(of_arm) for of_arm in (cells.get(arm, {}) for arm in study["arms"]))))
    if len(seeds) < 3:
        return {}
    whole = correlations(cells, study, seeds)
    without = {seed: correlations(cells, study, [other for other in seeds if other != seed]) for seed in seeds}
    count = len(seeds)
    return {
        name: {
            seed: {
                "metrics": {
                    metric: count * value - (count - 1) * without[seed][name][metric]
                    for metric, value in whole[name].items()
                }
            }
            for seed in seeds
        }
        for name in forecasts(study)
    }


def correlations(cells: Cells, study: dict, seeds: list[int], unseen: bool = False) -> dict[str, dict[str, float]]:
    """{forecast: {"all_TARGET", "worse_half_TARGET"}} of the autoencoders of some seeds; 1 orders them rightly.

    `unseen`, or `other_seeds` of what is stated: the regression learns from other seeds alone, too, as it would for an
    autoencoder of a seed of its own. At scale quick it learns from all other arms, so from what these share with the
    autoencoder in its seed.

    A measure that is better when higher counts as its negative, as all targets are better when lower. One that some
    arms have not (of codes, of an autoencoder without) is judged over the others, and so is a target.
    """
    unseen = unseen or study["forecast"].get("other_seeds", False)
    rows = [(arm, seed) for arm in study["arms"] for seed in seeds]
    names = study["forecast"]["measures"]
    measures = np.array([[goodness(cells[arm][seed], name, study) for name in names] for arm, seed in rows])
    found: dict[str, dict[str, float]] = {name: {} for name in forecasts(study)}
    for target, metric in study["forecast"]["targets"].items():
        wanted = np.array([goodness(cells[arm][seed], metric, study) for arm, seed in rows])
        has = np.isfinite(wanted)
        wanted = wanted[has]
        arms, of_seed = zip(*(row for row, reached in zip(rows, has, strict=True) if reached), strict=True)
        predicted = {"forecast": from_other_arms(measures[has], wanted, arms, of_seed if unseen else None)}
        predicted |= {name: measures[has, column] for column, name in enumerate(names)}
        worse = wanted <= np.median(wanted)
        for name, values in predicted.items():
            there = np.isfinite(values)
            found[name][f"all_{target}"] = rank_correlation(values[there], wanted[there])
            found[name][f"worse_half_{target}"] = rank_correlation(values[worse & there], wanted[worse & there])
    return found


def goodness(cell: dict, name: str, study: dict) -> float:
    """A metric of a cell, higher is better; the logarithm of a relative one; NaN where the cell has it not.

    Raises:
        ValueError: it has it, and that is no number.
    """
    about = study["metrics"][name]
    if name not in cell["metrics"]:
        return np.nan
    value = cell["metrics"][name]
    if not np.isfinite(value) or about.get("relative") and value <= 0:
        raise ValueError(f"{name} is {value}: nothing can be forecast from that, or of it.")
    value = np.log(value) if about.get("relative") else value
    return float(value if about["better"] == "higher" else -value)


def from_other_arms(
    measures: np.ndarray, wanted: np.ndarray, arms: Sequence[str], seeds: Sequence[int] | None = None
) -> np.ndarray:
    """(N,) predictions of `wanted` (N,) from `measures` (N, M) by ridge regressions on the rows of all other arms.

    With `seeds` (N), on those of them that are of other seeds. A measure that is NaN counts as its mean.
    """
    predicted = np.empty(len(wanted))
    of_arm, of_seed = np.array(arms), np.array(seeds if seeds is not None else [0] * len(arms))
    for arm, seed in dict.fromkeys(zip(arms, of_seed.tolist(), strict=True)):
        own = of_arm == arm
        asked = own & (of_seed == seed)
        known = ~own if seeds is None else ~own & (of_seed != seed)
        model = make_pipeline(SimpleImputer(), StandardScaler(), RidgeCV(PENALTIES)).fit(measures[known], wanted[known])
        predicted[asked] = model.predict(measures[asked])
    return predicted


def rank_correlation(values: np.ndarray, wanted: np.ndarray) -> float:
    """Spearman's, 0 where one of them is constant or empty."""
    if len(values) == 0 or np.ptp(values) == 0 or np.ptp(wanted) == 0:
        return 0.0
    return float(spearmanr(values, wanted).statistic)
