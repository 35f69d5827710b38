"""A mean over patches with its interval over patients: by hand, by simulation, and refused."""

import numpy as np
import pytest
from scipy import stats

from biopsy.core.errors import MetricError
from biopsy.statistics.resampling import clustered_mean
from refusals import refuses


def test_with_one_patch_a_patient_it_is_students_t():
    values = np.random.default_rng(0).normal(0.3, 0.1, 12)
    found = clustered_mean(values, np.arange(12).astype(str), seed=0)
    low, high = stats.t.interval(0.95, 11, loc=values.mean(), scale=stats.sem(values))
    assert (found.value, found.low, found.high) == pytest.approx((values.mean(), low, high))


def test_patches_of_one_patient_count_as_one_when_they_agree():
    values = np.random.default_rng(1).normal(0, 1, 8)
    alone = clustered_mean(values, np.arange(8), seed=0)
    often = clustered_mean(values.repeat(50), np.arange(8).repeat(50), seed=0)
    assert (often.low, often.high) == pytest.approx((alone.low, alone.high))


def test_few_patients_have_no_interval_and_many_are_drawn_anew():
    few = clustered_mean([0.1, 0.2, 0.4], ["a", "b", "b"], seed=0)
    assert few.value == pytest.approx(0.7 / 3) and few.low is None and "only 2 patients" in few.reason
    values = np.random.default_rng(2).normal(0, 1, 400)
    many = clustered_mean(values, np.arange(400), seed=0)
    assert many.high - many.low == pytest.approx(2 * 1.966 * stats.sem(values), rel=0.08)
    assert many == clustered_mean(values, np.arange(400), seed=0)


def test_bounds_are_kept():
    found = clustered_mean([0.99, 1, 1, 1, 0.9, 1], list("abcdef"), seed=0, bounds=(0.0, 1.0))
    assert 0 < found.low < found.value < found.high < 1


@pytest.mark.parametrize("values", [[], [np.nan, 1.0], [1.0, 2.0, 3.0]])
def test_values_without_a_mean_are_refused(values):
    with refuses(MetricError, "finite"):
        clustered_mean(values, ["a", "b"], seed=0)
