"""Annotations: what QuPath exports is read, what does not fit is refused by file and feature."""

import json

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from shapely import MultiPolygon, Polygon, box

from biopsy.core.errors import DataError
from biopsy.imaging.annotations import read_annotations, write_annotations
from biopsy.imaging.shares import share_of_mask, share_of_polygon

SQUARE = [[0, 0], [10, 0], [10, 10], [0, 10], [0, 0]]


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
    one["properties"]["classification"] = {"names": ["Tumor", "Positive"], "color": [1, 2, 3]}
    assert read_annotations(write([one])).class_names() == ["Tumor: Positive"]


def test_what_says_nothing_of_a_class_is_counted(write):
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
    "no class name": (feature(name=""), "has a classification without a name"),
    "no geometry": ({"type": "Feature", "properties": {}}, "has no geometry"),
    "no feature": (3, "has no geometry"),
    "properties": ({**feature(), "properties": [1]}, "properties that are no table"),
    "a curve": (feature(kind="CircularString"), "is a CircularString; Polygon and MultiPolygon"),
    "no rings": (feature([]), "has no coordinates|without rings"),
    "not closed": (feature([[[0, 0], [1, 0], [1, 1], [0, 1]]]), r"not closed: \[0, 0\] to \[0, 1\]"),
    "too short": (feature([[[0, 0], [1, 0], [0, 0]]]), "a ring of 3 points"),
    "text": (feature([[["a", 0], [1, 0], [1, 1], ["a", 0]]]), "no list of x, y"),
    "no number": (feature([[[float("nan"), 0], [1, 0], [1, 1], [0, 0]]]), "no list of x, y"),
    "flat": (feature([[[0, 0], [5, 5], [9, 9], [0, 0]]]), "has no area"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_feature_is_refused_by_file_and_number(write, name):
    bad, message = BAD[name]
    with pytest.raises(DataError, match=rf"case\.geojson, feature 2 .*({message})"):
        read_annotations(write([feature(), bad]))


def test_a_file_that_is_no_geojson_is_refused(write, tmp_path):
    with pytest.raises(DataError, match="is not readable as GeoJSON"):
        read_annotations(write("{not json"))
    with pytest.raises(DataError, match="holds no list of features"):
        read_annotations(write({"type": "Topology"}))
    with pytest.raises(DataError, match="does not exist"):
        read_annotations(tmp_path / "none.geojson")


def test_written_annotations_are_read_back(tmp_path):
    holed = Polygon(SQUARE, [[[2, 2], [4, 2], [4, 4], [2, 4]]])
    parts = MultiPolygon([box(20, 0, 22, 2), box(30, 0, 31, 1)])
    path = write_annotations(
        tmp_path / "a.geojson", [("Tumor", holed), ("Stroma", parts)], colours={"Tumor": (200, 0, 0)}
    )
    found = read_annotations(path)
    assert [item.class_name for item in found.items] == ["Tumor", "Stroma"]
    assert found.items[0].polygon.equals(holed) and found.items[1].polygon.equals(parts)
    document = json.loads(path.read_text())
    assert document["type"] == "FeatureCollection"
    assert document["features"][0]["properties"] == {
        "objectType": "annotation",
        "classification": {"name": "Tumor", "color": [200, 0, 0]},
    }
    outer, inner = (shapely.LinearRing(ring) for ring in document["features"][0]["geometry"]["coordinates"])
    assert outer.is_ccw and not inner.is_ccw


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
