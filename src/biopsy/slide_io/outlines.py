"""Annotated areas, and validation and repair of their outlines in bounded time.

Coordinates beyond any slide are refused, and so are outlines with too many self-intersections, which are
counted first because they determine the time of the repair.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import shapely
from shapely import MultiPolygon, Polygon
from shapely.validation import explain_validity

from biopsy.core.errors import DataError

Area: TypeAlias = Polygon | MultiPolygon

MAX_COORDINATE = 2.0**31
"""Largest coordinate in pixels, far beyond the size of slides."""

MAX_CORNERS = 5_000_000
"""Largest number of vertices in a file; outlines of pixel classifiers have some hundred thousand."""

MAX_CROSSINGS = 10_000
"""Largest number of self-intersections in a file, whose repair takes about a second."""

MAX_NAME = 200
"""Largest length of a class name."""

WITHOUT_CLASS = "without a class"
"""Reason why an area was ignored."""

UNCLASSIFIED = "Unclassified"
"""Name in options of the class of areas without a class."""

_PAIRS_AT_ONCE = 2**22


@dataclass(frozen=True)
class Annotation:
    """An area of a slide and its class.

    Attributes:
        class_name: Class name, with normalised Unicode and white space.
        polygon: Valid area at level 0.
        feature: Position in the file, counted from 1.
    """

    class_name: str
    polygon: Area
    feature: int


@dataclass(frozen=True)
class Annotations:
    """Content of an annotation file.

    Attributes:
        items: Annotations in the order of the file.
        repaired: Features with a self-intersecting outline, and the fault; all enclosed areas are included
            (of a figure of eight both loops).
        ignored: Number of ignored features by reason.
        from_bounds: Whether the origin of coordinates is that of the scanned bounds (see `Slide.corner`), as
            in QuPath, instead of the corner of the slide.
        mpp: Pixel size of the annotated slide in µm, if recorded.
        unclassified: Areas without a class, each with its own name (may be empty) in place of a class.
    """

    path: Path
    items: list[Annotation]
    repaired: dict[int, str] = field(default_factory=dict)
    ignored: dict[str, int] = field(default_factory=dict)
    from_bounds: bool = True
    mpp: float | None = None
    unclassified: list[Annotation] = field(default_factory=list)

    def shift(self, x: float, y: float) -> "Annotations":
        """Return the annotations shifted by an offset."""
        offset = np.array([x, y])

        def shift_all(items: list[Annotation]) -> list[Annotation]:
            return [
                replace(item, polygon=shapely.transform(item.polygon, lambda points: points + offset))
                for item in items
            ]

        return replace(self, items=shift_all(self.items), unclassified=shift_all(self.unclassified))

    def class_names(self) -> list[str]:
        return sorted({item.class_name for item in self.items})


class OutlineReader:
    """Reader of areas from the rings of one file, with limits on the work."""

    def __init__(self) -> None:
        self._n_corners = 0
        self._n_crossings = 0

    def read_area(self, polygons: Sequence[Sequence[np.ndarray]], where: str) -> tuple[Area, str]:
        """Return a valid area, and the fault of its outline, "" if there is none.

        Args:
            polygons: Outer ring and holes of each polygon, outputs of `read_ring`.
        """
        self._n_corners += sum(len(ring) for rings in polygons for ring in rings)
        if self._n_corners > MAX_CORNERS:
            raise DataError(f"{where}: the file has more than {MAX_CORNERS:,} corners; simplify its outlines")
        parts = [Polygon(rings[0], rings[1:]) for rings in polygons]
        area: Area = parts[0] if len(parts) == 1 else MultiPolygon(parts)
        fault = "" if area.is_valid else explain_validity(area)
        if fault:
            self._n_crossings += _count_crossings(area, MAX_CROSSINGS - self._n_crossings)
            if self._n_crossings > MAX_CROSSINGS:
                raise DataError(
                    f"{where}: outlines cross themselves more than {MAX_CROSSINGS:,} times; draw them again"
                )
            area = _repair(area)
        if not area.area > 0:
            raise DataError(f"{where} has no area")
        return area, fault


def read_ring(points: Any, where: str, *, close: bool = False) -> np.ndarray:
    """Return the vertices of a closed ring, float ``(n, 2)``; values after x and y are dropped.

    Args:
        points: List of points, each a list of two or more numbers.
    """
    try:
        ring = np.array([point[:2] for point in points])
    except (TypeError, ValueError, KeyError):
        ring = np.empty(0, object)
    if ring.ndim != 2 or ring.shape[1] != 2 or ring.dtype.kind not in "iuf":
        raise DataError(f"{where} has a ring that is not a list of x, y")
    ring = ring.astype(float)
    if not (np.abs(ring) <= MAX_COORDINATE).all():
        raise DataError(f"{where} has coordinates that are not numbers up to {MAX_COORDINATE:,.0f}")
    if close and not np.array_equal(ring[0], ring[-1]):
        ring = np.concatenate([ring, ring[:1]])
    if len(ring) < 4:
        raise DataError(f"{where} has a ring of {len(ring)} points; a closed one has 4 or more")
    if not np.array_equal(ring[0], ring[-1]):
        raise DataError(f"{where} has a ring that is not closed: {points[0]} to {points[-1]}")
    return ring


def _repair(area: Area) -> Area:
    """Return the area enclosed by the outer rings without that enclosed by the holes.

    ``make_valid`` of GEOS loses area if an outline overlaps one of its own edges.
    """
    parts = []
    for part in shapely.get_parts(area):
        outer, *holes = (
            _fill_ring(shapely.get_coordinates(ring)) for ring in (part.exterior, *part.interiors)
        )
        parts.append(outer.difference(shapely.union_all(holes)) if holes else outer)
    united = shapely.union_all(parts)
    polygons = [part for part in shapely.get_parts(united) if isinstance(part, Polygon) and part.area > 0]
    return polygons[0] if len(polygons) == 1 else MultiPolygon(polygons)


def _fill_ring(ring: np.ndarray) -> shapely.Geometry:
    """Return the area with non-zero winding number of a closed ring."""
    lines = shapely.union_all(shapely.linestrings(np.stack([ring[:-1], ring[1:]], axis=1)))
    faces = shapely.get_parts(shapely.polygonize([lines]))
    points = shapely.get_coordinates(shapely.point_on_surface(faces))
    (x0, y0), (x1, y1) = ring[:-1].T, ring[1:].T
    tree = shapely.STRtree(
        shapely.box(np.minimum(x0, x1), np.minimum(y0, y1), np.maximum(x0, x1), np.maximum(y0, y1))
    )
    rays = shapely.box(points[:, 0], points[:, 1], ring[:, 0].max() + 1, points[:, 1])
    face, side = tree.query(rays)
    x, y = points[face].T
    left = (x1[side] - x0[side]) * (y - y0[side]) - (x - x0[side]) * (y1[side] - y0[side])
    up = (y0[side] <= y) & (y < y1[side]) & (left > 0)
    down = (y1[side] <= y) & (y < y0[side]) & (left < 0)
    winding = np.bincount(face, weights=up.astype(float) - down, minlength=len(faces))
    return shapely.union_all(faces[winding != 0])


def _count_crossings(area: Area, limit: int) -> int:
    """Return the number of intersecting pairs of segments, or more than ``limit``."""
    corners = [
        shapely.get_coordinates(ring)
        for part in shapely.get_parts(area)
        for ring in (part.exterior, *part.interiors)
    ]
    ends = np.concatenate([np.stack([ring[:-1], ring[1:]], axis=1) for ring in corners])
    segments = shapely.linestrings(ends[(ends[:, 0] != ends[:, 1]).any(axis=1)])
    tree = shapely.STRtree(segments)
    n_crossings = -len(segments)  # each segment touches the next one
    start, step = 0, 16
    most = max(step, min(4096, _PAIRS_AT_ONCE // max(1, len(segments))))
    while start < len(segments) and n_crossings <= limit:
        first, second = tree.query(segments[start : start + step], predicate="intersects")
        n_crossings += int((first + start < second).sum())
        start, step = start + step, min(2 * step, most)
    return max(0, n_crossings)
