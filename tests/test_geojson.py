"""GeoJSON for QuPath: what the published rules ask for, read back by others, areas as on the map."""

import json

import numpy as np
import pytest
import shapely
from shapely.geometry import shape

from biopsy.slide_io.annotations import read_annotations
from biopsy.slides.maps import write_geojson
from slide_maps import make_map

RNG = np.random.default_rng(3)
CELLS = np.where(RNG.random((14, 17)) < 0.85, RNG.random((14, 17)), np.nan)
CELLS[4:9, 4:9] = 0.9
CELLS[6, 6] = 0.1  # a hole

POSITION = {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 3}
RING = {"type": "array", "items": POSITION, "minItems": 4}
RFC_7946 = {  # sections 3.1.6, 3.2 and 3.3, and in `properties` what QuPath 0.4 and later write themselves
    "type": "object",
    "required": ["type", "features"],
    "properties": {
        "type": {"const": "FeatureCollection"},
        "features": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["type", "geometry", "properties"],
                "properties": {
                    "type": {"const": "Feature"},
                    "geometry": {
                        "type": "object",
                        "required": ["type", "coordinates"],
                        "properties": {
                            "type": {"const": "Polygon"},
                            "coordinates": {"type": "array", "items": RING, "minItems": 1},
                        },
                        "additionalProperties": False,
                    },
                    "properties": {
                        "type": "object",
                        "required": ["objectType", "classification", "measurements"],
                        "properties": {
                            "objectType": {"enum": ["annotation", "detection"]},
                            "classification": {
                                "type": "object",
                                "required": ["name", "color"],
                                "properties": {
                                    "name": {"type": "string", "minLength": 1},
                                    "color": {
                                        "type": "array",
                                        "items": {"type": "integer", "minimum": 0, "maximum": 255},
                                        "minItems": 3,
                                        "maxItems": 3,
                                    },
                                },
                                "additionalProperties": False,
                            },
                            "isLocked": {"type": "boolean"},
                            "measurements": {
                                "type": "object",
                                "additionalProperties": {"type": "number"},
                            },
                        },
                        "additionalProperties": False,
                    },
                },
            },
        },
    },
}


@pytest.fixture
def slide_map():
    abstained = np.zeros(CELLS.shape, bool)
    abstained[0, :4] = True
    return make_map(CELLS, abstained=abstained)


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.peer
@pytest.mark.parametrize("detections", [False, True])
def test_an_independent_schema_accepts_it(slide_map, tmp_path, detections):
    jsonschema = pytest.importorskip("jsonschema")
    path = slide_map.to_geojson(tmp_path / "a.geojson", detections=detections)
    jsonschema.Draft202012Validator(RFC_7946).validate(load(path))
    broken = load(path)
    del broken["features"][0]["properties"]["objectType"]
    with pytest.raises(jsonschema.ValidationError) as caught:
        jsonschema.Draft202012Validator(RFC_7946).validate(broken)
    assert (caught.value.json_path, caught.value.validator) == ("$.features[0].properties", "required")


def test_rings_are_closed_and_turn_as_the_standard_asks(slide_map, tmp_path):
    features = load(slide_map.to_geojson(tmp_path / "a.geojson"))["features"]
    assert any(len(feature["geometry"]["coordinates"]) > 1 for feature in features)
    for feature in features:
        outer, *holes = map(shapely.LinearRing, feature["geometry"]["coordinates"])
        assert all(ring[0] == ring[-1] for ring in feature["geometry"]["coordinates"])
        assert outer.is_ccw and not any(hole.is_ccw for hole in holes)
        assert shape(feature["geometry"]).is_valid


def test_areas_are_those_of_the_map(slide_map, tmp_path):
    features = load(slide_map.to_geojson(tmp_path / "a.geojson"))["features"]
    pred = slide_map.cells_pred()
    for index, name in [(0, "normal"), (1, "tumour"), (-2, "abstained*")]:
        own = [f for f in features if f["properties"]["classification"]["name"] == name]
        area_px = sum(shape(feature["geometry"]).area for feature in own)
        stated = sum(feature["properties"]["measurements"]["Area mm^2"] for feature in own)
        assert area_px * slide_map.grid.slide_mpp**2 / 1e6 == pytest.approx(stated, rel=1e-2)
        assert stated == pytest.approx((pred == index).sum() * slide_map.cell_mm2, rel=1e-2)


def test_annotations_come_back_as_they_are_read_for_a_pack(slide_map, tmp_path):
    found = read_annotations(slide_map.to_geojson(tmp_path / "a.geojson"))
    assert found.ignored == {} and found.repaired == {}
    assert {item.class_name for item in found.items} == {"normal", "tumour", "abstained*"}
    pred, side = slide_map.cells_pred(), slide_map.cell_px
    names = {0: "normal", 1: "tumour", -2: "abstained*"}
    for row, column in np.ndindex(pred.shape):
        middle = shapely.Point((column + 0.5) * side, (row + 0.5) * side)
        over = [item.class_name for item in found.items if item.polygon.contains(middle)]
        assert over == ([names[int(pred[row, column])]] if pred[row, column] != -1 else [])


def test_detections_are_the_cells_with_their_probabilities(slide_map, tmp_path):
    features = load(slide_map.to_geojson(tmp_path / "a.geojson", detections=True))["features"]
    pred, cells = slide_map.cells_pred(), slide_map.cells()
    assert len(features) == (pred != -1).sum()
    for feature in features:
        left, top, right, bottom = shape(feature["geometry"]).bounds
        row, column = round(top / slide_map.cell_px), round(left / slide_map.cell_px)
        assert (right - left, bottom - top) == (slide_map.cell_px, slide_map.cell_px)
        about = feature["properties"]
        assert about["objectType"] == "detection"
        assert about["measurements"]["Probability tumour"] == pytest.approx(cells[row, column, 1], abs=1e-6)


def test_the_same_map_gives_the_same_file(slide_map, tmp_path):
    one, two = (slide_map.to_geojson(tmp_path / name).read_bytes() for name in ("a", "b"))
    assert one == two


def test_a_number_that_json_does_not_have_is_not_written(tmp_path):
    """`NaN` is no JSON, so that QuPath would refuse the whole file."""
    with pytest.raises(ValueError):
        write_geojson(tmp_path / "a.geojson", [{"type": "Feature", "properties": {"area": float("nan")}}])
    assert not list(tmp_path.iterdir())
