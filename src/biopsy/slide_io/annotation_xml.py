"""Annotations in the XML of ASAP, HALO and Aperio ImageScope.

Coordinates are level-0 pixels from the corner of the slide, in attributes of the elements:

* ASAP (Camelyon): the class is the group of an annotation. The group ``Exclusion``, or ``_2`` with
  Camelyon16's ``_0`` and ``_1``, is subtracted from the other areas. Splines are read as polygons.
* HALO: the class is the name of the layer. A region with ``NegativeROA`` is a hole in the regions of its
  layer that extend beyond it (islands in the hole are kept); rectangles and ellipses are given by two corners
  of their bounding box; a polygon with ``HasEndcaps`` is a line.
* Aperio ImageScope: the class is the name of the layer, else its attribute, the text of the region, or
  ``Layer 3`` by its number. Holes as in HALO. The file has the pixel size of the slide.

Annotations without an area (pins, rulers, arrows, lines, points) are counted and ignored. Document types, and
so entities, are refused.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

import numpy as np
import shapely

from biopsy.core.errors import DataError, FileFormatError
from biopsy.core.loaders import read_bytes
from biopsy.core.text import normalize_name
from biopsy.slide_io.outlines import (
    MAX_NAME,
    WITHOUT_CLASS,
    Annotation,
    Annotations,
    Area,
    OutlineReader,
    read_ring,
)

MAX_BYTES = 2**26
"""Largest file size: 64 MB, about a million vertices."""

_ASAP_AREAS = ("Polygon", "Spline", "Rectangle")
_IMAGESCOPE_TYPES = {"0": "Polygon", "1": "Rectangle", "2": "Ellipse", "3": "Arrow", "4": "Ruler"}
_N_ELLIPSE = 360  # vertices of an ellipse, with an error in area of 5e-5


@dataclass(frozen=True)
class Region:
    """One outline of a file.

    Attributes:
        number: Position in the file, counted from 1.
        layer: Index of the layer, shared with its holes.
        class_name: Class name; None if there is none.
        kind: Kind of shape.
        corners: Vertices, float ``(n, 2)``; of a rectangle or ellipse two corners of its bounding box.
        is_hole: Whether it is subtracted from others.
        name: Name of the annotation, which is not its class.
    """

    number: int
    layer: int
    class_name: str | None
    kind: str
    corners: np.ndarray
    is_hole: bool = False
    name: str = ""


def read_xml(path: Path) -> Annotations:
    """Read an annotation file of ASAP, HALO or Aperio ImageScope."""
    root = parse_xml(path)
    is_imagescope = "MicronsPerPixel" in root.attrib or root.find(".//Vertex") is not None
    if root.tag == "ASAP_Annotations":
        regions = _list_asap(root, path)
    elif root.tag == "Annotations":
        regions = _list_layers(root, path, is_imagescope)
    else:
        raise FileFormatError(
            path,
            "format",
            f"is not an annotation file of ASAP, HALO or ImageScope: it starts with <{root.tag}>",
        )
    return _build_areas(list(regions), path, _read_mpp(root) if is_imagescope else None)


def parse_xml(path: Path) -> Element:
    """Return the elements and attributes of an XML file, without text."""

    def refuse(*declaration: object) -> NoReturn:
        raise FileFormatError(path, "syntax", "declares a document type, which is not supported")

    builder, parser = TreeBuilder(), expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = builder.start, builder.end
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(read_bytes(path, max_bytes=MAX_BYTES), True)
    except (expat.ExpatError, LookupError, ValueError) as error:
        if isinstance(error, FileFormatError):
            raise
        raise FileFormatError(path, "syntax", f"is not readable as XML: {error}") from None
    return builder.close()


def _list_asap(root: Element, path: Path) -> Iterator[Region]:
    annotations = root.findall(".//Annotation")
    groups = {annotation.get("PartOfGroup", "None") for annotation in annotations}
    is_camelyon16 = "_2" in groups and groups <= {"_0", "_1", "_2", "None"}
    for number, annotation in enumerate(annotations, start=1):
        group, kind = annotation.get("PartOfGroup", "None").strip(), annotation.get("Type", "Polygon")
        elements = sorted(annotation.iter("Coordinate"), key=_order_of)
        is_hole = group.casefold() == "exclusion" or (is_camelyon16 and group == "_2")
        yield Region(
            number,
            0,
            None if group in ("None", "") else normalize_name(group),
            "Polygon" if kind in _ASAP_AREAS else kind,
            _read_corners(elements, f"{path}, annotation {number}"),
            is_hole,
            normalize_name(annotation.get("Name", "")),
        )


def _order_of(element: Element) -> float:
    text = element.get("Order", "0")
    return int(text) if text.isdecimal() and len(text) < 10 else 0


def _list_layers(root: Element, path: Path, is_imagescope: bool) -> Iterator[Region]:
    number = 0
    for index, layer in enumerate(root.iter("Annotation")):
        for region in layer.iter("Region"):
            number += 1
            kind = region.get("Type", "Polygon")
            kind = _IMAGESCOPE_TYPES.get(kind, f"type {kind}") if is_imagescope else kind
            elements = list(region.iter("Vertex" if is_imagescope else "V"))
            corners = _read_corners(elements, f"{path}, region {number}")
            if kind == "Polygon" and _is_true(region.get("HasEndcaps")):
                kind = "Line"
            if is_imagescope and kind in ("Rectangle", "Ellipse") and len(corners) > 2:
                is_ellipse = kind == "Ellipse" and len(corners) == 4
                kind, corners = "Polygon", _inscribe_ellipse(corners) if is_ellipse else corners
            name = _name_layer(layer, region) if is_imagescope else layer.get("Name", "").strip()
            is_hole = _is_true(region.get("NegativeROA") or region.get("Negative"))
            text = normalize_name(region.get("Text", ""))
            yield Region(number, index, normalize_name(name) or None, kind, corners, is_hole, text)


def _is_true(text: str | None) -> bool:
    return (text or "").strip().lower() not in ("", "0", "false", "no")


def _name_layer(layer: Element, region: Element) -> str:
    """Return the class of a region of ImageScope, whose layers may have no name."""
    attributes = layer.findall("Attributes/Attribute")
    names = [layer.get("Name", ""), *(item.get("Value", "") for item in attributes)]
    names += [item.get("Name", "") for item in attributes if item.get("Name") != "Description"]
    names += [region.get("Text", ""), f"Layer {layer.get('Id', '')}"]
    return next(name.strip() for name in names if name.strip())


def _read_corners(elements: list[Element], where: str) -> np.ndarray:
    try:
        corners = [(float(element.attrib["X"]), float(element.attrib["Y"])) for element in elements]
    except (KeyError, ValueError):
        raise DataError(f"{where} has a corner without numbers X and Y") from None
    return np.array(corners, float).reshape(-1, 2)


def _read_mpp(root: Element) -> float | None:
    try:
        mpp = float(root.get("MicronsPerPixel", ""))
    except ValueError:
        return None
    return mpp if 0 < mpp < 1000 else None


def _build_areas(regions: list[Region], path: Path, mpp: float | None) -> Annotations:
    outlines = OutlineReader()
    areas: dict[int, Area] = {}
    repaired: dict[int, str] = {}
    ignored: Counter[str] = Counter()
    valid = []
    for region in regions:
        if region.kind not in ("Polygon", "Rectangle", "Ellipse"):
            article = "an" if region.kind[0] in "AEIOU" else "a"
            ignored[f"is {article} {region.kind.lower()}"] += 1
        elif len(np.unique(region.corners, axis=0)) < (3 if region.kind == "Polygon" else 2):
            ignored["has too few corners"] += 1
        else:
            if region.class_name is None and not region.is_hole:
                ignored[WITHOUT_CLASS] += 1
            where = f"{path}, region {region.number}"
            ring = read_ring(_outline(region, where), where, close=True)
            areas[region.number], fault = outlines.read_area([[ring]], where)
            if fault:
                repaired[region.number] = fault
            valid.append(region)
    solid = [region for region in valid if not region.is_hole]
    for hole in (region for region in valid if region.is_hole):
        cut = _subtract_hole(hole, solid, areas)
        if not cut:
            ignored["is a hole outside all regions"] += 1
    kept = [
        (
            region,
            Annotation((region.class_name or region.name)[:MAX_NAME], areas[region.number], region.number),
        )
        for region in solid
        if areas[region.number].area > 0
    ]
    items = [annotation for region, annotation in kept if region.class_name]
    unclassified = [annotation for region, annotation in kept if not region.class_name]
    ignored_counts = dict(ignored)
    return Annotations(path, items, repaired, ignored_counts, False, mpp, unclassified)


def _subtract_hole(hole: Region, solid: list[Region], areas: dict[int, Area]) -> bool:
    """Subtract a hole from the regions of its layer that extend beyond it; return whether there is one."""
    area, is_cut = areas[hole.number], False
    for region in solid:
        other = areas[region.number]
        if region.layer == hole.layer and other.intersects(area) and not area.contains(other):
            remaining = other.difference(area)
            areas[region.number] = shapely.MultiPolygon(
                [part for part in shapely.get_parts(remaining) if isinstance(part, shapely.Polygon)]
            )
            is_cut = True
    return is_cut


def _outline(region: Region, where: str) -> np.ndarray:
    """Return the vertices of a region."""
    if region.kind == "Polygon":
        return region.corners
    if len(region.corners) != 2:
        raise DataError(f"{where} is a {region.kind} of {len(region.corners)} corners; expected 2")
    low, high = region.corners.min(axis=0), region.corners.max(axis=0)
    box = np.array([low, (high[0], low[1]), high, (low[0], high[1])])
    return box if region.kind == "Rectangle" else _inscribe_ellipse(box)


def _inscribe_ellipse(corners: np.ndarray) -> np.ndarray:
    """Return the ellipse in a rectangle of any rotation, or through the four ends of upright axes."""
    across, along = corners[2] - corners[0], corners[3] - corners[1]  # diagonals, or axes
    is_upright = min(abs(across)) == 0 and min(abs(along)) == 0
    first, second = (across, along) if is_upright else (corners[1] - corners[0], corners[2] - corners[1])
    turns = np.arange(_N_ELLIPSE)[:, None] * 2 * np.pi / _N_ELLIPSE
    return corners.mean(axis=0) + (np.cos(turns) * first + np.sin(turns) * second) / 2
