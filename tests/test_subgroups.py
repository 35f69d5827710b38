"""Subgroups: every value of every joined column, by the same metrics; what is no group is left out."""

import numpy as np
import pytest
from sklearn.metrics import f1_score, roc_auc_score

from biopsy.core.files import plain
from biopsy.evaluation.measure import MAX_VALUES, SHOWN, SHOWN_OF_CLASSES, measure_subgroups, pick_columns
from biopsy.evaluation.scored import ScoredPatches

N_PATIENTS, EACH = 8, 8
PATIENT = np.repeat(np.arange(N_PATIENTS), EACH)


@pytest.fixture
def measure(make_pack):
    def measure(rows=None, n_classes=2, **columns):
        pack = make_pack(
            n_patients=N_PATIENTS, patches_per_patient=EACH, n_classes=n_classes, columns=columns
        )
        probs = np.random.default_rng(0).dirichlet([1.0] * n_classes, len(pack))
        rows = np.arange(len(pack)) if rows is None else rows
        scored = ScoredPatches.of_pack(pack, rows, probs[rows], 0.5)
        found = plain(measure_subgroups(scored, pick_columns(pack.table.iloc[rows])))
        return pack, probs[rows], found

    return measure


def test_each_value_is_measured_by_itself(measure):
    scanner = np.array(["a", "b"])[PATIENT % 2]
    rows = np.arange(8, 64)
    pack, probs, found = measure(rows, scanner=scanner)
    assert found.keys() == {"scanner"} and list(found["scanner"]) == ["a", "b"]
    for value, group in found["scanner"].items():
        chosen = scanner[rows] == value
        target, prob = pack.target[rows][chosen], probs[chosen, 1]
        assert group["n_patches"] == chosen.sum() and group["n_patients"] == len(set(PATIENT[rows][chosen]))
        assert tuple(group["patch"]) == SHOWN
        assert group["patch"]["auroc"]["value"] == pytest.approx(roc_auc_score(target, prob), abs=1e-12)
        called = prob >= 0.5
        assert group["patch"]["sensitivity"]["value"] == pytest.approx(called[target == 1].mean(), abs=1e-12)


def test_numbers_with_many_values_are_cut_at_their_quartiles(measure):
    age = 30 + np.arange(64.0)
    _, _, found = measure(age=age, grade=PATIENT % 3)
    assert list(found["grade"]) == ["0", "1", "2"]
    assert [group["n_patches"] for group in found["age"].values()] == [16, 16, 16, 16]


def test_missing_values_are_in_no_group(measure):
    scanner = np.array(["a", "b", None], object)[PATIENT % 3]
    age = np.where(PATIENT == 0, np.nan, 30 + np.arange(64.0))
    smoker = np.array([True, False, None], object)[PATIENT % 3]
    _, _, found = measure(scanner=scanner, age=age, smoker=smoker)
    for column, known in (("scanner", 48), ("age", 56), ("smoker", 48)):
        assert sum(group["n_patches"] for group in found[column].values()) == known


def test_sites_count_and_what_makes_no_groups_does_not(measure):
    _, _, found = measure(
        site_id=np.array(["north", "south"])[PATIENT % 2],
        constant="same",
        empty=None,
        note=[f"text {index % (MAX_VALUES + 1)}" for index in range(64)],
        label_before=np.array(["idc", "non_idc"])[PATIENT % 2],
        official_subset=np.array(["train", "test"])[PATIENT % 2],
    )
    assert found.keys() == {"site_id"}


def test_a_group_of_one_patient_is_shown_without_interval_and_with_the_reason(measure):
    pack, probs, found = measure(hospital=np.where(PATIENT == 3, "east", "west"))
    alone, others = found["hospital"]["east"], found["hospital"]["west"]
    assert (alone["n_patients"], alone["n_patches"]) == (1, EACH) and others["n_patients"] == 7
    rows = PATIENT == 3
    auroc = alone["patch"]["auroc"]
    assert auroc["value"] == pytest.approx(roc_auc_score(pack.target[rows], probs[rows, 1]))
    assert (auroc["low"], auroc["high"]) == (None, None)
    assert auroc["reason"] == "only 1 patient with positive patches: an interval needs 5"
    assert all(others["patch"][name]["low"] is not None for name in SHOWN)


def test_a_group_of_one_class_states_why_it_has_no_ranking(measure):
    pack, _, found = measure(tissue=np.tile(np.arange(EACH) * 2 // EACH, N_PATIENTS))
    assert pack.target.tolist() == pack.table["tissue"].tolist()
    for group in found["tissue"].values():
        assert group["patch"]["auroc"]["value"] is None and "undefined" in group["patch"]["auroc"]["reason"]


def test_more_than_two_classes_have_their_own_registrations(measure):
    pack, probs, found = measure(n_classes=3, scanner=PATIENT % 2)
    rows = PATIENT % 2 == 1
    target, pred = pack.target[rows], probs[rows].argmax(axis=1)
    assert tuple(found["scanner"]["1"]["patch"]) == SHOWN_OF_CLASSES
    ours = found["scanner"]["1"]["patch"]["f1_macro"]["value"]
    assert ours == pytest.approx(f1_score(target, pred, average="macro"), abs=1e-12)
