"""GeoJSON as QuPath reads it: annotations of regions, detections of patches.

One ``FeatureCollection``; every feature has ``objectType``, ``classification`` with name and colour and
``measurements``; coordinates are pixels of level 0 from where what was scanned begins (OpenSlide's bounds, to
which QuPath crops slides), rings are closed, the outer one counter-clockwise as RFC
7946 asks. Source: QuPath's documentation, "Exporting annotations", and its class ``PathObjectTypeAdapters``.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from matplotlib.colors import to_rgb
from shapely import Polygon

from biopsy.core.files import replace_atomic
from biopsy.figures.style import BASELINE, CLASS_COLOURS
from biopsy.slides.maps import SlideMap
from biopsy.slides.regions import ABSTAINED, Region

Feature = dict[str, Any]


def collect_regions(slide_map: SlideMap, regions: Iterable[Region]) -> Iterator[Feature]:
    """Give one annotation a region, with its area, cells and probability as measurements."""
    for region in regions:
        measurements = {
            "Area mm^2": region.area_mm2,
            "Cells": region.n_cells,
            "Mean probability": region.mean_prob,
            "Max probability": region.max_prob,
        }
        name = region.class_name
        yield _feature(
            "annotation",
            _from_corner(slide_map, region.polygon),
            name,
            _colour(slide_map, name),
            measurements,
        )


def collect_detections(slide_map: SlideMap) -> Iterator[Feature]:
    """Give one detection a cell, with the probability of each class as measurements."""
    probs, pred = slide_map.cells(), slide_map.cells_pred()
    grid, side = slide_map.grid, slide_map.cell_px
    names = {**dict(enumerate(slide_map.class_names)), -2: ABSTAINED}
    for row, column in zip(*np.nonzero(pred != -1), strict=True):
        x = (grid.origin_px[0] + column * grid.stride_px) * grid.scale
        y = (grid.origin_px[1] + row * grid.stride_px) * grid.scale
        name = names[int(pred[row, column])]
        measurements = {
            f"Probability {class_name}": float(prob)
            for class_name, prob in zip(slide_map.class_names, probs[row, column], strict=True)
        }
        cell = shapely.box(x, y, x + side, y + side)
        yield _feature(
            "detection", _from_corner(slide_map, cell), name, _colour(slide_map, name), measurements
        )


def write_geojson(path: Path | str, features: Iterable[Feature]) -> Path:
    """Write features as one collection, one a line, whole or not at all."""
    with replace_atomic(path) as partial, open(partial, "w", encoding="utf-8") as file:
        file.write('{"type": "FeatureCollection", "features": [')
        for number, feature in enumerate(features):
            file.write(",\n" if number else "\n")
            file.write(json.dumps(feature, ensure_ascii=False, allow_nan=False))
        file.write("\n]}\n")
    return Path(path)


def _feature(
    object_type: str, polygon: Polygon, name: str, colour: list[int], measurements: dict[str, float]
) -> Feature:
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": _rings(polygon)},
        "properties": {
            "objectType": object_type,
            "classification": {"name": name, "color": colour},
            "isLocked": False,
            "measurements": {key: _short(value) for key, value in measurements.items()},
        },
    }


def _from_corner(slide_map: SlideMap, polygon: Polygon) -> Polygon:
    """Return an area at level 0 as QuPath counts."""
    return shapely.transform(polygon, lambda places: places - slide_map.grid.corner)


def _rings(polygon: Polygon) -> list[list[list[float]]]:
    """Give closed rings, the outer one first; whole numbers where level 0 has them."""
    polygon = shapely.geometry.polygon.orient(polygon)
    return [
        [[_short(x), _short(y)] for x, y in ring.coords] for ring in (polygon.exterior, *polygon.interiors)
    ]


def _short(value: float) -> float:
    rounded = round(float(value), 6)
    return int(rounded) if rounded.is_integer() else rounded


def _colour(slide_map: SlideMap, name: str) -> list[int]:
    colour = (
        BASELINE
        if name == ABSTAINED
        else CLASS_COLOURS[slide_map.class_names.index(name) % len(CLASS_COLOURS)]
    )
    return [round(255 * value) for value in to_rgb(colour)]
