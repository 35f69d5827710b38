"""Paired differences: laws, scikit-learn's numbers, and how often chance alone is called a difference."""

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit, logit
from sklearn.metrics import brier_score_loss, roc_auc_score

from biopsy.core.errors import MetricError
from biopsy.statistics.paired import estimate_differences, sample_seeds, subtract
from biopsy.statistics.resampling import Resampler
from biopsy.statistics.weighted_counts import sort_scores
from refusals import refuses
from report_facts import estimate_patch_metrics


def draw_pair(rng, n_patients, patches=40, gain=0.0):
    """Two scores that share what makes a patient and a patch hard, and differ by chance and by ``gain``."""
    groups = np.repeat(np.arange(n_patients), patches)

    def of_patient(sd):
        return rng.normal(0, sd, n_patients)[groups]

    target = (rng.random(len(groups)) < rng.beta(1.5, 3.5, n_patients)[groups]).astype(int)
    shift, gap, patch = of_patient(0.5), of_patient(0.4), rng.normal(0, 0.7, len(groups))
    scores = [
        shift
        + of_patient(0.33)
        + target * (1.6 + own_gain + gap + of_patient(0.3))
        + patch
        + rng.normal(0, 0.7, len(groups))
        for own_gain in (gain, 0.0)
    ]
    return target, *(expit(score - 1.5) for score in scores), groups


def test_a_difference_is_that_of_the_metrics():
    target, first, second, groups = draw_pair(np.random.default_rng(0), 12)
    found = estimate_differences(target, first, second, groups, seed=0)
    assert found["auroc"].value == pytest.approx(
        roc_auc_score(target, first) - roc_auc_score(target, second), abs=1e-12
    )
    assert found["brier"].value == pytest.approx(
        brier_score_loss(target, first) - brier_score_loss(target, second), abs=1e-12
    )
    assert found["auroc"].low < found["auroc"].value < found["auroc"].high


def test_seeds_add_the_variance_of_their_mean():
    """By hand, with the degrees of freedom of Satterthwaite: 11 of 12 patients, 2 of 3 seeds each."""
    rng = np.random.default_rng(3)
    target, *scores, groups = draw_pair(rng, 12)
    seeds = [[expit(logit(prob) + rng.normal(0, 0.5)) for _ in range(3)] for prob in scores]
    samples = [
        sample_seeds(
            [sort_scores(target, prob, group_ids=groups) for prob in probs], Resampler(12), names=["brier"]
        )
        for probs in seeds
    ]
    found = subtract(*samples)["brier"]
    patients = ((found.over_patients.high - found.over_patients.low) / 2 / stats.t.ppf(0.975, 11)) ** 2
    of_seeds = [np.var([brier_score_loss(target, prob) for prob in probs], ddof=1) / 3 for probs in seeds]
    total = patients + sum(of_seeds)
    freedom = total**2 / (patients**2 / 11 + sum(variance**2 / 2 for variance in of_seeds))
    half = stats.t.ppf(0.975, freedom) * np.sqrt(total)
    assert (found.interval.high - found.interval.low) / 2 == pytest.approx(half)
    assert half**2 > 1.1 * patients * stats.t.ppf(0.975, 11) ** 2


def test_swapping_the_two_changes_the_sign():
    target, first, second, groups = draw_pair(np.random.default_rng(1), 12)
    one = estimate_differences(target, first, second, groups, names=["auroc"], seed=0)["auroc"]
    other = estimate_differences(target, second, first, groups, names=["auroc"], seed=0)["auroc"]
    assert (one.value, one.low, one.high) == pytest.approx((-other.value, -other.high, -other.low))


def test_what_makes_patients_hard_for_both_cancels():
    rng = np.random.default_rng(2)
    target, first, _, groups = draw_pair(rng, 20)
    second = expit(logit(first) + rng.normal(0, 0.2, len(first)))
    paired = estimate_differences(target, first, second, groups, names=["auroc"], seed=0)["auroc"]
    alone = estimate_patch_metrics(target, first, groups, seed=0)["auroc"]
    assert paired.high - paired.low < (alone.high - alone.low) / 4


def test_thresholds_are_each_classifiers_own():
    target, first, _, groups = draw_pair(np.random.default_rng(3), 10)
    kinds = {"names": ["sensitivity"], "seed": 0}
    assert estimate_differences(target, first, first, groups, **kinds)["sensitivity"].value == 0
    stricter = estimate_differences(target, first, first, groups, thresholds=(0.9, 0.5), **kinds)
    expected = (first[target == 1] >= 0.9).mean() - (first[target == 1] >= 0.5).mean()
    assert stricter["sensitivity"].value == pytest.approx(expected)


def test_no_interval_without_a_spread_or_with_few_patients():
    target, first, second, groups = draw_pair(np.random.default_rng(4), 4)
    few = estimate_differences(target, first, second, groups, names=["auroc"], seed=0)["auroc"]
    assert few.low is None and "only 4 patients" in few.reason
    target, first, second, groups = draw_pair(np.random.default_rng(5), 8)
    same = estimate_differences(target, first, first, groups, names=["auroc"], seed=0)["auroc"]
    assert same.value == 0 and same.low is None and "identical" in same.reason


def test_an_undefined_metric_states_why():
    groups = np.repeat(np.arange(6), 5)
    prob = np.linspace(0.1, 0.9, 30)
    found = estimate_differences(np.zeros(30, int), prob, prob[::-1], groups, names=["auroc"], seed=0)[
        "auroc"
    ]
    assert np.isnan(found.value) and found.reason == "undefined: no positive patches"


def test_a_level_that_is_none_is_refused():
    with refuses(MetricError, "between 0 and 1"):
        estimate_differences([0, 1], [0.1, 0.9], [0.2, 0.8], [0, 1], seed=0, level=95)


@pytest.mark.parametrize("n_patients", [10, *(pytest.param(n, marks=pytest.mark.slow) for n in (20, 50))])
def test_the_false_positive_rate_is_the_nominal_five_percent(n_patients):
    rng = np.random.default_rng(n_patients)
    n_cohorts, wrong = 300, 0
    for _ in range(n_cohorts):
        target, first, second, groups = draw_pair(rng, n_patients)
        found = estimate_differences(target, first, second, groups, names=["auroc"], seed=0)["auroc"]
        wrong += not found.low <= 0 <= found.high
    assert 0.01 <= wrong / n_cohorts <= 0.09  # 5 % give or take three binomial standard errors
    target, first, second, groups = draw_pair(rng, n_patients, gain=2.0)
    assert estimate_differences(target, first, second, groups, names=["auroc"], seed=0)["auroc"].low > 0
