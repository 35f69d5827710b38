"""Nuclei of stroma, inflammation and tumour, fat cells, and how they are drawn onto a grid."""

from collections.abc import Sequence

import cv2
import numpy as np
from scipy.spatial import cKDTree

from biopsy.phantom.anatomy import Anatomy, fat_share
from biopsy.phantom.noise import Floats, Points
from biopsy.phantom.region import Region, Weave, fibre_axes, ramp


def place_nuclei(
    anatomy: Anatomy, weave: Weave, region: Region, epithelium: Floats, gland: Floats, bed: Floats
) -> Floats:
    """Return all nuclei of a region but those that line glands and vessels.

    Args:
        epithelium: Share of each pixel that is living tumour epithelium.
        gland: Share that is normal gland.
        bed: Share that is the loose stroma of a lobule.
    """
    blocked = np.maximum(epithelium, gland)
    kinds = (
        _place_fibroblasts(anatomy, weave, region, blocked, bed),
        _place_lymphocytes(anatomy, weave, region, blocked, bed),
        _place_tumour_cells(anatomy, weave, region, epithelium, gland),
    )
    return np.concatenate(kinds).astype(np.float32)


def _place_fibroblasts(
    anatomy: Anatomy, weave: Weave, region: Region, blocked: Floats, bed: Floats
) -> Floats:
    """Thin spindles along the collagen."""
    habit, points = anatomy.habit, weave.fibroblasts.within(*region.box_um)
    position = points.x_um, points.y_um
    crowd = 0.18 * habit.cellularity * np.exp(0.8 * region.pick(region.maps["cells"], *position))
    crowd *= (
        1
        + 0.6 * habit.desmoplasia * region.pick(region.tumour, *position)
        + 1.2 * region.pick(bed, *position)
    )
    x, y, d = _select(points, (points.draws[:, 0] < crowd) & (region.pick(blocked, *position) < 0.3))
    angle = _fibre_direction(anatomy, x, y) + 0.9 * (d[:, 1] - 0.5)
    columns = [x, y, 2.4 + 3.6 * d[:, 2], 1.0 + 0.8 * d[:, 3], angle, 0.5 + 0.5 * d[:, 4]]
    return np.stack(columns, axis=1)


def _place_lymphocytes(
    anatomy: Anatomy, weave: Weave, region: Region, blocked: Floats, bed: Floats
) -> Floats:
    """Small, round and darker than any tumour nucleus; in clusters, some of them at the tumour's margin."""
    habit, points = anatomy.habit, weave.lymphocytes.within(*region.box_um)
    position = points.x_um, points.y_um
    margin = np.exp(-((region.pick(region.maps["tumour"], *position) / 180) ** 2))
    level = region.pick(region.maps["lymph"], *position) + 0.3 * margin + 0.5 * region.pick(bed, *position)
    chance = np.clip(0.4 * (level - 1.9 + 1.5 * habit.lymphocytes), 0.015 * habit.lymphocytes, 0.75)
    chance *= 1 - 0.9 * region.pick(blocked, *position)
    x, y, d = _select(points, points.draws[:, 0] < chance)
    radius = 2.2 + 0.7 * d[:, 1]
    columns = [x, y, radius, radius * (0.85 + 0.15 * d[:, 2]), 6.3 * d[:, 3], 1.05 + 0.35 * d[:, 4]]
    return np.stack(columns, axis=1)


def _place_tumour_cells(
    anatomy: Anatomy, weave: Weave, region: Region, epithelium: Floats, gland: Floats
) -> Floats:
    """Large, of all sizes and shapes: filling the nests, and single in the stroma between."""
    habit, points = anatomy.habit, weave.tumour_cells.within(*region.box_um)
    position = points.x_um, points.y_um
    loose = 0.22 * habit.loose_cells * (region.pick(region.tumour, *position) > 0.6)
    chance = np.maximum(0.97 * (region.pick(epithelium, *position) > 0.5), loose)
    x, y, d = _select(points, (points.draws[:, 0] < chance) & (region.pick(gland, *position) < 0.3))
    normal = 2.0 * (d[:, 1:4].sum(1) - 1.5)  # three uniforms: near normal, spread 1, never far out
    radius = habit.nucleus_um * np.exp(habit.pleomorphism * normal)
    stain = habit.nucleus_stain * np.exp(2.2 * habit.pleomorphism * (d[:, 4] - 0.5))
    return np.stack([x, y, radius, radius * (0.55 + 0.4 * d[:, 5]), 6.3 * d[:, 6], stain], axis=1)


def _select(points: Points, mask: np.ndarray) -> tuple[Floats, Floats, Floats]:
    return points.x_um[mask], points.y_um[mask], points.draws[mask]


def _fibre_direction(anatomy: Anatomy, x_um: Floats, y_um: Floats) -> Floats:
    """Return the angle of the line of constant ``across`` through points, by finite differences."""
    if len(x_um) == 0:
        return x_um
    step = np.float32(6.0)
    x, y = x_um[None], y_um[None]
    here, right, below = (
        fibre_axes(anatomy, anatomy.read_all(("warp_x", "warp_y"), a, b), a, b)[1]
        for a, b in ((x, y), (x + step, y), (x, y + step))
    )
    return np.arctan2(here - right, below - here)[0]


_FAR_UM = 1e3


def draw_fat(anatomy: Anatomy, weave: Weave, region: Region, occupied: Floats) -> tuple[Floats, Floats]:
    """Return how much of each pixel is fat and how much of that is wall, both in [0, 1].

    Args:
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
    position = np.stack([points.x_um, points.y_um], axis=1)
    near = (
        cKDTree(position[is_fat]).query(position, distance_upper_bound=2.5 * anatomy.habit.fat_cell_um)[0]
        < np.inf
    )
    centres = np.column_stack([position, size, limit])[near].astype(np.float32)
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


def _nearest(region: Region, centres: Floats, radius: float) -> tuple[Floats, Floats, Floats]:
    """Return the distance to the nearest and the second nearest centre, less part of its size, and the limit.

    ``centres`` is (n, 4): x, y, size and limit. Each is only compared over its own
    neighbourhood, ``radius`` micrometres to each side.
    """
    first, second = np.full((2, *region.shape), _FAR_UM, np.float32)
    limit_here = np.zeros(region.shape, np.float32)
    left, top = region.origin_um
    sides = np.array([-radius, radius])
    columns = np.clip((centres[:, :1] + sides - left) / region.um, 0, region.shape[1]).astype(int)
    rows = np.clip((centres[:, 1:2] + sides - top) / region.um, 0, region.shape[0]).astype(int)
    visible = (columns[:, 0] < columns[:, 1]) & (rows[:, 0] < rows[:, 1])
    for i in np.flatnonzero(visible):
        box = np.s_[rows[i, 0] : rows[i, 1], columns[i, 0] : columns[i, 1]]
        x_um, y_um, size, limit = centres[i]
        dx2 = (region.x_um[0, box[1]] - x_um) ** 2
        dy2 = (region.y_um[box[0], 0] - y_um) ** 2
        distance = np.sqrt(dx2 + dy2[:, None]) - np.float32(0.55) * size
        nearer = distance < first[box]
        np.copyto(second[box], np.where(nearer, first[box], np.minimum(second[box], distance)))
        np.copyto(first[box], distance, where=nearer)
        np.copyto(limit_here[box], limit, where=nearer)
    return first, second, limit_here


_CHUNK = 1 << 20  # stamp pixels drawn at once, bounds memory
_SHIFT = 4  # fractional bits of OpenCV's polygon coordinates


def stamp_nuclei(shape: tuple[int, int], origin_um: tuple[float, float], um: float, nuclei: Floats) -> Floats:
    """Draw soft ellipses onto an empty grid; where they overlap the darker one shows.

    Args:
        shape: Height and width of the grid.
        um: Micrometres per pixel.
        nuclei: (n, 6): x, y, long and short radius in micrometres, angle in radians, amount of stain.
    """
    canvas = np.zeros(shape[0] * shape[1], np.float32)
    order = np.argsort(nuclei[:, 2], kind="stable")
    sizes = np.ceil(nuclei[order, 2] / um + 0.5).astype(int)
    for half in np.unique(sizes):
        group = nuclei[order[sizes == half]]
        step = max(_CHUNK // (2 * half + 1) ** 2, 1)
        for start in range(0, len(group), step):
            _stamp(canvas, shape, origin_um, um, group[start : start + step], int(half))
    return canvas.reshape(shape)


def _stamp(
    canvas: Floats,
    shape: tuple[int, int],
    origin_um: tuple[float, float],
    um: float,
    nuclei: Floats,
    half: int,
) -> None:
    x = (nuclei[:, 0] - np.float32(origin_um[0])) / np.float32(um) - np.float32(0.5)
    y = (nuclei[:, 1] - np.float32(origin_um[1])) / np.float32(um) - np.float32(0.5)
    column, row = np.rint(x).astype(np.int64), np.rint(y).astype(np.int64)
    window = np.arange(-half, half + 1)
    dx = (window - (x - column)[:, None]).astype(np.float32)[:, None, :]
    dy = (window - (y - row)[:, None]).astype(np.float32)[:, :, None]
    cos, sin = np.cos(nuclei[:, 4])[:, None, None], np.sin(nuclei[:, 4])[:, None, None]
    long_px, short_px = (nuclei[:, k, None, None] / np.float32(um) for k in (2, 3))
    distance = np.sqrt(((cos * dx + sin * dy) / long_px) ** 2 + ((cos * dy - sin * dx) / short_px) ** 2)
    value = np.clip((1 - distance) * np.sqrt(long_px * short_px) + 0.5, 0, 1) * nuclei[:, 5, None, None]
    rows = (row[:, None] + window)[:, :, None]
    columns = (column[:, None] + window)[:, None, :]
    inside = (rows >= 0) & (rows < shape[0]) & (columns >= 0) & (columns < shape[1]) & (value > 0)
    np.maximum.at(canvas, (rows * shape[1] + columns)[inside], value[inside])


def fill_outlines(
    shape: tuple[int, int],
    origin_um: tuple[float, float],
    um: float,
    outlines: Sequence[Floats],
    levels: Sequence[float] | None = None,
) -> Floats:
    """Fill closed outlines, each (n, 2) in micrometres, with a level in [0, 1] (1 without ``levels``)."""
    canvas = np.zeros(shape, np.uint8)
    for i, outline in enumerate(outlines):
        if len(outline) < 3:
            continue
        points = ((outline - np.array(origin_um, np.float32)) / np.float32(um) - 0.5) * (1 << _SHIFT)
        level = 255 if levels is None else round(255 * levels[i])
        cv2.fillPoly(canvas, [np.rint(points).astype(np.int32)], level, cv2.LINE_AA, _SHIFT)
    return canvas.astype(np.float32) * np.float32(1 / 255)
