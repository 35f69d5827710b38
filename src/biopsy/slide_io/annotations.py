"""Annotations of a slide: areas with a class, read from files of QuPath and others.

Coordinates are level-0 pixels. GeoJSON of QuPath is read as a ``FeatureCollection``, a list of features or
one feature, including nested objects (``childObjects``); geometries are polygons with holes and
multipolygons. Annotations without a class, objects without an area (points, lines) and other objects
(detections, cells, tiles) are counted and ignored; other deviations are errors. Sources: QuPath's
documentation "Exporting annotations", its class ``PathObjectTypeAdapters``, and RFC 7946.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from biopsy.core.errors import DataError
from biopsy.core.loaders import parse_json, read_bytes
from biopsy.core.text import normalize_name
from biopsy.slide_io.annotation_xml import read_xml
from biopsy.slide_io.outlines import (
    MAX_NAME,
    WITHOUT_CLASS,
    Annotation,
    Annotations,
    OutlineReader,
    read_ring,
)

logger = logging.getLogger(__name__)

MAX_BYTES = 2**27
"""Largest file size in bytes."""

XML_SUFFIXES = (".xml", ".annotations")
"""Suffixes of files of ASAP, HALO and Aperio ImageScope."""

SUFFIXES = (".geojson", ".json", *XML_SUFFIXES)
"""Suffixes of annotation files, in lower case."""

_FLAT = ("Point", "MultiPoint", "LineString", "MultiLineString")
_GEOMETRIES = ("Polygon", "MultiPolygon", "GeometryCollection", *_FLAT)
_OTHER_OBJECTS = {  # names in QuPath; in version 0.2 in the id of the feature
    "detection": ("detection", "PathDetectionObject"),
    "cell": ("cell", "PathCellObject"),
    "tile": ("tile", "PathTileObject"),
    "TMA core": ("tmaCore", "tma_core", "TMACoreObject"),
    "root": ("root", "PathRootObject"),
}
_KINDS = {name.lower(): kind for kind, names in _OTHER_OBJECTS.items() for name in names}


def read_annotations(path: Path | str) -> Annotations:
    """Read an annotation file: XML by its suffix, otherwise GeoJSON.

    Raises:
        DataError: If the format is unknown, the file is too large, or a feature has no valid outline.
    """
    path = Path(path)
    if path.suffix.lower() in XML_SUFFIXES:
        return read_xml(path)
    return _read_geojson(path)


def _read_geojson(path: Path) -> Annotations:
    outlines = OutlineReader()
    items: list[Annotation] = []
    repaired: dict[int, str] = {}
    ignored: Counter[str] = Counter()
    unclassified: list[Annotation] = []
    n_elsewhere = 0
    for number, feature in enumerate(_walk(_read_features(path), str(path)), start=1):
        where = f"{path}, feature {number}"
        polygons = _polygons_of(feature.geometry, where)
        class_name = _class_of(feature.properties, where)
        if reason := _reason_to_ignore(feature, polygons, class_name):
            ignored[reason] += 1
            if reason != WITHOUT_CLASS:
                continue
        n_elsewhere += _is_on_other_plane(feature.geometry)
        rings = [[read_ring(ring, where) for ring in polygon] for polygon in polygons]
        area, fault = outlines.read_area(rings, where)
        if fault:
            repaired[number] = fault
        if class_name is None:
            unclassified.append(Annotation(_name_of(feature.properties), area, number))
        else:
            items.append(Annotation(class_name, area, number))
    if n_elsewhere:
        logger.warning(
            "%s: %d outlines of other focal planes or time points are taken as of this one", path, n_elsewhere
        )
    return Annotations(path, items, repaired, dict(ignored), unclassified=unclassified)


class _Feature(NamedTuple):
    geometry: object
    properties: Mapping[str, object]
    identity: object


def _is_on_other_plane(geometry: object) -> bool:
    plane = geometry.get("plane") if isinstance(geometry, dict) else None
    return isinstance(plane, dict) and any(plane.get(axis) not in (None, 0) for axis in "zt")


def _name_of(properties: Mapping[str, object]) -> str:
    """Return the name of an object, which other programs use for its class."""
    names = (properties.get(key) for key in ("name", "label", "class", "category"))
    return normalize_name(next((name for name in names if isinstance(name, str)), ""))[:MAX_NAME]


def _read_features(path: Path) -> list[Any]:
    content = read_bytes(path, max_bytes=MAX_BYTES)
    document = parse_json(content, path, allow_nan=True)
    if isinstance(document, dict) and document.get("type") in ("Feature", *_GEOMETRIES):
        return [document]
    features = document.get("features") if isinstance(document, dict) else document
    if not isinstance(features, list):
        raise DataError(
            f"{path} has no list of features: export it from QuPath by File > Export objects as GeoJSON"
        )
    return features


def _walk(features: list[Any], path: str) -> Iterator[_Feature]:
    """Yield features with properties in the order of the file, parents before their children."""
    waiting = features[::-1]
    number = 0
    while waiting:
        feature = waiting.pop()
        number += 1
        where = f"{path}, feature {number}"
        if not isinstance(feature, dict):
            raise DataError(f"{where} is not a feature: {str(feature)[:40]!r}")
        if feature.get("type") in _GEOMETRIES:
            feature = {"geometry": feature}
        if "geometry" not in feature:
            raise DataError(f"{where} has no geometry")
        properties = feature.get("properties") or {}
        if not isinstance(properties, dict):
            raise DataError(f"{where} has properties that are not an object")
        yield _Feature(feature["geometry"], properties, feature.get("id"))
        for children in (properties.get("childObjects"), feature.get("childObjects")):
            if children is not None and not isinstance(children, list):
                raise DataError(f"{where} has childObjects that are not a list")
            waiting += (children or [])[::-1]


def _polygons_of(geometry: Any, where: str) -> list[list[Any]]:
    """Return the polygons of a geometry as lists of rings; none if it has no area."""
    polygons: list[Any] = []
    waiting = [] if geometry is None else [geometry]
    while waiting:
        geometry = waiting.pop()
        kind = geometry.get("type") if isinstance(geometry, dict) else None
        if kind not in _GEOMETRIES:
            raise DataError(f"{where} is a {kind}; {', '.join(_GEOMETRIES)} are known")
        inside = geometry.get("geometries" if kind == "GeometryCollection" else "coordinates")
        if not isinstance(inside, list):
            raise DataError(f"{where} has no coordinates")
        if kind == "GeometryCollection":
            waiting += inside[::-1]
        elif kind not in _FLAT:
            polygons += [inside] if kind == "Polygon" else inside
    if not all(isinstance(polygon, list) for polygon in polygons):
        raise DataError(f"{where} has a polygon that is not a list of rings")
    return [polygon for polygon in polygons if polygon]


def _reason_to_ignore(feature: _Feature, polygons: list[Any], class_name: str | None) -> str | None:
    names = (feature.properties.get(key) for key in ("objectType", "object_type", "type"))
    kind = next(filter(None, names), None) or feature.identity
    if other := _KINDS.get(str(kind).lower()):
        return f"is a {other}"
    if not polygons:
        return "without an area"
    return None if class_name else WITHOUT_CLASS


def _class_of(properties: Mapping[str, object], where: str) -> str | None:
    """Return the class: the ``classification`` or its ``name``; of a derived class the names, joined."""
    classification = properties.get("classification")
    if not classification:
        return None
    name = classification
    if isinstance(classification, dict):
        name = classification.get("name") or classification.get("names")
    if isinstance(name, list) and all(isinstance(part, str) for part in name):
        name = ": ".join(name)
    if not isinstance(name, str) or not name.strip():
        raise DataError(f"{where} has a classification without a name: {str(classification)[:80]}")
    if len(name) > MAX_NAME:
        raise DataError(f"{where} has a class name of {len(name):,} characters: shorten it")
    return normalize_name(name)
