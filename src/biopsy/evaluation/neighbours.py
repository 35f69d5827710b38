"""Positions of patches on slides: neighbours by label, errors at annotated borders, context images."""

from dataclasses import dataclass

import cv2
import numpy as np
import pandas as pd
from matplotlib.colors import to_rgb
from scipy.spatial import cKDTree

from biopsy.data.coordinates import REACH, find_slides, find_step
from biopsy.data.packs import Pack
from biopsy.evaluation.scored import ScoredPatches
from biopsy.plotting.style import class_colour
from biopsy.slide_io.mosaic import stitch
from biopsy.statistics.intervals import PatientSummary, estimate_metrics, estimate_patient_metrics
from biopsy.statistics.resampling import Interval

ZONES = {
    "border": "at least one of the eight neighbours has another label",
    "deep": "all existing neighbours have the same label",
}
SHOWN = ("sensitivity", "specificity")


def count_neighbours(table: pd.DataFrame, target: np.ndarray, n_classes: int) -> np.ndarray:
    """Count the neighbours of each patch by their label.

    Neighbours lie within `REACH` grid steps in x and in y; `find_step` estimates the step.

    Args:
        table: ``x``, ``y``, ``slide_id`` and ``patient_id`` of *all* patches of the slides.
        target: Class index per patch, ``(n,)``.

    Returns:
        float ``(n, n_classes)``; NaN for patches without a position.
    """
    counts = np.full((len(table), n_classes), np.nan)
    slides = find_slides(table)
    step = find_step(slides)
    for rows, positions in slides:
        pairs = cKDTree(positions).query_pairs(REACH * step, p=np.inf, output_type="ndarray")
        both_ways = np.concatenate([pairs, pairs[:, ::-1]])
        cell = both_ways[:, 0] * n_classes + target[rows[both_ways[:, 1]]]
        counts[rows] = np.bincount(cell, minlength=len(rows) * n_classes).reshape(len(rows), n_classes)
    return counts


def find_zones(counts: np.ndarray, target: np.ndarray) -> pd.DataFrame:
    """Return for each patch whether it is at the annotated border.

    Args:
        counts: Neighbours by label, from `count_neighbours`. They cover the patches of the table only: a
            slide with patches of a single class has no border.
        target: Class index per patch, ``(n,)``.

    Returns:
        ``n_neighbours`` and ``n_against`` (neighbours with another label), null for patches without a
        position, and ``zone``, one of `ZONES`, null for patches without neighbours.
    """
    n_neighbours = counts.sum(axis=1)
    n_against = n_neighbours - counts[np.arange(len(counts)), target]
    zone = np.where(n_against > 0, "border", "deep").astype(object)
    zone[~(n_neighbours > 0)] = None
    result = pd.DataFrame({"n_neighbours": n_neighbours, "n_against": n_against}).astype("Int64")
    return result.assign(zone=pd.array(zone, dtype="string"))


@dataclass(frozen=True)
class Zone:
    """Errors in one of `ZONES`: pooled over patches, and as means over patients (None without ids)."""

    n_patches: int
    n_positive: int
    n_groups: int
    fn: int
    fp: int
    patch: dict[str, Interval]
    patient: dict[str, PatientSummary] | None


def measure_zones(zone: np.ndarray, scored: ScoredPatches, threshold: float) -> dict[str, Zone]:
    """Measure the errors within each of `ZONES` that occurs.

    Args:
        zone: Zone per patch, from `find_zones`, ``(n,)``; patches without a zone are left out.
        scored: The patches, of two classes.
    """
    result, zones = {}, pd.Series(zone, dtype="string")
    for name in ZONES:
        chosen = zones.eq(name).fillna(False).to_numpy(bool)
        if not chosen.any():
            continue
        part = scored.take(chosen)
        truth, wrong = part.is_positive, part.pred != part.target
        patient = None
        if part.unit != "patch":
            means = estimate_patient_metrics(truth, part.prob, part.group_ids, threshold, unit=part.unit)
            patient = {metric: means[metric] for metric in SHOWN}
        result[name] = Zone(
            n_patches=len(part),
            n_positive=int(truth.sum()),
            n_groups=part.n_groups,
            fn=int((wrong & (truth == 1)).sum()),
            fp=int((wrong & (truth == 0)).sum()),
            patch=estimate_metrics(part.sample(), SHOWN, **part.resampling),
            patient=patient,
        )
    return result


def rank_label_issues(counts: np.ndarray, target: np.ndarray, probs: np.ndarray) -> pd.DataFrame:
    """Return, for each label, the class with the most votes against it and their smoothed share.

    Each neighbour's label is one vote; the out-of-sample prediction of a model is one more vote, divided by
    its probabilities. With ``k`` of ``n`` votes for another class, ``doubt`` is ``(k + 1) / (n + 2)``
    (Laplace's rule of succession), so that 7 of 8 neighbours count for more than 1 of 1. On the IDC slides
    with randomly flipped labels, a model with more than one vote makes the ranking worse
    (``docs/concepts/errors.md``).

    Args:
        counts: Neighbours by label, from `count_neighbours`.
        target: Class index per patch, ``(n,)``.
        probs: Out-of-sample probabilities ``(n, n_classes)``; NaN where there are none.

    Returns:
        ``suggested`` (index of the class with the most votes, other than the label), ``doubt`` (0.5 without
        votes), ``n_neighbours``, ``n_for`` (neighbours of the suggested class) and ``prob`` (its
        probability).
    """
    votes = np.nan_to_num(counts) + np.nan_to_num(probs)
    others = votes.copy()
    others[np.arange(len(target)), target] = -1
    suggested = others.argmax(axis=1)
    picked = np.arange(len(target)), suggested
    return pd.DataFrame(
        {
            "suggested": suggested,
            "doubt": (votes[picked] + 1) / (votes.sum(axis=1) + 2),
            "n_neighbours": counts.sum(axis=1),
            "n_for": counts[picked],
            "prob": probs[picked],
        }
    ).astype({"n_neighbours": "Int64", "n_for": "Int64"})


OVERVIEW_PX = 112
AROUND_PX = 260
STEPS_AROUND = 2
_INK, _PAPER = (31, 41, 51), (255, 255, 255)


class SlideViews:
    """Thumbnails and context views of the slides of a pack; None for a patch without coordinates."""

    def __init__(self, pack: Pack) -> None:
        self._pack = pack
        self._slides = find_slides(pack.table)
        self._step = find_step(self._slides)
        self._slide_of = {int(row): index for index, (rows, _) in enumerate(self._slides) for row in rows}
        self._thumbnails: dict[int, tuple[np.ndarray, float]] = {}

    def overview(self, row: int) -> np.ndarray | None:
        """Return a thumbnail of the slide, longer side about `OVERVIEW_PX`, with a box around the patch."""
        index = self._slide_of.get(int(row))
        if index is None:
            return None
        thumbnail, scale = self._thumbnail(index)
        image, patch_px = thumbnail.copy(), self._pack.info.patch_px
        corner = self._position(row) - self._slides[index][1].min(axis=0)
        middle, reach = (corner + patch_px / 2) * scale, max(patch_px * scale, 5) / 2 + 2
        first, last = (np.rint(middle + sign * reach).astype(int).tolist() for sign in (-1, 1))
        cv2.rectangle(image, first, last, _PAPER, 3)
        cv2.rectangle(image, first, last, _INK, 1)
        return image

    def surroundings(self, row: int) -> np.ndarray | None:
        """Return the patch, in a dark box, and its surroundings, each framed in the colour of its label."""
        index = self._slide_of.get(int(row))
        if index is None:
            return None
        rows, positions = self._slides[index]
        middle, patch_px = STEPS_AROUND * self._step, self._pack.info.patch_px
        offset = positions - self._position(row)
        near = (np.abs(offset) <= middle + 0.25 * self._step).all(axis=1)
        scale = AROUND_PX / (2 * middle + patch_px)
        image = np.full((AROUND_PX, AROUND_PX, 3), 255, np.uint8)
        for other, (x, y) in zip(rows[near], offset[near] + middle, strict=True):
            self._draw_patch(image, int(other), x, y, scale)
        first, last = (round((middle + more) * scale) for more in (0, patch_px))
        cv2.rectangle(image, (first - 3, first - 3), (last + 2, last + 2), _INK, 5)
        self._draw_patch(image, row, middle, middle, scale)
        return image

    def _draw_patch(self, image: np.ndarray, row: int, x: float, y: float, scale: float) -> None:
        patch, index = np.ascontiguousarray(self._pack.pixels(row)), int(self._pack.target[row])
        height, width = patch.shape[:2]
        left, top, right, bottom = np.rint(np.array([x, y, x + width, y + height]) * scale).astype(int)
        if min(left, top) < 0 or max(right, bottom) > AROUND_PX + 1:
            return  # off the grid and cut off by the frame
        right, bottom = min(right, AROUND_PX), min(bottom, AROUND_PX)
        size = (right - left, bottom - top)
        image[top:bottom, left:right] = cv2.resize(patch, size, interpolation=cv2.INTER_AREA)
        colour = [round(255 * part) for part in to_rgb(class_colour(index))]
        thick = 2 if index == 0 else 4  # distinguishable in greyscale too
        cv2.rectangle(image, (left + 1, top + 1), (right - 2, bottom - 2), colour, thick)

    def _thumbnail(self, index: int) -> tuple[np.ndarray, float]:
        """Return the image of a slide and its scale."""
        if index not in self._thumbnails:
            (rows, positions), patch_px = self._slides[index], self._pack.info.patch_px
            scale = min(1.0, OVERVIEW_PX / (np.ptp(positions, axis=0).max() + patch_px))
            image = stitch(map(self._pack.pixels, rows), *positions.T, patch_px=patch_px, scale=scale)
            self._thumbnails[index] = image, scale
        return self._thumbnails[index]

    def _position(self, row: int) -> np.ndarray:
        return self._pack.table[["x", "y"]].iloc[row].to_numpy(float)
