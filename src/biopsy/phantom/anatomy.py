"""Layout of one slide in micrometres: tissue, fat, tumour region, glands and vessels.

The layout is independent of the pixel size: maps have one value per ``CELL_UM`` and are interpolated.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from biopsy.core.seeds import make_rng
from biopsy.phantom.glands import Gland, grow_glands, grow_vessels
from biopsy.phantom.noise import Floats
from biopsy.phantom.patients import Habit, draw_habit

CELL_UM = 20.0
_FILLED = 0.6  # share of the canvas that is tissue
_ASPECT = 0.65, 1.5  # range of width by height


@dataclass(frozen=True)
class Anatomy:
    """Layout of one slide. ``maps`` are (rows, columns) arrays at ``CELL_UM`` by name:

    ``tissue`` and ``tumour``: signed distance in micrometres, positive inside; ``fat``, ``cells``, ``lymph``,
    ``tint``, ``blood``, ``grade``: smooth fields of mean 0 and spread 1; ``warp_x``, ``warp_y``: by how many
    micrometres the fibres' axes are bent.
    """

    patient: str
    seed: int
    width_um: float
    height_um: float
    habit: Habit
    maps: dict[str, Floats]
    fibre_angle: float
    glands: tuple[Gland, ...]
    gland_bounds: Floats  # (n, 4): left, top, right, bottom of each gland in micrometres

    def glands_within(self, left_um: float, top_um: float, right_um: float, bottom_um: float) -> list[Gland]:
        """Return the glands and vessels that may touch a rectangle."""
        left, top, right, bottom = self.gland_bounds.T
        near = (left < right_um) & (right > left_um) & (top < bottom_um) & (bottom > top_um)
        return [self.glands[i] for i in np.flatnonzero(near)]

    def read(self, name: str, x_um: Floats, y_um: Floats) -> Floats:
        """Return a slow map at points, arrays ``(H, W)`` in micrometres."""
        return self.read_all((name,), x_um, y_um)[name]

    def read_all(self, names: Iterable[str], x_um: Floats, y_um: Floats) -> dict[str, Floats]:
        """Return several slow maps at the same points."""
        column = x_um * np.float32(1 / CELL_UM) - np.float32(0.5)
        row = y_um * np.float32(1 / CELL_UM) - np.float32(0.5)
        return {name: _interpolate(self.maps[name], column, row) for name in names}


def _interpolate(values: Floats, column: Floats, row: Floats) -> Floats:
    edge = cv2.BORDER_REPLICATE
    return np.asarray(cv2.remap(values, column, row, cv2.INTER_LINEAR, borderMode=edge), np.float32)


def section_size_um(seed: int, patient: str, tissue_mm2: float) -> tuple[float, float]:
    """Return the width and height that `plan_slide` gives a section."""
    return _size_um(make_rng(seed, "phantom", patient, "anatomy").uniform(*_ASPECT), tissue_mm2)


def _size_um(aspect: float, tissue_mm2: float) -> tuple[float, float]:
    height_um = np.ceil(1000 * np.sqrt(tissue_mm2 / _FILLED / aspect) / 200) * 200
    width_um = np.ceil(1000 * np.sqrt(tissue_mm2 / _FILLED * aspect) / 200) * 200
    return width_um, height_um


def plan_slide(
    seed: int, patient: str, *, tissue_mm2: float, tumour_frac: float, high_grade: bool = False
) -> Anatomy:
    """Return the layout of a patient's slide.

    Args:
        patient: Name of the patient, part of the random seed.
        tissue_mm2: Area of tissue, above 0.
        tumour_frac: Fraction of the tissue inside the tumour region, in [0, 1); the region is connected.
        high_grade: As in `draw_habit`.
    """
    rng = make_rng(seed, "phantom", patient, "anatomy")
    habit = draw_habit(seed, patient, high_grade=high_grade)
    width_um, height_um = _size_um(rng.uniform(*_ASPECT), tissue_mm2)
    shape = (int(height_um / CELL_UM), int(width_um / CELL_UM))

    tissue = _outline(rng, shape, tissue_mm2)
    fat_level = _smooth(rng, shape, 700, 250)
    tumour = _region(rng, tissue, tumour_frac)
    maps = {
        "tissue": _signed_distance(tissue),
        "tumour": _signed_distance(tumour),
        "fat": fat_level,
        "cells": _smooth(rng, shape, 350, 120),
        "lymph": _smooth(rng, shape, 220, 90),
        "tint": _smooth(rng, shape, 600, 150),
        "blood": _smooth(rng, shape, 500, 120),
        "grade": _smooth(rng, shape, 450, 150),
        "warp_x": 170 * _smooth(rng, shape, 900, 200),
        "warp_y": 170 * _smooth(rng, shape, 900, 200),
    }
    fat = fat_share(habit, maps["fat"], maps["tumour"])
    glands = grow_glands(rng, habit, maps["tissue"], maps["tumour"], fat, CELL_UM)
    glands += grow_vessels(rng, maps["tissue"], fat, CELL_UM)
    return Anatomy(
        patient=patient,
        seed=seed,
        width_um=float(width_um),
        height_um=float(height_um),
        habit=habit,
        maps=maps,
        fibre_angle=float(rng.uniform(0, np.pi)),
        glands=tuple(glands),
        gland_bounds=np.array([[*g.outlines.min((0, 1)), *g.outlines.max((0, 1))] for g in glands]).reshape(
            -1, 4
        ),
    )


def fat_share(habit: Habit, fat: Floats, tumour: Floats) -> Floats:
    """Return the probability of fat at each point, reduced inside the tumour."""
    level = 1.3 * (fat - 0.8 + 2.0 * habit.fat) - np.clip(tumour / 100, -0.3, 0.8 + 1.4 * habit.fat_pushed)
    return np.clip(level, 0, 1)


def _smooth(rng: np.random.Generator, shape: tuple[int, int], slow_um: float, fast_um: float) -> Floats:
    """Return noise with two length scales, of mean 0 and standard deviation 1."""
    total = np.zeros(shape, np.float32)
    for scale_um, weight in ((slow_um, 1.0), (fast_um, 0.45)):
        white = rng.standard_normal(shape, dtype=np.float32)
        layer = ndimage.gaussian_filter(white, scale_um / CELL_UM / 2, mode="wrap")
        total += weight * layer / (layer.std() + 1e-9)
    return ((total - total.mean()) / (total.std() + 1e-9)).astype(np.float32)


def _outline(rng: np.random.Generator, shape: tuple[int, int], tissue_mm2: float) -> NDArray[np.bool_]:
    row, column = np.meshgrid(np.linspace(-1, 1, shape[0]), np.linspace(-1, 1, shape[1]), indexing="ij")
    level = -(np.abs(row) ** 3 + np.abs(column) ** 3) - 4.0 * (np.maximum(np.abs(row), np.abs(column)) > 0.97)
    level += 0.22 * _smooth(rng, shape, 2500, 400) + 0.05 * _smooth(rng, shape, 150, 60)
    cells = min(int(tissue_mm2 * 1e6 / CELL_UM**2), level.size - 1)
    mask = level > np.partition(level.ravel(), -cells)[-cells]
    pieces, n_pieces = ndimage.label(mask)
    sizes = ndimage.sum_labels(mask, pieces, np.arange(1, n_pieces + 1))
    large = np.isin(pieces, 1 + np.flatnonzero(sizes > 0.01 * mask.sum()))
    return ndimage.binary_fill_holes(large)


def _region(rng: np.random.Generator, tissue: NDArray[np.bool_], tumour_frac: float) -> NDArray[np.bool_]:
    """Return one connected region, holes filled, that covers ``tumour_frac`` of the tissue."""
    depth = ndimage.distance_transform_edt(np.pad(tissue, 1))[1:-1, 1:-1]
    inside = np.argwhere(tissue & (depth >= 0.35 * depth.max()))
    centre = inside[rng.integers(len(inside))]
    distance = np.hypot(*(np.indices(tissue.shape) - centre[:, None, None])) / np.sqrt(tissue.sum())
    level = 0.16 * _smooth(rng, tissue.shape, 900, 250) - distance
    level[~tissue] = -np.inf
    low, high = -3.0, float(level.max())
    region = np.zeros(tissue.shape, bool)
    for _ in range(12):
        middle = 0.5 * (low + high)
        region = _largest(level > middle)
        if region.sum() > tumour_frac * tissue.sum():
            low = middle
        else:
            high = middle
    return region


def _largest(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    pieces, n_pieces = ndimage.label(mask)
    if n_pieces == 0:
        return mask
    sizes = ndimage.sum_labels(mask, pieces, np.arange(1, n_pieces + 1))
    return ndimage.binary_fill_holes(pieces == 1 + int(np.argmax(sizes)))


def _signed_distance(mask: NDArray[np.bool_]) -> Floats:
    if not mask.any():
        return np.full(mask.shape, -1e4, np.float32)
    inside = ndimage.distance_transform_edt(mask)
    outside = ndimage.distance_transform_edt(~mask)
    return (CELL_UM * (np.where(mask, inside - 0.5, 0.5 - outside))).astype(np.float32)
