"""Sampling: counts by class, every patch as often as it should, another order each epoch, the same twice."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight

from biopsy.core.errors import DataError
from biopsy.training.sampling import (
    MAX_DRAWS,
    class_weights,
    sample_epoch,
    sample_passes,
    take_fraction,
    within_patient_shares,
)
from refusals import refuses

METHODS = ("none", "undersample", "oversample")
targets = st.lists(st.integers(0, 2), min_size=4, max_size=60).map(np.array).filter(lambda t: len(set(t)) > 1)


def order(target, sampling, *, index=None, seed=0, epoch=1):
    index = np.arange(len(target)) if index is None else index
    return sample_epoch(index, target, sampling=sampling, seed=seed, epoch=epoch)


@given(targets, st.sampled_from(METHODS), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_counts_by_class(target, sampling, seed):
    seen = order(target, sampling, seed=seed)
    present, counts = np.unique(target, return_counts=True)
    wanted = {"none": counts, "undersample": counts * 0 + min(counts), "oversample": counts * 0 + max(counts)}
    found = np.bincount(target[seen], minlength=3)[present]
    assert found.tolist() == wanted[sampling].tolist()
    times = np.bincount(seen, minlength=len(target))
    least = {"none": 1, "undersample": 0, "oversample": max(counts) // np.bincount(target)[target]}[sampling]
    assert (times >= least).all() and (times <= least + (sampling != "none")).all()


@pytest.mark.parametrize("sampling", METHODS)
def test_order_changes_by_epoch_and_seed_and_is_the_same_twice(sampling):
    target = np.repeat([0, 1], [40, 13])
    first = order(target, sampling)
    assert np.array_equal(first, order(target, sampling))
    assert not np.array_equal(first, order(target, sampling, epoch=2))
    assert not np.array_equal(first, order(target, sampling, seed=1))


def test_undersampling_keeps_its_choice_and_oversampling_draws_anew():
    target = np.repeat([0, 1], [40, 13])
    kept = [sorted(order(target, "undersample", epoch=epoch)) for epoch in (1, 2, 3)]
    assert kept[0] == kept[1] == kept[2] != sorted(order(target, "undersample", seed=1))
    drawn = [sorted(order(target, "oversample", epoch=epoch)) for epoch in (1, 2)]
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("sampling", METHODS)
def test_only_training_rows_are_seen(sampling):
    target, index = np.tile([0, 1, 1], 20), np.arange(7, 40)
    assert set(order(target, sampling, index=index)) <= set(index)


cohorts = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2)), min_size=4, max_size=32).filter(
    lambda pairs: any(len({c for q, c in pairs if q == p}) > 1 for p, _ in pairs)
)


@given(cohorts, st.floats(0.05, 1), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_classes_weigh_equally_within_each_patient(pairs, single, seed):
    patient, target = np.array(pairs).T
    index = np.arange(len(pairs))
    shares = within_patient_shares(index, target, patient, single)
    assert shares.sum() == pytest.approx(1) and (shares > 0).all()
    per_patch = {}
    for p in np.unique(patient):
        present = np.unique(target[patient == p])
        by_class = [shares[(patient == p) & (target == c)] for c in present]
        assert all(np.allclose(part, part[0]) for part in by_class)
        assert np.allclose([part.sum() for part in by_class], by_class[0].sum())
        per_patch.setdefault(len(present) > 1, []).append(shares[patient == p].mean())
    assert np.allclose(per_patch[True], per_patch[True][0])
    if False in per_patch:
        assert np.allclose(per_patch[False], single * per_patch[True][0])
    options = {"sampling": "within-patient", "groups": patient, "single_class_weight": single, "epoch": 3}
    drawn = sample_epoch(index, target, seed=seed, **options)
    times, expected = np.bincount(drawn, minlength=len(index)), shares * len(index)
    assert len(drawn) == len(index)
    assert (np.abs(times - expected) < 1 + 1e-6).all()
    assert np.array_equal(drawn, sample_epoch(index, target, seed=seed, **options))


def test_draws_within_patients_have_the_expected_numbers():
    patient = np.array([0] * 10 + [1] * 4 + [2] * 6)
    target = np.array([0] * 7 + [1] * 3 + [0] + [1] * 3 + [1] * 6)
    index, groups = np.arange(20) + 5, np.r_[np.full(5, 9), patient]
    target = np.r_[np.zeros(5, int), target]  # of other rows than those of training
    options = {"sampling": "within-patient", "groups": groups, "single_class_weight": 0.5, "seed": 1}
    passes = [sample_epoch(index, target, epoch=epoch, **options) for epoch in range(2000)]
    mean = np.mean([np.bincount(drawn, minlength=25) for drawn in passes], axis=0)
    assert np.allclose(mean[5:], 20 * within_patient_shares(index, target, groups, 0.5), atol=0.05)
    assert not mean[:5].any()
    assert not np.array_equal(passes[0], passes[1])


def test_no_patch_is_drawn_more_often_than_the_limit():
    index, groups = np.arange(1000), np.repeat([0, 1], [100, 900])
    target = np.r_[[0], np.ones(99, int), np.zeros(20, int), np.ones(880, int)]
    expected = 1000 * within_patient_shares(index, target, groups, 1.0)
    assert expected.sum() == pytest.approx(1000)
    assert expected[0] == pytest.approx(MAX_DRAWS)  # of 50, and of 22.5 in the other patient
    assert expected[100:120] == pytest.approx(np.full(20, MAX_DRAWS))
    rest = np.setdiff1d(index, [0, *range(100, 120)])
    before = np.where(groups[rest] == 0, 50 / 99, 450 / 880)
    assert expected[rest] / before == pytest.approx(np.full(len(rest), (expected[rest] / before)[0]))


def test_patients_that_are_balanced_are_drawn_once_each():
    index, target = np.arange(24), np.tile([0, 1], 12)
    options = {"sampling": "within-patient", "groups": np.repeat([0, 1, 2], 8), "single_class_weight": 0.25}
    assert sorted(sample_epoch(index, target, seed=0, epoch=1, **options)) == index.tolist()


def test_patients_of_one_class_only_are_drawn_as_without_sampling():
    index, target, groups = np.arange(6), np.repeat([0, 1], 3), np.repeat([4, 7], 3)
    assert within_patient_shares(index, target, groups, 0.25) == pytest.approx(1 / 6)
    options = {"groups": groups, "single_class_weight": 0.25, "seed": 3, "epoch": 2}
    drawn = [sample_epoch(index, target, sampling=name, **options) for name in ("within-patient", "none")]
    assert np.array_equal(*drawn)


@given(targets, st.floats(0.01, 1), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_fraction_takes_of_each_class_alike(target, fraction, seed):
    index = np.flatnonzero(np.arange(len(target)) % 5 != 0)
    taken = take_fraction(index, target, fraction, seed)
    assert set(taken) <= set(index) and (np.diff(taken) > 0).all()
    for label in np.unique(target[index]):
        n_all, n_taken = (target[index] == label).sum(), (target[taken] == label).sum()
        assert n_taken == max(1, round(fraction * n_all))
    assert np.array_equal(taken, take_fraction(index, target, fraction, seed))
    assert set(taken) <= set(take_fraction(index, target, min(1, 1.5 * fraction), seed))


def test_a_fraction_depends_on_the_seed_and_one_takes_all():
    target = np.tile([0, 1], 50)
    drawn = [tuple(take_fraction(np.arange(100), target, 0.2, seed)) for seed in range(5)]
    assert len(set(drawn)) == 5
    assert np.array_equal(take_fraction(np.arange(100), target, 1.0, 0), np.arange(100))


@given(st.integers(1, 9), st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_passes_follow_each_other_without_gap_or_end(per_pass, epochs):
    step, taken = 0, []
    for n_steps in epochs:
        pieces = list(sample_passes(step, n_steps, per_pass))
        taken += [(number, batch) for number, start, stop in pieces for batch in range(start, stop)]
        step += n_steps
    assert taken == [(1 + step // per_pass, step % per_pass) for step in range(sum(epochs))]


def test_weights_of_cancernet():
    target = np.repeat([0, 1], [198_738, 78_786])  # the IDC patches, docs/datasets/idc.md
    assert class_weights(target, 2, "largest") == pytest.approx([1, 2.5225], abs=1e-4)
    assert class_weights(target, 2, "none") is None


@given(targets.filter(lambda target: len(set(target)) == 3))
@settings(max_examples=30, deadline=None)
def test_balanced_weights_are_scikit_learns(target):
    theirs = compute_class_weight("balanced", classes=np.arange(3), y=target)
    np.testing.assert_allclose(class_weights(target, 3, "balanced"), theirs, rtol=1e-12)


@pytest.mark.parametrize("method", ["largest", "balanced"])
def test_a_class_without_patches_has_no_weight(method):
    with refuses(DataError, f"'{method}'", "[2, 0, 1]"):
        class_weights(np.array([0, 0, 2]), 3, method)
