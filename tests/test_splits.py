import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biopsy.core.errors import FileFormatError, SplitError
from biopsy.core.files import read_json, write_json
from biopsy.core.results import Table
from biopsy.data.packs import Pack
from biopsy.data.protocols.groups import divide_groups
from biopsy.data.splits import (
    check_no_leakage,
    find_split,
    list_splits,
    load_split,
    read_split,
    save_split,
)
from biopsy.data.splits import (
    split as make_split,
)
from conftest import write_pack
from refusals import refuses

MakePack = Callable[..., Pack]
SHARES = (0.7, 0.15, 0.15)
ids = st.lists(st.integers(0, 40), max_size=80).map(lambda extra: list(range(20)) + extra)


def patients_of(pack: Pack, subsets: np.ndarray, subset: str) -> set[str]:
    return set(pack.group_ids[subsets == subset])


@given(ids, st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_every_patch_once_and_no_patient_twice(patient_ids: list[int], seed: int) -> None:
    group_ids = np.array(patient_ids, dtype=str)
    parts = divide_groups(group_ids, np.array(patient_ids) % 2, SHARES, seed=seed)
    assert set(parts) == {0, 1, 2}
    check_no_leakage(group_ids, np.array(["train", "validation", "test"])[parts])


@given(ids, st.randoms())
@settings(max_examples=30, deadline=None)
def test_order_of_patches_does_not_move_patients(patient_ids: list[int], shuffler: random.Random) -> None:
    shuffled = shuffler.sample(patient_ids, len(patient_ids))

    def place(order: list[int]) -> dict[int, int]:
        parts = divide_groups(np.array(order, dtype=str), np.array(order) % 3, SHARES, seed=3)
        return dict(zip(order, parts.tolist(), strict=True))

    assert place(patient_ids) == place(shuffled)


def test_seed_moves_patients() -> None:
    group_ids = np.arange(30).astype(str)
    target = np.arange(30) % 2
    divided = [divide_groups(group_ids, target, SHARES, seed=seed).tolist() for seed in (0, 0, 1)]
    assert divided[0] == divided[1] != divided[2]


@pytest.mark.parametrize("seed", range(5))
def test_classes_and_patches_are_balanced_between_subsets(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n_patches, share = rng.integers(20, 400, 60), rng.integers(0, 2, 60)  # patients of one class each
    group_ids = np.repeat(np.arange(60), n_patches).astype(str)
    target = np.repeat(share, n_patches)
    parts = divide_groups(group_ids, target, SHARES, seed=seed)
    sizes = np.bincount([int(parts[group_ids == str(group)][0]) for group in range(60)])
    assert sizes.tolist() == [42, 9, 9]
    for part, wanted in enumerate(SHARES):
        for class_index in (0, 1):
            assert (parts[target == class_index] == part).mean() == pytest.approx(wanted, abs=0.02)


# Patients of one class mostly, and one who holds a third of all negative patches, as in the IDC subset.
FEW_NEGATIVES = {"both": (7, (40, 120)), "negative": (3, (120, 0)), "positive": (14, (0, 80))}


def few_negatives() -> tuple[np.ndarray, np.ndarray]:
    kinds = [patches for n, patches in FEW_NEGATIVES.values() for _ in range(n)]
    kinds[0] = (700, 160)
    group_ids = np.repeat(np.arange(len(kinds)), [sum(kind) for kind in kinds]).astype(str)
    return group_ids, np.concatenate([np.repeat([0, 1], kind) for kind in kinds])


@pytest.mark.parametrize("seed", range(5))
def test_patients_that_carry_a_class_are_shared_out(seed: int) -> None:
    group_ids, target = few_negatives()
    parts = divide_groups(group_ids, target, [1.0] * 5, seed=seed)
    for part in range(5):
        for class_index, wanted in ((0, 10 / 5), (1, 21 / 5)):
            carriers = set(group_ids[(parts == part) & (target == class_index)])
            assert abs(len(carriers) - wanted) < 1


@pytest.mark.parametrize("seed", range(20))
def test_a_rare_class_reaches_every_subset(seed: int) -> None:
    group_ids = np.repeat(np.arange(60), 10).astype(str)
    target = np.repeat(np.where(np.arange(60) < 8, 3, np.arange(60) % 3), 10)  # eight patients of class 3
    parts = divide_groups(group_ids, target, SHARES, seed=seed)
    assert set(parts[target == 3]) == {0, 1, 2}


def test_metrics_that_the_tested_patients_do_not_allow_are_stated(
    make_pack: MakePack, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pack = make_pack(n_patients=20, patches_per_patient=6)
    split = make_split(pack, protocol="patients", save=False)
    limits = split.parameters["limits"]
    assert len(limits) == 2 and all("folds" in text for text in limits)  # three of twenty are tested
    assert all(text in caplog.text for text in limits)
    assert split.parameters["counts"]["test"]["groups_per_class"] == {"non_idc": 3, "idc": 3}
    assert make_split(pack, protocol="folds", save=False).parameters["limits"] == []
    assert make_split(pack, protocol="leave-one-out", save=False).parameters["limits"] == []
    names = sorted(set(pack.group_ids))
    assert (
        make_split(pack, protocol="patients", test_patients=names[:5], save=False).parameters["limits"] == []
    )
    few = write_pack(tmp_path, "few.pack", n_patients=4, patches_per_patient=6)
    assert not any(
        "folds" in text for text in make_split(few, protocol="leave-one-out", save=False).parameters["limits"]
    )


def test_leak_is_named() -> None:
    group_ids = np.array(["14-4659", "b", "14-4659", "c"])
    with refuses(SplitError, "14-4659", "train", "test"):
        check_no_leakage(group_ids, np.array(["train", "train", "test", ""]))
    check_no_leakage(group_ids, np.array(["train", "validation", "", "test"]))


def test_patients_protocol_records_what_it_did(make_pack: MakePack) -> None:
    pack = make_pack(n_patients=10)
    split = make_split(pack, protocol="patients", seed=1, save=False)
    subsets = split.subsets(pack)
    assert [len(patients_of(pack, subsets, subset)) for subset in ("train", "validation", "test")] == [
        7,
        1,
        2,
    ]
    assert split.overlap is False
    assert split.parameters["counts"]["train"] == {
        "patches": 84,
        "groups": 7,
        "per_class": {"non_idc": 42, "idc": 42},
        "groups_per_class": {"non_idc": 7, "idc": 7},
    }
    assert "random assignments of patients" in split.parameters["method"]


def test_named_patients_stay_where_they_are_put(make_pack: MakePack) -> None:
    pack = make_pack(n_patients=10)
    split = make_split(
        pack, protocol="patients", test_patients=("8865", "8873"), val_patients=("8863",), save=False
    )
    subsets = split.subsets(pack)
    assert patients_of(pack, subsets, "test") == {"8865", "8873"}
    assert patients_of(pack, subsets, "validation") == {"8863"}
    assert len(patients_of(pack, subsets, "train")) == 7
    only_test = make_split(pack, protocol="patients", test_patients=("8865",), save=False).subsets(pack)
    assert patients_of(pack, only_test, "test") == {"8865"}
    assert len(patients_of(pack, only_test, "validation")) == 2


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"protocol": "patient"}, ["'patient'", "'patients'"]),
        ({"protocol": "patients", "test_patients": ("8866",)}, ["'8866'"]),
        (
            {"protocol": "patients", "test_patients": ("8863",), "val_patients": ("8863",)},
            ["8863", "validation", "test"],
        ),
        (
            {"protocol": "patients", "test_patients": ("8863", "8865"), "val_patients": ("8867", "8869")},
            ["0 remaining"],
        ),
        ({"protocol": "folds"}, ["4 patients", "5 "]),
        ({"protocol": "folds", "folds": 2}, ["2 folds", "3 "]),
        ({"protocol": "leave-one-out", "test_patients": ("8863",)}, ["leave-one-out", "2 ", "['8863']"]),
        ({"protocol": "official"}, ["--cases", "'patients'"]),
        ({"protocol": "site"}, ["48 of 48", "site_id", "--join"]),
        ({"protocol": "kaggle-rows"}, ["train_labels.csv"]),
        ({"protocol": "as-published"}, ["as-published", "--recipe"]),
        (
            {"protocol": "as-published", "recipe": {"method": "shuffle-paths"}},
            ["'shuffle-paths'", "'shuffled-paths'"],
        ),
        (
            {"protocol": "as-published", "recipe": {"method": "shuffled-paths"}},
            ["'shuffled-paths'", "'seed'"],
        ),
        ({"protocol": "patients", "unit": "slide"}, ["patient", "slide"]),
        ({"protocol": "no-test", "test_patients": ("8863",)}, ["8863"]),
        ({"protocol": "no-test", "val_patients": ("nobody",)}, ["nobody"]),
        ({"protocol": "no-test", "val_patients": ("8863", "8865", "8867", "8869")}, ["train"]),
        ({"protocol": "patients", "name": "../x"}, ["'../x'"]),
    ],
)
def test_refusals(make_pack: MakePack, options: dict[str, object], facts: list[str]) -> None:
    with refuses(SplitError, *facts):
        make_split(make_pack(n_patients=4), **options, save=False)  # type: ignore[arg-type]


def test_fewer_patients_than_subsets(make_pack: MakePack) -> None:
    with refuses(SplitError, "2 patients", "3 subsets"):
        make_split(make_pack(n_patients=2), protocol="patients", save=False)


def test_without_a_test_subset_everyone_else_trains(make_pack: MakePack) -> None:
    pack = make_pack(n_patients=11)
    drawn = make_split(pack, protocol="no-test", save=False)
    subsets = drawn.subsets(pack)
    assert len(patients_of(pack, subsets, "validation")) == 2 and drawn.overlap is False
    named = make_split(pack, protocol="no-test", val_patients=("8863", "8865"), save=False)
    subsets = named.subsets(pack)
    assert patients_of(pack, subsets, "validation") == {"8863", "8865"}
    assert len(patients_of(pack, subsets, "train")) == 9
    for split in (drawn, named):
        assert set(split.subsets(pack)) == {"train", "validation"}
        assert split.parameters["limits"] == [] and split.parameters["counts"]["test"]["patches"] == 0


def test_folds_test_every_patient_once(make_pack: MakePack) -> None:
    pack = make_pack(n_patients=11)
    split = make_split(pack, protocol="folds", folds=4, save=False)
    assert split.n_folds == 4
    tested = [patients_of(pack, split.subsets(pack, fold), "test") for fold in range(4)]
    assert sorted(patient for patients in tested for patient in patients) == sorted(set(pack.group_ids))
    for fold in range(4):
        assert patients_of(pack, split.subsets(pack, fold), "validation") == tested[(fold + 1) % 4]
    with refuses(SplitError, "0 to 3", "fold=None"):
        split.subsets(pack)
    with refuses(SplitError, "0 to 3", "fold=4"):
        split.subsets(pack, 4)
    with refuses(SplitError, "folds", "subsets"):
        make_split(pack, protocol="patients", save=False).subsets(pack, 0)


def test_a_split_by_patch_warns_that_patients_are_unknown(make_pack: MakePack) -> None:
    pack = make_pack(n_patients=6, columns={"patient_id": None, "slide_id": None})
    _, text, table = make_split(pack, protocol="patients", save=False).blocks()
    assert "--patients" in str(text) and isinstance(table, Table)
    assert list(table.columns) == ["subset", "patches", "non-IDC", "IDC"]
    assert {len(row) for row in table.rows} == {len(table.columns)}


def test_patches_without_ids_are_split_by_patch(make_pack: MakePack) -> None:
    pack = make_pack(n_patients=6, columns={"patient_id": None, "slide_id": None})
    split = make_split(pack, protocol="patients", save=False)
    assert (split.unit, split.overlap) == ("patch", None)
    assert split.parameters["counts"]["train"]["patches"] == pytest.approx(0.7 * 72, abs=1)
    with refuses(SplitError, "cases", "--patients"):
        make_split(pack, protocol="official", cases=Path(__file__).parent, save=False)


def name_all_but(*rows: int) -> dict[str, object]:
    """Patients of twelve patches each, without those rows'."""
    ids: list[str | None] = [f"P{row // 12}" for row in range(72)]
    for row in rows:
        ids[row] = None
    return {"patient_id": ids, "slide_id": None}


@pytest.mark.parametrize("protocol", ["patients", "folds", "leave-one-out"])
@pytest.mark.parametrize("rows", [(0,), (0, 13, 30), tuple(range(20))])
def test_a_patch_without_a_patient_is_left_out_and_patients_stay_whole(
    make_pack: MakePack, caplog: pytest.LogCaptureFixture, protocol: str, rows: tuple[int, ...]
) -> None:
    pack = make_pack(n_patients=6, columns=name_all_but(*rows))
    split = make_split(pack, protocol=protocol, save=False)
    assert (split.unit, split.overlap) == ("patient", False)
    nameless = pack.table["patient_id"].isna().to_numpy()
    for fold in range(split.n_folds) if split.n_folds else [None]:
        subsets = split.subsets(pack, fold)
        assert ((subsets == "") == nameless).all()
        check_no_leakage(pack.table["patient_id"][~nameless].to_numpy(str), subsets[~nameless])
    noted = split.parameters["unknown_patients"]
    assert (noted["patches"], noted["treatment"]) == (len(rows), "left out")
    assert noted["first"][0] == pack.table["patch_id"][0]
    assert pack.table["patch_id"][0] in caplog.text


def test_patches_without_a_patient_do_not_change_the_subsets_of_others(make_pack: MakePack) -> None:
    pack = make_pack(n_patients=6, columns=name_all_but(0, 1))
    known = Pack(pack.path, pack.info, pack.patches, pack.table[2:].reset_index(drop=True))
    for seed in range(3):
        subsets = make_split(pack, protocol="patients", seed=seed, save=False).subsets(pack)
        assert (
            subsets[2:] == make_split(known, protocol="patients", seed=seed, save=False).subsets(known)
        ).all()


def test_patches_without_a_patient_may_be_counted_each_alone(make_pack: MakePack) -> None:
    pack = make_pack(n_patients=6, columns=name_all_but(*range(12)))
    split = make_split(pack, protocol="patients", unknown_patients="alone", save=False)
    subsets = split.subsets(pack)
    assert (subsets != "").all() and len(set(subsets[:12])) > 1
    assert split.parameters["counts"]["train"]["groups"] > 6
    assert split.parameters["unknown_patients"]["treatment"] == "each alone"
    assert len(set(pack.group_ids[:12])) == 12
    round_trip = save_split(pack, split) and load_split(pack, split.name)
    assert (round_trip.subsets(pack) == subsets).all()


def test_own_subsets_keep_patches_without_a_patient_and_report_it(
    make_pack: MakePack, caplog: pytest.LogCaptureFixture
) -> None:
    own = {"official_subset": np.repeat(["train", "validation", "test"], 24)}
    pack = make_pack(n_patients=6, columns=name_all_but(0) | own)
    split = make_split(pack, protocol="official", save=False)
    assert split.subsets(pack)[0] == "train"
    assert split.parameters["unknown_patients"]["treatment"] == "as given"
    assert "1 of 72 patches have no patient_id and are as given" in caplog.text


def test_a_slide_without_a_patient_stays_whole(make_pack: MakePack) -> None:
    columns = name_all_but(*range(24)) | {"slide_id": np.repeat(["s0", "s1", "s2", "s3", "s4", "s5"], 12)}
    pack = make_pack(n_patients=6, columns=columns)
    assert len(set(pack.group_ids[:24])) == 2
    subsets = make_split(pack, protocol="patients", unknown_patients="alone", save=False).subsets(pack)
    check_no_leakage(pack.table["slide_id"].to_numpy(str), subsets, unit="slide")


def test_one_class_on_a_subset_is_noted(make_pack: MakePack, caplog: pytest.LogCaptureFixture) -> None:
    target = np.repeat([0, 1, 1, 0, 1, 0], 12)
    pack = make_pack(n_patients=6, columns={"target": target})
    split = make_split(pack, protocol="patients", test_patients=("8863",), save=False)
    assert "test has one class only" in split.parameters["warnings"]
    assert "has one class only" in caplog.text


def test_round_trip(make_pack: MakePack, tmp_path: Path) -> None:
    pack = make_pack(n_patients=6)
    named = {"test_patients": pack.group_ids[[0, -1]].tolist()}  # all others train in every fold
    options = {"my-patients": {}, "my-leave-one-out": {}, "my-leave-one-out-named": named}
    for name, chosen in options.items():
        protocol = "patients" if name == "my-patients" else "leave-one-out"
        split = make_split(pack, protocol=protocol, name=name, seed=5, save=False, **chosen)
        path = save_split(pack, split)
        again = load_split(pack, name)
        assert again.table.equals(split.table)
        for field in ("name", "protocol", "unit", "seed", "parameters", "overlap", "pack_sha256", "n_folds"):
            assert getattr(again, field) == getattr(split, field)
        assert read_split(path).table.equals(split.table)
    assert list_splits(pack) == sorted(options)
    assert not list(pack.path.rglob("*.partial"))


def test_order_of_rows_in_the_csv_is_free(make_pack: MakePack) -> None:
    pack = make_pack(n_patients=6)
    split = make_split(pack, protocol="patients", save=False)
    save_split(pack, replace(split, table=split.table[::-1]))
    assert (load_split(pack, "patients").subsets(pack) == split.subsets(pack)).all()


def test_splits_of_other_packs_and_damaged_ones_are_refused(make_pack: MakePack) -> None:
    pack, other = make_pack(n_patients=6), make_pack("other.pack", n_patients=5)
    path = save_split(pack, make_split(pack, protocol="patients", save=False))
    save_split(other, load_split(pack, "patients"))
    with refuses(SplitError, "'patients'", "12 "):
        load_split(other, "patients")
    whole = path.read_text()
    about = read_json(path.with_suffix(".json"))
    changed = {
        whole[: len(whole) // 2].rpartition("\n")[0]: ["tiny.pack", "38 "],
        whole.replace("train", "trian"): [path, "train"],
        whole.replace("subset", "fold"): [path, "fold"],
        whole.replace("patch_id", "patch"): [path, "patch_id"],
    }
    for text, facts in changed.items():
        path.write_text(text)
        write_json(path.with_suffix(".json"), about)
        with refuses(SplitError, "changed"):
            load_split(pack, "patients")
        write_json(path.with_suffix(".json"), about | {"table_sha256": ""})  # as the first versions wrote it
        with refuses(SplitError, *facts):
            load_split(pack, "patients")
    path.write_text(whole)
    write_json(path.with_suffix(".json"), about | {"format": "biopsy-split/2"})
    with refuses(FileFormatError, "'biopsy-split/2'", reason="format"):
        load_split(pack, "patients")


def test_a_hand_made_split_that_leaks_loads_but_is_not_used(make_pack: MakePack) -> None:
    pack = make_pack(n_patients=6)
    made = make_split(pack, protocol="patients", save=False)
    moved = made.table.copy()
    moved.loc[0, "subset"] = "validation" if moved.loc[0, "subset"] == "train" else "train"
    save_split(pack, replace(made, table=moved))
    split = load_split(pack, "patients")
    with refuses(SplitError, "8863", "train"):
        split.subsets(pack)


def test_find_split_makes_what_needs_nothing_more(
    make_pack: MakePack, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pack = make_pack(n_patients=6)
    assert find_split(pack).protocol == "patients"
    assert list_splits(pack) == ["patients"]
    with refuses(SplitError, "'patinets'", "'patients'"):
        find_split(pack, "patinets")

    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr("biopsy.data.splits.write_split", refuse)
    assert find_split(pack, "folds").n_folds == 5
    assert "cannot be written" in caplog.text
