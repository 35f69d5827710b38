"""Annotations of a slide as areas with a class: read from files of QuPath and others.

Coordinates are pixels of level 0. What QuPath exports is read: a ``FeatureCollection``, a list of features or
one feature, and the objects inside others (``childObjects``) at any depth; polygons with holes and several
polygons in one; the class by its name. Annotations without a class, and objects without an area (points,
lines) or of other kinds (detections, cells, tiles), say nothing about a class of tissue and are counted, not
read. Anything else that does not fit is refused by file and feature. Sources: QuPath's documentation,
"Exporting annotations", its class ``PathObjectTypeAdapters``, and RFC 7946.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import shapely

from biopsy.core.errors import DataError
from biopsy.core.loaders import parse_json, read_bytes
from biopsy.core.text import normalize_name
from biopsy.slide_io.annotation_xml import read_xml_areas
from biopsy.slide_io.outlines import Area, OutlineReader, read_ring

MAX_BYTES = 2**27
"""The largest file that is read."""

XML_SUFFIXES = (".xml", ".annotations")
"""How the files of ASAP, HALO and Aperio ImageScope end."""

SUFFIXES = (".geojson", ".json", *XML_SUFFIXES)
"""How files of annotations end, in lower case."""

MAX_NAME = 200
"""Characters of a class's name."""

_FLAT = ("Point", "MultiPoint", "LineString", "MultiLineString")
_GEOMETRIES = ("Polygon", "MultiPolygon", "GeometryCollection", *_FLAT)
_OTHER_OBJECTS = {  # as QuPath names them; in version 0.2 the class was the feature's id
    "detection": ("detection", "PathDetectionObject"),
    "cell": ("cell", "PathCellObject"),
    "tile": ("tile", "PathTileObject"),
    "TMA core": ("tmaCore", "tma_core", "TMACoreObject"),
    "root": ("root", "PathRootObject"),
}
_KINDS = {name.lower(): kind for kind, names in _OTHER_OBJECTS.items() for name in names}


@dataclass(frozen=True)
class Annotation:
    """An area of a slide and its class.

    Attributes:
        class_name: As it is spelt in the file, in one form of Unicode and white space.
        polygon: At level 0, valid, with an area.
        feature: Its place in the file, counted from 1, as messages name it.
    """

    class_name: str
    polygon: Area
    feature: int


@dataclass(frozen=True)
class Annotations:
    """What a file of annotations holds.

    Attributes:
        path: The file.
        items: In the file's order.
        repaired: Features whose outline crossed itself, and how; what an outline goes around belongs to them
            (of a figure of eight both loops).
        ignored: How many features were not read, by reason.
        from_bounds: Whether coordinates count from where what was scanned begins (see `Slide.corner`), as
            QuPath's do, and not from the slide's own corner.
        mpp: Micrometres per pixel of the slide that was annotated, where the file says it.
    """

    path: Path
    items: list[Annotation]
    repaired: dict[int, str] = field(default_factory=dict)
    ignored: dict[str, int] = field(default_factory=dict)
    from_bounds: bool = True
    mpp: float | None = None

    def shift(self, x: float, y: float) -> "Annotations":
        """Return the same annotations, moved."""
        by = np.array([x, y])
        moved = [
            replace(item, polygon=shapely.transform(item.polygon, lambda places: places + by))
            for item in self.items
        ]
        return replace(self, items=moved)

    def class_names(self) -> list[str]:
        """Return the classes there are, in order of their names."""
        return sorted({item.class_name for item in self.items})


def read_annotations(path: Path | str) -> Annotations:
    """Read a file of annotations: XML by its ending, otherwise GeoJSON as QuPath exports it.

    Raises:
        DataError: If it is of none of the known formats or too large, or a feature has no proper outline;
            names the feature.
    """
    path = Path(path)
    if path.suffix.lower() in XML_SUFFIXES:
        areas = read_xml_areas(path)
        items = [Annotation(name[:MAX_NAME], area, number) for number, name, area in areas.items]
        return Annotations(path, items, areas.repaired, areas.ignored, from_bounds=False, mpp=areas.mpp)
    return _read_geojson(path)


def _read_geojson(path: Path) -> Annotations:
    outlines = OutlineReader()
    items: list[Annotation] = []
    repaired: dict[int, str] = {}
    ignored: Counter[str] = Counter()
    for number, feature in enumerate(_walk(_read_features(path), str(path)), start=1):
        where = f"{path}, feature {number}"
        about = feature["properties"] or {}
        polygons = _polygons_of(feature.get("geometry"), where)
        class_name = _class_of(about, where)
        if reason := _reason_to_ignore(feature, polygons, class_name):
            ignored[reason] += 1
            continue
        rings = [[read_ring(ring, where) for ring in polygon] for polygon in polygons]
        area, fault = outlines.read_area(rings, where)
        if fault:
            repaired[number] = fault
        items.append(Annotation(str(class_name), area, number))
    return Annotations(path, items, repaired, dict(ignored))


def _read_features(path: Path) -> list[Any]:
    content = read_bytes(path, max_bytes=MAX_BYTES)
    document = parse_json(content, path, allow_nan=True)
    if isinstance(document, dict) and document.get("type") in ("Feature", *_GEOMETRIES):
        return [document]
    features = document.get("features") if isinstance(document, dict) else document
    if not isinstance(features, list):
        raise DataError(
            f"{path} holds no list of features: export it from QuPath by File > Export objects as GeoJSON"
        )
    return features


def _walk(features: list[Any], path: str) -> Iterator[dict[str, Any]]:
    """Yield features in the file's order, each before those inside it; every one has properties."""
    waiting = features[::-1]
    number = 0
    while waiting:
        feature = waiting.pop()
        number += 1
        where = f"{path}, feature {number}"
        if not isinstance(feature, dict):
            raise DataError(f"{where} is no feature, but {str(feature)[:40]!r}")
        if feature.get("type") in _GEOMETRIES:
            feature = {"geometry": feature}
        if "geometry" not in feature:
            raise DataError(f"{where} has no geometry")
        about = feature.get("properties") or {}
        if not isinstance(about, dict):
            raise DataError(f"{where} has properties that are no table")
        yield {**feature, "properties": about}
        for children in (about.get("childObjects"), feature.get("childObjects")):
            if children is not None and not isinstance(children, list):
                raise DataError(f"{where} has childObjects that are no list")
            waiting += (children or [])[::-1]


def _polygons_of(geometry: Any, where: str) -> list[list[Any]]:
    """Return the polygons of a geometry as lists of rings; none where it has no area."""
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
        raise DataError(f"{where} has a polygon that is no list of rings")
    return [polygon for polygon in polygons if polygon]


def _reason_to_ignore(feature: dict[str, Any], polygons: list[Any], class_name: str | None) -> str | None:
    about = feature["properties"]
    kind = about.get("objectType") or about.get("object_type") or about.get("type") or feature.get("id")
    if other := _KINDS.get(str(kind).lower()):
        return f"is a {other}"
    if not polygons:
        return "without an area"
    return None if class_name else "without a class"


def _class_of(about: dict[str, Any], where: str) -> str | None:
    """Return the name of the class: in ``classification`` as ``name``, or as ``names`` of a derived class."""
    classification = about.get("classification")
    if not classification:
        return None
    name = classification
    if isinstance(classification, dict):
        names = classification.get("names")
        name = classification.get("name") or (": ".join(map(str, names)) if isinstance(names, list) else None)
    if not isinstance(name, str) or not name.strip():
        raise DataError(f"{where} has a classification without a name: {str(classification)[:80]}")
    if len(name) > MAX_NAME:
        raise DataError(f"{where} has a class whose name is {len(name):,} characters long: shorten it")
    return normalize_name(name)
