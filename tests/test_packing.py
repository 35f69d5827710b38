"""From an archive to a pack: the right pixels, everything counted, nothing half-written."""

import errno
import io
import json
import logging
import shutil
import struct
import zipfile
import zlib
from collections import namedtuple

import numpy as np
import pytest
from PIL import Image

from biopsy.core.errors import ArchiveError, DataError, PackError
from biopsy.data import packing
from biopsy.data.pack_files import pad
from biopsy.data.packs import Pack
from biopsy.data.prepare import prepare
from refusals import refuses


def add(path, name, data):
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, data)


def encode(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def huge_png():
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


def test_pixels_are_pillows_in_order_of_names(make_idc_zip, tmp_path):
    source = make_idc_zip()
    pack = prepare(source, tmp_path / "x.pack")
    with zipfile.ZipFile(source) as archive:
        names = sorted(archive.namelist())
        images = [np.array(Image.open(archive.open(name)).convert("RGB")) for name in names]
    assert np.array_equal(pack.patches, np.stack(images))
    assert pack.table["source"].tolist() == names
    assert pack.target.tolist() == [int(name[-5]) for name in names]
    assert (pack.table[["width", "height"]] == 16).all(axis=None)
    pack.verify()


def test_twice_the_same_whatever_the_cores_and_the_blocks(make_idc_zip, tmp_path, monkeypatch):
    source = make_idc_zip(n_patients=3)
    one = prepare(source, tmp_path / "one.pack")
    monkeypatch.setattr(packing, "_BLOCK_BYTES", 5 * 16 * 16 * 3)
    monkeypatch.setattr(packing.os, "cpu_count", lambda: 5)
    two = prepare(source, tmp_path / "two.pack")
    for name in ("patches.npy", "patches.parquet"):
        assert (one.path / name).read_bytes() == (two.path / name).read_bytes()
    assert one.info.content_sha256 == two.info.content_sha256


def test_small_patches_are_padded_by_their_edge_and_kept(tmp_path):
    small = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    for name, image in (("a", small), ("b", np.zeros((4, 4, 3), np.uint8))):
        (tmp_path / "x" / name).mkdir(parents=True)
        (tmp_path / "x" / name / "1.png").write_bytes(encode(Image.fromarray(image)))
    pack = prepare(tmp_path / "x", tmp_path / "x.pack", positive="b")
    assert pack.info.patch_px == 4
    assert pack.sizes.tolist() == [[3, 2], [4, 4]]
    assert np.array_equal(pack.patches[0], np.pad(small, ((0, 2), (0, 1), (0, 0)), mode="edge"))
    assert np.array_equal(pad(small, 4), pack.patches[0])
    pack.verify()

    pixels = np.load(pack.path / "patches.npy")
    pixels[0, 3, 3] += 1  # in the padding
    np.save(pack.path / "patches.npy", pixels)
    with refuses(PackError, "x.pack", reason="altered"):
        Pack.open(pack.path).verify()


def test_unreadable_files_are_named_and_counted(make_idc_zip, tmp_path):
    source = make_idc_zip(n_patients=2)
    good = encode(Image.new("RGB", (16, 16)))
    bad = {
        "text": (b"I am no image", "is not an image"),
        "empty": (b"", "is empty"),
        "huge": (huge_png(), "is 100,000 x 100,000 pixels"),
        "cut": (encode(Image.effect_noise((16, 16), 9).convert("RGB"))[:150], "cannot be decoded"),
        "deep": (encode(Image.fromarray(np.ones((16, 16), np.uint16))), "has 16 bits per channel"),
        "cmyk": (encode(Image.new("CMYK", (16, 16)), "JPEG"), "is of mode CMYK"),
    }
    for index, (data, _) in enumerate(bad.values()):
        add(source, f"IDC_regular_ps50_idx5/8863/0/8863_idx5_x{9001 + index}_y1_class0.png", data)
    fine = {
        "grey": encode(Image.new("L", (16, 16), 7)),
        "alpha": encode(Image.new("RGBA", (16, 16))),
        "good": good,
    }
    for index, data in enumerate(fine.values()):
        add(source, f"IDC_regular_ps50_idx5/8863/0/8863_idx5_x{8001 + index}_y1_class0.png", data)
    progress = []
    pack = prepare(
        source, tmp_path / "x.pack", on_progress=lambda done, total: progress.append((done, total))
    )
    assert len(pack) == 24 + 3
    assert pack.info.counts["skipped"] == 6
    reasons = {item["source"][-17:]: item["reason"] for item in pack.info.skipped}
    for index, (_, reason) in enumerate(bad.values()):
        assert reason in reasons[f"x{9001 + index}_y1_class0.png"[-17:]]
    by_id = dict(zip(pack.table["patch_id"], pack.patches, strict=True))
    assert (by_id["8863_idx5_x8001_y1_class0"] == 7).all()
    assert (by_id["8863_idx5_x8002_y1_class0"] == 255).all()  # transparent: the white below
    assert progress[-1] == (progress[-1][1],) * 2
    pack.verify()


def test_a_larger_patch_late_in_the_set_is_not_cut(make_idc_zip, tmp_path, monkeypatch):
    source = make_idc_zip()
    add(
        source,
        "IDC_regular_ps50_idx5/9999/0/9999_idx5_x1_y1_class0.png",
        encode(Image.new("RGB", (20, 18), "red")),
    )
    whole = prepare(source, tmp_path / "whole.pack")
    monkeypatch.setattr(packing, "_SAMPLE_ROWS", 3)
    monkeypatch.setattr(packing, "_BLOCK_BYTES", 5 * 16 * 16 * 3)
    pack = prepare(source, tmp_path / "late.pack")
    assert pack.patches.shape == (73, 20, 20, 3)
    assert (pack.patches[-1] == (255, 0, 0)).all()
    assert pack.info.content_sha256 == whole.info.content_sha256
    assert pack.info.skipped == []


def lying_png(n_px):
    data = encode(Image.new("RGB", (16, 16), "red"))
    chunk = b"IHDR" + struct.pack(">IIBBBBB", n_px, n_px, 8, 2, 0, 0, 0)
    return data[:8] + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]


@pytest.mark.parametrize("n_px", [20, 2000])
@pytest.mark.parametrize("sample_rows", [3, 256])
def test_the_size_is_that_of_the_decoded_image_not_of_the_header(
    make_idc_zip, tmp_path, monkeypatch, n_px, sample_rows
):
    monkeypatch.setattr(packing, "_SAMPLE_ROWS", sample_rows)
    source = make_idc_zip()
    for index in range(3):
        add(source, f"8863/0/8863_idx5_x{9001 + index}_y1_class0.png", lying_png(n_px))
    pack = prepare(source, tmp_path / "x.pack")
    assert pack.patches.shape[1:] == (16, 16, 3)
    assert len(pack) == 72
    assert [item["reason"][:17] for item in pack.info.skipped] == ["cannot be decoded"] * 3


@pytest.mark.parametrize("sample_rows", [3, 256])
def test_a_patch_unlike_all_others_in_size_is_skipped_and_named(
    make_idc_zip, tmp_path, monkeypatch, sample_rows
):
    monkeypatch.setattr(packing, "_SAMPLE_ROWS", sample_rows)
    source = make_idc_zip(n_patients=1)
    add(source, "8863/0/8863_idx5_x1_y9001_class0.png", encode(Image.new("RGB", (900, 16))))
    add(source, "8863/0/8863_idx5_x51_y9001_class0.png", encode(Image.new("RGB", (64, 3))))
    add(source, "8863/0/8863_idx5_x101_y9001_class0.png", encode(Image.new("RGB", (1, 1))))
    pack = prepare(source, tmp_path / "x.pack")
    assert pack.patches.shape == (14, 64, 64, 3)  # four times as long is still one of them
    assert [item["source"][-27:] for item in pack.info.skipped] == ["8863_idx5_x1_y9001_class0.png"[-27:]]
    assert "900 x 16" in pack.info.skipped[0]["reason"]


def test_patches_of_two_very_different_sizes_are_refused(tmp_path):
    for name, side in (("benign", 16), ("malignant", 100)):
        (tmp_path / "x" / name).mkdir(parents=True)
        for index in range(6):
            (tmp_path / "x" / name / f"{index}.png").write_bytes(
                encode(Image.new("RGB", (side, side), index))
            )
    with refuses(DataError, "malignant/0.png", "100 px"):
        prepare(tmp_path / "x", tmp_path / "x.pack")


def test_memory_ahead_of_the_writing_is_bounded(make_idc_zip, tmp_path, monkeypatch):
    source = make_idc_zip()
    monkeypatch.setattr(packing, "_BLOCK_BYTES", 16 * 16 * 3)
    monkeypatch.setattr(packing, "_AHEAD_BYTES", 2 * 16 * 16 * 3)
    monkeypatch.setattr(packing.os, "cpu_count", lambda: 8)
    decoded, written = [], []
    honest = packing._decode_block
    monkeypatch.setattr(packing, "_decode_block", lambda *args: decoded.append(args) or honest(*args))
    prepare(
        source,
        tmp_path / "x.pack",
        on_progress=lambda done, total: written.append(len(decoded) - done),
    )
    assert max(written) <= 3


def test_nothing_readable_is_an_error_and_leaves_nothing(tmp_path):
    source = tmp_path / "x.zip"
    add(source, "8863/0/8863_idx5_x1_y1_class0.png", b"no")
    for data in (b"no", encode(Image.effect_noise((16, 16), 9).convert("RGB"))[:150]):
        source.unlink()
        add(source, "8863/0/8863_idx5_x1_y1_class0.png", data)
        with refuses(DataError, "1 skipped", "8863/0/8863_idx5_x1_y1_class0.png"):
            prepare(source, tmp_path / "out" / "x.pack")
    assert not list((tmp_path / "out").iterdir())
    source.unlink()
    add(source, "8863/0/8863_idx5_x1_y1_class1.png", b"no")
    with refuses(DataError, "class 0"):
        prepare(source, tmp_path / "x.pack")


@pytest.mark.parametrize("stage", ["pixels", "table"])
def test_a_full_disk_is_one_line_and_leaves_nothing(make_idc_zip, tmp_path, monkeypatch, stage):
    def fail(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(
        *{"pixels": (packing, "_write_header"), "table": (packing, "finish_pack")}[stage], fail
    )
    with refuses(DataError, tmp_path / "out"):
        prepare(make_idc_zip(), tmp_path / "out" / "x.pack")
    assert not list((tmp_path / "out").iterdir())


def test_too_little_space_is_known_before_anything_is_written(make_idc_zip, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(packing.shutil, "disk_usage", lambda path: usage(1000))
    with refuses(DataError, "16 px", "0.00 GB"):
        prepare(make_idc_zip(), tmp_path / "out" / "x.pack")
    assert not list((tmp_path / "out").iterdir())


def test_an_interruption_leaves_nothing(make_idc_zip, tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(make_idc_zip(), tmp_path / "out" / "x.pack", on_progress=interrupt)
    assert not list((tmp_path / "out").iterdir())


def test_a_finished_pack_is_used_again_and_nothing_is_overwritten(make_idc_zip, tmp_path):
    source, out = make_idc_zip(), tmp_path / "x.pack"
    made = prepare(source, out).info.origin["made"]
    before = (out / "pack.json").stat().st_mtime_ns
    again = prepare(source, out)
    assert (again.info.origin["made"], (out / "pack.json").stat().st_mtime_ns) == (made, before)
    with refuses(PackError, "x.pack", "--out", reason="exists"):
        prepare(source, out, mpp=0.5)
    with refuses(PackError, "x.pack", "--out", reason="exists"):
        prepare(make_idc_zip("other.zip", seed=1), out)
    with refuses(DataError, out, "a pack"):
        prepare(out, tmp_path / "y.pack")
    (tmp_path / "mine").mkdir()
    prepare(source, tmp_path / "mine")
    shutil.rmtree(tmp_path / "mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with refuses(DataError, "mine", "pack"):
        prepare(source, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_one_class_or_one_patient_is_data_with_a_warning(make_idc_zip, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        pack = prepare(make_idc_zip(n_patients=1, n_classes=1), tmp_path / "x.pack")
    assert pack.class_names == ["non_idc", "idc"]
    assert [record.getMessage() for record in caplog.records] == [
        "all patches are of one class, non_idc",
        "all patches are of one patient, 8863: no split by patient is possible",
    ]


def test_the_pack_records_its_origin(make_idc_zip, tmp_path):
    csv = tmp_path / "age.csv"
    csv.write_text("patient_id,age\n8863,61\n8865,\n1,50\n")
    pack = prepare(make_idc_zip(n_patients=2), tmp_path / "x.pack", join=csv, positive="non_idc", mpp=3.9)
    origin = pack.info.origin
    assert (origin["source"], origin["version"]) == ("idc.zip", "0.1.0")
    assert origin["join"]["columns"] == ["age"]
    assert (origin["join"]["patches_without_row"], origin["join"]["rows_without_patch"]) == (0, 1)
    assert (pack.info.positive_class, pack.info.mpp, pack.positive_index) == ("non_idc", 3.9, 0)
    ages = pack.table.groupby("patient_id")["age"].first()
    assert ages["8863"] == 61 and np.isnan(ages["8865"])
    assert str(tmp_path) not in json.dumps(pack.info.model_dump())


def test_labels_by_hand_are_kept_with_who_and_what_was_before(make_idc_zip, tmp_path):
    csv = tmp_path / "labels.csv"
    csv.write_text("patch_id,label,who,when\n8863_idx5_x1_y1_class0,idc,A. Reader,2024-05-01\n")
    source = make_idc_zip(n_patients=2)
    pack = prepare(source, tmp_path / "x.pack", labels=csv)
    row = pack.table.set_index("patch_id").loc["8863_idx5_x1_y1_class0"]
    assert row[["target", "label_before", "label_by", "label_at"]].tolist() == [
        1,
        "non_idc",
        "A. Reader",
        "2024-05-01",
    ]
    assert pack.table["label_before"].notna().sum() == 1
    assert pack.info.origin["labels"]["changed"] == 1
    assert pack.info.content_sha256 != prepare(source, tmp_path / "y.pack").info.content_sha256


def test_three_classes_fold_into_two(make_patches, tmp_path):
    images, table = make_patches(n_patients=1, n_classes=3)
    for image, row in zip(images, table.itertuples(), strict=True):
        folder = tmp_path / "x" / ("normal", "in_situ", "invasive")[row.target]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{row.x}_{row.y}.png").write_bytes(encode(Image.fromarray(image)))
    pack = prepare(tmp_path / "x", tmp_path / "three.pack")
    assert (pack.class_names, pack.positive_index) == (["in_situ", "invasive", "normal"], None)
    pack = prepare(tmp_path / "x", tmp_path / "two.pack", positive="in_situ,invasive")
    assert (pack.class_names, pack.info.positive_class) == (
        ["normal", "in_situ+invasive"],
        "in_situ+invasive",
    )
    assert pack.info.counts["per_class"] == {"normal": 4, "in_situ+invasive": 8}
    assert set(pack.table["original_class"]) == {"normal", "in_situ", "invasive"}


def test_two_classes_without_a_known_positive_one_ask(make_patches, tmp_path):
    for name in ("luminal", "basal"):
        (tmp_path / "x" / name).mkdir(parents=True)
        (tmp_path / "x" / name / "1.png").write_bytes(encode(Image.new("RGB", (4, 4))))
    with refuses(DataError, "basal", "luminal"):
        prepare(tmp_path / "x", tmp_path / "x.pack")
    assert prepare(tmp_path / "x", tmp_path / "x.pack", positive=["basal"]).positive_index == 0


def test_wrong_values_are_refused(make_idc_zip, tmp_path):
    source = make_idc_zip()
    for mpp in (0, -1.0, float("nan")):
        with refuses(DataError, "between"):
            prepare(source, tmp_path / "x.pack", mpp=mpp)
    with refuses(ArchiveError, "nothing.zip"):
        prepare(tmp_path / "nothing.zip", tmp_path / "x.pack")
    assert not (tmp_path / "x.pack").exists()
