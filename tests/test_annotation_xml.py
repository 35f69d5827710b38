"""Annotations of ASAP, HALO and ImageScope: classes, holes and areas are those that were drawn."""

import math
from collections import Counter

import numpy as np
import pytest
import shapely

from annotation_files import asap, halo, imagescope
from biopsy.core.errors import DataError, FileFormatError
from biopsy.slide_io.annotations import read_annotations
from refusals import refuses

SQUARE = [(0, 0), (100, 0), (100, 100), (0, 100)]
INNER = [(20, 20), (60, 20), (60, 60), (20, 60)]
ISLAND = [(30, 30), (40, 30), (40, 40), (30, 40)]
HOLE = {"NegativeROA": 1}
BOW = [(0, 0), (10, 10), (10, 0), (0, 10)]


@pytest.fixture
def read(tmp_path):
    def read(text, name="case.xml", encoding="utf-8"):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
        return read_annotations(tmp_path / name)

    return read


def areas(found):
    return [(item.feature, item.class_name, round(item.polygon.area, 2)) for item in found.items]


def test_asap_groups_are_classes_and_exclusions_are_cut_out(read):
    found = read(
        asap(
            ("Tumor", SQUARE),
            ("Exclusion", INNER),
            ("Stroma", ISLAND, "Spline"),
            ("None", SQUARE),
            ("Tumor", [(1, 1)], "Dot"),
            ("Tumor", [(1, 1), (2, 2)], "Measurement"),
        )
    )
    assert areas(found) == [(1, "Tumor", 8400), (3, "Stroma", 100)]
    assert found.ignored == {"without a class": 1, "is a dot": 1, "is a measurement": 1}
    assert len(found.items[0].polygon.geoms[0].interiors) == 1 and not found.from_bounds


@pytest.mark.parametrize(
    "attribute", [{"NegativeROA": 1}, {"NegativeROA": "True"}, {"Negative": 1}, {"Negative": "true"}]
)
@pytest.mark.parametrize("program", [halo, imagescope])
def test_holes_are_marked_in_several_ways(read, attribute, program):
    if program is halo:
        text = halo(
            ("Tumor", [("Polygon", SQUARE, {"NegativeROA": "False"}), ("Polygon", INNER, {"NegativeROA": 0})])
        )
    else:
        text = imagescope(("Tumor", "", [(0, SQUARE, 0), (0, INNER, 0)]))
    ((name, value),) = attribute.items()
    before, _, after = text.rpartition('NegativeROA="0"')
    assert areas(read(f'{before}{name}="{value}"{after}')) == [(1, "Tumor", 8400)]


def test_the_names_of_areas_without_a_class_are_known(read):
    found = read(asap(("Stroma", SQUARE), ("None", INNER)))
    assert [(area.feature, area.class_name) for area in found.unclassified] == [
        (2, "A 1")
    ] and found.ignored == {"without a class": 1}


def test_the_groups_of_camelyon16(read):
    assert areas(read(asap(("_0", SQUARE), ("_1", ISLAND), ("_2", INNER)))) == [
        (1, "_0", 8400),
        (2, "_1", 100),
    ]
    assert areas(read(asap(("Tumor", SQUARE), ("_2", INNER)))) == [(1, "Tumor", 10_000), (2, "_2", 1600)]
    assert read(asap(("_2", INNER), ("_0", [(200, 0), (210, 0), (200, 10)]))).ignored == {
        "is a hole outside all regions": 1
    }


def test_asap_corners_are_taken_in_their_order(read):
    text = asap(("Tumor", SQUARE)).replace('Order="1"', 'Order="9"')
    assert areas(read(text)) == [(1, "Tumor", 5000)]  # the second corner comes last: a figure of eight
    assert list(read(asap(("Tumor", BOW))).repaired) == [1]


def test_halo_holes_islands_and_shapes(read):
    found = read(
        halo(
            (
                "Tumor",
                [("Polygon", SQUARE), ("Polygon", INNER, HOLE), ("Polygon", ISLAND)],
            ),
            ("Stroma", [("Rectangle", [(0, 0), (40, 10)]), ("Ellipse", [(30, 40), (10, 0)])]),
            (
                "Other",
                [
                    ("Pin", [(1, 1)]),
                    ("Ruler", [(0, 0), (9, 9)]),
                    ("Polygon", INNER, {"HasEndcaps": 1}),
                ],
            ),
        ),
        "case.annotations",
    )
    assert [(n, name) for n, name, _ in areas(found)] == [
        (1, "Tumor"),
        (3, "Tumor"),
        (4, "Stroma"),
        (5, "Stroma"),
    ]
    sizes = [item.polygon.area for item in found.items]
    assert sizes[:3] == [8400, 100, 400] and sizes[3] == pytest.approx(math.pi * 10 * 20, rel=1e-4)
    assert found.ignored == {"is a pin": 1, "is a ruler": 1, "is a line": 1}


@pytest.mark.parametrize("degrees", [0, 30, 60, 90])
def test_imagescope_ellipses_may_be_rotated(read, degrees):
    """Corners of a rotated box of 40 x 20 px, in which an ellipse lies."""
    turn = np.exp(1j * np.radians(degrees))
    corners = [
        (200 + z.real, 200 + z.imag) for z in turn * np.array([-20 - 10j, 20 - 10j, 20 + 10j, -20 + 10j])
    ]
    (item,) = read(imagescope(("Tumor", "", [("2", corners, 0)]))).items
    assert item.polygon.area == pytest.approx(math.pi * 20 * 10, rel=1e-4)
    tip = 200 + 19.9 * turn
    assert item.polygon.contains(shapely.Point(tip.real + 0, tip.imag + 200))
    upright = read(imagescope(("Tumor", "", [("2", [(0, 10), (20, 0), (40, 10), (20, 20)], 0)]))).items[0]
    assert upright.polygon.bounds == pytest.approx((0, 0, 40, 20))


def test_accidental_clicks_are_counted(read):
    found = read(asap(("Tumor", SQUARE), ("Tumor", SQUARE[:2]), ("Tumor", SQUARE[:1] * 5), ("Tumor", [])))
    assert areas(found) == [(1, "Tumor", 10_000)] and found.ignored == {"has too few corners": 3}
    empty = read(halo(("A", [("Polygon", SQUARE), ("Polygon", []), ("Rectangle", [])])), "case.annotations")
    assert areas(empty) == [(1, "A", 10_000)] and empty.ignored == {"has too few corners": 2}


def test_a_hole_belongs_to_its_layer(read):
    found = read(halo(("A", [("Polygon", SQUARE)]), ("B", [("Polygon", INNER, HOLE)])))
    assert areas(found) == [(1, "A", 10_000)] and found.ignored == {"is a hole outside all regions": 1}


def test_imagescope_layers_are_named_by_name_attribute_text_or_number(read):
    found = read(
        imagescope(
            ("Tumor", "CaP", [("0", SQUARE, 0, "x"), ("0", INNER, 1)]),
            ("", "CaP", [("0", SQUARE, 0, "x")]),
            ("", "Description", [("1", [(0, 0), (9, 0), (9, 9), (0, 9)], 0, "DCIS"), ("0", SQUARE, 0)]),
            ("Other", "", [("4", [(0, 0), (5, 5)], 0), ("3", [(0, 0), (5, 5)], 0)]),
        )
    )
    assert areas(found) == [
        (1, "Tumor", 8400),
        (3, "CaP", 10_000),
        (4, "DCIS", 81),
        (5, "Layer 3", 10_000),
    ]
    assert found.mpp == 0.25 and found.ignored == {"is a ruler": 1, "is an arrow": 1}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_encodings_that_xml_names_itself_are_read(read, encoding):
    text = halo(("Tümör", [("Polygon", SQUARE)]))
    assert read(text, encoding=encoding).class_names() == ["Tümör"]
    latin = '<?xml version="1.0" encoding="iso-8859-1"?>' + text
    assert read(latin, encoding="latin-1").class_names() == ["Tümör"]


LAUGHS = '<!DOCTYPE a [<!ENTITY a "ha"><!ENTITY b "&a;&a;">]>'
BAD = {
    "entities": (LAUGHS + halo(), "syntax"),
    "an outer entity": ('<!DOCTYPE a SYSTEM "file:///etc/passwd">' + halo(), "syntax"),
    "cut short": (halo(("A", []))[:-3], "syntax"),
    "no XML": ('{"type": "FeatureCollection"}', "syntax"),
    "empty": ("", "syntax"),
    "another kind": ("<svg/>", "format"),
    "deep": ("<a>" * 100_000 + "</a>" * 100_000, "format"),
    "an encoding": ('<?xml version="1.0" encoding="x"?><a/>', "syntax"),
}


@pytest.mark.parametrize("name", BAD)
def test_files_that_are_not_annotations_are_refused(read, name):
    text, reason = BAD[name]
    with refuses(FileFormatError, "case.xml", reason=reason):
        read(text)


CORNERS = {
    "text": ([("a", 0), (1, 1), (2, 0)], ["corner"]),
    "not a number": ([("nan", 0), (1, 1), (2, 0)], []),
    "far": ([("1e300", 0), (1, 1), (2, 0)], []),
    "on a line": ([(0, 0), (1, 1), (2, 2)], ["area"]),
}


@pytest.mark.parametrize("name", CORNERS)
def test_corners_that_are_none_are_refused_by_region(read, name):
    corners, reason = CORNERS[name]
    with refuses(DataError, "region 1", *reason):
        read(halo(("A", [("Polygon", corners)])))
    with refuses(DataError, "Rectangle", "3 corners"):
        read(halo(("A", [("Rectangle", SQUARE[:3])])))
    with refuses(DataError, "corner", "X", "Y"):
        read(asap(("A", SQUARE)).replace(" X=", " Z="))


# --- real files


def totals(path):
    """Return the area and the number of holes of each class."""
    found = read_annotations(path)
    sizes, holes = Counter(), Counter()
    for item in found.items:
        sizes[item.class_name] += item.polygon.area
        holes[item.class_name] += sum(len(part.interiors) for part in shapely.get_parts(item.polygon))
    return found, sizes, holes


@pytest.mark.data
def test_halo_and_qupath_hold_one_drawing(data_dir):
    folder = data_dir / "annotations"
    _, halo_sizes, halo_holes = totals(folder / "halo" / "qupath_test.annotations")
    _, sizes, holes = totals(folder / "qupath" / "qupath_test.geojson")
    assert dict(halo_sizes) == pytest.approx(dict(sizes), rel=1e-3) and len(sizes) == 7
    assert halo_holes == holes and holes.total() == 7
    assert holes["Cortical White Matter"] == 4


@pytest.mark.data
def test_real_files_of_halo(data_dir):
    found, _, holes = totals(data_dir / "annotations" / "halo" / "example_holes.annotations")
    assert len(found.items) == 6 and dict(holes) == {"Layer 1": 0, "Layer 2": 0, "Layer 3": 1}
    found, _, _ = totals(data_dir / "annotations" / "halo" / "test_types.annotations")
    assert found.ignored == {"is a ruler": 2, "is a pin": 1, "is a line": 1}
    box = shapely.box(-27900, 45644, -16121, 57423).area
    disc = math.pi * (11592 - 2154) * (63840 - 54402) / 4
    assert [found.items[0].polygon.area, found.items[2].polygon.area] == pytest.approx([box, disc], rel=1e-4)


@pytest.mark.data
def test_a_real_file_of_imagescope_has_the_areas_that_it_states(data_dir):
    path = data_dir / "annotations" / "aperio" / "TCGA-EJ-5518-01Z-00-DX1.xml"
    found, sizes, _ = totals(path)
    stated = {"CaP": 29046449.6 + 641099844.1, "Layer 3": 3853031.2, "Layer 4": 8308723.7}
    assert dict(sizes) == pytest.approx(stated, rel=2e-3) and found.mpp == 0.252
    assert sizes["CaP"] * 0.252**2 == pytest.approx(1844565.8 + 40712405.8, rel=1e-4)


@pytest.mark.data
@pytest.mark.parametrize(("name", "n"), [("tumor_076", 39), ("tumor_085", 50)])
def test_real_files_of_asap(data_dir, name, n):
    found, sizes, _ = totals(data_dir / "annotations" / "asap" / f"{name}.xml")
    assert len(found.items) == n and set(sizes) == {"metastasis"} and not found.ignored
    outer = shapely.union_all([item.polygon for item in found.items]).bounds
    assert min(outer) > 0 and max(outer) < 221_184  # the longer side of Camelyon16's slides
