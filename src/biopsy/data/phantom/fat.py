"""Fat: large clear cells, each the area nearest to one centre, with thin walls between them."""

import cv2
import numpy as np
from scipy.spatial import cKDTree

from biopsy.data.phantom.anatomy import Anatomy, fat_share
from biopsy.data.phantom.noise import Floats
from biopsy.data.phantom.regions import Region, Weave, ramp

_FAR_UM = 1e3


def draw_fat(anatomy: Anatomy, weave: Weave, region: Region, occupied: Floats) -> tuple[Floats, Floats]:
    """Give how much of each pixel is fat and how much of that is wall, both in [0, 1].

    Args:
        anatomy: The slide.
        weave: Its texture.
        region: Where.
        occupied: Share of each pixel that holds epithelium; fat grows round it.
    """
    share = fat_share(anatomy.habit, region.maps["fat"], region.maps["tumour"])
    if share.max() <= 0.01:
        return np.zeros_like(share), np.zeros_like(share)
    left, top, width, height = region.box_um
    pad = 2 * anatomy.habit.fat_cell_um
    points = weave.fat_cells.within(left - pad, top - pad, width + 2 * pad, height + 2 * pad)
    crowd = region.pick(share, points.x_um, points.y_um)
    free = region.pick(occupied, points.x_um, points.y_um) < 0.3
    is_fat = (points.draws[:, 0] < crowd) & free
    if not is_fat.any():
        return np.zeros_like(share), np.zeros_like(share)
    size = anatomy.habit.fat_cell_um * (0.3 + 0.5 * points.draws[:, 1])
    # Among others a cell fills the room it has; one with few neighbours stays round.
    limit = np.where(is_fat, np.where(crowd > 0.7, _FAR_UM, 0.45 * size), 0)
    # A centre that far from every fat cell bounds none.
    place = np.stack([points.x_um, points.y_um], axis=1)
    near = (
        cKDTree(place[is_fat]).query(place, distance_upper_bound=2.5 * anatomy.habit.fat_cell_um)[0] < np.inf
    )
    centres = np.column_stack([place, size, limit])[near].astype(np.float32)
    first, second, limit_here = _nearest(region, centres, 1.25 * anatomy.habit.fat_cell_um)
    gap = 0.5 * (second - first)
    inside = ramp((_round_corners(gap, region.um) - 1.0) / region.um + 0.5)
    cell = inside * ramp((limit_here - first) / region.um + 0.5) * (limit_here > 0)
    between = (limit_here >= _FAR_UM) * (1 - cell) * (1 - occupied)
    return np.maximum(cell, between), (0.8 + 0.15 * region.grain) * between


def _round_corners(gap_um: Floats, um: float) -> Floats:
    """Lower the distance to the wall where walls meet, and leave it along a single wall.

    Blurred, the distance from a straight wall is .8 of the blur on the wall itself and less near a corner.
    """
    blur_um = 3.2
    blurred = np.asarray(cv2.GaussianBlur(gap_um, (0, 0), blur_um / um), np.float32)
    return np.minimum(gap_um, 1.0 + 4.0 * (blurred - 0.8 * blur_um - 0.1))


def _nearest(region: Region, centres: Floats, reach: float) -> tuple[Floats, Floats, Floats]:
    """Give the distance to the nearest and the second nearest centre, less part of its size, and the limit.

    ``centres`` is (n, 4): x, y, size and limit. Each is only compared over its own
    neighbourhood, ``reach`` micrometres to each side.
    """
    first, second = np.full((2, *region.shape), _FAR_UM, np.float32)
    limit_here = np.zeros(region.shape, np.float32)
    left, top = region.origin_um
    sides = np.array([-reach, reach])
    columns = np.clip((centres[:, :1] + sides - left) / region.um, 0, region.shape[1]).astype(int)
    rows = np.clip((centres[:, 1:2] + sides - top) / region.um, 0, region.shape[0]).astype(int)
    visible = (columns[:, 0] < columns[:, 1]) & (rows[:, 0] < rows[:, 1])
    for i in np.flatnonzero(visible):
        box = np.s_[rows[i, 0] : rows[i, 1], columns[i, 0] : columns[i, 1]]
        x_um, y_um, size, limit = centres[i]
        dx2 = (region.x_um[0, box[1]] - x_um) ** 2
        dy2 = (region.y_um[box[0], 0] - y_um) ** 2
        away = np.sqrt(dx2 + dy2[:, None]) - np.float32(0.55) * size
        nearer = away < first[box]
        np.copyto(second[box], np.where(nearer, first[box], np.minimum(second[box], away)))
        np.copyto(first[box], away, where=nearer)
        np.copyto(limit_here[box], limit, where=nearer)
    return first, second, limit_here
