"""Annotations: what QuPath exports is read, what does not fit is refused by file and feature."""

import json
import time

import numpy as np
import pytest
import shapely
from hypothesis import example, given, settings
from hypothesis import strategies as st
from shapely import MultiPolygon, Polygon, box

from annotation_files import write_annotations
from biopsy.core.errors import DataError, FileFormatError
from biopsy.slide_io import annotations
from biopsy.slide_io.annotations import read_annotations
from biopsy.slide_io.coverage import share_of_mask, share_of_polygon
from biopsy.slide_io.outlines import OutlineReader
from refusals import refuses

SQUARE = [[0, 0], [10, 0], [10, 10], [0, 10], [0, 0]]
SQUARE_GEOMETRY = {"type": "Polygon", "coordinates": [SQUARE]}


def feature(rings=(SQUARE,), name="Tumor", *, kind="Polygon", **properties):
    about = {"objectType": "annotation", **properties}
    if name is not None:
        about["classification"] = {"name": name, "color": [200, 0, 0]}
    return {"type": "Feature", "geometry": {"type": kind, "coordinates": list(rings)}, "properties": about}


@pytest.fixture
def write(tmp_path):
    def write(document, name="case.geojson"):
        if isinstance(document, list):
            document = {"type": "FeatureCollection", "features": document}
        (tmp_path / name).write_text(document if isinstance(document, str) else json.dumps(document))
        return tmp_path / name

    return write


def test_classes_holes_and_several_polygons_are_read(write):
    hole = [[2, 2], [2, 4], [4, 4], [4, 2], [2, 2]]
    far = [[20, 0], [24, 0], [24, 4], [20, 4], [20, 0]]
    found = read_annotations(
        write([feature([SQUARE, hole]), feature([[SQUARE], [far]], "Stroma", kind="MultiPolygon")])
    )
    assert [(item.class_name, item.polygon.area) for item in found.items] == [("Tumor", 96), ("Stroma", 116)]
    assert found.class_names() == ["Stroma", "Tumor"] and not found.repaired and not found.ignored


@pytest.mark.parametrize("form", ["list", "one", "collection", "bom"])
def test_every_form_of_export_is_read(write, tmp_path, form):
    forms = {"list": [feature()], "one": feature(), "collection": {"features": [feature()]}}
    path = tmp_path / "case.geojson"
    text = json.dumps(forms.get(form, feature()))
    path.write_text(text, encoding="utf-8-sig" if form == "bom" else "utf-8")
    assert [item.class_name for item in read_annotations(path).items] == ["Tumor"]


def test_a_derived_class_has_its_names_joined(write):
    one = feature(name=None)
    for names in ({"names": ["Tumor", "Positive"], "color": [1, 2, 3]}, ["Tumor", "Positive"]):
        one["properties"]["classification"] = names
        assert read_annotations(write([one])).class_names() == ["Tumor: Positive"]


@pytest.mark.parametrize("key", ["name", "label", "class", "category"])
def test_a_name_is_not_a_class_and_is_known(write, key):
    named = feature(name=None)
    named["properties"][key] = " Tumor\u00a0"
    found = read_annotations(write([feature(), named, feature(name=None)]))
    assert [(area.feature, area.class_name) for area in found.unclassified] == [(2, "Tumor"), (3, "")]
    assert len(found.items) == 1


@pytest.mark.parametrize("plane", [{"c": -1, "z": 3, "t": 0}, {"z": 0, "t": 1}])
def test_outlines_of_other_planes_are_named(write, caplog, plane):
    here, there = feature(), feature()
    here["geometry"] = {**here["geometry"], "plane": {"c": -1, "z": 0, "t": 0}}
    assert len(read_annotations(write([here])).items) == 1 and not caplog.text
    there["geometry"] = {**there["geometry"], "plane": plane}
    assert len(read_annotations(write([there])).items) == 1 and "1 outlines" in caplog.text


def test_areas_without_a_class_are_counted(write):
    features = [
        feature(),
        feature(name=None),
        feature([1, 2], kind="Point"),
        feature([[1, 2], [3, 4]], kind="LineString"),
        feature(objectType="detection"),
    ]
    found = read_annotations(write(features))
    assert [item.feature for item in found.items] == [1]
    assert found.ignored == {"without a class": 1, "without an area": 2, "is a detection": 1}


def test_an_outline_that_crosses_itself_is_repaired_and_named(write):
    bow = [[0, 0], [10, 10], [10, 0], [0, 10], [0, 0]]
    found = read_annotations(write([feature(), feature([bow])]))
    assert list(found.repaired) == [2] and "Self-intersection" in found.repaired[2]
    assert found.items[1].polygon.is_valid and found.items[1].polygon.area == pytest.approx(50)


BAD = {
    "no class name": (feature(name=""), "classification"),
    "no geometry": ({"type": "Feature", "properties": {}}, "geometry"),
    "no feature": (3, "'3'"),
    "properties": ({**feature(), "properties": [1]}, "properties"),
    "a curve": (feature(kind="CircularString"), "CircularString"),
    "no list": (feature({"0": SQUARE}), "not a list of"),
    "children": (feature(childObjects={"a": 1}), "childObjects"),
    "not closed": (feature([[[0, 0], [1, 0], [1, 1], [0, 1]]]), "[0, 0] to [0, 1]"),
    "too short": (feature([[[0, 0], [1, 0], [0, 0]]]), "3 points"),
    "text": (feature([[["a", 0], [1, 0], [1, 1], ["a", 0]]]), "x, y"),
    "text that reads as numbers": (
        feature([[["0", "0"], ["1", "0"], ["1", "1"], ["0", "0"]]]),
        "x, y",
    ),
    "one number": (feature([[[0], [1], [1], [0]]]), "x, y"),
    "no places": (feature([[1, 2, 3, 1]]), "x, y"),
    "no number": (feature([[[float("nan"), 0], [1, 0], [1, 1], [0, 0]]]), "numbers"),
    "endless": (feature([[[0, 0], [float("inf"), 0], [1, 1], [0, 0]]]), "numbers"),
    "far": (feature([[[0, 0], [1e10, 0], [1, 1], [0, 0]]]), "numbers up to"),
    "flat": (feature([[[0, 0], [5, 5], [9, 9], [0, 0]]]), "area"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_feature_is_refused_by_file_and_number(write, name):
    bad, fact = BAD[name]
    with refuses(DataError, "case.geojson, feature 2 ", fact):
        read_annotations(write([feature(), bad]))


def test_objects_inside_others_are_read_at_any_depth(write):
    inner = feature([[[1, 1], [2, 1], [2, 2], [1, 1]]], "Necrosis")
    cell = feature(name="Tumor", objectType="cell", childObjects=[inner])
    middle = feature(name=None, childObjects=[cell, feature(name="Stroma")])
    found = read_annotations(write([feature(name="Region*", childObjects=[middle]), feature()]))
    assert [(item.feature, item.class_name) for item in found.items] == [
        (1, "Region*"),
        (4, "Necrosis"),
        (5, "Stroma"),
        (6, "Tumor"),
    ]
    assert found.ignored == {"without a class": 1, "is a cell": 1}
    beside = {**feature(name="Region*"), "childObjects": [feature()]}
    assert read_annotations(write([beside])).class_names() == ["Region*", "Tumor"]


def test_exports_of_older_versions_are_read(write):
    """Version 0.2 wrote the kind of object as the feature's id and colours as one number."""
    old = feature(name=None)
    del old["properties"]["objectType"]
    old["properties"] |= {"classification": {"name": "Tumor", "colorRGB": -3670016}, "isLocked": True}
    features = [
        {**old, "id": "PathAnnotationObject"},
        {**old, "id": "PathDetectionObject"},
        {**old, "id": "TMACoreObject"},
        {**old, "properties": {**old["properties"], "object_type": "tma_core"}},
        {**old, "properties": {"classification": "Tumor"}},
        SQUARE_GEOMETRY,
    ]
    found = read_annotations(write(json.dumps(features)))
    assert [item.feature for item in found.items] == [1, 5] and found.class_names() == ["Tumor"]
    assert found.ignored == {"is a detection": 1, "is a TMA core": 2, "without a class": 1}
    assert read_annotations(write(json.dumps(SQUARE_GEOMETRY))).ignored == {"without a class": 1}


def test_collections_give_their_areas_and_empty_geometries_none(write):
    line = {"type": "LineString", "coordinates": [[0, 0], [5, 5]]}
    far = {"type": "MultiPolygon", "coordinates": [[[[20, 0], [24, 0], [24, 4], [20, 4], [20, 0]]]]}
    collection = {"type": "GeometryCollection", "geometries": [line, {**far}, SQUARE_GEOMETRY]}
    features = [
        {**feature(), "geometry": {"type": "GeometryCollection", "geometries": [collection, line]}},
        {**feature(), "geometry": None},
        {**feature(), "geometry": {"type": "GeometryCollection", "geometries": [line]}},
        feature([]),
    ]
    found = read_annotations(write(features))
    assert [item.polygon.area for item in found.items] == [116] and found.ignored == {"without an area": 3}


@pytest.mark.parametrize(
    "rest", [[[5, 0]] * 4, [[5, 0, 7, 1]] * 4, [[5, 0], [9, 9, 9]] * 2], ids=["2", "4", "mixed"]
)
def test_further_coordinates_after_x_and_y_are_ignored(write, rest):
    ring = [[0, 0], *([x, i, *more] for i, (x, _, *more) in enumerate(rest)), [0, 10], [0, 0]]
    found = read_annotations(write([feature([ring])]))
    assert found.items[0].polygon.equals(Polygon([place[:2] for place in ring]))


def star(n_corners, seed=0):
    """Return a ring whose every side crosses a third of the others."""
    ring = np.random.default_rng(seed).integers(0, 10_000, (n_corners, 2)).tolist()
    return [*ring, ring[0]]


@pytest.mark.parametrize("n_corners", [400, 1500, 20_000])
def test_an_outline_that_crosses_itself_everywhere_is_refused_at_once(write, n_corners):
    path = write([feature(), feature([star(n_corners)])])
    start = time.process_time()
    with refuses(DataError, "feature 2", "10,000"):
        read_annotations(path)
    assert time.process_time() - start < 10


@pytest.mark.slow
def test_many_outlines_that_cross_themselves_count_together(write):
    features = [feature([star(100, seed)]) for seed in range(20)]
    assert len(read_annotations(write(features[:3])).repaired) == 3
    with refuses(DataError, "10,000"):
        read_annotations(write(features))


def test_a_repaired_outline_keeps_what_it_winds_around_twice(write):
    five = [[100 * np.sin(turn), 100 * np.cos(turn)] for turn in np.arange(0, 12, 2) * 2 * np.pi / 5]
    five[-1] = five[0]
    found = read_annotations(write([feature([five])]))
    convex = shapely.MultiPoint(five).convex_hull
    assert found.items[0].polygon.contains(shapely.Point(0, 0)) and len(found.repaired) == 1
    assert 0.3 < found.items[0].polygon.area / convex.area < 0.6


def winding_number(ring, x, y):
    """Return how often a ring goes around a point, by the turns of the line of sight."""
    angles = np.unwrap(np.arctan2(ring[:, 1] - y, ring[:, 0] - x))
    return round((angles[-1] - angles[0]) / (2 * np.pi))


@settings(max_examples=60, deadline=None)
@example([(0, 1), (2, 0), (0, 1), (1, 0), (2, 0)])  # along a side, back, and around it
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=3, max_size=25))
def test_a_repaired_outline_holds_what_it_goes_around(corners):
    ring = np.array([*corners, corners[0]], float)
    places = [(x + 0.137, y + 0.291) for x in range(6) for y in range(6)]
    inside = {place for place in places if winding_number(ring, *place)}
    try:
        area, fault = OutlineReader().read_area([[ring]], "here")
    except DataError:
        assert not inside
    else:
        assert area.is_valid and area.area > 0 and bool(fault) == (not Polygon(ring).is_valid)
        assert {place for place in places if area.contains(shapely.Point(place))} == inside


@pytest.mark.parametrize("what", ["arrays", "children", "digits", "large"])
def test_a_file_that_would_exhaust_the_reader_is_refused(write, what, monkeypatch):
    monkeypatch.setattr(annotations, "MAX_BYTES", 10_000_000)
    texts = {
        "arrays": "[" * 100_000 + "]" * 100_000,
        "children": '{"features":' + '[{"geometry":null,"properties":{"childObjects":' * 5000,
        "digits": json.dumps({"features": [feature()]}).replace("10", "1" * 5000),
        "large": " " * 10_000_001,
    }
    reasons = {"arrays": "too-deep", "children": "too-deep", "digits": "syntax", "large": "too-large"}
    with refuses(FileFormatError, "case.geojson", reason=reasons[what]):
        read_annotations(write(texts[what]))


def test_a_file_that_is_no_geojson_is_refused(write, tmp_path):
    with refuses(DataError, "case.geojson", reason="syntax"):
        read_annotations(write("{not json"))
    with refuses(DataError, "case.geojson", "features"):
        read_annotations(write({"type": "Topology"}))
    with refuses(DataError, "none.geojson", reason="missing"):
        read_annotations(tmp_path / "none.geojson")


def test_written_annotations_are_read_back(tmp_path):
    holed = Polygon(SQUARE, [[[2, 2], [4, 2], [4, 4], [2, 4]]])
    parts = MultiPolygon([box(20, 0, 22, 2), box(30, 0, 31, 1)])
    found = read_annotations(write_annotations(tmp_path / "a.geojson", [("Tumor", holed), ("Stroma", parts)]))
    assert [item.class_name for item in found.items] == ["Tumor", "Stroma"]
    assert found.items[0].polygon.equals(holed) and found.items[1].polygon.equals(parts)


corner = st.tuples(st.integers(0, 60), st.integers(0, 60))


@settings(max_examples=40, deadline=None)
@given(st.lists(corner, min_size=3, max_size=12, unique=True), st.integers(3, 13))
def test_shares_of_a_polygon_are_its_area_and_those_of_its_mask(corners, step):
    polygon = shapely.make_valid(Polygon(corners)).buffer(0)
    edges = np.arange(0, 61, step).astype(float)
    shares = share_of_polygon(polygon, edges, edges, step, step)
    assert shares.sum() * step**2 == pytest.approx(polygon.area, rel=1e-9, abs=1e-9)
    assert (shares >= 0).all() and (shares <= 1 + 1e-9).all()


def test_shares_agree_with_a_mask_of_many_cells():
    mask = np.zeros((300, 400), bool)
    mask[40:260, 100:333] = True
    mask[100:150, 150:200] = False
    polygon = box(100, 40, 333, 260).difference(box(150, 100, 200, 150))
    left, top = np.arange(0, 393, 3.5), np.arange(0, 290, 3.5)
    np.testing.assert_allclose(
        share_of_polygon(polygon, left, top, 7.25, 7.25),
        share_of_mask(mask, left, top, 7.25, 7.25),
        atol=1e-9,
    )
