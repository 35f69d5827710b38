"""Inspecting a pack: the audit is kept, and there are pictures of classes, patients and slides."""

import errno

import cv2
import numpy as np
import pytest

from biopsy.core.errors import PackError, SplitError
from biopsy.core.files import read_json
from biopsy.data import inspection
from biopsy.data.audit import audit_pack
from biopsy.data.figures import draw_subsets
from biopsy.data.inspection import inspect
from biopsy.data.pack_files import PIXELS
from biopsy.data.packs import Pack
from biopsy.data.splits import Split, save_split
from biopsy.data.splits import split as make_split
from biopsy.experiments.reports import find_audit
from refusals import refuses


@pytest.fixture
def pictures_empty(monkeypatch):
    """Write pictures without rendering them, and of one slide: most of the time of an inspection."""
    monkeypatch.setattr(inspection, "MAX_SLIDES", 1)
    monkeypatch.setattr(inspection, "png", lambda figure: b"")
    monkeypatch.setattr(inspection, "svg", lambda figure, name: "<svg></svg>")


def names(paths):
    return sorted(path.name for path in paths)


def test_audit_and_pictures_of_a_pack(make_pack):
    pack = make_pack(n_patients=3, patch_px=50)
    found = inspect(pack)
    assert found["blocking_issues"] == []
    assert found["paths"]["audit"] == pack.path / "audit.json"
    kept = read_json(pack.path / "audit.json", format="biopsy-audit/1")
    assert find_audit(pack) == kept
    assert kept == {key: value for key, value in found.items() if key not in ("paths", "blocking_issues")}
    assert names(found["paths"]["pictures"]) == [
        "classes.png",
        "patients.svg",
        "slide-01-8863.png",
        "slide-02-8865.png",
        "slide-03-8867.png",
    ]
    for path in found["paths"]["pictures"]:
        assert path.parent == pack.path / "inspection"
        if path.suffix == ".png":
            assert min(cv2.imread(str(path)).shape[:2]) > 100
        else:
            text = path.read_text(encoding="utf-8")
            assert text.startswith("<svg") and 'xmlns="http://www.w3.org/2000/svg"' in text and "8867" in text


@pytest.mark.parametrize(
    ("options", "parts", "counts"),
    [
        ({"protocol": "patients"}, ["train", "validation", "test"], [42, 42, 6, 6, 12, 12]),
        (
            {"protocol": "leave-one-out", "test_patients": ("8863", "8865"), "name": "two"},
            ["fold 0", "fold 1", "in no fold"],
            [6, 6, 6, 6, 48, 48],
        ),
    ],
)
def test_the_classes_of_a_split_are_drawn(make_pack, monkeypatch, options, parts, counts):
    pack = make_pack(n_patients=10)
    drawn = []
    monkeypatch.setattr(
        inspection, "draw_subsets", lambda *given: drawn.append(given) or draw_subsets(*given)
    )
    monkeypatch.setattr(inspection, "MAX_SLIDES", 1)
    split = make_split(pack, **options, save=False)
    picture = inspect(pack, split=split)["paths"]["pictures"][-1]
    assert picture.name == f"split-{split.name}.svg" and picture.read_text().startswith("<svg")
    ((names_drawn, counts_drawn, classes),) = drawn
    assert (names_drawn, classes) == (parts, ["non-IDC", "IDC"]) and counts_drawn.ravel().tolist() == counts


@pytest.mark.usefixtures("pictures_empty")
def test_inspecting_does_not_change_the_pack(make_pack):
    pack = make_pack(patch_px=50)
    inspect(pack)
    Pack.open(pack.path).verify()
    assert inspect(pack.path)["blocking_issues"] == []


def test_patches_on_the_class_sheet_come_from_every_patient_first(make_pack, monkeypatch):
    pack = make_pack(n_patients=6, patches_per_patient=40)
    monkeypatch.setattr(inspection, "N_SHOWN", 6)
    shown = {}
    monkeypatch.setattr(inspection, "draw_class_sheet", lambda sheets: shown.update(sheets))
    monkeypatch.setattr(inspection, "png", lambda figure: b"")
    inspect(pack)
    assert list(shown) == ["non-IDC: 120 patches", "IDC: 120 patches"]
    patches = {patch.tobytes(): owner for patch, owner in zip(pack.patches, pack.group_ids, strict=True)}
    for title, sheet in shown.items():
        assert len({patches[patch.tobytes()] for patch in sheet}) == len(sheet) == 6, title


@pytest.mark.usefixtures("pictures_empty")
def test_a_patient_in_two_subsets_is_a_blocking_issue(make_pack):
    pack = make_pack(n_patients=6)
    split = make_split(pack, protocol="patients", save=False)
    table = split.table.copy()
    whose = pack.table["patient_id"] == split_patient(pack, table, "train")
    table.loc[np.flatnonzero(whose)[:2], "subset"] = "test"
    leaking = Split("mine", "patients", "patient", 0, {}, table, None, pack.info.content_sha256)
    save_split(pack, leaking)
    found = inspect(pack, split="mine")
    assert len(found["blocking_issues"]) == 1
    assert (
        split_patient(pack, table, "train") in found["blocking_issues"][0]
        and "mine" in found["blocking_issues"][0]
    )
    assert inspect(pack, split=split)["blocking_issues"] == []


def split_patient(pack, table, subset):
    """Name the first patient with patches in a subset."""
    return pack.table["patient_id"][(table["subset"] == subset).to_numpy()].iloc[0]


@pytest.mark.usefixtures("pictures_empty")
def test_a_label_conflict_is_a_blocking_issue(make_pack):
    pack = make_pack(n_patients=6, patches_per_patient=12)
    x = pack.table["x"].copy()
    y = pack.table["y"].copy()
    x[11], y[11] = x[0], y[0]  # the first patient's last patch, of the other class, at its first one's place
    conflicting = make_pack("conflict.pack", columns={"x": x, "y": y})
    blocking_issues = inspect(conflicting)["blocking_issues"]
    assert len(blocking_issues) == 1 and "the same coordinates" in blocking_issues[0]


@pytest.mark.usefixtures("pictures_empty")
def test_without_patients_and_coordinates_only_classes_are_drawn(make_pack):
    unknown = {"patient_id": None, "slide_id": None, "x": None, "y": None}
    pack = make_pack(columns=unknown)
    assert names(inspect(pack)["paths"]["pictures"]) == ["classes.png"]


@pytest.mark.usefixtures("pictures_empty")
def test_slide_ids_never_become_paths(make_pack):
    pack = make_pack(n_patients=1, columns={"slide_id": "../../out of/here"})
    (picture,) = [path for path in inspect(pack)["paths"]["pictures"] if path.name.startswith("slide")]
    assert picture == pack.path / "inspection" / "slide-01-.._.._out_of_here.png"


@pytest.mark.usefixtures("pictures_empty")
def test_slides_with_most_patches_come_first_and_the_rest_is_counted(make_pack, monkeypatch, caplog):
    pack = make_pack(n_patients=2, columns={"slide_id": ["a"] * 5 + ["b"] * 19})
    with caplog.at_level("INFO", logger="biopsy"):
        pictures = inspect(pack)["paths"]["pictures"]
    assert names(pictures) == ["classes.png", "patients.svg", "slide-01-b.png"]
    assert "the 1 largest of 2 slides" in caplog.text


def test_a_stitched_slide_shows_each_patch_at_its_place(make_pack, monkeypatch):
    pack = make_pack(n_patients=1, patches_per_patient=9)
    shown = {}
    monkeypatch.setattr(
        inspection,
        "draw_slide",
        lambda tissue, target, *rest, **named: shown.update(tissue=tissue, target=target),
    )
    monkeypatch.setattr(inspection, "png", lambda figure: b"")
    monkeypatch.setattr(inspection, "draw_class_sheet", lambda sheets: None)
    inspect(pack)
    for index in range(9):
        x, y = int(pack.table["x"][index]) - 1, int(pack.table["y"][index]) - 1
        assert (shown["tissue"][y : y + 16, x : x + 16] == pack.patches[index]).all()
        assert shown["target"][y // 16, x // 16] == pack.target[index]


@pytest.mark.usefixtures("pictures_empty")
def test_a_read_only_pack_needs_a_folder(make_pack, tmp_path, monkeypatch):
    pack = make_pack()
    write = inspection.write_json

    def refuse(path, document):
        if pack.path in path.parents:
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        write(path, document)

    monkeypatch.setattr(inspection, "write_json", refuse)
    with refuses(PackError, "--out", reason="read-only"):
        inspect(pack)
    found = inspect(pack, out=tmp_path / "elsewhere")
    assert found["paths"]["audit"] == tmp_path / "elsewhere" / "audit.json"
    assert all(path.parent == tmp_path / "elsewhere" for path in found["paths"]["pictures"])


def test_a_full_disk_is_not_taken_for_a_read_only_pack(make_pack, monkeypatch):
    def full(path, document):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(inspection, "write_json", full)
    with refuses(OSError, errno=errno.ENOSPC):
        inspect(make_pack())


def test_an_altered_pack_is_refused(make_pack):
    pack = make_pack()
    patches = np.load(pack.path / PIXELS, mmap_mode="r+")
    patches[0, 0, 0, 0] += 1
    patches.flush()
    with refuses(PackError, reason="altered"):
        inspect(pack.path)


def test_an_unknown_split_is_refused(make_pack):
    with refuses(SplitError, "'patiens'", "'patients'", reason="name"):
        inspect(make_pack(), split="patiens")


@pytest.mark.usefixtures("pictures_empty")
def test_the_result_holds_the_audit(make_pack):
    pack = make_pack()
    assert {**inspect(pack), "paths": 0, "blocking_issues": 0} == {
        **audit_pack(pack),
        "paths": 0,
        "blocking_issues": 0,
    }
