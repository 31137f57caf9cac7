"""Student's interval of a mean: as often right as it says, for few runs too, and scipy's t test turned round."""

import numpy as np
import pytest
from cases import for_each
from scipy.stats import ttest_1samp

from hf_dpssl.evaluation.student_interval import student_interval


def test_interval_covers_the_true_mean_in_95_of_100_studies_of_few_seeds():
    random = np.random.default_rng(5)
    for seeds in (3, 5, 8):
        arms = random.normal([[[2.0], [1.3]]], 0.5, (400, 2, seeds)) + random.normal(0, 3, (400, 1, seeds))
        found = [student_interval(first - second) for first, second in arms]  # what a seed does to both cancels
        covered = np.mean([entry["low"] <= 0.7 <= entry["high"] for entry in found])
        assert 0.93 <= covered <= 0.97, (seeds, covered)


def test_interval_is_that_of_scipys_t_test():
    values = [16.2, -0.4, 33.1, 5.5]
    low, high = ttest_1samp(values, 0).confidence_interval(0.95)
    assert student_interval(values) == pytest.approx({"mean": np.mean(values), "low": low, "high": high})
    assert student_interval([2.5, 2.5, 2.5]) == {"mean": 2.5, "low": 2.5, "high": 2.5}


@for_each("values", [[], [1.0], [1.0, float("nan")], [1.0, float("inf")], [[1.0, 2.0]]])
def test_what_has_no_interval_is_refused(values):
    with pytest.raises(ValueError, match="at least two runs, each one finite number; got"):
        student_interval(values)
