"""Contrasts: numbers of scikit-learn and by hand, patients as the unit, reasons for missing intervals."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from biopsy.core.errors import MetricError
from biopsy.statistics.contrasts import contrast_groups
from biopsy.statistics.resampling import clustered_ratio
from refusals import refuses
from report_facts import estimate_patch_metrics


def draw(n_groups=12, each=30, shift=0.0, spread=0.5, seed=0):
    """Values that differ between groups, and within each by ``shift`` for the chosen third."""
    rng = np.random.default_rng(seed)
    groups = np.repeat([f"g{i:03d}" for i in range(n_groups)], each)
    chosen = rng.random(len(groups)) < 1 / 3
    values = rng.normal(np.repeat(rng.normal(0, spread, n_groups), each) + shift * chosen)
    return values, chosen, groups


def test_values_are_scikit_learns_and_numpys():
    values, chosen, groups = draw(shift=0.7)
    found = contrast_groups(values, chosen, groups, seed=0)
    assert found.auroc.value == pytest.approx(roc_auc_score(chosen, values), abs=1e-12)
    a, b = values[chosen], values[~chosen]
    pooled = np.sqrt((a.var() * len(a) + b.var() * len(b)) / (len(a) + len(b)))
    assert found.difference_sd.value == pytest.approx((a.mean() - b.mean()) / pooled, rel=1e-9)
    assert (found.n_chosen, found.n_others) == (len(a), len(b))
    assert (found.mean_chosen, found.mean_others) == (pytest.approx(a.mean()), pytest.approx(b.mean()))
    one = groups == "g003"
    assert found.by_group["g003"]["auroc"] == pytest.approx(roc_auc_score(chosen[one], values[one]))
    assert found.within.value == pytest.approx(np.mean([one["auroc"] for one in found.by_group.values()]))


def test_the_interval_of_the_difference_is_the_jackknifes():
    values, chosen, groups = draw(shift=0.4)

    def difference(kept):
        a, b = values[kept & chosen], values[kept & ~chosen]
        pooled = np.sqrt((a.var() * len(a) + b.var() * len(b)) / (len(a) + len(b)))
        return (a.mean() - b.mean()) / pooled

    names = np.unique(groups)
    without = np.array([difference(groups != name) for name in names])
    n = len(names)
    error = np.sqrt(((without - without.mean()) ** 2).sum() * (n - 1) / n)
    sizes = np.array([[np.sum(kind & (groups == name)) for name in names] for kind in (chosen, ~chosen)])
    effective = (sizes.sum(axis=1) ** 2 / (sizes**2).sum(axis=1)).min()
    half = stats.t.ppf(0.975, effective - 1) * error
    found = contrast_groups(values, chosen, groups, seed=0).difference_sd
    assert found.low == pytest.approx(found.value - half, rel=1e-9)
    assert found.high == pytest.approx(found.value + half, rel=1e-9)


@pytest.mark.parametrize("n_groups", [12, 120])
def test_the_interval_of_the_auroc_is_that_of_any_auroc(n_groups):
    values, chosen, groups = draw(n_groups, each=8, shift=0.5)
    probs = stats.rankdata(values) / (len(values) + 1)
    usual = estimate_patch_metrics(chosen.astype(int), probs, groups, seed=3, draws=100)["auroc"]
    assert contrast_groups(values, chosen, groups, seed=3, draws=100).auroc == usual
    assert usual.low is not None


def test_turning_the_values_turns_the_contrast():
    values, chosen, groups = draw(shift=0.5)
    up, down = (contrast_groups(sign * values, chosen, groups, seed=0) for sign in (1, -1))
    assert down.auroc.value == pytest.approx(1 - up.auroc.value)
    assert down.difference_sd.value == pytest.approx(-up.difference_sd.value)
    assert down.difference_sd.low == pytest.approx(-up.difference_sd.high)
    order = np.random.default_rng(1).permutation(len(values))
    moved = contrast_groups(values[order], chosen[order], groups[order], seed=0)
    assert moved.auroc.low == pytest.approx(up.auroc.low)
    assert moved.difference_sd.low == pytest.approx(up.difference_sd.low)


def test_a_contrast_between_patients_is_not_taken_for_one_within():
    """Chosen patches come from patients with high values; within each, chosen and others are alike."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(20), 50)
    level = np.repeat(rng.normal(0, 2, 20), 50)
    chosen = rng.random(1000) < np.where(level > 0, 0.7, 0.2)
    found = contrast_groups(level + rng.normal(size=1000), chosen, groups, seed=0)
    assert found.auroc.low > 0.5
    assert found.within.low < 0.5 < found.within.high


def test_few_patients_have_values_and_a_reason():
    values, chosen, groups = draw(n_groups=3, shift=1.0)
    found = contrast_groups(values, chosen, groups, seed=0, unit="slide", names=("missed", "found"))
    assert found.auroc.low is None and found.difference_sd.low is None and found.auroc.value > 0.6
    assert found.auroc.reason == "only 3 slides with missed patches: an interval needs 5"
    assert list(found.by_group) == ["g000", "g001", "g002"]
    few = np.isin(groups, "g001") & chosen
    values, chosen, groups = draw(n_groups=9)
    few = chosen & (groups == "g001")
    found = contrast_groups(values, few, groups, seed=0, names=("missed", "found"))
    assert found.auroc.reason == "only 1 patient with missed patches: an interval needs 5"
    assert np.isnan(found.by_group["g002"]["auroc"])


def test_nothing_to_compare_is_reported():
    values, chosen, groups = draw(n_groups=6)
    none = contrast_groups(values, np.zeros_like(chosen), groups, seed=0, names=("missed", "found"))
    assert none.auroc.reason == "undefined: no missed patches" and np.isnan(none.mean_chosen)
    assert none.mean_others == pytest.approx(values.mean())
    every = contrast_groups(values, np.ones_like(chosen), groups, seed=0, names=("missed", "found"))
    assert every.difference_sd.reason == "undefined: no found patches"
    empty = contrast_groups([], [], [], seed=0)
    assert empty.n_chosen == 0 and np.isnan(empty.auroc.value)
    flat = contrast_groups(np.ones(len(values)), chosen, groups, seed=0)
    assert flat.auroc.value == 0.5 and "does not vary" in flat.auroc.reason
    assert np.isnan(flat.difference_sd.value)


def test_patches_without_a_patient_have_no_list_of_patients():
    values, chosen, _ = draw(n_groups=1, each=150, shift=1.0)
    found = contrast_groups(values, chosen, np.arange(150), seed=0, unit="patch", draws=200)
    assert found.within is None and found.by_group == {} and found.auroc.low > 0.5


def test_a_ratio_is_that_of_the_sums_with_the_jackknife_on_the_log_scale():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(8), 20)
    below = rng.random(160)
    above = below * rng.uniform(1, 2, 160)
    found = clustered_ratio(above, below, groups, seed=0)
    assert found.value == pytest.approx(above.sum() / below.sum())
    without = np.log([above[groups != g].sum() / below[groups != g].sum() for g in range(8)])
    error = np.sqrt(((without - without.mean()) ** 2).sum() * 7 / 8)
    sizes = np.bincount(groups, below)
    half = stats.t.ppf(0.975, sizes.sum() ** 2 / (sizes**2).sum() - 1) * error
    assert found.low == pytest.approx(found.value * np.exp(-half))
    assert clustered_ratio(below, below, groups, seed=0).reason is not None
    assert np.isnan(clustered_ratio(above, np.zeros(160), groups, seed=0).value)


def test_values_that_do_not_fit_are_refused():
    with refuses(MetricError, "2", "1"):
        contrast_groups([1.0, 2.0], [True], ["a"], seed=0)
    with refuses(MetricError, "finite"):
        contrast_groups([1.0, np.nan], [True, False], ["a", "b"], seed=0)
