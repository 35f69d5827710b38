"""Decisions and reliability: net benefit and Brier's parts by hand, error rates as the metrics have them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss

from biopsy.core.errors import MetricError
from biopsy.statistics.calibration import calibration_error, ece_floor
from biopsy.statistics.decisions import (
    count_decisions,
    estimate_benefit_gain,
    estimate_net_benefit,
    estimate_predictive_values,
    estimate_rates,
    net_benefit,
)
from biopsy.statistics.reliability import decompose_brier, estimate_reliability
from refusals import refuses
from report_facts import estimate_patch_metrics

TEN = ([0, 0, 0, 1, 0, 1, 0, 1, 1, 1], [0.1, 0.1, 0.2, 0.2, 0.4, 0.4, 0.6, 0.6, 0.9, 0.9])


def draw(n=1200, n_groups=12, seed=0):
    rng = np.random.default_rng(seed)
    prob = rng.random(n).round(3)
    groups = rng.integers(n_groups, size=n).astype(str)
    return (rng.random(n) < prob).astype(int), prob, groups


# Net benefit: Vickers and Elkin 2006.


def test_net_benefit_by_hand():
    """At .5 the four highest are called: 3 true, 1 false; at .25 six: 4 true, 2 false, weighed one third."""
    found = net_benefit(*TEN, [0.25, 0.5, 0.8])
    assert found == pytest.approx([4 / 10 - 2 / 10 / 3, 3 / 10 - 1 / 10, 2 / 10])
    treat_all = net_benefit(TEN[0], np.ones(10), [0.25, 0.5, 0.8])
    assert treat_all == pytest.approx([0.5 - 0.5 / 3, 0, 0.5 - 0.5 * 4])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(0.01, 0.99))
def test_net_benefit_of_all_and_of_none(seed, threshold):
    target, prob, _ = draw(60, seed=seed)
    all_, none = (net_benefit(target, np.full(60, value), [threshold])[0] for value in (1.0, 0.0))
    share = target.mean()
    assert none == 0 and all_ == pytest.approx(share - (1 - share) * threshold / (1 - threshold))
    assert net_benefit(target, target.astype(float), [threshold])[0] == pytest.approx(share)
    assert net_benefit(target, prob, [threshold])[0] <= share


def test_net_benefit_with_its_interval_is_net_benefit():
    target, prob, groups = draw()
    at = [0.2, 0.5]
    calls = count_decisions(target, prob, groups, at, seed=0)
    for k, plain in enumerate(net_benefit(target, prob, at)):
        found = estimate_net_benefit(calls, k)
        assert found.value == pytest.approx(plain) and found.low < plain < found.high


@pytest.mark.parametrize("threshold", [0, 1, -0.1, float("nan")])
def test_threshold_probabilities_lie_between_0_and_1(threshold):
    with refuses(MetricError, "above 0 and below 1"):
        net_benefit(*TEN, [threshold])


# Rates at a threshold.


@pytest.mark.parametrize("n_groups", [3, 12, 130])
def test_rates_and_intervals_are_those_of_the_metrics(n_groups):
    target, prob, groups = draw(n_groups=n_groups)
    calls = count_decisions(target, prob, groups, [0.7, 0.31], seed=5, draws=300)
    for k, threshold in enumerate(calls.thresholds):
        wanted = estimate_patch_metrics(target, prob, groups, threshold, seed=5, draws=300)
        for name, found in estimate_rates(calls, k).items():
            assert (found.value, found.reason) == (pytest.approx(wanted[name].value), wanted[name].reason)
            if found.low is not None:
                assert (found.low, found.high) == pytest.approx((wanted[name].low, wanted[name].high))


def test_rates_that_are_exactly_1_and_undefined():
    target, groups = np.repeat([0, 1], 10), np.tile(np.arange(5).astype(str), 4)
    found = estimate_rates(count_decisions(target, target.astype(float), groups, [0.5, 1.5], seed=0), 0)
    assert found["sensitivity"].high == 1 and found["sensitivity"].low == pytest.approx(0.025 ** (1 / 5))
    nothing = estimate_rates(count_decisions(target, target.astype(float), groups, [0.5, 1.5], seed=0), 1)
    assert np.isnan(nothing["ppv"].value) and "no patches predicted positive" in nothing["ppv"].reason


def test_predictive_values_by_hand():
    """Sensitivity .9 and specificity .9 at prevalence .01: 9 right in 108 called, as in every textbook."""
    target = np.repeat([1, 0], 100)
    prob = np.concatenate([np.tile([1] * 9 + [0], 10), np.tile([0] * 9 + [1], 10)]).astype(float)
    calls = count_decisions(target, prob, np.tile(np.arange(10), 20).astype(str), [0.5], seed=0)
    found = estimate_predictive_values(calls, 0, 0.01)
    assert found["ppv"].value == pytest.approx(9 / 108)
    assert found["npv"].value == pytest.approx(891 / 892)


def test_at_the_samples_own_prevalence_predictive_values_are_its_own():
    target, prob, groups = draw()
    calls = count_decisions(target, prob, groups, [0.6], seed=0)
    here, stated = estimate_rates(calls, 0), estimate_predictive_values(calls, 0, target.mean())
    for name in ("ppv", "npv"):
        assert stated[name].value == pytest.approx(here[name].value)
        assert stated[name].low < stated[name].value < stated[name].high
    rarer = estimate_predictive_values(calls, 0, 0.02)
    assert rarer["ppv"].value < here["ppv"].value and rarer["npv"].value > here["npv"].value


def test_gain_over_the_better_reference_is_paired():
    target, prob, groups = draw(n_groups=12)
    thresholds = [0.1, 0.4]
    calls = count_decisions(target, prob, groups, thresholds, seed=0)
    for at, threshold in enumerate(thresholds):
        act_on_all = net_benefit(target, np.ones(len(target)), [threshold])[0]
        gain, model = estimate_benefit_gain(calls, at), estimate_net_benefit(calls, at)
        assert gain.value == pytest.approx(model.value - max(act_on_all, 0.0))
        if act_on_all <= 0:
            assert (gain.low, gain.high) == pytest.approx((model.low, model.high))
        else:
            assert gain.high - gain.low < model.high - model.low


def test_few_patients_allow_no_interval():
    target, prob, groups = draw(n_groups=2)
    found = estimate_predictive_values(count_decisions(target, prob, groups, [0.5], seed=0), 0, 0.1)["ppv"]
    assert found.low is None and found.reason == (
        "only 2 patients with positive patches: an interval needs 5"
    )


@pytest.mark.parametrize("prevalence", [0, 1, 2.0, -0.1, float("nan")])
def test_a_prevalence_is_a_share(prevalence):
    target, prob, groups = draw(20)
    with refuses(MetricError, "0.02"):
        estimate_predictive_values(count_decisions(target, prob, groups, [0.5], seed=0), 0, prevalence)


@pytest.mark.parametrize("wrong", [np.nan, 1.2, -0.1])
def test_probabilities_that_are_none_are_refused(wrong):
    target, prob, groups = draw(20)
    prob[2] = wrong
    for measure in (
        lambda: count_decisions(target, prob, groups, [0.5], seed=0),
        lambda: net_benefit(target, prob, [0.5]),
        lambda: decompose_brier(target, prob),
        lambda: estimate_reliability(target, prob, groups, seed=0),
    ):
        with refuses(MetricError, "1", "0-1"):
            measure()


# Reliability and the Brier score.


def test_a_calibration_table_by_hand():
    """Five pairs: .1 0/2, .2 1/2, .4 1/2, .6 1/2, .9 2/2; gaps .1 .3 .1 .1 .1, so ECE .14."""
    table = estimate_reliability(*TEN, np.arange(10).astype(str), seed=0, n_bins=5)
    assert [one.n for one in table] == [2] * 5
    assert [one.observed.value for one in table] == [0, 0.5, 0.5, 0.5, 1]
    assert [one.mean_prob for one in table] == pytest.approx([0.1, 0.2, 0.4, 0.6, 0.9])
    gaps = [abs(one.mean_prob - one.observed.value) for one in table]
    assert np.mean(gaps) == pytest.approx(0.14)
    levels = np.array([0.9, 0.6, 0.4, 0.2, 0.1])
    ece = calibration_error(levels, np.array([2.0, 1, 1, 1, 0]), np.array([0.0, 1, 1, 1, 2]), 5)
    assert ece == pytest.approx(0.14)


def test_bins_are_scikit_learns():
    target, prob, groups = draw(1500)
    prob = (prob + np.arange(1500) / 1e6).clip(0, 1)  # no ties, on whose bin the two need not agree
    found, promised = calibration_curve(target, prob, n_bins=15, strategy="quantile")
    table = estimate_reliability(target, prob, groups, seed=0)
    assert [one.observed.value for one in table] == pytest.approx(found.tolist())
    assert [one.mean_prob for one in table] == pytest.approx(promised.tolist())
    inside = [one.observed.low <= one.mean_prob <= one.observed.high for one in table]
    assert np.mean(inside) > 0.7  # probabilities drawn right
    assert all(one.low <= one.mean_prob <= one.high for one in table)


def test_reliability_of_many_groups_and_of_one():
    target, prob, groups = draw(2000, n_groups=150)
    few, many = (estimate_reliability(target, prob, g, seed=0, draws=200) for g in (groups, ["a"] * 2000))
    assert all(one.observed.low < one.observed.value < one.observed.high for one in few)
    assert all(one.observed.reason == "only 1 patient with patches: an interval needs 5" for one in many)


def test_bins_without_spread():
    table = estimate_reliability(TEN[0], TEN[1], np.tile(np.arange(5), 2).astype(str), seed=0, n_bins=1)
    assert len(table) == 1 and table[0].n_groups == 5
    constant = estimate_reliability(TEN[0], np.full(10, 0.5), np.arange(10).astype(str), seed=0)
    assert len(constant) == 1 and constant[0].mean_prob == constant[0].observed.value == 0.5


def test_the_parts_of_the_brier_score_by_hand():
    """Two bins: .25 (one of four) and .75 (three of four): right, and .25 from the .5 of all."""
    parts = decompose_brier([0, 0, 0, 1, 0, 1, 1, 1], [0.25] * 4 + [0.75] * 4, n_bins=2)
    assert (parts.reliability, parts.resolution, parts.uncertainty) == (0, 0.0625, 0.25)
    assert parts.within_bins == pytest.approx(0)
    off = decompose_brier([0, 0, 0, 1, 0, 1, 1, 1], [0.0] * 4 + [0.5] * 4, n_bins=2)
    assert off.reliability == 0.0625  # both bins say .25 less than is there


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 30))
def test_the_parts_add_up_to_the_brier_score(seed, n_bins):
    target, prob, _ = draw(200, seed=seed)
    parts = decompose_brier(target, prob, n_bins=n_bins)
    total = parts.reliability - parts.resolution + parts.uncertainty + parts.within_bins
    assert total == pytest.approx(brier_score_loss(target, prob))
    assert parts.uncertainty == pytest.approx(target.mean() * (1 - target.mean()))
    assert parts.reliability >= 0 and 0 <= parts.resolution <= parts.uncertainty + 1e-12


def test_the_floor_is_the_error_of_a_perfect_classifier():
    target, prob, groups = draw(712)
    table = estimate_reliability(target, prob, groups, seed=0)
    ece = sum(one.n * abs(one.mean_prob - one.observed.value) for one in table) / 712
    assert ece == pytest.approx(ece_floor(prob, seed=0), abs=0.02) and ece > 0.01
