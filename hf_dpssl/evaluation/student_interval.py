"""How far a mean over few runs can be trusted."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import t as student_t


def student_interval(values: Sequence[float]) -> dict[str, float]:
    """Mean of independent runs and its 95 % interval by Student's t with n - 1 degrees of freedom (Student 1908).

    For two arms with the same seeds, the values are the differences seed by seed. A percentile bootstrap is no
    substitute: of three values it cannot leave their range, and covers the true mean three times in four.

    Args:
        values: (n,) one number per run, n >= 2, finite; exact for normal ones.

    Returns:
        {"mean", "low", "high"}, in the unit of the values.

    Raises:
        ValueError: fewer than two values, or one that is not finite.
    """
    runs = np.asarray(values, dtype=np.float64)
    if runs.ndim != 1 or len(runs) < 2 or not np.isfinite(runs).all():
        raise ValueError(f"an interval needs at least two runs, each one finite number; got {runs.tolist()}.")
    mean = float(runs.mean())
    half = float(student_t.ppf(0.975, len(runs) - 1) * runs.std(ddof=1) / math.sqrt(len(runs)))
    return {"mean": mean, "low": mean - half, "high": mean + half}
