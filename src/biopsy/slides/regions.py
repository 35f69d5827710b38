"""Cells of one class, joined to polygons with holes whose areas are exactly those of the cells."""

from dataclasses import dataclass

import cv2
import numpy as np
import shapely
from shapely import Polygon

from biopsy.slides.maps import SlideMap

ABSTAINED = "abstained*"  # QuPath, and `prepare`, ignore classes that end so


@dataclass(frozen=True)
class Region:
    """Cells of one class that touch along an edge.

    Attributes:
        class_name: The class, or `ABSTAINED`.
        polygon: At level 0, with holes; its edges follow those of the cells.
        n_cells: How many cells it joins.
        area_mm2: Their area.
        mean_prob: Mean probability of the region's class (of the positive one where it abstained), NaN if
            there is none.
        max_prob: The highest.
    """

    class_name: str
    polygon: Polygon
    n_cells: int
    area_mm2: float
    mean_prob: float
    max_prob: float


def find_regions(slide_map: SlideMap) -> list[Region]:
    """Give the regions of every class and where the map abstained, largest first within each.

    Two cells of a class that touch at a corner only belong to two regions.
    """
    probs, pred = slide_map.cells(), slide_map.cells_pred()
    positive = slide_map.positive_index
    regions = []
    for index, name in [*enumerate(slide_map.class_names), (-2, ABSTAINED)]:
        prob = probs[..., index if index >= 0 else positive or 0]
        found = _join(slide_map, pred == index, prob, name)
        regions += sorted(found, key=lambda region: -region.n_cells)
    return regions


def _join(slide_map: SlideMap, mask: np.ndarray, prob: np.ndarray, name: str) -> list[Region]:
    _, labels, found, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    regions = []
    for number, (left, top, width, height, _) in enumerate(found[1:].tolist(), start=1):
        place = slice(top, top + height), slice(left, left + width)
        inside = labels[place] == number
        values = prob[place][inside]
        polygon = outline(inside, left, top)
        regions.append(
            Region(
                name,
                shapely.transform(polygon, lambda points: _to_level_0(points, slide_map)),
                len(values),
                len(values) * slide_map.cell_mm2,
                float(values.mean()),
                float(values.max()),
            )
        )
    return regions


def outline(mask: np.ndarray, left: int = 0, top: int = 0) -> Polygon:
    """Give the outline of cells that hang together, in cells, without corners on straight edges.

    Args:
        mask: bool ``(rows, columns)``, one piece connected along edges.
        left: Column of the mask's first cell.
        top: Row of the mask's first cell.

    Example:
        >>> outline(np.array([[True, True], [True, False]])).area
        3.0
    """
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    row, start = np.nonzero(edges == 1)
    _, end = np.nonzero(edges == -1)
    runs = shapely.box(start + left, row + top, end + left, row + top + 1)
    return shapely.union_all(runs).simplify(0)


def _to_level_0(points: np.ndarray, slide_map: SlideMap) -> np.ndarray:
    grid = slide_map.grid
    return (points * grid.stride_px + grid.origin_px) * grid.scale
