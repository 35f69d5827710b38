"""Arms of a comparison: the laws that make a leak measurable."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biopsy.core.errors import SplitError
from biopsy.data.audit import audit_pack, find_spoilers
from biopsy.data.leakage import check_no_leakage, find_overlap
from biopsy.data.packs import Pack
from biopsy.data.protocols import PROTOCOLS, Request
from biopsy.data.splits import find_split, load_split, make_split, save_split
from biopsy.experiments.leakage import make_leak_splits, matched

MakePack = Callable[..., Pack]
CANCERNET = {"method": "shuffled-paths", "seed": 42, "train": 0.8, "val": 0.1}


def count(pack: Pack, chosen: np.ndarray) -> list[int]:
    return np.bincount(pack.target[chosen], minlength=2).tolist()


class Table:
    """As much of a pack as the arms look at."""

    class_names = ("non_idc", "idc")

    def __init__(self, group_ids: np.ndarray, target: np.ndarray) -> None:
        self.table = pd.DataFrame({"patch_id": [f"p{row:03d}" for row in range(len(target))]})
        self.group_ids, self.target = group_ids, target


def divide(table: Table, protocol: str, seed: int, order: np.ndarray | None = None) -> np.ndarray:
    rows = np.arange(len(table.target)) if order is None else order
    moved = Table(table.group_ids[rows], table.target[rows])
    moved.table = table.table.iloc[rows].reset_index(drop=True)
    request = Request(
        pack=moved,  # type: ignore[arg-type]
        unit="patient",
        group_ids=moved.group_ids,
        seed=seed,
        fractions=(0.7, 0.15, 0.15),
        n_folds=5,
        test_ids=("a",),
        val_ids=("b",),
        cases=None,
        recipe=None,
    )
    sides, _ = PROTOCOLS[protocol](request)
    back = np.empty_like(sides)
    back[rows] = sides
    return back


counts = st.tuples(st.integers(1, 9), st.integers(1, 9))
others = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=4).map(
    lambda more: [(9, 9), *more]
)


@given(counts, counts, others, st.integers(0, 99), st.randoms())
@settings(max_examples=60, deadline=None)
def test_laws_of_the_two_arms(tested, validating, others, seed, shuffler):
    groups, target = [], []
    for name, (n_negative, n_positive) in zip("abcdefg", [tested, validating, *others], strict=False):
        groups += [name] * (n_negative + n_positive)
        target += [0] * n_negative + [1] * n_positive
    table = Table(np.array(groups), np.array(target))
    apart, leak = divide(table, "leak-apart", seed), divide(table, "leak-with", seed)
    of_tested = table.group_ids == "a"
    for side in ("test", "val"):
        assert ((apart == side) == (leak == side)).all()
    assert ((apart == "val") == (table.group_ids == "b")).all()
    for class_index, n_tested in enumerate(tested):
        member = table.target == class_index
        assert (member & (apart == "test")).sum() == (n_tested + 1) // 2
        assert (member & (apart == "train")).sum() == (member & (leak == "train")).sum()
    check_no_leakage(table.group_ids, apart)
    assert not (of_tested & (apart == "train")).any()
    assert ((of_tested & (leak == "train")) == (of_tested & (apart != "test"))).all()
    assert (find_overlap(table.group_ids, leak).keys() == {"a"}) == (max(tested) > 1)
    order = np.array(shuffler.sample(range(len(target)), len(target)))
    assert (divide(table, "leak-with", seed, order) == leak).all()


def test_the_tested_half_is_the_same_for_every_seed_and_the_rest_is_drawn(make_pack: MakePack) -> None:
    pack = make_pack(n_patients=6)
    made = [make_leak_splits(pack, "8863", "8865", seed) for seed in (0, 0, 1)]
    sides = [[split.sides(pack) for split in pair] for pair in made]
    assert (sides[0][1] == sides[1][1]).all() and (sides[0][1] != sides[2][1]).any()
    assert (sides[0][0] == sides[2][0]).all()
    assert ((sides[0][1] == "test") == (sides[2][1] == "test")).all()
    assert count(pack, sides[0][0] == "train") == count(pack, sides[2][1] == "train") == [24, 24]
    other = make_leak_splits(pack, "8867", "8865")[0].sides(pack)
    halves = [(arm == "test")[pack.group_ids == who] for arm, who in ((sides[0][0], "8863"), (other, "8867"))]
    assert halves[0].tolist() != halves[1].tolist()  # of each slide, a half of its own


def test_arms_are_kept_in_the_pack_and_used_by_name(make_pack: MakePack) -> None:
    pack = make_pack(n_patients=6)
    apart, leak = make_leak_splits(pack, "8863", "8865", seed=3)
    assert (apart.name, leak.name) == ("leak-apart-8863-s3", "leak-with-8863-s3")
    assert (apart.overlap, leak.overlap) == (False, True)
    assert not leak.is_published and leak.may_overlap and not apart.may_overlap
    for split in (apart, leak):
        save_split(pack, split)
        again = load_split(pack, split.name)
        assert (again.sides(pack) == split.sides(pack)).all() and again.parameters == split.parameters
        assert (find_split(pack, split.name).sides(pack) == split.sides(pack)).all()
        audit = audit_pack(pack, again)
        assert audit["split"]["patients_overlap"] is split.overlap and find_spoilers(audit) == []
    with pytest.raises(SplitError, match="patient 8863 is in train and test"):
        check_no_leakage(pack.group_ids, leak.sides(pack))


def test_an_arm_that_should_not_leak_and_does_is_refused(make_pack: MakePack) -> None:
    pack = make_pack(n_patients=6)
    apart, leak = make_leak_splits(pack, "8863", "8865")
    save_split(pack, replace(apart, table=leak.table))
    with pytest.raises(SplitError, match="patient 8863 is in train and test"):
        load_split(pack, apart.name).sides(pack)


def test_ids_that_are_no_file_names_stay_apart(make_pack: MakePack) -> None:
    pack = make_pack(n_patients=4, columns={"patient_id": np.repeat(["a/1", "a 1", "c", "d"], 12)})
    names = {make_leak_splits(pack, who, "c")[0].name for who in ("a/1", "a 1")}
    assert len(names) == 2 and all(name.startswith("leak-apart-a-1-") for name in names)


@pytest.mark.parametrize(
    ("tested", "validating", "message"),
    [
        ("8864", "8865", "no patient is called '8864'; did you mean"),
        ("8863", "8864", "no patient is called '8864'"),
        ("8863", "8863", "one patient while another validates"),
    ],
)
def test_wrong_patients_are_refused(make_pack: MakePack, tested: str, validating: str, message: str) -> None:
    with pytest.raises(SplitError, match=message):
        make_leak_splits(make_pack(n_patients=4), tested, validating)


def test_what_cannot_be_measured_is_refused(make_pack: MakePack) -> None:
    target = np.concatenate([np.zeros(12, int), np.tile([0, 1], 18)])
    one_class = make_pack("one.pack", n_patients=4, columns={"target": target})
    with pytest.raises(SplitError, match="patient 8863 has non_idc patches only"):
        make_leak_splits(one_class, "8863", "8865")
    nobody = make_pack("nobody.pack", n_patients=4, columns={"patient_id": None, "slide_id": None})
    with pytest.raises(SplitError, match="names neither patients nor slides"):
        make_leak_splits(nobody, "8863", "8865")
    scarce = make_pack("scarce.pack", n_patients=3, columns={"target": [0, 1] * 12 + [1] * 12})
    with pytest.raises(SplitError, match=r"3 non_idc patches of 8863 would train and the others have 0"):
        make_leak_splits(scarce, "8863", "8865")
    with pytest.raises(SplitError, match="one patient while another validates; to test: \\[\\]"):
        find_split(make_pack(n_patients=3), "leak-with")


def test_matched_trims_the_larger_training_side(make_pack: MakePack) -> None:
    target = np.tile([0, 0, 0, 1], 30)
    pack = make_pack(n_patients=10, columns={"target": target})
    published = make_split(pack, protocol="as-published", recipe=CANCERNET)
    apart = make_split(pack, protocol="patients", test_patients=("8863", "8865", "8867"))
    n_train = int((apart.sides(pack) == "train").sum())
    trimmed, same = matched(published, apart, pack, seed=2)
    assert same is apart
    before, after = published.sides(pack), trimmed.sides(pack)
    assert (after == "train").sum() == n_train < (before == "train").sum()
    assert (before[after == "train"] == "train").all()
    for side in ("val", "test"):
        assert ((before == side) == (after == side)).all()
    share = pack.target[before == "train"].mean()
    assert pack.target[after == "train"].sum() == pytest.approx(share * n_train, abs=1)
    assert trimmed.name == "as-published-matched-s2" and trimmed.is_published and trimmed.overlap
    assert trimmed.parameters["counts"]["train"]["patches"] == n_train
    assert trimmed.parameters["matched"] == {"from": "as-published", "train_patches": n_train, "seed": 2}
    again, other = (matched(apart, published, pack, seed=seed)[1].sides(pack) for seed in (2, 3))
    assert (again == after).all() and (other != after).any()
    save_split(pack, trimmed)
    assert (load_split(pack, trimmed.name).sides(pack) == after).all()
    with pytest.raises(SplitError, match="'folds' has folds"):
        matched(make_split(pack, protocol="folds"), apart, pack)
