import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biopsy.core.files import read_json, sha256_file, write_json
from biopsy.data import audit as duplicates
from biopsy.data.audit import (
    LIST_LIMIT,
    MAX_BITS,
    audit_pack,
    find_blocking_issues,
    find_near_duplicates,
    hash_patches,
)
from biopsy.data.pack_files import PIXELS, TABLE, content_sha256, patch_sha256
from biopsy.data.packs import Pack
from biopsy.data.splits import split as make_split

MakePack = Callable[..., Pack]
MakePatches = Callable[..., tuple[np.ndarray, pd.DataFrame]]


def alter(pack: Pack, change: Callable[[np.ndarray, pd.DataFrame], None]) -> Pack:
    """Change pixels and table of a pack in place and open it again."""
    images, table = np.array(pack.patches), pack.table.copy()
    change(images, table)
    cut = [image[:height, :width] for image, (width, height) in zip(images, pack.sizes, strict=True)]
    table["sha256"] = [patch_sha256(image) for image in cut]
    np.save(pack.path / PIXELS, images)
    table.to_parquet(pack.path / TABLE, index=False)
    about = read_json(pack.path / "pack.json")
    about["files"] = {name: (pack.path / name).stat().st_size for name in (PIXELS, TABLE)}
    about["table_sha256"] = sha256_file(pack.path / TABLE)
    about["content_sha256"] = content_sha256(images, table)
    write_json(pack.path / "pack.json", about)
    return Pack.open(pack.path)


def test_a_clean_pack_has_no_issues(make_pack: MakePack) -> None:
    pack = make_pack(n_patients=5)
    audit = audit_pack(pack, make_split(pack, protocol="patients", save=False))
    assert find_blocking_issues(audit) == []
    for kind in ("unreadable", "padded", "blank", "exact_duplicates", "near_duplicates"):
        assert audit[kind]["count"] == 0, kind
    assert audit["coordinates"]["known"] == 60
    assert audit["groups"]["count"] == 5
    assert audit["groups"]["items"][0] == {
        "id": "8863",
        "patches": 12,
        "per_class": {"non_idc": 6, "idc": 6},
    }
    assert audit["split"]["patients_overlap"] is False
    assert json.loads(json.dumps(audit)) == audit


def test_duplicates_and_conflicts_are_named(make_pack: MakePack) -> None:
    def copy(images: np.ndarray, _: pd.DataFrame) -> None:
        images[14] = images[2]  # of another patient, same class
        images[47] = images[40]  # of the same patient, another class

    pack = alter(make_pack(n_patients=4), copy)
    ids = pack.table["patch_id"]
    split = make_split(pack, protocol="patients", test_patients=("8863",), val_patients=("8867",), save=False)
    audit = audit_pack(pack, split)
    assert (audit["exact_duplicates"]["patches"], audit["exact_duplicates"]["count"]) == (4, 2)
    assert audit["exact_duplicates"]["items"] == [[ids[2], ids[14]], [ids[40], ids[47]]]
    assert audit["label_conflicts"]["same_pixels"]["items"] == [[ids[40], ids[47]]]
    assert audit["split"]["duplicates_across_subsets"]["items"] == [[ids[2], ids[14]]]
    reasons = find_blocking_issues(audit)
    assert len(reasons) == 2
    assert (
        f"1 label conflicts: patches of the same pixels with different labels, such as {ids[40]}"
        in reasons[0]
    )
    assert f"1 pictures in two subsets of split 'patients', such as {ids[2]} and {ids[14]}" in reasons[1]
    together = make_split(
        pack, protocol="patients", test_patients=("8863", "8865"), val_patients=("8867",), save=False
    )
    assert audit_pack(pack, together)["split"]["duplicates_across_subsets"]["count"] == 0


def test_duplicates_across_any_fold_are_found(make_pack: MakePack) -> None:
    pack = alter(make_pack(n_patients=5), lambda images, _: images.__setitem__(50, images[2]))
    split = make_split(pack, protocol="leave-one-out", test_patients=("8863", "8865"), save=False)
    assert audit_pack(pack, split)["split"]["duplicates_across_subsets"]["count"] == 1


def test_blank_duplicates_are_counted_separately_and_do_not_block(make_pack: MakePack) -> None:
    def whiten(images: np.ndarray, _: pd.DataFrame) -> None:
        images[[0, 11, 20]] = 255

    pack = alter(make_pack(n_patients=4), whiten)
    audit = audit_pack(pack, make_split(pack, protocol="leave-one-out", save=False))
    assert audit["blank"]["count"] == audit["exact_duplicates"]["blank_patches"] == 3
    assert audit["label_conflicts"]["same_pixels_blank"]["count"] == 1
    assert find_blocking_issues(audit) == []


def test_one_place_with_two_classes_is_a_conflict(make_pack: MakePack) -> None:
    def move(_: np.ndarray, table: pd.DataFrame) -> None:
        table.loc[[5, 6], ["x", "y"]] = 51
        table.loc[[7, 8], ["x", "y"]] = 101

    pack = alter(make_pack(n_patients=3), move)
    audit = audit_pack(pack)
    ids = pack.table["patch_id"].tolist()
    assert pack.target[5:9].tolist() == [0, 1, 1, 1]
    assert [ids[5], ids[6]] in audit["label_conflicts"]["same_place"]["items"]
    assert audit["label_conflicts"]["same_place"]["count"] == 1
    assert "patches of the same coordinates with different labels" in find_blocking_issues(audit)[0]


def test_places_off_the_grid_are_counted(make_pack: MakePack) -> None:
    def move(_: np.ndarray, table: pd.DataFrame) -> None:
        table.loc[7, "x"] += 3
        table.loc[9, "y"] = -49

    pack = alter(make_pack(n_patients=2, patch_px=50), move)
    expected = {"known": 24, "off_grid": 1, "grid_offset": [1, 1], "negative": 1}
    assert audit_pack(pack)["coordinates"] == expected


def test_places_of_different_patients_do_not_meet(make_pack: MakePack) -> None:
    assert audit_pack(make_pack(n_patients=3))["label_conflicts"]["repeated_places"] == 0


def test_a_patient_in_two_subsets_blocks_unless_published(make_pack: MakePack) -> None:
    pack = make_pack(n_patients=4)
    recipe = {"method": "shuffled-paths", "seed": 42, "train": 0.8, "validation": 0.1}
    published = make_split(pack, protocol="as-published", recipe=recipe, save=False)
    audit = audit_pack(pack, published)
    assert audit["split"]["patients_overlap"] is True
    assert audit["split"]["overlap"]["count"] == 4
    assert find_blocking_issues(audit) == []
    reasons = find_blocking_issues(audit_pack(pack, replace(published, protocol="patients", name="mine")))
    assert reasons == [
        "4 patients in two subsets of split 'mine', such as 8863 in "
        f"{' and '.join(audit['split']['overlap']['items']['8863'])}; split by patient"
    ]


def test_a_named_patient_in_two_subsets_blocks_though_other_ids_are_missing(make_pack: MakePack) -> None:
    ids = [None, *np.repeat(["P0", "P1", "P2", "P3"], 12).tolist()[1:]]
    pack = make_pack(n_patients=4, columns={"patient_id": ids, "slide_id": None})
    split = make_split(pack, protocol="patients", save=False)
    assert find_blocking_issues(audit_pack(pack, split)) == []
    subsets = split.subsets(pack)
    subsets[1] = "test" if subsets[2] != "test" else "train"
    table = split.table.assign(subset=subsets)
    audit = audit_pack(pack, replace(split, table=table))
    assert audit["groups"] | {"items": []} == {"count": 4, "one_class": audit["groups"]["one_class"]} | {
        "items": [],
        "unknown": 1,
    }
    assert list(audit["split"]["overlap"]["items"]) == ["P0"]
    assert len(find_blocking_issues(audit)) == 1


def test_patches_without_ids(make_pack: MakePack) -> None:
    nobody = {"patient_id": None, "slide_id": None, "x": None, "y": None}
    pack = make_pack(n_patients=4, columns=nobody)
    audit = audit_pack(pack, make_split(pack, protocol="patients", save=False))
    assert audit["split"]["patients_overlap"] is None
    assert audit["groups"]["count"] is None
    assert audit["coordinates"]["known"] == 0


def test_one_class_patients_padded_patches_and_long_lists(make_pack: MakePack) -> None:
    target = np.zeros(240, int)
    target[5] = 1
    pack = make_pack(n_patients=20, columns={"target": target, "width": 9})
    audit = audit_pack(pack)
    assert audit["padded"]["count"] == 240
    assert audit["padded"]["by_size"] == [{"width": 9, "height": 16, "count": 240}]
    assert len(audit["padded"]["items"]) == LIST_LIMIT
    assert audit["groups"]["one_class"]["count"] == 19


def test_pictures_stored_again_are_found() -> None:
    noise = np.random.default_rng(0).normal(0, 1, (240, 50, 50, 3))
    smooth = np.stack([cv2.GaussianBlur(image, (0, 0), 4) for image in noise])
    images = np.clip(150 + 600 * smooth, 0, 255).astype(np.uint8)
    stored = [
        cv2.imdecode(cv2.imencode(".jpg", image, [1, 90])[1], cv2.IMREAD_COLOR) for image in images[:100]
    ]
    darker = np.clip(images[100:140] * 0.95, 0, 255).astype(np.uint8)
    images = np.concatenate([images, np.stack(stored), darker])
    sizes = np.full((len(images), 2), 50)
    hashes, spread = hash_patches(images, sizes)
    pairs, likeness = find_near_duplicates(images, sizes, hashes, np.flatnonzero(spread > 4))
    found = set(map(tuple, pairs.tolist()))
    assert found <= {(row, 240 + row) for row in range(140)}
    assert len(found) >= 0.9 * 140
    assert likeness.min() >= duplicates.MIN_CORRELATION


def test_hashes_alike_by_chance_are_not_reported() -> None:
    images = np.random.default_rng(0).integers(0, 255, (40, 50, 50, 3), dtype=np.uint8)
    sizes = np.full((40, 2), 50)
    pairs, likeness = find_near_duplicates(images, sizes, np.zeros(40, np.uint64), np.arange(40))
    assert len(pairs) == len(likeness) == 0


@given(st.lists(st.tuples(st.integers(0, 30), st.sets(st.integers(0, 63), max_size=6)), max_size=40))
@settings(max_examples=40, deadline=None)
def test_banding_misses_no_close_pair(drawn: list[tuple[int, set[int]]]) -> None:
    base = np.random.default_rng(0).integers(0, 2**64, 31, dtype=np.uint64).tolist()
    numbers = [base[which] ^ sum(1 << bit for bit in flipped) for which, flipped in drawn]
    expected = {
        (a, b)
        for b in range(len(numbers))
        for a in range(b)
        if (numbers[a] ^ numbers[b]).bit_count() <= MAX_BITS
    }
    hashes = np.array(numbers, np.uint64)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(duplicates, "PAIRS_AT_ONCE", 7)
        found = [
            pair for block in duplicates._close_pairs(hashes) for pair in np.sort(block, axis=1).tolist()
        ]
    assert {tuple(pair) for pair in found} == expected


def test_hash_looks_at_the_real_part_only(make_patches: MakePatches) -> None:
    images, _ = make_patches(n_patients=1)
    padded = images[:1].copy()
    padded[:, :, 11:] = 0
    cut, spread = hash_patches(images[:1, :, :11], np.array([[11, 16]]))
    assert hash_patches(padded, np.array([[11, 16]])) == (cut, spread)
    assert spread[0] == pytest.approx(cv2.cvtColor(images[0, :, :11], cv2.COLOR_RGB2GRAY).std(), rel=1e-5)


@pytest.mark.data
def test_duplicates_of_pcam(data_dir: Path, tmp_path: Path) -> None:
    from biopsy.data.prepare import prepare

    pack = prepare(data_dir / "pcam" / "pcam_train_valid.zip", tmp_path / "pcam.pack")
    audit = audit_pack(pack, make_split(pack, protocol="official", save=False))
    assert (audit["exact_duplicates"]["patches"], audit["exact_duplicates"]["count"]) == (1_164, 511)
    assert audit["label_conflicts"]["same_pixels"]["count"] == 0
    assert find_blocking_issues(audit) == []
