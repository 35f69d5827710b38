"""Slides with annotations become packs: labels are areas, what has none is counted, the loop closes."""

import json
import re
import shutil

import cv2
import numpy as np
import pytest
import shapely
import shapely.affinity
import torch

import biopsy
from annotation_files import asap, asap_annotation, imagescope, write_annotations
from biopsy.core.errors import DataError, SlideError
from biopsy.data.prepare import prepare
from biopsy.phantom.slides import make_phantom_slide
from biopsy.slide_io.annotations import read_annotations
from biopsy.slide_io.pyramids import write_pyramid
from biopsy.slides.maps import SlideMap
from command_line import call
from conftest import draw_slide
from host_models import make_classifier
from refusals import refuses
from scn_files import write_scn

TUMOUR = shapely.Polygon([(300, 60), (470, 110), (500, 300), (340, 330), (280, 200)])
STROMA = shapely.Polygon([(120, 120), (260, 70), (270, 190), (220, 300), (110, 260)])
BOX = shapely.box(64, 40, 560, 344)
CUT = {"mpp": 1.0, "patch_px": 16, "positive": "Tumor"}


@pytest.fixture
def slides(make_slide, tmp_path):
    """``slides(annotations, name="case")``: a folder with a slide of 600 x 400 px at .5 um/px."""

    def make(annotations=(("Tumor", TUMOUR), ("Stroma", STROMA)), name="case", mpp=0.5, **slide):
        folder = tmp_path / "slides"
        folder.mkdir(exist_ok=True)
        shutil.move(make_slide(f"{name}.tiff", mpp=mpp, **slide), folder / f"{name}.tiff")
        if annotations is not None:
            write_annotations(folder / f"{name}.geojson", annotations)
        return folder

    return make


def cut(folder, **options):
    return prepare(folder, folder.with_suffix(".pack"), **(CUT | options))


def raster(polygon, width=600, height=400):
    """Draw a polygon 16 times finer than level 0, and average."""
    fine = np.zeros((height * 4, width * 4), np.uint8)
    for part in shapely.get_parts(polygon):
        cv2.fillPoly(fine, [np.round(np.array(part.exterior.coords) * 4 - 0.5).astype(int)], 1)
    return cv2.resize(fine.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)


def shares(pack, polygon, scale=2.0):
    """Return by pixels what share of each patch a polygon covers."""
    mask = raster(polygon)
    side = round(pack.info.patch_px * scale)
    corners = (pack.table[["x", "y"]].to_numpy(int) * scale).round().astype(int)
    return np.array([mask[y : y + side, x : x + side].mean() for x, y in corners])


def test_a_label_is_the_class_that_covers_half_of_the_patch(slides):
    pack = cut(slides())
    assert pack.class_names == ["Stroma", "Tumor"] and pack.info.dataset == "annotated-slides"
    found = np.stack([shares(pack, STROMA), shares(pack, TUMOUR)])
    assert (found.argmax(axis=0) == pack.target).all() and set(pack.target) == {0, 1}
    covered = np.take_along_axis(found, pack.target[None], axis=0)[0]
    np.testing.assert_allclose(pack.table["label_share"], covered, atol=0.02)
    assert covered.min() > 0.48
    pack.verify()


def test_pixels_are_the_slides_at_the_wanted_resolution(slides):
    image = draw_slide(600, 400)
    half = cv2.resize(image, (300, 200), interpolation=cv2.INTER_AREA)
    folder = slides()
    for mpp, wanted in ((0.5, image), (1.0, half)):
        pack = prepare(folder, folder.with_name(f"{mpp}.pack"), mpp=mpp, patch_px=16, positive="Tumor")
        for patch, x, y in zip(pack.patches, pack.table["x"], pack.table["y"], strict=True):
            assert np.abs(patch.astype(int) - wanted[y : y + 16, x : x + 16]).max() <= 1
        assert pack.info.mpp == mpp and (pack.sizes == 16).all()


def test_every_place_on_the_grid_is_a_patch_or_counted(slides):
    pack = cut(slides())
    record = pack.info.origin["annotations"]
    assert len(pack) + sum(record["left_out"].values()) == (300 // 16) * (200 // 16)
    assert pack.info.counts["left_out"] == sum(record["left_out"].values())
    case = record["slides"]["case"]
    assert (
        case["patches"] == len(pack) and case["mpp_source"] == "slide" and case["mpp"] == pytest.approx(0.5)
    )
    wanted = {"Stroma": STROMA.area * 0.25e-6, "Tumor": TUMOUR.area * 0.25e-6}
    assert case["area_mm2"] == pytest.approx(wanted) and case["overlap_mm2"] == {}
    assert record["label_frac"] == 0.5 and record["patch_px"] == 16


def test_steps_overlap_and_leave_gaps(slides):
    folder = slides()
    dense = prepare(folder, folder.with_name("dense.pack"), **CUT, stride_px=8)
    plain = cut(folder)
    assert set(plain.table["patch_id"]) < set(dense.table["patch_id"])
    assert not (dense.table[["x", "y"]] % 8).to_numpy().any()
    both = dense.table.set_index("patch_id").loc[plain.table["patch_id"]]
    assert both["target"].tolist() == plain.target.tolist()


def test_a_region_limits_where_labels_hold_and_rest_names_what_is_left(slides):
    folder = slides([("Tumor", TUMOUR), ("Region*", BOX)])
    pack = cut(folder, classes=["tumour=Tumor"], rest="other", positive=None)
    assert pack.class_names == ["other", "tumour"] and pack.info.positive_class == "tumour"
    inside = shares(pack, BOX)
    assert inside.min() > 0.99
    assert ((shares(pack, TUMOUR) > 0.5) == (pack.target == 1)).mean() > 0.99
    left_out = pack.info.origin["annotations"]["left_out"]
    assert left_out["not wholly in the valid area"] > 0 and "no class covers enough" not in left_out


def test_ignored_areas_have_no_labels(slides):
    hole = shapely.box(350, 150, 420, 250)
    star = slides([("Tumor", TUMOUR), ("Stroma", STROMA), ("Ignore*", hole)])
    named = slides([("Tumor", TUMOUR), ("Stroma", STROMA), ("Fold", hole)], name="fold")
    (named / "case.tiff").rename(star / "none.png")
    for path in list(named.glob("case*")) + list(named.glob("none*")):
        path.unlink()
    pack = cut(named, classes=["Tumor", "Stroma", "=Fold"])
    assert shares(pack, hole).max() < 1e-6
    assert pack.info.origin["annotations"]["left_out"]["not wholly in the valid area"] > 0


def test_annotations_that_overlap_are_measured_and_their_patches_left_out(slides):
    pack = cut(slides([("Tumor", TUMOUR), ("Stroma", STROMA.union(shapely.box(300, 100, 400, 250)))]))
    record = pack.info.origin["annotations"]
    overlap = TUMOUR.intersection(STROMA.union(shapely.box(300, 100, 400, 250))).area
    assert record["slides"]["case"]["overlap_mm2"] == pytest.approx({"Stroma and Tumor": overlap * 0.25e-6})
    assert record["left_out"]["more than one class covers enough"] > 0


def test_a_larger_share_can_be_requested(slides):
    folder = slides()
    half, most = cut(folder), prepare(folder, folder.with_name("most.pack"), **CUT, label_frac=0.9)
    assert len(most) < len(half) and most.table["label_share"].min() >= 0.9 - 1e-6
    assert (
        most.info.origin["annotations"]["left_out"]["no class covers enough"]
        > half.info.origin["annotations"]["left_out"]["no class covers enough"]
    )


def test_several_annotated_names_make_one_class(slides):
    folder = slides([("IDC", TUMOUR), ("DCIS", STROMA), ("Region*", BOX)])
    pack = cut(folder, classes=["tumour=IDC", "tumour=DCIS"], rest="benign", positive=None)
    assert pack.class_names == ["benign", "tumour"]
    union = shares(pack, TUMOUR.union(STROMA))
    assert ((union > 0.5) == (pack.target == 1)).mean() > 0.99


def test_patients_come_from_a_csv_of_slides(slides, tmp_path):
    slides()
    folder = slides(name="other", seed=1)
    (tmp_path / "people.csv").write_text("slide_id,patient_id,site_id\ncase,p1,a\nother,p2,b\n")
    pack = cut(folder, patients=tmp_path / "people.csv")
    assert pack.table.groupby("slide_id")["patient_id"].first().to_dict() == {"case": "p1", "other": "p2"}
    assert pack.unit == "patient" and pack.info.counts["slides"] == 2
    assert cut(folder, patients=tmp_path / "people.csv").info.origin["made"] == pack.info.origin["made"]
    with refuses(DataError, "slides.pack", "--out"):
        cut(folder, patients=tmp_path / "people.csv", label_frac=0.6)


def test_slides_and_annotations_without_partner_are_named(slides):
    folder = slides()
    slides(None, name="alone")
    write_annotations(folder / "nobody.geojson", [("Tumor", TUMOUR)])
    write_annotations(folder / "case.tiff.geojson", [("Tumor", TUMOUR)])
    out = str(folder.with_suffix(".pack"))
    flags = ["--out", out, "--mpp", "1", "--patch-px", "16", "--positive", "Tumor"]
    done = call("prepare", str(folder), *flags)
    assert done.exit_code == 3, done.stderr
    for wanted in (
        "alone.tiff: has no annotations",
        "nobody.geojson: has no slide of the same name",
        "case.tiff.geojson: case.tiff already has case.geojson",
    ):
        assert wanted in done.stderr


def test_the_pixel_size_of_slides_can_be_stated_one_by_one(slides, tmp_path):
    folder = slides([("Tumor", TUMOUR), ("Stroma", STROMA)])
    (folder / "case.tiff").unlink()
    cv2.imwrite(str(folder / "case.png"), draw_slide(600, 400)[..., ::-1])
    with refuses(SlideError, "case.png", "--mpp"):
        cut(folder)
    (tmp_path / "mpp.csv").write_text("slide,mpp\ncase,0.5\n")
    one, other = (
        prepare(folder, tmp_path / f"{n}.pack", **CUT, slide_mpp=stated)
        for n, stated in enumerate([0.5, tmp_path / "mpp.csv"])
    )
    assert one.info.content_sha256 == other.info.content_sha256
    assert one.info.origin["annotations"]["slides"]["case"]["mpp_source"] == "stated"
    (tmp_path / "blank.csv").write_text("slide,mpp\ncase,\nother,0.5\n")
    with refuses(SlideError, "case.png", "--mpp"):
        prepare(folder, tmp_path / "blank.pack", **CUT, slide_mpp=tmp_path / "blank.csv")
    for text, *facts in (
        ("slide,mpp\ncase,x\n", "slide case", "mpp"),
        ("a,b\n1,2\n", "a, b", "slide, mpp"),
    ):
        (tmp_path / "bad.csv").write_text(text)
        with refuses(DataError, "bad.csv", *facts):
            prepare(folder, tmp_path / "bad.pack", **CUT, slide_mpp=str(tmp_path / "bad.csv"))


def outside(**options):
    return {"annotations": [("Tumor", shapely.box(900, 900, 1400, 1300)), ("Stroma", STROMA)], **options}


REFUSALS = {
    "another slide's": (
        outside(),
        {},
        ["feature 1", "Tumor", "x 900 to 1400, y 900 to 1300", "600 x 400 px"],
    ),
    "a class not named": (
        {},
        {"classes": ["Tumour", "Stroma"]},
        ["'Tumor'", "'Tumour'", "=Tumor ", "--classes"],
    ),
    "one class": ({"annotations": [("Tumor", TUMOUR)]}, {}, ["Tumor", "--rest", "Region*"]),
    "no region": ({}, {"rest": "other"}, ["case.geojson", "Region*", "'other'"]),
    "too coarse": (
        {},
        {"mpp": 0.3},
        ["0.30 um/px", "case.tiff", "0.50 um/px", "1.5x"],
    ),
    "too small": ({}, {"patch_px": 300}, ["case.tiff", "300 x 200 um", "patch of 300 um"]),
    "a share": ({}, {"label_frac": 0.0}, ["label_frac=0.0"]),
    "a side": ({}, {"patch_px": 0}, ["patch_px=0", "1 or more"]),
    "a step": ({}, {"stride_px": 0}, ["stride_px=0", "1 or more"]),
    "no side": ({}, {"patch_px": None}, ["--mpp", "--patch-px"]),
    "a step alone": ({}, {"patch_px": None, "stride_px": 8}, ["--stride-px", "--patch-px"]),
    "no mpp": ({}, {"mpp": None}, ["--patch-px", "--mpp"]),
    "two positive": ({}, {"positive": None}, ["Stroma", "Tumor", "--positive"]),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_annotations_that_do_not_fit_the_slide_are_refused(slides, name):
    made, options, facts = REFUSALS[name]
    folder = slides(**made)
    with refuses((DataError, SlideError), *facts):
        cut(folder, **options)
    assert not folder.with_suffix(".pack").exists()


def test_options_for_slides_are_refused_for_patches(make_idc_zip, tmp_path):
    with refuses(DataError, "idc.zip", "--patch-px"):
        prepare(make_idc_zip(), tmp_path / "x.pack", **CUT)
    with refuses(DataError, ".geojson"):
        prepare(make_idc_zip(), tmp_path / "x.pack", **CUT, dataset="annotated-slides")


def test_a_repaired_outline_is_recorded_and_reported(slides, caplog):
    bow = [[300, 60], [500, 300], [500, 60], [300, 300], [300, 60]]
    folder = slides()
    document = json.loads((folder / "case.geojson").read_text())
    document["features"][0]["geometry"]["coordinates"] = [bow]
    (folder / "case.geojson").write_text(json.dumps(document))
    pack = cut(folder)
    assert pack.info.origin["annotations"]["slides"]["case"]["repaired"] == [1]
    assert "1 self-intersecting outlines were repaired, feature 1 first" in caplog.text


def test_a_phantom_slide_gets_the_labels_of_its_truth(tmp_path):
    folder = tmp_path / "phantom"
    folder.mkdir()
    truth = make_phantom_slide(folder / "case.tiff", seed=3, width=640, height=480, mpp=2.0, tumour_frac=0.4)
    pack = prepare(folder, tmp_path / "x.pack", mpp=4.0, patch_px=25, classes=["tumour=Tumor"], rest="normal")
    places = 2.0 * pack.table[["x", "y"]].to_numpy(float)
    boxes = [shapely.box(x, y, x + 50, y + 50) for x, y in places]
    covered = np.array([truth.tumour.intersection(one).area / one.area for one in boxes])
    assert ((covered >= 0.5) == (pack.target == 1)).all() and 0 < pack.target.mean() < 1


class Darkness(torch.nn.Module):
    """Calls a patch malignant the darker it is."""

    def forward(self, patches):
        z = 40 * (0.74 - patches.mean(dim=(1, 2, 3)))
        return torch.stack([-z, z], dim=1)


def test_a_map_corrected_in_qupath_gives_its_labels_back(slides, tmp_path):
    folder = slides(None)
    classifier = biopsy.Classifier(make_classifier(patch_px=16, input_px=16).info, Darkness())
    table = biopsy.slide(classifier, folder / "case.tiff", precision="fp32", device="cpu")
    table.to_geojson(folder / "case.geojson")
    pack = cut(folder, positive="malignant", classes=["benign", "malignant"])
    called = {
        (int(x), int(y)): row.argmax()
        for x, y, row in zip(table.grid.x_px, table.grid.y_px, table.probs, strict=True)
    }
    assert len(pack) == len(table) and 0 < pack.target.mean() < 1
    assert pack.target.tolist() == [called[x, y] for x, y in pack.table[["x", "y"]].to_numpy(int).tolist()]
    np.testing.assert_allclose(pack.table["label_share"], 1)


def labels(pack):
    """Return the class at each place that has one."""
    places = pack.table[["x", "y"]].to_numpy(int).tolist()
    return {(x, y): target for (x, y), target in zip(places, pack.target.tolist(), strict=True)}


@pytest.mark.parametrize(("mpp", "patch_px"), [(1.0, 16), (0.65, 20)])
def test_abstained_patches_of_a_map_return_without_a_label(slides, tmp_path, mpp, patch_px):
    folder = slides(None)
    info = make_classifier(patch_px=patch_px, input_px=16).info
    info = info.model_copy(update={"mpp": mpp, "conformal": {"quantiles": [0.95, 0.9]}})
    classifier = biopsy.Classifier(info, Darkness())
    table = biopsy.slide(classifier, folder / "case.tiff", precision="fp32", device="cpu")
    table.to_geojson(folder / "case.geojson")
    pack = cut(folder, mpp=mpp, patch_px=patch_px, positive="malignant", classes=["benign", "malignant"])
    places = list(zip(table.grid.x_px.tolist(), table.grid.y_px.tolist(), strict=True))
    sets = 1 - table.probs <= [0.95, 0.9]
    np.testing.assert_array_equal(table.abstained, sets.sum(axis=1) != 1)
    called = {
        place: row.argmax()
        for place, row, is_open in zip(places, table.probs, table.abstained, strict=True)
        if not is_open
    }
    assert labels(pack) == called
    n_places = int(300 / mpp // patch_px) * int(200 / mpp // patch_px)
    assert pack.info.origin["annotations"]["left_out"] == {
        "not wholly in the valid area": int(table.abstained.sum()),
        "less than half tissue": n_places - len(table),
    }
    assert min(table.abstained.sum(), *np.bincount(pack.target)) > 10
    np.testing.assert_allclose(pack.table["label_share"], 1)


def test_of_an_overlapping_map_labels_are_those_of_its_cells(slides):
    folder = slides(None)
    info = make_classifier(patch_px=16, input_px=16).info
    info = info.model_copy(update={"conformal": {"quantiles": [0.95, 0.9]}})
    classifier = biopsy.Classifier(info, Darkness())
    table = biopsy.slide(classifier, folder / "case.tiff", stride_um=8, precision="fp32", device="cpu")
    table.to_geojson(folder / "case.geojson")
    pack = cut(folder, stride_px=8, positive="malignant", classes=["benign", "malignant"])
    cells, labelled, counts = table.cells_pred(), {}, {"not valid": 0, "two classes": 0}
    for row, column in zip(table.grid.row.tolist(), table.grid.column.tolist(), strict=True):
        under = cells[row : row + 2, column : column + 2]
        n_malignant = (under == 1).sum()
        if (under == -2).any():
            counts["not valid"] += 1
        elif n_malignant == 2:
            counts["two classes"] += 1
        else:
            labelled[column * 8, row * 8] = int(n_malignant > 2)
    assert labels(pack) == labelled and set(labelled.values()) == {0, 1}
    left_out = pack.info.origin["annotations"]["left_out"]
    assert left_out["not wholly in the valid area"] == counts["not valid"] > 10
    assert left_out["more than one class covers enough"] == counts["two classes"] > 0
    assert "no class covers enough" not in left_out


CORNER = (96, 64)  # whole patches of 16 px at 1.0 um/px


@pytest.fixture
def scn(tmp_path):
    """Return a folder with a slide of which a part was scanned, as MIRAX and SCN say it."""
    folder = tmp_path / "scn"
    folder.mkdir()
    write_scn(folder / "case.scn", draw_slide(600, 400), corner=CORNER, size=(800, 608), mpp=0.5)
    return folder


def test_qupath_counts_from_where_scanning_began(slides, scn):
    write_annotations(scn / "case.geojson", [("Tumor", TUMOUR), ("Stroma", STROMA)])
    plain, shifted = labels(cut(slides())), labels(cut(scn))
    moved = {(x + CORNER[0] // 2, y + CORNER[1] // 2): target for (x, y), target in plain.items()}
    assert moved == shifted and len(moved) > 40
    by_hand = {"Tumor": TUMOUR, "Stroma": STROMA}
    by_hand = {name: shapely.affinity.translate(area, *CORNER) for name, area in by_hand.items()}
    write_annotations(scn / "case.geojson", by_hand.items())
    not_cropped = prepare(scn, scn.with_name("whole.pack"), **CUT, crop=False)
    assert labels(not_cropped) == shifted
    record = not_cropped.info.origin["annotations"]
    assert record["slides"]["case"]["corner_px"] == list(CORNER) and record["crop"] is False


def test_asap_counts_from_the_slides_corner(scn):
    write_annotations(scn / "case.geojson", [("Tumor", TUMOUR), ("Stroma", STROMA)])
    (scn.parent / "case.xml").write_text(
        asap(
            *(
                (name, list(shapely.affinity.translate(area, *CORNER).exterior.coords)[:-1])
                for name, area in (("Tumor", TUMOUR), ("Stroma", STROMA))
            )
        )
    )
    pack = prepare(scn, scn.with_name("asap.pack"), **CUT, annotations=scn.parent / "case.xml")
    assert labels(pack) == labels(cut(scn)) and len(pack) > 40


def test_a_map_of_a_part_scanned_lies_over_it_in_qupath(scn):
    classifier = biopsy.Classifier(make_classifier(patch_px=16, input_px=16).info, Darkness())
    out = scn.parent / "maps"
    biopsy.slide(classifier, [scn / "case.scn"], out=out, detections=True, precision="fp32", device="cpu")
    table = SlideMap.from_parquet(out / "case" / "map.parquet")
    assert table.grid.corner == CORNER and min(table.grid.x) >= CORNER[0] and min(table.grid.y) >= CORNER[1]
    drawn = {
        name: shapely.union_all([shapely.geometry.shape(one["geometry"]) for one in features])
        for name in ("regions", "detections")
        if (features := json.loads((out / "case" / f"{name}.geojson").read_text())["features"])
    }
    cells = shapely.union_all(shapely.box(table.grid.x, table.grid.y, table.grid.x + 32, table.grid.y + 32))
    for area in drawn.values():
        assert area.equals(shapely.affinity.translate(cells, -CORNER[0], -CORNER[1]))
    table.to_geojson(scn / "case.geojson")
    pack = cut(scn, positive="malignant", classes=["benign", "malignant"])
    places = zip(table.grid.x_px.tolist(), table.grid.y_px.tolist(), strict=True)
    assert labels(pack) == dict(zip(places, table.probs.argmax(axis=1).tolist(), strict=True))


def test_annotations_may_lie_elsewhere_under_names_that_fit(slides, tmp_path):
    folder = slides(None)
    for name in ("other", "TCGA-1.0-uuid"):
        slides(None, name=name, seed=1)
    notes = tmp_path / "notes"
    (notes / "deeper").mkdir(parents=True)
    areas = [("Tumor", TUMOUR), ("Stroma", STROMA)]
    drawn = asap(*((name, list(area.exterior.coords)[:-1]) for name, area in areas))
    write_annotations(notes / "other.tiff.json", areas)
    (notes / "deeper" / "case.xml").write_text(drawn)
    (notes / "TCGA-1.xml").write_text(drawn)
    (notes / "nobody.xml").write_text(drawn)
    (notes / "readme.txt").write_text("no annotations")
    pack = cut(folder, annotations=notes)
    records = pack.info.origin["annotations"]["slides"]
    assert {name: record["annotations"] for name, record in records.items()} == {
        "TCGA-1.0-uuid": "TCGA-1.xml",
        "case": "deeper/case.xml",
        "other": "other.tiff.json",
    }
    assert pack.info.skipped == [{"source": "nobody.xml", "reason": "has no slide of the same name"}]
    assert cut(folder, annotations=notes).info.origin["made"] == pack.info.origin["made"]
    (notes / "nobody.xml").unlink()
    with refuses(DataError, "slides.pack", "--out"):
        cut(folder, annotations=notes)
    for fact, annotations in {
        str(notes / "none.xml"): notes / "none.xml",
        ".geojson .json .xml .annotations": folder,
        "readme.txt": notes / "readme.txt",
    }.items():
        with refuses(DataError, fact):
            prepare(folder, tmp_path / "x.pack", **CUT, annotations=annotations)


def test_one_file_is_that_of_one_slide(slides, tmp_path):
    folder = slides()
    (tmp_path / "export 1.geojson").write_bytes((folder / "case.geojson").read_bytes())
    pack = cut(folder)
    (folder / "case.geojson").unlink()
    for number, source in enumerate((folder, folder / "case.tiff")):
        one = prepare(source, tmp_path / f"{number}.pack", **CUT, annotations=tmp_path / "export 1.geojson")
        assert one.info.content_sha256 == pack.info.content_sha256
    shutil.copy(folder / "case.tiff", folder / "case.tif")
    with refuses(DataError, "case.geojson", "case.tif and case.tiff"):
        write_annotations(folder / "case.geojson", [("Tumor", TUMOUR)])
        prepare(folder, tmp_path / "y.pack", **CUT, annotations=folder / "case.geojson")


def test_annotations_drawn_at_another_pixel_size_are_refused(slides, tmp_path):
    areas = [
        (name, "", [("0", list(a.exterior.coords), 0)]) for name, a in (("Tumor", TUMOUR), ("S", STROMA))
    ]
    folder = slides(None)
    (tmp_path / "case.xml").write_text(imagescope(*areas, mpp=0.51))
    assert len(cut(folder, annotations=tmp_path / "case.xml")) > 40
    (tmp_path / "case.xml").write_text(imagescope(*areas, mpp=0.25))
    with refuses(DataError, "case.xml", "0.25 um/px", "case.tiff has 0.5"):
        prepare(folder, tmp_path / "x.pack", **CUT, annotations=tmp_path / "case.xml")


@pytest.mark.data
@pytest.mark.parametrize("name", ["tumor_076", "tumor_085"])
def test_outlines_of_camelyon_label_a_slide_of_their_size(data_dir, tmp_path, name):
    """As large as Camelyon16's, at 3.9 um/px and tissue throughout, under the outlines scaled to it."""
    outlines = read_annotations(data_dir / "annotations" / "asap" / f"{name}.xml")
    whole = shapely.MultiPolygon([box for item in outlines.items for box in shapely.get_parts(item.polygon)])
    width, height = (int(side // 16) + 200 for side in whole.bounds[2:])
    noise = np.random.default_rng(0).integers(-12, 12, (height, width, 1))
    pixels = np.clip(np.array([190, 110, 170]) + noise, 0, 255).astype(np.uint8)
    folder = tmp_path / "slides"
    folder.mkdir()
    mpp = 0.243 * 16
    write_pyramid(folder / f"{name}.tiff", pixels, width=width, height=height, mpp=mpp)
    text = (data_dir / "annotations" / "asap" / f"{name}.xml").read_text()
    scaled = re.sub(r' (X|Y)="([^"]*)"', lambda found: f' {found[1]}="{float(found[2]) / 16}"', text)
    box = [(0, 0), (width, 0), (width, height), (0, height)]
    scaled = scaled.replace("</Annotations>", f"{asap_annotation('Region*', box)}</Annotations>")
    (tmp_path / f"{name}.xml").write_text(scaled)
    pack = prepare(
        folder,
        tmp_path / "x.pack",
        mpp=mpp,
        patch_px=25,
        classes=["tumour=metastasis"],
        rest="normal",
        annotations=tmp_path / f"{name}.xml",
    )
    tumour = shapely.union_all([item.polygon for item in outlines.items])
    shapely.prepare(tumour)
    x, y = pack.table[["x", "y"]].to_numpy(float).T * 16
    truth = shapely.area(shapely.intersection(shapely.box(x, y, x + 400, y + 400), tumour)) / 400**2
    assert ((truth >= 0.5) == (pack.target == 1)).mean() > 0.9999 and len(pack) > 20_000
    assert pack.target.sum() * 400**2 == pytest.approx(tumour.area, rel=0.02)


@pytest.mark.data
def test_real_slides_are_cut(data_dir, tmp_path):
    folder = tmp_path / "real"
    folder.mkdir()
    for name, width, height in (("CMU-1-Small-Region", 2220, 2967), ("tcga-cr-7395-01a-01-ts1", 4443, 3567)):
        shutil.copy(data_dir / "wsi" / f"{name}.svs", folder)
        halves = [
            ("Tumor", shapely.box(0, 0, width, height / 2)),
            ("Stroma", shapely.box(0, height / 2, width, height)),
        ]
        write_annotations(folder / f"{name}.geojson", halves)
    with refuses(SlideError, "tcga-cr-7395-01a-01-ts1.svs", "--mpp"):
        cut(folder)
    (tmp_path / "mpp.csv").write_text("slide,mpp\ntcga-cr-7395-01a-01-ts1,0.5\n")
    pack = prepare(
        folder, tmp_path / "x.pack", mpp=1.0, patch_px=50, positive="Tumor", slide_mpp=tmp_path / "mpp.csv"
    )
    sources = {name: case["mpp_source"] for name, case in pack.info.origin["annotations"]["slides"].items()}
    assert sources == {"CMU-1-Small-Region": "slide", "tcga-cr-7395-01a-01-ts1": "stated"}
    assert pack.info.counts["slides"] == 2 and len(pack) > 500
    assert (pack.patches[:, 20:30, 20:30].mean(axis=(1, 2, 3)) < 235).mean() > 0.9
