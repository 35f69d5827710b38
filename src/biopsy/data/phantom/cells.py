"""The nuclei of stroma, inflammation and tumour, (n, 6) each as in ``glands.Gland``."""

import numpy as np

from biopsy.data.phantom.anatomy import Anatomy
from biopsy.data.phantom.noise import Floats, Points
from biopsy.data.phantom.regions import Region, Weave, fibre_axes


def place_nuclei(
    anatomy: Anatomy, weave: Weave, region: Region, epithelium: Floats, gland: Floats, bed: Floats
) -> Floats:
    """Give all nuclei of a region but those that line glands and vessels.

    Args:
        anatomy: The slide.
        weave: Its texture.
        region: Where.
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
    place = points.x_um, points.y_um
    crowd = 0.18 * habit.cellularity * np.exp(0.8 * region.pick(region.maps["cells"], *place))
    crowd *= 1 + 0.6 * habit.desmoplasia * region.pick(region.tumour, *place) + 1.2 * region.pick(bed, *place)
    x, y, d = _keep(points, (points.draws[:, 0] < crowd) & (region.pick(blocked, *place) < 0.3))
    angle = _fibre_direction(anatomy, x, y) + 0.9 * (d[:, 1] - 0.5)
    columns = [x, y, 2.4 + 3.6 * d[:, 2], 1.0 + 0.8 * d[:, 3], angle, 0.5 + 0.5 * d[:, 4]]
    return np.stack(columns, axis=1)


def _place_lymphocytes(
    anatomy: Anatomy, weave: Weave, region: Region, blocked: Floats, bed: Floats
) -> Floats:
    """Small, round and darker than any tumour nucleus; in clusters, some of them at the tumour's margin."""
    habit, points = anatomy.habit, weave.lymphocytes.within(*region.box_um)
    place = points.x_um, points.y_um
    margin = np.exp(-((region.pick(region.maps["tumour"], *place) / 180) ** 2))
    level = region.pick(region.maps["lymph"], *place) + 0.3 * margin + 0.5 * region.pick(bed, *place)
    chance = np.clip(0.4 * (level - 1.9 + 1.5 * habit.lymphocytes), 0.015 * habit.lymphocytes, 0.75)
    chance *= 1 - 0.9 * region.pick(blocked, *place)
    x, y, d = _keep(points, points.draws[:, 0] < chance)
    radius = 2.2 + 0.7 * d[:, 1]
    columns = [x, y, radius, radius * (0.85 + 0.15 * d[:, 2]), 6.3 * d[:, 3], 1.05 + 0.35 * d[:, 4]]
    return np.stack(columns, axis=1)


def _place_tumour_cells(
    anatomy: Anatomy, weave: Weave, region: Region, epithelium: Floats, gland: Floats
) -> Floats:
    """Large, of all sizes and shapes: filling the nests, and single in the stroma between."""
    habit, points = anatomy.habit, weave.tumour_cells.within(*region.box_um)
    place = points.x_um, points.y_um
    loose = 0.22 * habit.loose_cells * (region.pick(region.tumour, *place) > 0.6)
    chance = np.maximum(0.97 * (region.pick(epithelium, *place) > 0.5), loose)
    x, y, d = _keep(points, (points.draws[:, 0] < chance) & (region.pick(gland, *place) < 0.3))
    normal = 2.0 * (d[:, 1:4].sum(1) - 1.5)  # three uniforms: near normal, spread 1, never far out
    radius = habit.nucleus_um * np.exp(habit.pleomorphism * normal)
    stain = habit.nucleus_stain * np.exp(2.2 * habit.pleomorphism * (d[:, 4] - 0.5))
    return np.stack([x, y, radius, radius * (0.55 + 0.4 * d[:, 5]), 6.3 * d[:, 6], stain], axis=1)


def _keep(points: Points, kept: np.ndarray) -> tuple[Floats, Floats, Floats]:
    return points.x_um[kept], points.y_um[kept], points.draws[kept]


def _fibre_direction(anatomy: Anatomy, x_um: Floats, y_um: Floats) -> Floats:
    """Give the angle of the line of constant ``across`` through points, by finite differences."""
    if len(x_um) == 0:
        return x_um
    step = np.float32(6.0)
    x, y = x_um[None], y_um[None]
    here, right, below = (
        fibre_axes(anatomy, anatomy.read_all(("warp_x", "warp_y"), a, b), a, b)[1]
        for a, b in ((x, y), (x + step, y), (x, y + step))
    )
    return np.arctan2(here - right, below - here)[0]
