"""The pack on disk: opened whole, refused when altered."""

import json
import os

import numpy as np
import pytest

from biopsy.core.errors import PackError
from biopsy.core.files import write_json
from biopsy.data.packs import Pack, is_pack
from refusals import refuses


def test_opens_what_was_written(make_pack, make_patches):
    pack = make_pack(n_patients=3)
    images, table = make_patches(n_patients=3)
    assert np.array_equal(pack.patches, images)
    assert pack.table["patch_id"].tolist() == table["patch_id"].tolist()
    assert (len(pack), pack.unit, pack.positive_index) == (36, "patient", 1)
    assert pack.info.counts == {
        "patches": 36,
        "patients": 3,
        "slides": 3,
        "per_class": {"non_idc": 18, "idc": 18},
    }
    assert is_pack(pack.path)
    pack.verify()
    assert repr(pack) == "<Pack tiny.pack: 36 patches of 3 patients>"


@pytest.mark.parametrize(
    ("columns", "unit", "groups"),
    [
        ({}, "patient", 2),
        ({"patient_id": None}, "slide", 2),
        ({"patient_id": None, "slide_id": None}, "patch", 24),
    ],
)
def test_unit_is_the_widest_known_id(make_pack, columns, unit, groups):
    pack = make_pack(n_patients=2, columns=columns)
    assert pack.unit == unit
    assert len(set(pack.group_ids)) == groups


@pytest.mark.parametrize("name", ["patches.npy", "patches.parquet"])
def test_a_pack_cut_short_is_refused(make_pack, name):
    pack = make_pack()
    with open(pack.path / name, "rb+") as file:
        file.truncate(100)
    with refuses(PackError, name, "100 bytes", reason="truncated"):
        Pack.open(pack.path)


def test_a_missing_file_is_refused(make_pack):
    pack = make_pack()
    (pack.path / "patches.npy").unlink()
    with refuses(PackError, "patches.npy", reason="truncated"):
        Pack.open(pack.path)


def test_an_altered_pixel_or_label_is_noticed(make_pack):
    pack = make_pack()
    with open(pack.path / "patches.npy", "rb+") as file:
        file.seek(5000)
        value = file.read(1)[0]
        file.seek(5000)
        file.write(bytes([value ^ 1]))
    with refuses(PackError, reason="altered"):
        Pack.open(pack.path).verify()

    pack = make_pack("labels.pack")
    pack.table.loc[0, "target"] = 1
    with refuses(PackError, reason="altered"):
        pack.verify()


def test_splits_and_audits_do_not_change_the_hash(make_pack):
    pack = make_pack()
    (pack.path / "splits").mkdir()
    (pack.path / "splits" / "a.csv").write_text("patch_id,subset\n")
    pack.table["age"] = 60
    pack.verify()


def test_patches_are_found_by_their_ids_and_unknown_ones_refused(make_pack):
    pack = make_pack(n_patients=2)
    ids = pack.table["patch_id"].iloc[[5, 0, 7]]
    assert pack.rows_of(ids).tolist() == pack.rows_of(ids.tolist()).tolist() == [5, 0, 7]
    assert len(pack.rows_of([])) == 0
    with refuses(PackError, "'nobody'", reason="patch"):
        pack.rows_of([ids.iloc[0], "nobody"])


def test_a_newer_format_and_a_broken_document_are_refused(make_pack, tmp_path):
    pack = make_pack()
    document = json.loads((pack.path / "pack.json").read_text())
    (pack.path / "pack.json").write_text(json.dumps({**document, "format": "biopsy-pack/2"}))
    with refuses(PackError, "'biopsy-pack/1'", "'biopsy-pack/2'", reason="format"):
        Pack.open(pack.path)
    write_json(pack.path / "pack.json", {**document, "patch_px": "wide"})
    with refuses(PackError, "patch_px", reason="value"):
        Pack.open(pack.path)
    with refuses(PackError, "nothing", "pack.json", reason="missing"):
        Pack.open(tmp_path / "nothing")


@pytest.mark.parametrize(
    "change",
    [
        {"class_names": ["idc", "idc"]},
        {"class_names": []},
        {"positive_class": "nobody"},
        {"mpp": 0.0},
        {"mpp": "x"},
        {"patch_px": 10**6},
        {"patch_px": 17},
        {"counts": {}},
        {"content_sha256": 3},
    ],
)
def test_a_document_that_contradicts_itself_or_the_files_is_refused(make_pack, change):
    pack = make_pack()
    document = json.loads((pack.path / "pack.json").read_text())
    write_json(pack.path / "pack.json", {**document, **change})
    with pytest.raises(PackError) as caught:
        Pack.open(pack.path)
    assert "\n" not in str(caught.value)


def test_a_document_changed_by_hand_is_refused_and_one_without_a_hash_is_reported(make_pack, caplog):
    pack = make_pack()
    path = pack.path / "pack.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "class_names": ["idc", "non_idc"]}))
    with pytest.raises(PackError):
        Pack.open(pack.path)
    path.write_text(json.dumps(document, indent=1))  # the same content, written otherwise
    Pack.open(pack.path)
    del document["document_sha256"]
    path.write_text(json.dumps(document))
    assert not caplog.records
    Pack.open(pack.path)
    assert len(caplog.records) == 1


def test_a_changed_table_is_known_when_the_pack_is_opened(make_pack):
    pack = make_pack()
    path = pack.path / "patches.parquet"
    size = path.stat().st_size
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    assert path.stat().st_size == size
    with pytest.raises(PackError):
        Pack.open(pack.path)


def test_a_pack_in_use_may_be_touched_but_not_changed(make_pack):
    pack = make_pack()
    pixels = pack.path / "patches.npy"
    pack.require_unchanged()
    content = pixels.read_bytes()
    pixels.write_bytes(content)
    os.utime(pixels, ns=(1, 1))
    pack.require_unchanged()
    pixels.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(pixels, ns=(2, 2))
    with pytest.raises(PackError):
        pack.require_unchanged()
    pixels.unlink()
    with pytest.raises(PackError):
        pack.require_unchanged()
