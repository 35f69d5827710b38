"""Conditions of a comparison: the laws that make a leak measurable."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biopsy.core.errors import SplitError
from biopsy.data.audit import audit_pack, find_blocking_issues
from biopsy.data.packs import Pack
from biopsy.data.protocols import LEAK_PROTOCOLS, PROTOCOLS
from biopsy.data.protocols.groups import Request
from biopsy.data.splits import (
    check_no_leakage,
    find_overlap,
    find_split,
    load_split,
    save_split,
)
from biopsy.data.splits import (
    split as make_split,
)
from biopsy.experiments.leakage import make_leak_splits, matched
from refusals import refuses

MakePack = Callable[..., Pack]
CANCERNET = {"method": "shuffled-paths", "seed": 42, "train": 0.8, "validation": 0.1}


def count(pack: Pack, chosen: np.ndarray) -> list[int]:
    return np.bincount(pack.target[chosen], minlength=2).tolist()


class Table:
    """As much of a pack as the conditions look at."""

    class_names = ("non_idc", "idc")

    def __init__(self, group_ids: np.ndarray, target: np.ndarray) -> None:
        ids = [f"p{row:03d}" for row in range(len(target))]
        place = np.arange(len(target))
        self.table = pd.DataFrame({"patch_id": ids, "x": 50 * (place % 7), "y": 50 * (place // 7)})
        self.group_ids, self.target = group_ids, target
        self.info = SimpleNamespace(patch_px=50)


def divide(table: Table, protocol: str, seed: int, order: np.ndarray | None = None) -> np.ndarray:
    rows = np.arange(len(table.target)) if order is None else order
    moved = Table(table.group_ids[rows], table.target[rows])
    moved.table = table.table.iloc[rows].reset_index(drop=True)
    request = Request(
        pack=moved,  # type: ignore[arg-type]
        unit="patient",
        group_ids=moved.group_ids,
        seed=seed,
        n_folds=5,
        test_ids=("a",),
        val_ids=("b",),
        cases=None,
        recipe=None,
        n_groups=24,
    )
    subsets, _ = PROTOCOLS[protocol](request)
    back = np.empty_like(subsets)
    back[rows] = subsets
    return back


counts = st.tuples(st.integers(1, 9), st.integers(1, 9))
others = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=4).map(
    lambda more: [(18, 18), (9, 9), *more]  # the first gives the placebo, having most of its rarer class
)


def lay_out(*patients):
    groups, target = [], []
    for name, (n_negative, n_positive) in zip("abcdefgh", patients, strict=False):
        groups += [name] * (n_negative + n_positive)
        target += [0] * n_negative + [1] * n_positive
    return Table(np.array(groups), np.array(target))


@given(counts, counts, others, st.integers(0, 99), st.randoms())
@settings(max_examples=15, deadline=None)
def test_laws_of_the_conditions(tested, validating, others, seed, shuffler):
    table = lay_out(tested, validating, *others)
    conditions = {name: divide(table, f"leak-{name}", seed) for name in ("apart", "with", "placebo")}
    of_tested, of_placebo = table.group_ids == "a", table.group_ids == "c"
    for subset in ("test", "validation"):
        assert all(
            ((subsets == subset) == (conditions["apart"] == subset)).all() for subsets in conditions.values()
        )
    assert ((conditions["apart"] == "validation") == (table.group_ids == "b")).all()
    trains = {name: subsets == "train" for name, subsets in conditions.items()}
    for class_index, n_tested in enumerate(tested):
        member = table.target == class_index
        assert (member & (conditions["apart"] == "test")).sum() == (n_tested + 1) // 2
        assert len({(member & train).sum() for train in trains.values()}) == 1
        assert (member & of_placebo & trains["placebo"]).sum() == n_tested // 2
    assert not (of_tested & (trains["apart"] | trains["placebo"])).any()
    assert not (of_placebo & (trains["apart"] | trains["with"])).any()
    assert ((of_tested & trains["with"]) == (of_tested & (conditions["with"] != "test"))).all()
    rest = ~of_tested & ~of_placebo
    assert (trains["with"][rest] == trains["placebo"][rest]).all()  # they differ in whose patches are added
    check_no_leakage(table.group_ids, conditions["apart"])
    check_no_leakage(table.group_ids, conditions["placebo"])
    assert (find_overlap(table.group_ids, conditions["with"]).keys() == {"a"}) == (max(tested) > 1)
    order = np.array(shuffler.sample(range(len(rest)), len(rest)))
    for name, subsets in conditions.items():
        assert (divide(table, f"leak-{name}", seed, order) == subsets).all()


def test_no_patch_of_the_blocked_half_touches_a_tested_one():
    table = lay_out((36, 12), (9, 9), (30, 30), (40, 20))
    rng = np.random.default_rng(0)
    place = rng.permutation(49)[:48]  # of the tested patient: a square, the classes mixed
    table.table.loc[:47, "x"], table.table.loc[:47, "y"] = 50 * (place % 7), 50 * (place // 7)
    for seed in range(5):
        leaking, placebo = (
            divide(table, f"leak-blocked-{condition}", seed) for condition in ("with", "placebo")
        )
        tested, leaked = (np.flatnonzero((leaking == subset)[:48]) for subset in ("test", "train"))
        xy = table.table[["x", "y"]].to_numpy()
        distance = np.abs(xy[leaked, None] - xy[None, tested]).max(axis=2)
        assert len(leaked) >= 8 and distance.min() > 50
        assert np.bincount(table.target[tested]).tolist()[1] == 6  # half of the rarer class
        assert ((leaking == "test") == (placebo == "test")).all()
        assert count(table, leaking == "train") == count(table, placebo == "train")
        random = divide(table, "leak-with", seed)
        close = np.abs(xy[random == "train"][:, None] - xy[None, random == "test"]).max(axis=2).min(axis=1)
        assert (close <= 50).any()


def test_without_coordinates_or_another_patient_conditions_are_missing(make_pack: MakePack) -> None:
    lost = make_pack("lost.pack", n_patients=4, columns={"x": pd.NA, "y": pd.NA})
    assert sorted(make_leak_splits(lost, "8863", "8865")) == ["leak-apart", "leak-placebo", "leak-with"]
    with refuses(SplitError, "coordinates"):
        make_split(
            lost, protocol="leak-blocked-with", test_patients=["8863"], val_patients=["8865"], save=False
        )
    single = np.concatenate([[0, 1] * 12, np.zeros(24, int), np.ones(24, int)])
    two = make_pack("two.pack", n_patients=6, columns={"target": single})
    assert sorted(make_leak_splits(two, "8863", "8865")) == ["leak-apart", "leak-blocked-with", "leak-with"]
    with refuses(SplitError, "placebo"):
        make_split(two, protocol="leak-placebo", test_patients=["8863"], val_patients=["8865"], save=False)


def test_who_gives_the_placebo(make_pack: MakePack) -> None:
    target = np.concatenate([[0, 1] * 12, [0] * 10 + [1] * 2, [0] * 8 + [1] * 4, [0, 1] * 12])
    pack = make_pack(n_patients=6, columns={"target": target})
    for asked, wanted in ((None, "8871"), ("8869", "8869")):
        made = make_leak_splits(pack, "8863", "8865", placebo_id=asked)
        assert {split.parameters["placebo"] for split in made.values()} == {wanted}
        trained = pack.group_ids[made["leak-placebo"].subsets(pack) == "train"]
        assert wanted in trained and wanted not in pack.group_ids[made["leak-with"].subsets(pack) == "train"]
    scarce = make_leak_splits(pack, "8863", "8865", placebo_id="8867")["leak-with"]
    assert scarce.parameters["leaked"] == 3 + 2  # as many as the placebo has


def test_every_draw_follows_the_seed(make_pack: MakePack) -> None:
    pack = make_pack(n_patients=6)
    made = [make_leak_splits(pack, "8863", "8865", seed) for seed in (0, 0, 1)]
    assert list(made[0]) == list(LEAK_PROTOCOLS)
    for protocol in made[0]:
        first, again, other = (splits[protocol].subsets(pack) for splits in made)
        assert (first == again).all()
        assert ((first == "test") != (other == "test")).any() or "blocked" in protocol
        assert (first == "train").sum() == (other == "train").sum()
    elsewhere = make_leak_splits(pack, "8867", "8865")["leak-with"].subsets(pack)
    halves = [
        (subsets == "test")[pack.group_ids == who]
        for subsets, who in ((made[0]["leak-with"].subsets(pack), "8863"), (elsewhere, "8867"))
    ]
    assert halves[0].tolist() != halves[1].tolist()  # of each slide, a half of its own


def test_conditions_are_kept_in_the_pack_and_used_by_name(make_pack: MakePack) -> None:
    pack = make_pack(n_patients=6)
    made = make_leak_splits(pack, "8863", "8865", seed=3)
    apart, leak = made["leak-apart"], made["leak-with"]
    assert (apart.name, leak.name) == ("leak-apart-8863-s3", "leak-with-8863-s3")
    assert (apart.overlap, leak.overlap) == (False, True)
    assert not leak.is_published and leak.may_overlap and not apart.may_overlap
    for split in made.values():
        assert split.may_overlap is split.overlap is split.protocol.endswith("with")
        save_split(pack, split)
        again = load_split(pack, split.name)
        assert (again.subsets(pack) == split.subsets(pack)).all() and again.parameters == split.parameters
        assert (find_split(pack, split.name).subsets(pack) == split.subsets(pack)).all()
        audit = audit_pack(pack, again)
        assert audit["split"]["patients_overlap"] is split.overlap and find_blocking_issues(audit) == []
    with refuses(SplitError, "8863", "train", "test"):
        check_no_leakage(pack.group_ids, leak.subsets(pack))


def test_a_condition_that_should_not_leak_and_does_is_refused(make_pack: MakePack) -> None:
    pack = make_pack(n_patients=6)
    made = make_leak_splits(pack, "8863", "8865")
    apart, leak = made["leak-apart"], made["leak-with"]
    save_split(pack, replace(apart, table=leak.table))
    with refuses(SplitError, "8863", "train", "test"):
        load_split(pack, apart.name).subsets(pack)


def test_ids_that_are_no_file_names_stay_apart(make_pack: MakePack) -> None:
    pack = make_pack(n_patients=4, columns={"patient_id": np.repeat(["a/1", "a 1", "c", "d"], 12)})
    names = {make_leak_splits(pack, who, "c")["leak-apart"].name for who in ("a/1", "a 1")}
    assert len(names) == 2 and all(name.startswith("leak-apart-a-1-") for name in names)


@pytest.mark.parametrize(
    ("tested", "validating", "fact"),
    [("8864", "8865", "'8864'"), ("8863", "8864", "'8864'"), ("8863", "8863", "['8863']")],
)
def test_wrong_patients_are_refused(make_pack: MakePack, tested: str, validating: str, fact: str) -> None:
    with refuses(SplitError, fact, reason="patient"):
        make_leak_splits(make_pack(n_patients=4), tested, validating)


def test_packs_and_settings_without_a_measurable_leak_are_refused(make_pack: MakePack) -> None:
    target = np.concatenate([np.zeros(12, int), np.tile([0, 1], 18)])
    one_class = make_pack("one.pack", n_patients=4, columns={"target": target})
    with refuses(SplitError, "8863", "non_idc"):
        make_leak_splits(one_class, "8863", "8865")
    nobody = make_pack("nobody.pack", n_patients=4, columns={"patient_id": None, "slide_id": None})
    with refuses(SplitError, "patients", "slides"):
        make_leak_splits(nobody, "8863", "8865")
    scarce = make_pack("scarce.pack", n_patients=3, columns={"target": [0, 1] * 12 + [1] * 12})
    with refuses(SplitError, "3 non_idc", "8863"):
        make_leak_splits(scarce, "8863", "8865")
    with refuses(SplitError, "test patient"):
        find_split(make_pack(n_patients=3), "leak-with")


def test_matched_trims_the_larger_training_subset(make_pack: MakePack) -> None:
    target = np.tile([0, 0, 0, 1], 30)
    pack = make_pack(n_patients=10, columns={"target": target})
    published = make_split(pack, protocol="as-published", recipe=CANCERNET, save=False)
    apart = make_split(pack, protocol="patients", test_patients=("8863", "8865", "8867"), save=False)
    n_train = int((apart.subsets(pack) == "train").sum())
    trimmed, same = matched(published, apart, pack, seed=2)
    assert same is apart
    before, after = published.subsets(pack), trimmed.subsets(pack)
    assert (after == "train").sum() == n_train < (before == "train").sum()
    assert (before[after == "train"] == "train").all()
    for subset in ("validation", "test"):
        assert ((before == subset) == (after == subset)).all()
    share = pack.target[before == "train"].mean()
    assert pack.target[after == "train"].sum() == pytest.approx(share * n_train, abs=1)
    assert trimmed.name == "as-published-matched-s2" and trimmed.is_published and trimmed.overlap
    assert trimmed.parameters["counts"]["train"]["patches"] == n_train
    assert trimmed.parameters["matched"] == {"from": "as-published", "train_patches": n_train, "seed": 2}
    again, other = (matched(apart, published, pack, seed=seed)[1].subsets(pack) for seed in (2, 3))
    assert (again == after).all() and (other != after).any()
    save_split(pack, trimmed)
    assert (load_split(pack, trimmed.name).subsets(pack) == after).all()
    with refuses(SplitError, "'folds'", "subsets"):
        matched(make_split(pack, protocol="folds", save=False), apart, pack)
