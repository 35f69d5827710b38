"""Annotations of a slide as polygons with a class, read from and written to QuPath's GeoJSON.

Coordinates are pixels of level 0. What QuPath exports is read: a ``FeatureCollection``, a list of features or
one feature; polygons with holes and several polygons in one; the class by its name. Annotations without a
class, and objects without an area (points, lines) or of other kinds (detections, cells, tiles), say nothing
about a class of tissue and are counted, not read. Anything else that does not fit is refused by file and
feature. Source: QuPath's documentation, "Exporting annotations", and RFC 7946.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import shapely
from shapely import MultiPolygon, Polygon
from shapely.geometry import mapping, shape
from shapely.validation import explain_validity

from biopsy.core.errors import DataError
from biopsy.core.files import write_atomic

_FLAT = ("Point", "MultiPoint", "LineString", "MultiLineString")
_OTHER_OBJECTS = ("detection", "cell", "tile", "tma core", "tmacore", "root")


@dataclass(frozen=True)
class Annotation:
    """An area of a slide and its class.

    Attributes:
        class_name: As QuPath spells it.
        polygon: At level 0, valid, with an area.
        feature: Its place in the file, counted from 1, as messages name it.
    """

    class_name: str
    polygon: Polygon | MultiPolygon
    feature: int


@dataclass(frozen=True)
class Annotations:
    """What a file of annotations holds.

    Attributes:
        path: The file.
        items: In the file's order.
        repaired: Features whose outline crossed itself, and how; they are read as shapely's ``make_valid``
            makes of them (of a figure of eight both loops).
        ignored: How many features were not read, by reason.
    """

    path: Path
    items: list[Annotation]
    repaired: dict[int, str] = field(default_factory=dict)
    ignored: dict[str, int] = field(default_factory=dict)

    def class_names(self) -> list[str]:
        """Give the classes there are, in order of their names."""
        return sorted({item.class_name for item in self.items})


def read_annotations(path: Path | str) -> Annotations:
    """Read a GeoJSON file that QuPath exported.

    Raises:
        DataError: If it is no GeoJSON, or a feature has no proper outline; names the feature.
    """
    path = Path(path)
    items: list[Annotation] = []
    repaired: dict[int, str] = {}
    ignored: Counter[str] = Counter()
    for number, feature in enumerate(_read_features(path), start=1):
        where = f"{path}, feature {number}"
        geometry, about = _parts_of(feature, where)
        reason = _reason_to_ignore(geometry, about)
        class_name = None if reason else _class_of(about, where)
        if reason or class_name is None:
            ignored[reason or "without a class"] += 1
            continue
        polygon, fault = _read_polygon(geometry, where)
        if fault:
            repaired[number] = fault
        items.append(Annotation(class_name, polygon, number))
    return Annotations(path, items, repaired, dict(ignored))


def write_annotations(
    path: Path | str,
    annotations: Iterable[tuple[str, Polygon | MultiPolygon]],
    *,
    colours: Mapping[str, tuple[int, int, int]] | None = None,
) -> Path:
    """Write areas with their classes as QuPath reads them.

    Args:
        path: The file to be.
        annotations: Class and area at level 0.
        colours: Of classes, as red, green, blue in 0-255.
    """
    features = [
        {
            "type": "Feature",
            "geometry": mapping(_orient(polygon)),
            "properties": {
                "objectType": "annotation",
                "classification": {"name": name, "color": list((colours or {}).get(name, (128, 128, 128)))},
            },
        }
        for name, polygon in annotations
    ]
    write_atomic(path, json.dumps({"type": "FeatureCollection", "features": features}) + "\n")
    return Path(path)


def _orient(polygon: Polygon | MultiPolygon) -> Polygon | MultiPolygon:
    """Turn outer rings counter-clockwise and holes clockwise, as RFC 7946 asks."""
    if isinstance(polygon, MultiPolygon):
        return MultiPolygon([shapely.geometry.polygon.orient(part) for part in polygon.geoms])
    return shapely.geometry.polygon.orient(polygon)


def _read_features(path: Path) -> list[Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not readable as GeoJSON: {error}") from None
    if isinstance(document, dict) and document.get("type") == "Feature":
        return [document]
    features = document.get("features") if isinstance(document, dict) else document
    if not isinstance(features, list):
        raise DataError(
            f"{path} holds no list of features: export it from QuPath by File > Export objects as GeoJSON"
        )
    return features


def _parts_of(feature: Any, where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Give a feature's geometry and properties."""
    if not isinstance(feature, dict) or not isinstance(feature.get("geometry"), dict):
        raise DataError(f"{where} has no geometry")
    about = feature.get("properties") or {}
    if not isinstance(about, dict):
        raise DataError(f"{where} has properties that are no table")
    return feature["geometry"], about


def _reason_to_ignore(geometry: dict[str, Any], about: dict[str, Any]) -> str | None:
    kind = str(about.get("objectType") or about.get("object_type") or "annotation").lower()
    if kind.replace("_", " ") in _OTHER_OBJECTS:
        return f"is a {kind}"
    return "without an area" if geometry.get("type") in _FLAT else None


def _class_of(about: dict[str, Any], where: str) -> str | None:
    """Give the name of the class: in ``classification`` as ``name``, or as ``names`` of a derived class."""
    classification = about.get("classification")
    if not classification:
        return None
    name = classification
    if isinstance(classification, dict):
        names = classification.get("names")
        name = classification.get("name") or (": ".join(map(str, names)) if isinstance(names, list) else None)
    if not isinstance(name, str) or not name.strip():
        raise DataError(f"{where} has a classification without a name: {classification!r}")
    return name.strip()


def _read_polygon(geometry: dict[str, Any], where: str) -> tuple[Polygon | MultiPolygon, str]:
    """Give a valid area, and what was wrong with it; empty where nothing was."""
    kind = geometry.get("type")
    if kind not in ("Polygon", "MultiPolygon"):
        raise DataError(f"{where} is a {kind}; Polygon and MultiPolygon have an area")
    polygons = [geometry.get("coordinates")] if kind == "Polygon" else geometry.get("coordinates")
    _check_rings(polygons, where)
    area = shapely.force_2d(shape(geometry))
    fault = "" if area.is_valid else explain_validity(area)
    if fault:
        area = _areas_of(shapely.make_valid(area))
    if not area.area > 0:
        raise DataError(f"{where} has no area")
    return area, fault


def _check_rings(polygons: Any, where: str) -> None:
    """Refuse rings that are no lists of places, not closed, or of fewer than three corners."""
    if not isinstance(polygons, list) or not polygons:
        raise DataError(f"{where} has no coordinates")
    for rings in polygons:
        if not isinstance(rings, list) or not rings:
            raise DataError(f"{where} has a polygon without rings")
        for ring in rings:
            if not isinstance(ring, list) or not all(_is_place(place) for place in ring):
                raise DataError(f"{where} has a ring that is no list of x, y")
            if len(ring) < 4:
                raise DataError(f"{where} has a ring of {len(ring)} points; a closed one has 4 or more")
            if ring[0] != ring[-1]:
                raise DataError(f"{where} has a ring that is not closed: {ring[0]} to {ring[-1]}")


def _is_place(place: Any) -> bool:
    return (
        isinstance(place, list)
        and len(place) >= 2
        and all(isinstance(value, int | float) and abs(value) < float("inf") for value in place[:2])
    )


def _areas_of(repaired: Any) -> Polygon | MultiPolygon:
    """Keep of a repaired outline what has an area."""
    parts = [part for part in shapely.get_parts(repaired) if isinstance(part, Polygon | MultiPolygon)]
    whole = shapely.union_all(parts)
    return whole if isinstance(whole, Polygon | MultiPolygon) else Polygon()
