"""Conditions of a reproduction: patients apart, patients tested for leakage, equal numbers of patches."""

import numpy as np
import pytest

from biopsy.core.errors import RunError
from biopsy.data.protocols import LEAK_PROTOCOLS
from biopsy.data.splits import split as make_split
from biopsy.experiments.leakage import choose_apart, choose_leaking, compare_splits, count_subset, list_leaks
from biopsy.recipes import load_recipe
from refusals import refuses

TESTED = ("8863", "8865")
RECIPE = "cancernet-2020"


def test_undersampling_recipes_are_compared_after_undersampling(make_pack):
    rare = {"target": np.tile([0] * 9 + [1] * 3, 6)}
    pack = make_pack(n_patients=6, patches_per_patient=12, columns=rare)
    recipe = load_recipe(RECIPE, ["train.sampling=undersample"])
    split = make_split(pack, protocol="leave-one-out", test_patients=TESTED, save=False)
    found = compare_splits(pack, recipe, split)
    for condition in found.conditions:
        classes = np.bincount(pack.target[condition.split.subsets(pack) == "train"])
        assert classes[0] == classes[1]
    assert (
        len({count_subset(pack, condition.split, "train") for condition in found.conditions}) == 1
        and not found.missing
    )


def test_who_is_kept_apart_and_whose_leak_is_measured(make_pack):
    pack = make_pack(n_patients=6, patches_per_patient=12)
    assert choose_apart(pack, None, TESTED).protocol == "leave-one-out"
    assert choose_apart(pack, None, ()).protocol == "patients"
    assert choose_leaking(pack) == []  # none has 50 patches of each class
    make_split(pack, protocol="patients", name="mine", seed=5)
    assert choose_apart(pack, "mine", TESTED).name == "mine"
    own = make_pack("own.pack", n_patients=6, official_subsets=("train", "validation", "test"))
    assert choose_apart(own, None, TESTED).protocol == "official"


@pytest.mark.parametrize("ids", [{}, {"patient_id": None, "slide_id": None}])
def test_own_subsets_without_a_test_subset_are_tested_on_validation(make_pack, ids):
    pack = make_pack(n_patients=8, official_subsets=("train", "train", "validation", "train"), columns=ids)
    own = pack.table["official_subset"].to_numpy(str)
    subsets = choose_apart(pack, None, TESTED).subsets(pack)
    assert ((subsets == "test") == (own == "validation")).all()
    assert set(subsets[own == "train"]) == {"train", "validation"}
    assert (subsets == "validation").sum() < (subsets == "train").sum() and set(
        pack.target[subsets == "validation"]
    ) == {0, 1}


def test_the_three_with_most_of_their_rarer_class_are_chosen(make_pack):
    groups = np.repeat(["a", "b", "c", "d", "e"], [120, 140, 160, 110, 118])
    target = np.random.default_rng(0).permutation(len(groups)) % 2
    target[groups == "e"] = 0
    columns = {"patient_id": groups, "target": target}
    pack = make_pack(n_patients=1, patches_per_patient=len(groups), columns=columns)
    rarer = {name: np.bincount(pack.target[groups == name], minlength=2).min() for name in "abcde"}
    known = sorted((name for name in rarer if rarer[name] >= 50), key=lambda name: -rarer[name])[:3]
    assert choose_leaking(pack) == sorted(known)


def test_a_published_split_that_cannot_be_made_leaves_the_other_condition(make_pack):
    pack = make_pack(n_patients=6)
    rows = load_recipe(RECIPE, ["as_published.split={method='kaggle-rows'}"])
    found = compare_splits(pack, rows, choose_apart(pack, None, TESTED))
    assert "lacks the row numbers" in found.missing["published"]
    assert [condition.kind for condition in found.conditions] == ["apart", "apart"]
    with refuses(RunError, "cancernet-2020", "tiny.pack", "row numbers"):
        compare_splits(pack, rows, None)


def test_the_next_in_order_validates_the_leak(make_pack):
    pack = make_pack(n_patients=6)
    conditions = list_leaks(pack, ["8863", "8867", "8865"], seed=2)
    n = len(LEAK_PROTOCOLS)
    assert [condition.kind for condition in conditions] == [*LEAK_PROTOCOLS] * 3
    assert [(condition.tested, condition.place) for condition in conditions[::n]] == [
        ("8863", 0),
        ("8867", 1),
        ("8865", 2),
    ]
    for index, condition in enumerate(conditions):
        validates, placebo = ("8867", "8865", "8863")[index // n], ("8865", "8863", "8867")[index // n]
        assert (
            set(pack.group_ids[condition.split.subsets(pack) == "validation"]) == {validates}
            and condition.split.seed == 2
        )
        assert condition.split.parameters["placebo"] == placebo
