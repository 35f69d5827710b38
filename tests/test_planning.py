"""Planning: textbook numbers, the power that was promised, and refusals."""

import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from biopsy.core.errors import MetricError
from biopsy.statistics.paired import estimate_differences
from biopsy.statistics.power import comparison_power, influence_groups, plan_patients
from biopsy.statistics.weighted_counts import sort_scores
from refusals import refuses
from report_facts import estimate_patch_metrics
from test_paired import draw_pair


def test_numbers_of_a_textbook():
    """Cohen (1988) and G*Power 3.1, paired t, two-sided .05: effect .5 needs 34 (power .8) and 44 (.9)."""
    assert plan_patients(1.0, 30, difference=0.5).n_patients == 34
    assert plan_patients(1.0, 30, difference=0.5, power=0.9).n_patients == 44
    assert plan_patients(2.0, 30, difference=0.4).n_patients == 199
    assert comparison_power(0.5, 34) == pytest.approx(0.8078, abs=1e-4)


def test_a_number_worked_by_hand():
    """Six patients of ten patches, 9 8 9 7 8 10 of them right: their accuracies' own mean and spread."""
    right = [9, 8, 9, 7, 8, 10]
    target = np.ones(60, int)
    prob = np.concatenate([[0.9] * n + [0.1] * (10 - n) for n in right])
    sample = sort_scores(target, prob, group_ids=np.repeat(np.arange(6), 10))
    influences = influence_groups([sample], "accuracy")
    # The jackknife of a mean over patients of equal size: each patient's mean less that of all, 0.9 - 0.85
    assert influences.values == pytest.approx([0.05, -0.05, 0.05, -0.15, -0.05, 0.15])
    sd = math.sqrt((0.0025 * 4 + 0.0225 * 2) / 5)
    assert np.std(influences.values, ddof=1) == pytest.approx(sd)
    # (z.975 + z.8)² (sd / difference)² = 7.849 * 0.011 / 0.0025 = 34.5, and about z² / 2 = 2 more for t
    assert plan_patients(sd, 6, difference=0.05).n_patients == 37


def test_influences_are_those_of_the_interval():
    target, prob, _, groups = draw_pair(np.random.default_rng(0), 15)
    influences = influence_groups([sort_scores(target, prob, group_ids=groups)], "brier")
    interval = estimate_patch_metrics(target, prob, groups, seed=0)["brier"]
    error = np.std(influences.values, ddof=1) / np.sqrt(15)
    slope = 1 / (interval.value * (1 - interval.value))
    half = (np.log(interval.high / (1 - interval.high)) - np.log(interval.low / (1 - interval.low))) / 2
    assert stats.t.ppf(0.975, 14) * error * slope == pytest.approx(half, rel=0.02)


def test_degrees_of_freedom_are_those_of_patients_who_carry_the_metric():
    """Of twenty patients eight have positive patches: sensitivity is planned from what those are worth."""
    target, prob, _, groups = draw_pair(np.random.default_rng(0), 20)
    target = np.where(groups < 8, target, 0)
    found = influence_groups([sort_scores(target, prob, group_ids=groups)], "sensitivity")
    positives = np.bincount(groups, target)
    assert (
        found.effective == pytest.approx(positives.sum() ** 2 / (positives**2).sum()) and found.effective < 8
    )
    sd = float(np.std(found.values, ddof=1))
    few, all_carry = (
        plan_patients(sd, 20, effective=effective, difference=sd / 2) for effective in (found.effective, 20)
    )
    assert few.n_patients > all_carry.n_patients and few.high > all_carry.high and few.low < all_carry.low


def test_the_number_of_patients_follows_the_request():
    def needed(sd=0.1, n=20, **asked):
        return plan_patients(sd, n, **{"difference": 0.05, **asked})

    assert needed(difference=0.025).n_patients > 3.5 * needed().n_patients
    assert needed(power=0.9).n_patients > needed().n_patients < needed(level=0.99).n_patients
    assert needed(sd=0.001).n_patients == 5
    few, many = needed(n=6), needed(n=200)
    assert few.low < many.low < many.n_patients == few.n_patients < many.high < few.high
    assert needed().power >= 0.8 > comparison_power(0.5, needed().n_patients - 1)


@pytest.mark.slow
def test_the_planned_power_is_reached():
    """Plan on 300 patients for the difference that is there; see how often cohorts of that size show it."""
    rng = np.random.default_rng(1)
    target, first, second, _ = draw_pair(rng, 4000, gain=0.5)
    truth = roc_auc_score(target, first) - roc_auc_score(target, second)
    target, first, second, groups = draw_pair(rng, 300, gain=0.5)
    pair = [sort_scores(target, prob, group_ids=groups) for prob in (first, second)]
    one, other = (influence_groups([scores], "auroc") for scores in pair)
    need = plan_patients(float(np.std(one.values - other.values, ddof=1)), 300, difference=truth)
    assert 20 < need.n_patients < 40
    n_cohorts, seen = 200, 0
    for _ in range(n_cohorts):
        target, first, second, groups = draw_pair(rng, need.n_patients, gain=0.5)
        found = estimate_differences(target, first, second, groups, names=["auroc"], seed=0)["auroc"]
        seen += found.low > 0
    assert seen / n_cohorts == pytest.approx(0.8, abs=0.085)  # three binomial standard errors


def test_refusals():
    target, prob, _, groups = draw_pair(np.random.default_rng(2), 4)
    with refuses(MetricError, "4 patients with positive patches"):
        influence_groups([sort_scores(target, prob, group_ids=groups)], "auroc")
    with refuses(MetricError, "'auc'", "'auroc'"):
        influence_groups([sort_scores(target, prob, group_ids=groups)], "auc")
    with refuses(MetricError, "auroc", "positive patches"):
        influence_groups([sort_scores(target * 0, prob, group_ids=groups)], "auroc")
    for wrong in (0, -0.03, math.nan):
        with refuses(MetricError, "difference", wrong, "above 0"):
            plan_patients(0.1, 20, difference=wrong)
    for wrong in (0.05, 1.0, 80):
        with refuses(MetricError, "power", wrong, "0.05 and 1"):
            plan_patients(0.1, 20, difference=0.03, power=wrong)
    with refuses(MetricError, "1.9", "at least 2"):
        plan_patients(0.1, 20, difference=0.05, effective=1.9)
    assert plan_patients(0.1, 20, difference=0.05, effective=2.0).n_patients > 34
    with refuses(MetricError, "vary"):
        plan_patients(0.0, 20, difference=0.03)
    with refuses(MetricError, "1,000,000"):
        plan_patients(0.5, 20, difference=1e-5)
