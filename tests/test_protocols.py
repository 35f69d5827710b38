import inspect
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from biopsy.core.errors import SplitError
from biopsy.data.packs import Pack
from biopsy.data.protocols import PROTOCOLS
from biopsy.data.protocols.groups import Request
from biopsy.data.protocols.published import follow_recipe, read_cases
from biopsy.data.splits import find_split, load_split, save_split
from biopsy.data.splits import split as make_split
from biopsy.data.splits import split as split_pack
from conftest import draw_patches
from refusals import refuses

MakePack = Callable[..., Pack]
BARUAH = {
    "method": "first-files",
    "count": 60_000,
    "test": 0.15,
    "undersample": ["train", "test"],
    "test_is_validation": True,
    "seed": 0,
}
CANCERNET = {"method": "shuffled-paths", "seed": 42, "train": 0.8, "validation": 0.1}


def patients_of(pack: Pack, subsets: np.ndarray, subset: str) -> set[str]:
    return set(pack.group_ids[subsets == subset])


def test_leave_one_out_over_all_of_two_patients_leaves_none_to_train(make_pack: MakePack) -> None:
    with refuses(SplitError, "train", "fold 0"):
        make_split(make_pack(n_patients=2), protocol="leave-one-out", save=False)


def test_leave_one_out_follows_the_order_named(make_pack: MakePack) -> None:
    pack = make_pack(n_patients=6)
    order = ("8867", "8863", "8865")
    split = make_split(pack, protocol="leave-one-out", test_patients=order, save=False)
    for fold in range(3):
        subsets = split.subsets(pack, fold)
        assert patients_of(pack, subsets, "test") == {order[fold]}
        assert patients_of(pack, subsets, "validation") == {order[(fold + 1) % 3]}
        assert {"8869", "8871", "8873", order[(fold + 2) % 3]} == patients_of(pack, subsets, "train")
    assert make_split(pack, protocol="leave-one-out", save=False).n_folds == 6


def test_leaving_out_a_slide_leaves_out_its_patient(make_pack: MakePack) -> None:
    pack = make_pack(n_patients=5)
    halves = np.where(np.arange(len(pack)) % 2, "a", "b")
    pack = make_pack("slides.pack", n_patients=5, columns={"slide_id": np.char.add(pack.group_ids, halves)})
    split = make_split(
        pack,
        protocol="leave-one-out",
        unit="slide",
        test_patients=("8863a", "8865a", "8863b"),
        save=False,
    )
    assert set(pack.table["slide_id"][split.subsets(pack, 2) == "validation"]) == {
        "8865a"
    }  # not 8863a, next in order
    subsets = split.subsets(pack, 0)
    assert set(pack.table["slide_id"][subsets == "test"]) == {"8863a"}
    assert set(pack.table["slide_id"][subsets == "validation"]) == {"8865a"}
    assert set(pack.table["slide_id"][subsets == ""]) == {"8863b", "8865b"}
    assert split.parameters["counts"]["folds"][0]["left_out"] == {
        "patches": 12,
        "groups": 2,
        "per_class": {"non_idc": 6, "idc": 6},
        "groups_per_class": {"non_idc": 2, "idc": 2},
    }
    with refuses(SplitError, "validation", "fold 0"):
        make_split(pack, protocol="leave-one-out", unit="slide", test_patients=("8863a", "8863b"), save=False)


def test_sites(make_pack: MakePack) -> None:
    sites = np.repeat(["north", "south", "west"], 24)
    pack = make_pack(n_patients=6, columns={"site_id": sites})
    split = make_split(pack, protocol="site", save=False)
    for fold, site in enumerate(("north", "south", "west")):
        assert set(sites[split.subsets(pack, fold) == "test"]) == {site}
    named = make_split(pack, protocol="site", test_patients=("west",), save=False).subsets(pack)
    assert set(sites[named == "test"]) == {"west"}
    assert len(patients_of(pack, named, "validation")) == 1
    both = make_split(
        pack, protocol="site", test_patients=("west",), val_patients=("south",), save=False
    ).subsets(pack)
    assert set(sites[both == "validation"]) == {"south"}
    with refuses(SplitError, "'wset'", "'west'"):
        make_split(pack, protocol="site", test_patients=("wset",), save=False)


def test_two_sites_and_patients_of_two_sites(make_pack: MakePack) -> None:
    pack = make_pack(n_patients=6, columns={"site_id": np.repeat(["north", "south"], 36)})
    with refuses(SplitError, "2 sites"):
        make_split(pack, protocol="site", save=False)
    assert patients_of(
        pack,
        make_split(pack, protocol="site", test_patients=("south",), save=False).subsets(pack),
        "validation",
    )
    mixed = make_pack("mixed.pack", n_patients=6, columns={"site_id": ["north", "south", "west"] * 24})
    with refuses(SplitError, "patient 8863", "test", reason="overlap"):
        make_split(mixed, protocol="site", save=False)


def test_official_subsets(make_pack: MakePack) -> None:
    pack = make_pack(n_patients=8, official_subsets=("train", "train", "validation", "test"))
    split = find_split(pack)
    assert split.protocol == "official"
    assert (split.subsets(pack) == pack.table["official_subset"]).all()


def test_own_subsets_with_no_test_subset_are_kept_and_reported(make_pack: MakePack) -> None:
    pack = make_pack(n_patients=4, official_subsets=("train", "validation"))
    assert "test has no patches" in make_split(pack, protocol="official", save=False).parameters["warnings"]


def test_own_subsets_that_leak_are_refused(make_pack: MakePack) -> None:
    pack = make_pack(n_patients=4, columns={"official_subset": ["train", "validation", "test"] * 16})
    with refuses(SplitError, "8863", "train", "validation", "test", "3 more"):
        make_split(pack, protocol="official", save=False)


def write_lists(folder: Path) -> Path:
    folder.mkdir()
    (folder / "cases_train.txt").write_text("8863\n8865 \n\n 8867\n9999\n")
    (folder / "cases_val.txt").write_text("\ufeff8869\r\n")
    (folder / "cases_test.txt").write_text("8871")
    return folder


def test_official_cases_from_lists_and_from_csv(make_pack: MakePack, tmp_path: Path) -> None:
    pack = make_pack(n_patients=7)
    folder = write_lists(tmp_path / "lists")
    (tmp_path / "cases.csv").write_text(
        "split,case_id\ntrain,8863\ntraining,8865\nTrain,8867\ntrain,9999\nvalidation,8869\ntest, 8871\n"
    )
    splits = [
        make_split(pack, protocol="official", cases=cases, save=False)
        for cases in (
            folder,
            tmp_path / "cases.csv",
            [folder / f"cases_{subset}.txt" for subset in ("test", "train", "val")],
        )
    ]
    for split in splits:
        subsets = split.subsets(pack)
        assert patients_of(pack, subsets, "train") == {"8863", "8865", "8867"}
        assert patients_of(pack, subsets, "") == {"8873", "8875"}
        assert split.parameters["cases"]["train"] == {"listed": 4, "found": 3}
        assert split.parameters["left_out"] == {"patients": 2, "patches": 24}


def test_listed_cases_that_do_not_exist_are_named_with_the_likely_patient(
    make_pack: MakePack, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pack = make_pack(n_patients=8, columns={"patient_id": np.repeat([f"0{n}" for n in range(8)], 12)})
    subsets = ["train"] * 4 + ["validation"] * 2 + ["test"] * 2
    rows = "".join(f"{'3' if n == 3 else f'0{n}'},{subset}\n" for n, subset in enumerate(subsets))
    (tmp_path / "cases.csv").write_text("Case_ID;Split\n" + rows.replace(",", ";"))
    split = make_split(pack, protocol="official", cases=tmp_path / "cases.csv", save=False)
    assert split.parameters["left_out"]["patients"] == 1
    assert "1 of 8 listed cases are not in tiny.pack: '3' (perhaps '03')" in caplog.text
    assert "1 of 8 patients are in no list and left out: '03' (perhaps '3')" in caplog.text


def test_cases_are_read_in_one_spelling(make_pack: MakePack, tmp_path: Path) -> None:
    pack = make_pack(n_patients=4)
    (tmp_path / "cases.csv").write_text(
        "case_id,split\n8863.0,train\n 8865\u00a0,Training\n8867,val\n8869,test\n", encoding="utf-8"
    )
    split = make_split(pack, protocol="official", cases=tmp_path / "cases.csv", save=False)
    assert split.parameters["left_out"]["patients"] == 0
    named = make_split(
        pack, protocol="patients", test_patients=(" 8863\u00a0",), val_patients=("8865.0",), save=False
    )
    assert (named.subsets(pack)[:12] == "test").all()


def test_bad_lists_of_cases(make_pack: MakePack, tmp_path: Path) -> None:
    pack = make_pack(n_patients=4)
    folder = write_lists(tmp_path / "lists")
    (folder / "cases_val.txt").write_text("8863")
    with refuses(SplitError, "8863", "train", "validation"):
        read_cases(folder)
    (folder / "cases_val.txt").unlink()
    with refuses(SplitError, "cases_val.txt"):
        read_cases(folder)
    for text, *facts in [
        ("case_id,split\n1,training\n2,left", "'left'"),
        ("case,split\n1,train", "cases.csv", "case, split", "case_id"),
        ("case_id,split\n", "cases.csv", "no cases"),
        ("case_id,split\n1,train", "4 patients", "'8863'", "1 listed", "'1'"),
        ("", "cases.csv", "empty"),
    ]:
        (tmp_path / "cases.csv").write_text(text)
        with refuses(SplitError, *facts):
            make_split(pack, protocol="official", cases=tmp_path / "cases.csv", save=False)
    with refuses(SplitError, "absent.csv"):
        read_cases(tmp_path / "absent.csv")


def test_as_published_shuffles_sorted_paths_as_the_post_does(make_pack: MakePack) -> None:
    pack = make_pack(n_patients=5)
    paths = sorted(pack.table["source"])
    random.seed(42)
    random.shuffle(paths)
    n_train = int(len(paths) * 0.8)
    n_val = int(n_train * 0.1)
    expected = {path: "test" for path in paths[n_train:]} | {path: "validation" for path in paths[:n_val]}
    split = make_split(pack, protocol="as-published", recipe=CANCERNET, save=False)
    subsets = split.subsets(pack)
    assert [expected.get(path, "train") for path in pack.table["source"]] == subsets.tolist()
    assert split.overlap is True
    assert split.parameters["recipe"] == CANCERNET


class Rows:
    """As much of a pack as the published splits look at."""

    def __init__(self, n_rows: int) -> None:
        self.table = pd.DataFrame({"row": np.arange(n_rows), "source": np.arange(n_rows).astype(str)})
        self.target = (np.arange(n_rows) % 4 == 0).astype(int)


def follow(recipe: dict[str, object], n_patches: int) -> np.ndarray:
    request = Request(
        pack=Rows(n_patches),  # type: ignore[arg-type]
        unit="patch",
        group_ids=np.array([]),
        seed=0,
        n_folds=5,
        test_ids=(),
        val_ids=(),
        cases=None,
        recipe=recipe,
        n_groups=24,
    )
    return follow_recipe(request)[0]


@pytest.mark.parametrize(
    ("recipe", "n_patches", "expected"),
    [
        (CANCERNET, 277_524, [199_818, 22_201, 55_505, 0]),
        ({"method": "kaggle-rows"}, 220_025, [154_017, 44_004, 22_002, 2]),
        (BARUAH | {"undersample": []}, 277_524, [51_000, 0, 9_000, 217_524]),
    ],
)
def test_published_counts(recipe: dict[str, object], n_patches: int, expected: list[int]) -> None:
    subsets = follow(recipe, n_patches)
    assert [int((subsets == subset).sum()) for subset in ("train", "validation", "test", "")] == expected


def test_first_files_are_the_first_by_path_and_undersampled() -> None:
    subsets, target = follow(BARUAH, 90_000), Rows(90_000).target
    first = np.argsort(np.arange(90_000).astype(str), kind="stable")[:60_000]
    assert set(np.flatnonzero(subsets)) <= set(first)
    whole = follow(BARUAH | {"undersample": []}, 90_000)
    assert set(np.flatnonzero(whole)) == set(first)
    for subset in ("train", "test"):
        kept = np.bincount(target[subsets == subset])
        assert kept.tolist() == [target[whole == subset].sum()] * 2  # the rarer class is kept whole
        assert set(np.flatnonzero(subsets == subset)) <= set(np.flatnonzero(whole == subset))
    only_train = follow(BARUAH | {"undersample": ["train"]}, 90_000)
    assert (only_train == "test").sum() == 9_000
    assert (follow(BARUAH, 90_000) == subsets).all()
    assert (follow(BARUAH | {"seed": 1}, 90_000) != subsets).any()


def test_what_tests_may_validate_where_it_was_published_so(make_pack: MakePack) -> None:
    pack = make_pack(n_patients=6)
    split = make_split(
        pack, protocol="as-published", recipe=BARUAH | {"test": 0.25}, name="baruah", save=False
    )
    save_split(pack, split)
    for made in (split, load_split(pack, "baruah")):
        assert made.test_is_validation and made.overlap is True and made.may_overlap
        assert set(made.subsets(pack)) <= {"train", "test", ""}
    assert split.parameters["warnings"] == [] and split.parameters["taken"] == 72
    assert not make_split(pack, protocol="as-published", recipe=CANCERNET, save=False).test_is_validation
    with refuses(SplitError, "'first-files'", "count", "'test'"):
        make_split(pack, protocol="as-published", recipe={"method": "first-files", "count": 5}, save=False)
    with refuses(SplitError, "validation"):
        make_split(pack, protocol="as-published", recipe=BARUAH | {"test_is_validation": False}, save=False)


def test_help_names_every_protocol() -> None:
    named = re.search(r"protocol: (.*?)\.\n", inspect.getdoc(split_pack) or "", re.DOTALL)
    assert named is not None and set(re.findall(r'"(.+?)"', named[1])) == set(PROTOCOLS)


def test_kaggle_rows_go_by_row_whatever_the_order(make_pack: MakePack) -> None:
    rows = np.random.default_rng(0).permutation(48)
    pack = make_pack(n_patients=4, columns={"row": rows, "patient_id": None, "slide_id": None})
    split = make_split(pack, protocol="kaggle-rows", save=False)
    subsets = split.subsets(pack)
    assert rows[subsets == "train"].max() == 32
    assert sorted(rows[subsets == ""]) == [33, 43]
    assert rows[subsets == "test"].min() == 44
    assert split.overlap is None


@pytest.mark.data
def test_official_lists_of_idc_hold_84_29_49_cases(data_dir: Path) -> None:
    subsets = list(read_cases(data_dir / "idc" / "official_split.csv").values())
    assert [subsets.count(subset) for subset in ("train", "validation", "test")] == [84, 29, 49]


def test_left_out_patches_survive_the_csv(make_pack: MakePack, tmp_path: Path) -> None:
    pack = make_pack(n_patients=7)
    split = make_split(pack, protocol="official", cases=write_lists(tmp_path / "lists"), save=False)
    save_split(pack, split)
    assert (load_split(pack, "official").subsets(pack) == split.subsets(pack)).all()


def test_patients_of_a_pack_without_ids_are_refused_with_the_way_to_give_them(tmp_path):
    images, table = draw_patches(4, 4)
    pack = Pack.from_arrays(images, table["target"], class_names=["a", "b"], out=tmp_path / "p")
    with refuses(SplitError, "'007'", "by patch", "prepare", "--patients", reason="patient"):
        split_pack(pack, protocol="patients", test_patients=["007"])
