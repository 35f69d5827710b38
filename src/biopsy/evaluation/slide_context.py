"""Patches seen on their slide: where one lies, and what lies around it with which label."""

from functools import cached_property

import cv2
import numpy as np
from matplotlib.colors import to_rgb

from biopsy.data.packs import Pack
from biopsy.evaluation.neighbours import find_step, place_on_slides
from biopsy.plotting.style import class_colour
from biopsy.slide_io.mosaic import stitch

OVERVIEW_PX = 112
AROUND_PX = 260
STEPS_AROUND = 2
_INK, _PAPER = (31, 41, 51), (255, 255, 255)


class SlideViews:
    """Small pictures of the slides of a pack; None for a patch without coordinates."""

    def __init__(self, pack: Pack) -> None:
        self._pack = pack
        self._overviews: dict[int, tuple[np.ndarray, float]] = {}

    def overview(self, row: int) -> np.ndarray | None:
        """Return the whole slide, about `OVERVIEW_PX` wide or high, with a box where a patch lies."""
        if self._slide_of[row] < 0:
            return None
        index = int(self._slide_of[row])
        places = self._slides[index][1]
        if index not in self._overviews:
            self._overviews[index] = self._stitch(index)
        small, scale = self._overviews[index]
        image = small.copy()
        left, top = (self._place(row) - places.min(axis=0)) * scale
        side = max(self._pack.info.patch_px * scale, 5)
        middle = np.array([left, top]) + self._pack.info.patch_px * scale / 2
        corner, opposite = (np.rint(middle + sign * (side / 2 + 2)).astype(int).tolist() for sign in (-1, 1))
        cv2.rectangle(image, corner, opposite, _PAPER, 3)
        cv2.rectangle(image, corner, opposite, _INK, 1)
        return image

    def surroundings(self, row: int) -> np.ndarray | None:
        """Return a patch in a dark box and those around it, each framed in the colour of its label."""
        if self._slide_of[row] < 0:
            return None
        rows, places = self._slides[int(self._slide_of[row])]
        offset = places - self._place(row)
        near = (np.abs(offset) <= (STEPS_AROUND + 0.25) * self._step).all(axis=1)
        patch_px = self._pack.info.patch_px
        room = 2 * STEPS_AROUND * self._step + patch_px
        scale = AROUND_PX / room
        image = np.full((AROUND_PX, AROUND_PX, 3), 255, np.uint8)
        for other, (x, y) in zip(rows[near], offset[near] + STEPS_AROUND * self._step, strict=True):
            self._lay(image, int(other), x, y, scale)
        first, last = (round((STEPS_AROUND * self._step + more) * scale) for more in (0, patch_px))
        cv2.rectangle(image, (first - 3, first - 3), (last + 2, last + 2), _INK, 5)
        middle = STEPS_AROUND * self._step
        self._lay(image, row, middle, middle, scale)
        return image

    def _lay(self, image: np.ndarray, row: int, x: float, y: float, scale: float) -> None:
        width, height = self._pack.sizes[row]
        left, top, right, bottom = np.rint(np.array([x, y, x + width, y + height]) * scale).astype(int)
        if min(left, top) < 0 or max(right, bottom) > AROUND_PX + 1:
            return  # off the grid and cut by the frame
        right, bottom = min(right, AROUND_PX), min(bottom, AROUND_PX)
        patch = np.ascontiguousarray(self._pack.patches[row, :height, :width])
        image[top:bottom, left:right] = cv2.resize(
            patch, (right - left, bottom - top), interpolation=cv2.INTER_AREA
        )
        index = int(self._pack.target[row])
        colour = [round(255 * part) for part in to_rgb(class_colour(index))]
        thick = 2 if index == 0 else 4  # told apart in a grey print too
        cv2.rectangle(image, (left + 1, top + 1), (right - 2, bottom - 2), colour, thick)

    def _stitch(self, index: int) -> tuple[np.ndarray, float]:
        rows, places = self._slides[index]
        patch_px = self._pack.info.patch_px
        scale = min(1.0, OVERVIEW_PX / (np.ptp(places, axis=0).max() + patch_px))
        patches = (self._true_patch(int(row)) for row in rows)
        return stitch(patches, places[:, 0], places[:, 1], patch_px=patch_px, scale=scale), scale

    def _true_patch(self, row: int) -> np.ndarray:
        width, height = self._pack.sizes[row]
        return self._pack.patches[row, :height, :width]

    def _place(self, row: int) -> np.ndarray:
        return self._pack.table[["x", "y"]].iloc[row].to_numpy(float)

    @cached_property
    def _slides(self) -> list[tuple[np.ndarray, np.ndarray]]:
        return place_on_slides(self._pack.table)

    @cached_property
    def _step(self) -> float:
        return find_step(self._slides)

    @cached_property
    def _slide_of(self) -> np.ndarray:
        result = np.full(len(self._pack), -1)
        for index, (rows, _) in enumerate(self._slides):
            result[rows] = index
        return result
